"""The declarations: shape rule, function bodies, and their NumPy meaning."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.reference
import pytest

from sparsecc import emit, runtime
from sparsecc.errors import ModelError, UnsupportedModelError
from sparsecc.ir import ConvGeometry
from sparsecc.ir.sparse_ops import ACTIVATIONS, FAMILIES, sparse_op_node
from sparsecc.runtime.capi import ACTIVATION_CODES
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor, keep_mask

PARAMETERS = {"LeakyRelu": {"alpha": 0.25}, "Clip": {"lo": -0.25, "hi": 0.5}}
LINEAR = {name: op for name, op in emit.operators().items() if isinstance(op, emit.LinearOp)}
WEIGHT_SHAPE = (12, 3, 3, 2)
GEOMETRY = ConvGeometry((3, 2), (2, 1), (1, 0, 1, 1), (1, 2), 2)


def _packed(pattern: str, shape: tuple[int, int]) -> SparseTensor:
    dense = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    parsed = Pattern.parse(pattern)
    return SparseTensor.encode(dense * keep_mask(np.abs(dense), parsed, 0.6), parsed)


def test_every_family_with_every_activation() -> None:
    assert len(LINEAR) == len(FAMILIES) * len(ACTIVATIONS) == 120
    for name, op in LINEAR.items():
        assert name == op.name
        count = (7 if op.activation == "Clip" else 5) + op.int8 + 2 * bool(op.x_form) + op.adds
        assert len({item.name for item in op.inputs}) == len(op.inputs) == count


# ONNX's evaluator cannot pass a function's attribute on to LeakyRelu; tests/runtime/test_ops.py has that one.
@pytest.mark.parametrize("name", [name for name in LINEAR if "Leaky" not in name])
def test_function_body_means_what_numpy_says(name: str) -> None:
    """The body run by ONNX's own reference evaluator: no onnxruntime, no library."""
    op = LINEAR[name]
    shape = (12, 18) if op.conv else (13, 21)
    weight = _packed("4x2" if op.blocks else "unstructured", shape)
    if op.int8:
        weight = QuantizedTensor.encode(weight.decode(), weight.pattern)
    x = np.random.default_rng(1).standard_normal((2, 6, 7, 8) if op.conv else (3, 21)).astype(np.float32)
    if op.x_form == "Bytes":
        x = np.random.default_rng(1).integers(0, 256, x.shape, dtype=np.uint8)
    bias = np.random.default_rng(2).standard_normal(shape[0]).astype(np.float32)
    y_shape = op.output_shape(x.shape, WEIGHT_SHAPE if op.conv else shape, {
        "strides": GEOMETRY.strides, "pads": GEOMETRY.pads, "dilations": GEOMETRY.dilations,
    })  # fmt: skip
    residual = np.random.default_rng(3).standard_normal(y_shape).astype(np.float32)
    model = emit.single_op_model(
        weight, x.shape, bias=bias, activation=op.activation, parameters=PARAMETERS.get(op.activation),
        weight_shape=WEIGHT_SHAPE, conv=GEOMETRY if op.conv else None,
        x_form=op.x_form, x_scale=0.011, x_zero_point=117,
        residual_shape=y_shape if op.adds else None,
    )  # fmt: skip
    node = next(iter(model.onnx.graph))
    assert node.op_type == name
    y = onnx.reference.ReferenceEvaluator(model.to_proto()).run(
        None, {"x": x, "residual": residual} if op.adds else {"x": x}
    )[0]
    others = [
        residual if value.const_value is None else value.const_value.numpy() for value in node.inputs[1:]
    ]
    (expected,) = op.reference([x, *others], {key: item.value for key, item in node.attributes.items()})
    assert y.shape == expected.shape == y_shape
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 18, 21, onnx.defs.onnx_opset_version()])
def test_function_bodies_are_valid_at_every_opset(opset: int) -> None:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = {"": opset}
    for op in emit.operators().values():
        if opset < op.oldest_opset:
            continue
        function = onnx.parser.parse_function(op.function_text(opset))
        onnx.checker.check_function(function, context, onnx.checker.C.LexicalScopeContext())


def test_bodies_hold_no_data_dependent_shape() -> None:
    """Since 1.27 onnxruntime does not fold a node whose output size is not known beforehand."""
    for op in emit.operators().values():
        used = {node.op_type for node in op.function(max(17, op.oldest_opset))}
        assert not used & {"Compress", "NonZero", "Unique"}


