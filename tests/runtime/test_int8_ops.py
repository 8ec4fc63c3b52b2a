"""The operators with int8 weights in onnxruntime: the library, the function body and NumPy agree."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir
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
X_FORMS = ("", "Static", "Bytes")
X_SCALE, X_ZERO_POINT = 0.01, 113  # some of x saturates
X_SHAPES = {"1-D": ([45], (45,)), "2-D": (["B", 45], (3, 45)), "3-D": (["B", "S", 45], (2, 3, 45))}


def _weight(packed, pattern: str, **options) -> QuantizedTensor:
    weight = packed(SHAPE, pattern, **options)
    return QuantizedTensor.encode(weight.decode(), weight.pattern)


def _model(
    packed,
    pattern: str,
    kind: str = "2-D",
    opset: int = 17,
    activation: str = "",
    x_form: str = "",
    **options,
) -> Model:
    return emit.single_op_model(
        _weight(packed, pattern, **options),
        X_SHAPES[kind][0],
        opset=opset,
        bias=np.random.default_rng(1).standard_normal(SHAPE[0]).astype(np.float32),
        activation=activation,
        parameters=PARAMETERS.get(activation),
        x_form=x_form,
        x_scale=X_SCALE,
        x_zero_point=X_ZERO_POINT,
    )


def _input(kind: str = "2-D", x_form: str = "") -> np.ndarray:
    rng = np.random.default_rng(2)
    if x_form == "Bytes":
        return rng.integers(0, 256, X_SHAPES[kind][1], dtype=np.uint8)
    return rng.standard_normal(X_SHAPES[kind][1]).astype(np.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", X_SHAPES)
def test_every_pattern_at_every_opset(check_single_op, packed, kind: str, pattern: str) -> None:
    for opset in OPSETS:
        model = _model(packed, pattern, kind, opset)
        family = "BlockSparseMatMulInt8" if "x" in pattern else "SparseMatMulInt8"
        assert next(iter(model.onnx.graph)).op_type == family
        check_single_op(model, _input(kind), TOLERANCE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["16x4", "unstructured"])
@pytest.mark.parametrize("x_form", X_FORMS)
def test_every_operator(check_single_op, packed, x_form: str, pattern: str, activation: str) -> None:
    model = _model(packed, pattern, activation=activation, x_form=x_form)
    assert next(iter(model.onnx.graph)).op_type.endswith(f"Int8{x_form}{activation}")
    check_single_op(model, _input(x_form=x_form), TOLERANCE)


@pytest.mark.parametrize("x_form", X_FORMS[1:])
def test_given_scale_at_every_opset(check_single_op, packed, x_form: str) -> None:
    for opset, kind in itertools.product(OPSETS, X_SHAPES):
        check_single_op(_model(packed, "4x1", kind, opset, x_form=x_form), _input(kind, x_form), TOLERANCE)


@pytest.mark.parametrize("library", [True, False])
def test_scale_computed_in_the_model(session, packed, library: bool) -> None:
    """One DynamicQuantizeLinear for a product: the same result as with x quantised inside."""
    inside = _model(packed, "unstructured")
    outside = _model(packed, "unstructured", x_form="Bytes")
    graph = outside.onnx.graph
    x = graph.inputs[0]
    x.dtype = onnx_ir.DataType.FLOAT
    quantize = onnx_ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3, name="quantize")
    node = next(iter(graph))
    graph.insert_before(node, quantize)
    for place, value in zip((0, 6, 7), quantize.outputs, strict=True):
        node.replace_input_with(place, value)
    for name in ("x_scale", "x_zero_point"):
        del graph.initializers[name]
    results = [
        session(m.to_proto(), library=library).run(None, {"x": _input()})[0] for m in (inside, outside)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("x_form", X_FORMS[1:])
@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_given_scale_must_be_finite_and_positive(session, packed, x_form: str, scale: float) -> None:
    model = _model(packed, "4x1", x_form=x_form)
    proto = model.to_proto()
    next(t for t in proto.graph.initializer if t.name == "x_scale").CopyFrom(
        numpy_helper.from_array(np.array(scale, np.float32), "x_scale")
    )
    with pytest.raises(Exception, match="x_scale is not a finite positive number"):
        session(proto, library=True).run(None, {"x": _input(x_form=x_form)})


@pytest.mark.parametrize("name", ["x_scale", "x_zero_point"])
def test_given_scale_must_be_one_number(session, packed, name: str) -> None:
    proto = _model(packed, "4x1", x_form="Static").to_proto()
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.resize(numpy_helper.to_array(tensor), 2), name))
    with pytest.raises(Exception, match=f"'{name}' has shape \\[2\\], expected one number"):
        session(proto, library=True).run(None, {"x": _input()})


def test_node_builder_refuses_half_a_scale(packed) -> None:
    scale = onnx_ir.Value(name="s")
    graph = onnx_ir.Graph([], [], nodes=[], name="g")
    with pytest.raises(ValueError, match="belong together"):
        sparse_op_node(graph, None, _weight(packed, "4x1"), name="n", x_scale=scale)
    with pytest.raises(ValueError, match="int8 weights"):
        sparse_op_node(graph, None, packed(SHAPE, "4x1"), name="n", x_scale=scale, x_zero_point=scale)


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
def test_weight_without_a_kept_entry(check_single_op, packed, pattern: str) -> None:
    check_single_op(_model(packed, pattern, sparsity=1.0), _input(), TOLERANCE)


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
