"""Every operator in onnxruntime: the library, the function body and NumPy agree."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.errors import UnsupportedModelError
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.sparse_ops import ACTIVATIONS, sparse_op_node

PATTERNS = ("unstructured", "2:4", "4:8", "16x1", "16x4", "8x1")
OPSETS = (11, 13, 17, 21)
TOLERANCE = 1e-5
PARAMETERS = {"LeakyRelu": {"alpha": 0.1}, "Clip": {"lo": -0.5, "hi": 0.75}}

# kind -> (weight shape, declared x shape, x shape at run time, geometry)
KINDS = {
    "1-D": ((37, 45), [45], (45,), None),
    "2-D": ((37, 45), ["B", 45], (3, 45), None),
    "3-D": ((37, 45), ["B", "S", 45], (2, 3, 45), None),
    "conv1d": ((11, 5, 3), ["B", 5, "L"], (2, 5, 9), ConvGeometry((3,), (2,), (1, 0), (2,), 1)),
    "conv2d": (
        (32, 5, 3, 2),
        ["B", 10, "H", "W"],
        (2, 10, 9, 8),
        ConvGeometry((3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2),
    ),
    "pointwise": (
        (21, 7, 1, 1),
        [2, 7, 5, 5],
        (2, 7, 5, 5),
        ConvGeometry((1, 1), (1, 1), (0,) * 4, (1, 1), 1),
    ),
}


def _model(
    packed, kind: str, pattern: str, opset: int = 17, activation: str = "", residual=None, **options
) -> Model:
    shape, x_shape, _, geometry = KINDS[kind]
    return emit.single_op_model(
        packed(shape, pattern, **options),
        x_shape,
        opset=opset,
        bias=np.random.default_rng(1).standard_normal(shape[0]).astype(np.float32),
        activation=activation,
        parameters=PARAMETERS.get(activation),
        weight_shape=shape,
        conv=geometry,
        residual_shape=residual,
    )


def _input(kind: str) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(KINDS[kind][2]).astype(np.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_at_every_opset(check_single_op, packed, kind: str, pattern: str) -> None:
    for opset in OPSETS:
        check_single_op(_model(packed, kind, pattern, opset), _input(kind), TOLERANCE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_operator(check_single_op, packed, activation: str) -> None:
    for kind, pattern in itertools.product(("2-D", "conv2d"), ("unstructured", "16x1")):
        check_single_op(_model(packed, kind, pattern, activation=activation), _input(kind), TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["2-D", "conv2d"])
@pytest.mark.parametrize("opset", [11, 21])
def test_without_library_decoding_is_folded_away(
    session, packed, tmp_path, kind: str, pattern: str, opset: int
) -> None:
    dump = tmp_path / "optimized.onnx"
    session(_model(packed, kind, pattern, opset, "Relu").to_proto(), library=False, optimized=str(dump))
    left = {node.op_type for node in onnx.load(dump).graph.node}
    assert left <= {"FusedGemm", "FusedMatMul", "Gemm", "MatMul", "Add", "Relu", "Conv", "FusedConv",
                    "ReorderInput", "ReorderOutput"}, left  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_convolution_with_a_summand(session, packed, pattern: str, activation: str) -> None:
    model = _model(packed, "conv2d", pattern, activation=activation, residual=["B", 32, 5, 7])
    onnx.checker.check_model(model.to_proto(), full_check=True)
    (node,) = model.onnx.graph
    assert "ConvAdd" in node.op_type
    x, residual = _input("conv2d"), np.random.default_rng(3).standard_normal((2, 32, 5, 7)).astype(np.float32)
    arrays = [
        x,
        *(residual if value.const_value is None else value.const_value.numpy() for value in node.inputs[1:]),
    ]
    (expected,) = emit.operators()[node.op_type].reference(
        arrays, {name: attribute.value for name, attribute in node.attributes.items()}
    )
    for library in (True, False):
        running = session(model.to_proto(), library=library)
        y = running.run(None, {"x": x, "residual": residual})[0]
        assert np.linalg.norm(y - expected) <= TOLERANCE * np.linalg.norm(expected)
    running = session(model.to_proto(), library=True)
    with pytest.raises(Exception, match=r"residual has shape \[1,32,5,7\], the result has \[2,32,5,7\]"):
        running.run(None, {"x": x, "residual": residual[:1]})


def test_library_is_what_runs(session, packed) -> None:
    model = _model(packed, "2-D", "16x1")
    model.onnx.functions.clear()
    x = _input("2-D")
    assert session(model.to_proto(), library=True).run(None, {"x": x})[0].shape == (3, 37)
    with pytest.raises(Exception, match="BlockSparseMatMul"):
        session(model.to_proto(), library=False)


@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
@pytest.mark.parametrize("library", [True, False])
def test_empty_batch_and_empty_sequence(session, packed, pattern: str, library: bool) -> None:
    linear = session(_model(packed, "3-D", pattern).to_proto(), library=library)
    for shape in ((0, 3, 45), (2, 0, 45)):
        assert linear.run(None, {"x": np.zeros(shape, np.float32)})[0].shape == (*shape[:2], 37)
    conv = session(_model(packed, "conv2d", pattern).to_proto(), library=library)
    assert conv.run(None, {"x": np.zeros((0, 10, 9, 8), np.float32)})[0].shape == (0, 32, 5, 7)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1"])
def test_one_session_takes_any_batch(single_op_reference, session, packed, pattern: str) -> None:
    model = _model(packed, "3-D", pattern)
    running = session(model.to_proto(), library=True)
    for batch in (1, 5, 2):
        x = np.random.default_rng(batch).standard_normal((batch, 4, 45)).astype(np.float32)
        np.testing.assert_allclose(
            running.run(None, {"x": x})[0], single_op_reference(model, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weight_without_a_kept_entry(check_single_op, packed, pattern: str) -> None:
    check_single_op(_model(packed, "2-D", pattern, sparsity=1.0), _input("2-D"), TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["3-D", "conv2d"])
def test_threads_change_at_most_the_rounding(
    single_op_reference, session, packed, kind: str, pattern: str
) -> None:
    """The work is cut for the threads of the session; 0 is onnxruntime's choice, found out while running."""
    model = _model(packed, kind, pattern)
    proto = model.to_proto()
    rng = np.random.default_rng(3)
    shape = (40, *KINDS[kind][2][1:])
    x = rng.standard_normal(shape).astype(np.float32)
    expected = single_op_reference(model, x)
    for threads in (0, 1, 2, 7):
        y = session(proto, library=True, threads=threads).run(None, {"x": x})[0]
        assert np.linalg.norm(y - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_session_gives_the_same_bits(session, packed, pattern: str, threads: int) -> None:
    running = session(_model(packed, "3-D", pattern).to_proto(), library=True, threads=threads)
    x = np.random.default_rng(3).standard_normal((40, 3, 45)).astype(np.float32)
    first = running.run(None, {"x": x})[0]
    for _ in range(40):
        np.testing.assert_array_equal(running.run(None, {"x": x})[0], first)


def test_threads_not_told_are_found_out(single_op_reference, session, packed) -> None:
    """After enough runs without company a node cuts for one thread, and now and then looks again."""
    model = _model(packed, "3-D", "unstructured")
    running = session(model.to_proto(), library=True, threads=0)
    x = np.random.default_rng(3).standard_normal((40, 3, 45)).astype(np.float32)
    expected = single_op_reference(model, x)
    for _ in range(60):
        np.testing.assert_allclose(running.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["2-D", "conv2d"])
def test_one_session_serves_several_callers_at_once(session, packed, kind: str) -> None:
    running = session(_model(packed, kind, "16x1").to_proto(), library=True, threads=2)
    x = _input(kind)
    expected = running.run(None, {"x": x})[0]
    with ThreadPoolExecutor(4) as callers:
        for y in callers.map(lambda _: running.run(None, {"x": x})[0], range(200)):
            np.testing.assert_array_equal(y, expected)


def test_nan_and_infinity_pass_through(session, packed) -> None:
    proto = _model(packed, "2-D", "unstructured", sparsity=0.0).to_proto()
    x = _input("2-D")
    x[1, 4] = np.nan
    y = session(proto, library=True).run(None, {"x": x})[0]
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_operator_inside_an_if_body(session, packed) -> None:
    weight = packed((37, 45), "16x1")
    condition = onnx_ir.Value(
        name="c", shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL)
    )
    x = onnx_ir.Value(
        name="x", shape=onnx_ir.Shape(["B", 45]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    outer = onnx_ir.Graph([condition, x], [], nodes=[], opset_imports={"": 17}, name="outer")
    bodies = []
    for branch, activation in (("then", ""), ("else", "Relu")):
        body = onnx_ir.Graph([], [], nodes=[], name=branch)
        node = sparse_op_node(body, x, weight, name=f"{branch}_op", activation=activation)
        node.outputs[0].name = f"{branch}_y"
        body.append(node)
        body.outputs.append(node.outputs[0])
        bodies.append(onnx_ir.AttrGraph(f"{branch}_branch", body))
    choice = onnx_ir.Node("", "If", [condition], bodies, name="choice")
    choice.outputs[0].name = "y"
    outer.append(choice)
    outer.outputs.append(choice.outputs[0])
    choice.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    choice.outputs[0].shape = onnx_ir.Shape(["B", 37])
    model = Model(onnx_ir.Model(outer, ir_version=8))
    emit.finalize(model)
    assert {key[1] for key in model.onnx.functions} == {"BlockSparseMatMul", "BlockSparseMatMulRelu"}

    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    x_value = _input("2-D")
    linear = x_value @ weight.decode().T
    for library, chosen in itertools.product((True, False), (True, False)):
        y = session(proto, library=library).run(None, {"c": np.array(chosen), "x": x_value})[0]
        np.testing.assert_allclose(y, linear if chosen else np.maximum(linear, 0), rtol=1e-4, atol=1e-5)


def test_two_nodes_share_one_packed_weight(session, packed) -> None:
    weight = packed((45, 45), "16x1")
    model = emit.single_op_model(weight, ["B", 45])
    graph = model.onnx.graph
    first = next(iter(graph))
    second = sparse_op_node(graph, first.outputs[0], weight, name="again", share=first)
    assert second.inputs[1:4] == first.inputs[1:4]
    first.outputs[0].name, second.outputs[0].name = "h", "y"
    graph.append(second)
    graph.outputs[0] = second.outputs[0]
    emit.finalize(model)
    x = np.random.default_rng(0).standard_normal((3, 45)).astype(np.float32)
    dense = weight.decode().astype(np.float64)
    for library in (True, False):
        y = session(model.to_proto(), library=library).run(None, {"x": x})[0]
        np.testing.assert_allclose(y, x @ dense.T @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("2-D", (3, 44), "last dimension of 45"),
        ("conv2d", (1, 9, 9, 8), "10 channels"),
        ("conv2d", (1, 10, 9), "rank 4"),
        ("conv2d", (1, 10, 1, 1), "kernel"),
    ],
)
def test_unfitting_input_is_an_error_that_names_the_node(session, packed, kind, shape, message) -> None:
    proto = _model(packed, kind, "unstructured").to_proto()
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=f"node 'op'.*{message}"):
        session(proto, library=True).run(None, {"x": np.zeros(shape, np.float32)})


def test_opset_too_old_is_refused(packed) -> None:
    with pytest.raises(UnsupportedModelError, match="opset 11 or later and the model uses 10"):
        _model(packed, "2-D", "16x1", opset=10)