def test_opset_too_old() -> None:
    with pytest.raises(UnsupportedModelError, match="opset 11 or later and the model uses 9: convert"):
        emit.operators()["SparseMatMul"].function(9)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ((45,), (37,)),
        ((3, 45), (3, 37)),
        (("B", None, 45), ("B", None, 37)),
    ],
)
def test_shape_of_a_matrix_product(x, expected) -> None:
    assert LINEAR["SparseMatMul"].output_shape(x, (37, 45), {}) == expected


@pytest.mark.parametrize(
    ("x", "stride", "pads", "expected"),
    [
        (("B", 8, 32, 32), 1, (1, 1, 1, 1), ("B", 16, 32, 32)),
        (("B", 8, 32, 33), 2, (1, 1, 1, 1), ("B", 16, 16, 17)),
        (("B", 8, "H", "W"), 1, (1, 1, 1, 1), ("B", 16, "H", "W")),
        (("B", 8, "H", "W"), 1, (0, 1, 0, 1), ("B", 16, None, "W")),
        (("B", 8, "H", None), 2, (1, 1, 1, 1), ("B", 16, None, None)),
    ],
)
def test_shape_of_a_convolution(x, stride, pads, expected) -> None:
    attributes = {"strides": (stride, stride), "pads": pads, "dilations": (1, 1)}
    assert LINEAR["SparseConvRelu"].output_shape(x, (16, 8, 3, 3), attributes) == expected


def test_shape_of_a_convolution_of_something_unknown() -> None:
    """The rank and the channels are known all the same."""
    attributes = {"strides": (1,), "pads": (1, 1), "dilations": (1,)}
    constants = {"shape": np.array([16, 8, 3])}
    assert LINEAR["SparseConv"].output_shapes([None], constants, attributes) == ((None, 16, None),)
    assert LINEAR["SparseMatMul"].output_shapes([None], {"shape": np.array([16, 8])}, {}) == (None,)


def test_reference_refuses_another_layout_version() -> None:
    weight = _packed("unstructured", (4, 8))
    inputs = [np.ones((1, 8), np.float32), weight.values, weight.indices, np.array([4, 8]), np.zeros(4)]
    with pytest.raises(ModelError, match="layout_version 2"):
        emit.operators()["SparseMatMul"].reference(inputs, {"layout": "unstructured", "layout_version": 2})


def test_node_builder_refuses_what_does_not_fit() -> None:
    import onnx_ir

    graph = onnx_ir.Graph([], [], nodes=[], name="g")
    weight = _packed("unstructured", (12, 18))
    with pytest.raises(ValueError, match="takes"):
        sparse_op_node(graph, None, weight, name="n", activation="Clip", parameters={"lo": 0.0})
    with pytest.raises(ValueError, match="weight_shape"):
        sparse_op_node(graph, None, weight, name="n", weight_shape=(12, 4, 3, 2), conv=GEOMETRY)
    with pytest.raises(ValueError, match="only a convolution adds"):
        sparse_op_node(graph, None, weight, name="n", residual=onnx_ir.Value(name="a"))
    with pytest.raises(ValueError, match="bias"):
        sparse_op_node(graph, None, weight, name="n", bias=np.zeros(11, np.float32))
    assert not graph.initializers


def test_names_of_initializers_stay_unique() -> None:
    import onnx_ir

    graph = onnx_ir.Graph([], [], nodes=[], name="g")
    for _ in range(3):
        sparse_op_node(graph, None, _packed("unstructured", (12, 18)), name="n")
    assert len(graph.initializers) == 12
    assert {"n.values", "n.values.1", "n.values.2"} <= set(graph.initializers)


def test_the_library_knows_the_same_operators() -> None:
    declared = {
        f"{op.name} {' '.join(i.dtype for i in op.inputs)} -> {' '.join(o.dtype for o in op.outputs)}"
        for op in emit.operators().values()
    }
    assert set(runtime.operator_table()) == declared


def test_c_activations_agree_with_the_schema(root) -> None:
    suffixes = re.findall(
        r'\{"(\w*)", SPARSECC_ACT_(\w+)\}', (root / "runtime/csrc/ort/op_table.h").read_text()
    )
    assert [suffix for suffix, _ in suffixes] == list(ACTIVATIONS)
    header = (root / "runtime/csrc/include/sparsecc/c_api.h").read_text()
    codes = {name: int(code) for name, code in re.findall(r"SPARSECC_ACT_(\w+) = (\d+)", header)}
    assert {suffix: codes[constant] for suffix, constant in suffixes} == dict(ACTIVATION_CODES)


def test_operators_page_is_up_to_date(root) -> None:
    page = (root / "docs/operators.md").read_text()
    assert page == emit.operators_markdown(), "run `make docs`"
