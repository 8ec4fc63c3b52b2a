"""The dense operators of transformers in onnxruntime: the library, the function body and NumPy agree."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.ir import Model
from sparsecc.ir.ops_transformer import attention_node, gate_node, norm_node, transformer_names
from sparsecc.ir.sparse_ops import DOMAIN

OPS = [op for op in emit.operators().values() if isinstance(op, emit.TransformerOp)]
ATTRIBUTES = {"heads": 4, "kv_heads": 2, "scale": 0.5, "epsilon": 1e-3}
BY_SHAPE = {
    "[B,S,W]": (2, 5, 24), "[B,T,W]": (2, 7, 24), "[B,S,3*W]": (2, 5, 72), "[N]": (6,), "[...,N]": (2, 5, 6),
    "[...,2*N]": (2, 5, 12), "[B,T,V]": (2, 7, 12), "[B,S,V]": (2, 5, 12), "[B,S,W+2*V]": (2, 5, 48),
    "[S,D]": (2, 1, 5, 6),
}  # fmt: skip


def inputs_of(op: emit.Operator) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {item.name: BY_SHAPE.get(item.shape, ()) for item in op.inputs}
    if "mask" in shapes:
        shapes["mask"] = (2, 1, 1, 5 if {"qkv", "cos"} & set(shapes) else 7)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def model_of(
    op: emit.Operator, inputs: Mapping[str, np.ndarray], opset: int = 17, **attributes: float
) -> Model:
    """One node of ``op`` whose inputs are all inputs of the graph."""
    values = [
        onnx_ir.Value(
            name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        )
        for name, array in inputs.items()
    ]
    given = {item.name: attributes.get(item.name, ATTRIBUTES[item.name]) for item in op.attributes}
    node = onnx_ir.Node(
        DOMAIN, op.name, values, list(onnx_ir.convenience.convert_attributes(given)), num_outputs=len(op.outputs),
        name="op", version=1,
    )  # fmt: skip
    for value, declared in zip(node.outputs, op.outputs, strict=True):
        value.name = f"{declared.name}_out"
    graph = onnx_ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="g")
    model = Model(onnx_ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_library_and_body_mean_what_numpy_says(session, op) -> None:
    inputs = inputs_of(op)
    expected = op.reference(list(inputs.values()), ATTRIBUTES)
    for opset in (13, 17, 18, 21):
        model = model_of(op, inputs, opset)
        proto = model.to_proto()
        onnx.checker.check_model(proto, full_check=True)
        for library in (True, False):
            found = session(proto, library=library).run(None, inputs)
            for y, wanted, value in zip(found, expected, model.onnx.graph.outputs, strict=True):
                assert list(y.shape) == list(wanted.shape) == list(value.shape)
                np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_body_in_the_reference_evaluator(op) -> None:
    inputs = inputs_of(op)
    found = onnx.reference.ReferenceEvaluator(model_of(op, inputs).to_proto()).run(None, inputs)
    for y, wanted in zip(found, op.reference(list(inputs.values()), ATTRIBUTES), strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_empty_batch(session, op) -> None:
    inputs = {name: array if array.ndim == 1 else array[:0] for name, array in inputs_of(op).items()}
    for library in (True, False):
        found = session(model_of(op, inputs).to_proto(), library=library).run(None, inputs)
        assert all(y.size == 0 for y in found)


def run_with(
    session, name: str, shapes: Mapping[str, tuple[int, ...]], **attributes: float
) -> list[np.ndarray]:
    """The operator run by the library on ones of these shapes; declared shapes are left out of the model."""
    op = emit.operators()[name]
    inputs = {item.name: np.ones(shapes[item.name], np.float32) for item in op.inputs}
    model = model_of(op, inputs_of(op), **attributes)
    model.onnx.functions.clear()
    for value in (*model.onnx.graph.inputs, *model.onnx.graph.outputs):
        value.shape = None
    return session(model.to_proto(), library=True).run(None, inputs)


ROTARY = {"q": (2, 5, 24), "k": (2, 5, 12), "v": (2, 5, 12), "cos": (5, 6), "sin": (5, 6)}
BAD = [
    ("Attention", {"q": (2, 5, 13), "k": (2, 5, 12), "v": (2, 5, 12)}, r"multiple of 4"),
    ("Attention", {"q": (5, 12), "k": (2, 5, 12), "v": (2, 5, 12)}, r"three dimensions"),
    ("Attention", {"q": (2, 5, 12), "k": (2, 5, 12), "v": (2, 4, 12)}, r"do not fit together"),
    ("Attention", {"q": (2, 5, 12), "k": (1, 5, 12), "v": (1, 5, 12)}, r"do not fit together"),
    ("PackedAttention", {"qkv": (2, 5, 16)}, r"multiple of 12"),
    ("PackedAttentionMask", {"qkv": (2, 5, 36), "mask": (4,)}, r"does not broadcast to \[2,4,5,5\]"),
    ("PackedAttentionMask", {"qkv": (2, 5, 36), "mask": (1, 1, 1, 1, 5)}, r"does not broadcast"),
    ("PackedAttentionMask", {"qkv": (2, 5, 36), "mask": (2, 1, 5)}, r"does not broadcast"),
    ("GroupedAttention", {"q": (2, 5, 24), "k": (2, 7, 13), "v": (2, 7, 13)}, r"multiple of 2"),
    ("GroupedAttention", {"q": (2, 5, 24), "k": (2, 7, 24), "v": (2, 7, 24)}, r"do not fit together"),
    ("PackedGroupedAttention", {"qkv": (2, 5, 36)}, r"multiple of 8"),
    ("RotaryAttention", {**ROTARY, "k": (2, 6, 12), "v": (2, 6, 12)}, r"as many queries as keys"),
    (
        "RotaryAttention",
        {"q": (2, 5, 12), "k": (2, 5, 6), "v": (2, 5, 6), "cos": (5, 3), "sin": (5, 3)},
        r"even",
    ),
    ("RotaryAttention", {**ROTARY, "cos": (5, 4)}, r"expected both to be \[1 or 2,1,5,6\]"),
    ("RotaryAttention", {**ROTARY, "cos": (6,), "sin": (6,)}, r"expected both"),
    ("RotaryAttention", {**ROTARY, "cos": (2, 5, 6), "sin": (2, 5, 6)}, r"expected both"),
    ("RotaryAttention", {**ROTARY, "cos": (3, 1, 5, 6), "sin": (3, 1, 5, 6)}, r"expected both"),
    ("RotaryAttention", {**ROTARY, "cos": (1, 1, 1, 5, 6), "sin": (1, 1, 1, 5, 6)}, r"expected both"),
    (
        "AddLayerNorm",
        {"x": (2, 5, 6), "residual": (5, 5, 6), "gain": (6,), "shift": (6,)},
        r"leading dimensions",
    ),
    (
        "AddLayerNorm",
        {"x": (2, 5, 6), "residual": (2, 1, 6), "gain": (6,), "shift": (6,)},
        r"leading dimensions",
    ),
    ("AddRmsNorm", {"x": (2, 5, 6), "residual": (1,), "gain": (6,)}, r"leading dimensions"),
    ("LayerNorm", {"x": (2, 5, 6), "gain": (5,), "shift": (6,)}, r"gain has shape \[5\]"),
    ("LayerNorm", {"x": (2, 5, 6), "gain": (6,), "shift": (6, 1)}, r"shift has shape \[6,1\]"),
    ("LayerNorm", {"x": (), "gain": (6,), "shift": (6,)}, r"no dimension"),
    ("GatedSilu", {"x": (2, 5)}, r"even last dimension"),
    ("GatedSilu", {"x": ()}, r"even last dimension"),
]


@pytest.mark.parametrize(("name", "shapes", "message"), BAD)
def test_shapes_that_do_not_fit(session, name: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run_with(session, name, shapes)


@pytest.mark.parametrize("heads", [0, -1, 1 << 40])
def test_heads_out_of_range(session, heads: int) -> None:
    with pytest.raises(Exception, match="heads"):
        run_with(session, "PackedAttention", {"qkv": (2, 5, 36)}, heads=heads)


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_heads_of_keys_that_do_not_divide_those_of_queries(session, kv_heads: int) -> None:
    shapes = {"q": (2, 5, 24), "k": (2, 7, 24), "v": (2, 7, 24)}
    with pytest.raises(Exception, match="'kv_heads' is"):
        run_with(session, "GroupedAttention", shapes, kv_heads=kv_heads)


def test_residual_with_leading_ones_and_missing_dimensions(session) -> None:
    shapes = {"x": (2, 5, 6), "gain": (6,)}
    for residual in ((1, 5, 6), (5, 6), (6,), (1, 1, 6)):
        (y,) = run_with(session, "AddRmsNorm", {**shapes, "residual": residual}, epsilon=0.0)
        np.testing.assert_allclose(y, np.ones((2, 5, 6)), rtol=1e-6)


def test_threads_do_not_change_the_result(session) -> None:
    op = emit.operators()["PackedAttention"]
    inputs = {"qkv": np.random.default_rng(1).standard_normal((1, 61, 9 * 16)).astype(np.float32)}
    proto = model_of(op, inputs).to_proto()
    one, two = (session(proto, library=True, threads=n).run(None, inputs)[0] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_node_builders() -> None:
    value = onnx_ir.Value(name="x")
    assert {attention_node((value,), None, heads=1, scale=1, name="n").op_type,
            attention_node((value,) * 3, value, heads=1, scale=1, name="n").op_type,
            norm_node(value, value, value, None, epsilon=0, with_sum=True, name="n").op_type,
            gate_node(value, "GatedGelu", name="n").op_type} <= transformer_names()  # fmt: skip
    assert transformer_names() == {op.name for op in OPS}
    with pytest.raises(ValueError, match="inputs"):
        attention_node((value,) * 2, None, heads=1, scale=1, name="n")
    with pytest.raises(ValueError, match="residual"):
        norm_node(value, None, value, None, epsilon=0, with_sum=True, name="n")
    with pytest.raises(ValueError, match="GatedTanh"):
        gate_node(value, "GatedTanh", name="n")
