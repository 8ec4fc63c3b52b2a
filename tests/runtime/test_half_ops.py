"""Values of 16 bits in a file: every family takes them, with the library, without it, and in NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.errors import ModelError, SpecError
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.ops_recurrent import recurrent_op_node
from sparsecc.ir.packed import packed_sites
from sparsecc.sparse import FLOATS, Pattern, SparseTensor, rounded

NARROW = ("fp16", "bf16")
TOLERANCE = 1e-5
CONV = ConvGeometry((3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2)


def _narrow(tensor: SparseTensor, floats: str) -> SparseTensor:
    values = rounded(tensor.values, floats)
    return SparseTensor(tensor.pattern, tensor.shape, values, tensor.indices).stored_as(floats)


@pytest.mark.parametrize("floats", NARROW)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1", "32x1", "8x2"])
@pytest.mark.parametrize("opset", [13, 21])
def test_products_and_convolutions(check_single_op, packed, floats: str, pattern: str, opset: int) -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 3, 40):
        weight = _narrow(packed((37, 45), pattern), floats)
        model = emit.single_op_model(weight, ["B", 45], opset=opset, activation="Relu")
        check_single_op(model, rng.standard_normal((rows, 45)).astype(np.float32), TOLERANCE)
    shape = (64, 5, 3, 2)
    weight = _narrow(packed(shape, pattern), floats)
    model = emit.single_op_model(weight, ["B", 10, "H", "W"], opset=opset, weight_shape=shape, conv=CONV)
    check_single_op(model, rng.standard_normal((2, 10, 9, 8)).astype(np.float32), TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_other_types_are_refused(session, packed, dtype: type) -> None:
    proto = emit.single_op_model(packed((32, 40), "16x1"), ["B", 40]).to_proto()
    tensor = next(t for t in proto.graph.initializer if t.name == "op.values")
    values = onnx.numpy_helper.to_array(tensor).astype(dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(Exception, match="'values' must be float32, float16 or bfloat16"):
        session(proto, library=True)


def test_half_precision_in_the_oldest_opset(check_single_op, packed) -> None:
    model = emit.single_op_model(_narrow(packed((32, 40), "16x1"), "fp16"), ["B", 40], opset=11)
    check_single_op(model, np.ones((2, 40), np.float32), TOLERANCE)


@pytest.mark.parametrize("floats", NARROW)
@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_recurrent(check_single_op, packed, floats: str, pattern: str) -> None:
    hidden, inputs = 16, 7
    w, r = (_narrow(packed((4 * hidden, n), pattern, seed=n), floats) for n in (inputs, hidden))
    x = onnx_ir.Value(
        name="x", shape=onnx_ir.Shape([5, 2, inputs]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 17}, name="g")
    node = recurrent_op_node(
        graph, x, w, r, cell="LSTM", hidden=hidden, name="op", bias=np.zeros((1, 8 * hidden), np.float32)
    )
    graph.append(node)
    for number, value in enumerate(node.outputs):
        value.name, value.type = f"y{number}", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.extend(node.outputs)
    model = Model(onnx_ir.Model(graph, ir_version=8))
    emit.finalize(model)
    check_single_op(
        model, np.random.default_rng(1).standard_normal((5, 2, inputs)).astype(np.float32), TOLERANCE
    )


@pytest.mark.parametrize("floats", NARROW)
def test_file_keeps_the_type(packed, tmp_path, floats: str) -> None:
    wide = packed((64, 80), "16x1")
    model = emit.single_op_model(_narrow(wide, floats), ["B", 80])
    model.save(tmp_path / "m.onnx")
    (site,) = packed_sites(Model.load(tmp_path / "m.onnx"))
    assert site.layout == f"{floats} 16x1"
    assert site.tensor.values.dtype == FLOATS[floats]
    assert site.tensor.values.nbytes * 2 == wide.values.nbytes
    np.testing.assert_array_equal(site.tensor.decode(), rounded(wide.decode(), floats))


def test_bf16_needs_opset_13(packed) -> None:
    with pytest.raises(ValueError, match="opset 13"):
        emit.single_op_model(_narrow(packed((32, 40), "16x1"), "bf16"), ["B", 40], opset=12)


def test_values_that_do_not_fit_are_refused(packed) -> None:
    tensor = packed((32, 40), "16x1")
    for floats in NARROW:
        with pytest.raises(SpecError, match="round-weights"):
            tensor.stored_as(floats)
    assert tensor.stored_as("fp32").values.dtype == np.float32
    wrong = SparseTensor(Pattern("unstructured"), (1, 1), np.ones(1, np.float64), np.array([241], np.uint8))
    with pytest.raises(ModelError, match="float32, float16 or bfloat16, got float64"):
        wrong.validate()
