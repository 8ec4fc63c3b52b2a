"""Work of the parts of an operator, and how long threads work on it, as the library tells."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.runtime import NativeInt8MatMul, NativeMatMul
from sparsecc.runtime.balance import measure_busy, part_work
from sparsecc.sparse import Pattern, QuantizedTensor

CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[B, 96] x) => (float[B, 64] y) <float[96, 256] w1, float[256, 64] w2> {
    [first] h = MatMul(x, w1)
    [] y = MatMul(h, w2)
}"""


@pytest.fixture(scope="module")
def lowered() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(CHAIN)
    for name, shape in (("w1", (96, 256)), ("w2", (256, 64))):
        weight = rng.standard_normal(shape, np.float32) * (rng.random(shape) < 0.2)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    model = Model.from_proto(proto)
    Pipeline.parse("tidy,choose-layout{layout=unstructured},lower-sparse").run(model, PassContext())
    return model.to_proto()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 300])
def test_nobody_works_longer_than_the_node_takes(lowered, session, threads, rows):
    x = np.random.default_rng(1).standard_normal((rows, 96)).astype(np.float32)
    run = session(lowered, library=True, threads=threads)
    before = run.run(None, {"x": x})[0]
    with measure_busy() as nodes:
        assert nodes == []
        for _ in range(3):
            np.testing.assert_array_equal(run.run(None, {"x": x})[0], before)
    assert [node.op for node in nodes] == ["SparseMatMul", "SparseMatMul"]
    assert "first" in {node.name for node in nodes}
    for node in nodes:
        assert node.runs == 3
        assert 1 <= len(node.threads) <= threads
        assert 0 < max(node.threads) <= node.seconds
        assert 1 <= node.balance <= len(node.threads)
    with measure_busy() as after:
        pass
    assert after == []  # what was measured before is forgotten


def test_one_measurement_at_a_time(lowered, session):
    run = session(lowered, library=True)
    with measure_busy() as outer:
        with pytest.raises(UsageError, match="measured already"), measure_busy():
            pass
        run.run(None, {"x": np.ones((2, 96), np.float32)})
    assert len(outer) == 2


@pytest.mark.parametrize("name", ["tab\tand\nline", "quote' (", "x" * 500])
def test_names_of_strangers(lowered, session, name):
    proto = onnx.ModelProto()
    proto.CopyFrom(lowered)
    proto.graph.node[0].name = name
    run = session(proto, library=True)
    with measure_busy() as nodes:
        run.run(None, {"x": np.ones((2, 96), np.float32)})
    shown = name.replace("\t", "?").replace("\n", "?")
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    assert shown in {node.name for node in nodes}


@pytest.mark.parametrize("layout", ["unstructured", "16x1", "2:4"])
@pytest.mark.parametrize("rows", [1, 3, 500])
def test_work_of_parts_is_what_balance_compares(packed, layout, rows):
    weight = packed((300, 200), layout)
    with NativeMatMul(layout, weight.shape, weight.values, weight.indices) as op:
        for parts in (1, 2, 7, 64, 1000):
            work = part_work(op, rows, parts)
            assert len(work) <= 64
            assert min(work) >= 0
            mean = sum(work) / len(work)
            assert max(work) / mean == pytest.approx(op.balance(rows, min(parts, 64)))
        assert len(part_work(op, 1, 3)) == 4


def test_work_of_parts_of_bytes():
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((128, 64)) * (rng.random((128, 64)) < 0.5)).astype(np.float32)
    packed = QuantizedTensor.encode(weight, Pattern.parse("unstructured"))
    with NativeInt8MatMul("unstructured", weight.shape, packed.values, packed.indices, packed.scales) as op:
        for parts in (1, 4, 64):
            work = part_work(op, 1, parts)
            assert len(work) == parts
            assert max(work) * parts / sum(work) == pytest.approx(op.balance(parts))
