"""The operators with int8 weights in onnxruntime: the library, the function body and NumPy agree."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from sparsecc import emit, runtime
from sparsecc.errors import ModelError
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.packed import packed_sites
from sparsecc.ir.sparse_ops import ACTIVATIONS, sparse_op_node
from sparsecc.sparse import QuantizedTensor

PATTERNS = ("16x4", "4x1", "8x1", "4x4", "1x4", "16x1", "unstructured", "2:4", "2:8")
OPSETS = (11, 13, 17, 21)
TOLERANCE = 1e-6
PARAMETERS = {"LeakyRelu": {"alpha": 0.1}, "Clip": {"lo": -0.5, "hi": 0.75}}
SHAPE = (37, 45)
X_SHAPES = {"1-D": ([45], (45,)), "2-D": (["B", 45], (3, 45)), "3-D": (["B", "S", 45], (2, 3, 45))}


def _weight(packed, pattern: str, **options) -> QuantizedTensor:
    weight = packed(SHAPE, pattern, **options)
    return QuantizedTensor.encode(weight.decode(), weight.pattern)


def _model(
    packed, pattern: str, kind: str = "2-D", opset: int = 17, activation: str = "", **options
) -> Model:
    return emit.single_op_model(
        _weight(packed, pattern, **options),
        X_SHAPES[kind][0],
        opset=opset,
        bias=np.random.default_rng(1).standard_normal(SHAPE[0]).astype(np.float32),
        activation=activation,
        parameters=PARAMETERS.get(activation),
    )


def _input(kind: str = "2-D") -> np.ndarray:
    return np.random.default_rng(2).standard_normal(X_SHAPES[kind][1]).astype(np.float32)


def _expected(model: Model, x: np.ndarray) -> np.ndarray:
    node = next(iter(model.onnx.graph))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    constants = [value.const_value.numpy() for value in node.inputs[1:]]
    (y,) = emit.operators()[node.op_type].reference([x, *constants], attributes)
    return y


def _check(session, model: Model, x: np.ndarray) -> None:
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    expected = _expected(model, x)
    for library in (True, False):
        y = session(proto, library=library).run(None, {"x": x})[0]
        assert y.dtype == np.float32
        assert y.shape == expected.shape
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE, f"library={library}: relative L2 {error}"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", X_SHAPES)
def test_every_pattern_at_every_opset(session, packed, kind: str, pattern: str) -> None:
    for opset in OPSETS:
        model = _model(packed, pattern, kind, opset)
        family = "BlockSparseMatMulInt8" if "x" in pattern else "SparseMatMulInt8"
        assert next(iter(model.onnx.graph)).op_type == family
        _check(session, model, _input(kind))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["16x4", "unstructured"])
def test_every_operator(session, packed, pattern: str, activation: str) -> None:
    _check(session, _model(packed, pattern, activation=activation), _input())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("opset", [11, 21])
def test_without_library_decoding_is_folded_away(session, packed, tmp_path, pattern: str, opset: int) -> None:
    dump = tmp_path / "optimized.onnx"
    proto = _model(packed, pattern, opset=opset, activation="Relu").to_proto()
    session(proto, library=False, optimized=str(dump))
    left = {node.op_type for node in onnx.load(dump).graph.node}
    assert left <= {"DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Add", "Relu",
                    "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, left  # fmt: skip


def test_bytes_of_x_are_those_of_onnxruntime() -> None:
    """The library's rounding is tested against NumPy's; here NumPy's against DynamicQuantizeLinear."""
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N"])],
        [
            helper.make_tensor_value_info(name, dtype, shape)
            for name, dtype, shape in (("q", 2, ["N"]), ("s", 1, []), ("z", 2, []))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    running = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    for trial in range(200):
        x = (rng.standard_normal(100) * 10.0 ** rng.integers(-20, 20)).astype(np.float32)
        x = (x, np.abs(x), -np.abs(x), x * 0, np.rint(x) * 0.5)[trial % 5]
        found = running.run(None, {"x": x})
        stored, scale, zero_point = emit.reference.quantize_linear(x)
        np.testing.assert_array_equal(found[0], stored)
        assert (found[1], found[2]) == (scale, zero_point)


def test_library_is_what_runs(session, packed) -> None:
    model = _model(packed, "16x4")
    model.onnx.functions.clear()
    assert session(model.to_proto(), library=True).run(None, {"x": _input()})[0].shape == (3, 37)
    with pytest.raises(Exception, match="BlockSparseMatMulInt8"):
        session(model.to_proto(), library=False)


@pytest.mark.parametrize("library", [True, False])
def test_empty_batch(session, packed, library: bool) -> None:
    linear = session(_model(packed, "16x4", "3-D").to_proto(), library=library)
    for shape in ((0, 3, 45), (2, 0, 45)):
        assert linear.run(None, {"x": np.zeros(shape, np.float32)})[0].shape == (*shape[:2], 37)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weight_without_a_kept_entry(session, packed, pattern: str) -> None:
    _check(session, _model(packed, pattern, sparsity=1.0), _input())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_threads_do_not_change_the_result(session, packed, pattern: str) -> None:
    proto = _model(packed, pattern).to_proto()
    one, two = (session(proto, library=True, threads=n).run(None, {"x": _input()})[0] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_neither_the_cut_nor_the_instruction_set_changes_the_integers(packed, tmp_path) -> None:
    """The library reads its environment variables once a process, so each value gets its own."""
    code = (
        "import sys, numpy as np; from sparsecc import runtime\n"
        "session = runtime.load(sys.argv[1], threads=2)\n"
        "x = np.resize(np.arange(-90, 166, dtype=np.float32), (9, 45))\n"
        "print(session.run(None, {'x': x})[0].tobytes().hex())"
    )
    model = _model(packed, "16x4")
    scales = next(v for v in model.onnx.graph.initializers.values() if v.name == "op.scales")
    proto = model.to_proto()
    for tensor in proto.graph.initializer:
        if tensor.name in (scales.name, "op.bias"):
            value = np.ones(37, np.float32) * (tensor.name == scales.name)
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    file = tmp_path / "m.onnx"
    onnx.save(proto, file)
    results = {
        subprocess.run(
            [sys.executable, "-c", code, file],
            env={**os.environ, "SPARSECC_THREADS": str(threads), "SPARSECC_ISA": isa},
            check=True,
            capture_output=True,
        ).stdout
        for threads, isa in itertools.product((1, 7), runtime.int8_isas())
    }
    assert len(results) == 1
    assert len(results.pop()) > 1000


def test_two_nodes_share_one_packed_weight(session, packed) -> None:
    weight = packed((45, 45), "16x4")
    weight = QuantizedTensor.encode(weight.decode(), weight.pattern)
    model = emit.single_op_model(weight, ["B", 45])
    graph = model.onnx.graph
    first = next(iter(graph))
    second = sparse_op_node(graph, first.outputs[0], weight, name="again", share=first)
    assert second.inputs[1:5] == first.inputs[1:5]
    first.outputs[0].name, second.outputs[0].name = "h", "y"
    graph.append(second)
    graph.outputs[0] = second.outputs[0]
    emit.finalize(model)
    x = np.random.default_rng(0).standard_normal((3, 45)).astype(np.float32)
    for library in (True, False):
        y = session(model.to_proto(), library=library).run(None, {"x": x})[0]
        dense = weight.decode()
        assert np.linalg.norm(y - x @ dense.T @ dense.T) < 0.02 * np.linalg.norm(y)


def test_packed_sites_are_read_back(packed) -> None:
    weight = _weight(packed, "16x4")
    (site,) = packed_sites(_model(packed, "16x4", activation="Relu"))
    assert site.op == "BlockSparseMatMulInt8Relu"
    assert isinstance(site.tensor, QuantizedTensor)
    np.testing.assert_array_equal(site.tensor.decode(), weight.decode())
    model = _model(packed, "16x4")
    node = next(iter(model.onnx.graph))
    node.replace_input_with(4, None)
    with pytest.raises(ModelError, match="not constant"):
        packed_sites(model)


def test_convolutions_are_refused(packed) -> None:
    geometry = ConvGeometry((1, 1), (1, 1), (0,) * 4, (1, 1), 1)
    with pytest.raises(ValueError, match="no int8 weights"):
        emit.single_op_model(
            _weight(packed, "16x4"), ["B", 45, 1, 1], weight_shape=(37, 45, 1, 1), conv=geometry
        )
