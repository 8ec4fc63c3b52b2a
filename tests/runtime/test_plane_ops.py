"""Operators on quad planes in onnxruntime, with the library and without, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.errors import ModelError
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.ops_planes import ByteScale, QuadsBuilder
from sparsecc.sparse import Pattern, QuantizedTensor, keep_mask

X, Y, ADDED = ByteScale(0.021, 117), ByteScale(0.05, 33), ByteScale(0.043, 200)


def single(
    make: Callable[[QuadsBuilder, list[onnx_ir.Value]], onnx_ir.Node], inputs: list[np.ndarray]
) -> Model:
    """A finished model of one node, with inputs ``x0``, ``x1`` shaped like the arrays."""
    values = [
        onnx_ir.Value(
            name=f"x{i}",
            shape=onnx_ir.Shape(array.shape),
            type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
        )
        for i, array in enumerate(inputs)
    ]
    graph = onnx_ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="single")
    node = make(QuadsBuilder(graph), values)
    node.outputs[0].name = "y"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = Model(onnx_ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


def packed(outputs: int, columns: int, pattern: str = "8x4") -> QuantizedTensor:
    rng = np.random.default_rng(0)
    parsed = Pattern.parse(pattern)
    dense = rng.standard_normal((outputs, columns)).astype(np.float32)
    return QuantizedTensor.encode(dense * keep_mask(rng.random(dense.shape), parsed, 0.5), parsed)


def conv_case(weight_shape: tuple[int, ...], geometry: ConvGeometry, residual: bool = False) -> Any:
    tensor = packed(weight_shape[0], int(np.prod(weight_shape[1:])))
    bias = np.random.default_rng(1).standard_normal(weight_shape[0]).astype(np.float32)

    def make(build: QuadsBuilder, x: list[onnx_ir.Value]) -> onnx_ir.Node:
        return build.conv(
            x[0], tensor, name="op", weight_shape=weight_shape, conv=geometry, x_scale=X, y_scale=Y,
            bounds=(33, 255), bias=bias, residual=(x[1], ADDED) if residual else None,
        )  # fmt: skip

    return make


def rolled(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.uint8)


GROUPED = ConvGeometry((3, 2), (2, 1), (1, 0, 1, 1), (1, 2), 2)
LINE = ConvGeometry((3,), (1,), (1, 1), (1,), 1)
POINT = ConvGeometry((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
POOL = ConvGeometry((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1)
CASES = {
    "conv": (conv_case((12, 3, 2, 3), GROUPED), [rolled(2, 2, 7, 8, 4)]),
    "conv-1d": (conv_case((9, 3, 10), LINE), [rolled(1, 3, 30, 4)]),
    "conv-add": (conv_case((10, 1, 1, 7), POINT, True), [rolled(2, 2, 5, 5, 4), rolled(2, 3, 5, 5, 4)]),
    "add": (
        lambda build, x: build.add((x[0], X), (x[1], ADDED), name="op", y_scale=Y, bounds=(33, 255)),
        [rolled(2, 3, 5, 5, 4), rolled(2, 3, 5, 5, 4) // 2],
    ),
    "concat": (
        lambda build, x: build.concat((x[0], X), (x[1], ADDED), name="op", y_scale=Y, bounds=(33, 255)),
        [rolled(2, 3, 5, 5, 4), rolled(2, 2, 5, 5, 4)],
    ),
    "concat-1d": (
        lambda build, x: build.concat((x[0], X), (x[1], Y), name="op", y_scale=Y),
        [rolled(3, 1, 5, 4), rolled(3, 2, 5, 4)],
    ),
    "max-pool": (lambda build, x: build.max_pool(x[0], POOL, name="op"), [rolled(2, 3, 9, 10, 4)]),
    "max-pool-1d": (lambda build, x: build.max_pool(x[0], LINE, name="op"), [rolled(2, 3, 9, 4)]),
    "mean": (
        lambda build, x: build.mean(x[0], name="op", x_scale=X, y_scale=Y, bounds=(0, 200)),
        [rolled(2, 3, 7, 7, 4)],
    ),
    "quantize": (
        lambda build, x: build.quantize(x[0], X, name="op"),
        [np.random.default_rng(2).standard_normal((2, 6, 5, 5)).astype(np.float32) * 3],
    ),
    "dequantize": (lambda build, x: build.dequantize(x[0], X, 10, name="op"), [rolled(2, 3, 5, 5, 4)]),
}  # fmt: skip


def expected_of(model: Model, inputs: list[np.ndarray]) -> np.ndarray:
    node = next(iter(model.onnx.graph))
    op = emit.operators()[node.op_type]
    constants = [value.const_value.numpy() for value in node.inputs[len(inputs) :]]
    (y,) = op.reference([*inputs, *constants], {key: item.value for key, item in node.attributes.items()})
    return y


def agree(y: np.ndarray, expected: np.ndarray, channels: int | None) -> None:
    """Integers may differ by one where float32 meets a tie; channels that do not exist do not count."""
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    if y.dtype == np.uint8:
        if channels is not None:
            y, expected = (
                np.moveaxis(a, -1, 2).reshape(a.shape[0], -1, *a.shape[2:-1])[:, :channels]
                for a in (y, expected)
            )
        difference = np.abs(y.astype(int) - expected)
        assert difference.max(initial=0) <= 1
        assert (difference != 0).mean() < 0.02
    else:
        np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_run_agrees(name: str, session) -> None:
    """The library, onnxruntime on the function body, ONNX's own evaluator on it, and NumPy."""
    make, inputs = CASES[name]
    model = single(make, inputs)
    expected = expected_of(model, inputs)
    channels = {"conv": 12, "conv-1d": 9, "conv-add": 10, "quantize": 6}.get(name)
    output = model.onnx.graph.outputs[0]
    assert tuple(output.shape) == expected.shape
    assert output.dtype == onnx_ir.DataType.from_numpy(expected.dtype)
    feeds = {f"x{i}": array for i, array in enumerate(inputs)}
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    for library in (False, True):
        agree(session(proto, library=library).run(None, feeds)[0], expected, channels)
    agree(session(proto, library=True, threads=2).run(None, feeds)[0], expected, channels)
    # ONNX's evaluator cannot pass a function's attribute on to a Constant or MaxPool.
    if not model.onnx.graph[0].attributes:
        agree(onnx.reference.ReferenceEvaluator(proto).run(None, feeds)[0], expected, channels)


def refused(change: Callable[[onnx_ir.Node], None], message: str, session, name: str = "conv-add") -> None:
    make, inputs = CASES[name]
    model = single(make, inputs)
    change(model.onnx.graph[0])
    model.onnx.functions.clear()
    proto = model.to_proto()
    with pytest.raises(Exception, match=message):
        session(proto, library=True).run(None, {f"x{i}": array for i, array in enumerate(inputs)})


def replace(name: str, array: np.ndarray) -> Callable[[onnx_ir.Node], None]:
    def change(node: onnx_ir.Node) -> None:
        value = node.graph.initializers[f"op.{name}"]
        value.const_value = onnx_ir.Tensor(array, name=value.name)
        value.shape, value.type = onnx_ir.Shape(array.shape), onnx_ir.TensorType(value.const_value.dtype)

    return change


def attribute(item: onnx_ir.Attr) -> Callable[[onnx_ir.Node], None]:
    return lambda node: node.attributes.__setitem__(item.name, item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("steps", np.ones(2, np.float32)), "'steps' and 'zero_points' have 2 and 3 entries, expected 3"),
        (replace("steps", np.float32([1, 0, 1])), "scale of y is not a finite"),
        (replace("zero_points", np.zeros(4, np.uint8)), "have 3 and 4 entries"),
        (replace("bounds", np.zeros(3, np.uint8)), "'bounds' has 3 entries"),
        (replace("bounds", np.uint8([2, 1])), "low is above high"),
        (replace("bias", np.zeros(9, np.float32)), "'bias' has 9 entries, the weight has 10"),
        (replace("scales", np.zeros(10, np.float32)), "scale of output 0"),
        (replace("shape", np.int64([10, 7])), "'shape' has 2 entries"),
        (replace("shape", np.int64([10, 1, 1, 0])), "every entry must be in 1"),
        (replace("shape", np.int64([10, 1 << 20, 1 << 20, 7])), "at most 2147483647"),
        (replace("shape", np.int64([10, 1, 1, 100])), "x has 2 quads of channels, expected 25"),
        (replace("indices", np.zeros(3, np.uint8)), "index stream"),
        (attribute(onnx_ir.AttrString("layout", "16x4")), "which is not layout '16x4'"),
        (attribute(onnx_ir.AttrString("layout", "8x4" * 20)), "'layout' has 60 characters"),
        (attribute(onnx_ir.AttrInt64("layout_version", 9)), "layout_version 9 is not supported"),
        (attribute(onnx_ir.AttrInt64("group", 0)), "'group'"),
        (attribute(onnx_ir.AttrInt64("group", 3)), "groups"),
        (attribute(onnx_ir.AttrInt64s("strides", [1, 0])), "'strides'"),
        (attribute(onnx_ir.AttrInt64s("strides", [2, 2])), r"residual has shape \[2,3,5,5,4\], expected \[2,3,3,3,4\]"),
        (attribute(onnx_ir.AttrInt64s("pads", [0, 0])), "'pads' has 2 entries, expected 4"),
    ],
)  # fmt: skip
def test_malformed_convolutions(change, message: str, session) -> None:
    refused(change, message, session)


def test_malformed_others(session) -> None:
    refused(attribute(onnx_ir.AttrInt64s("kernel_shape", [])), "one or two axes", session, "max-pool")
    refused(attribute(onnx_ir.AttrInt64s("pads", [3, 0, 0, 0])), "pad of a pooling", session, "max-pool")
    refused(attribute(onnx_ir.AttrInt64("channels", 0)), "'channels'", session, "dequantize")
    refused(attribute(onnx_ir.AttrInt64("channels", 13)), "3 quads, not those of 13", session, "dequantize")
    refused(replace("steps", np.float32([-1])), "scale of the tensor", session, "quantize")
    refused(replace("steps", np.float32([1, np.nan])), "scale of y", session, "mean")
    refused(replace("steps", np.float32([1, 1, np.inf])), "scale of the residual", session, "add")
    refused(replace("steps", np.float32([1, 0, 1])), "scale of y", session, "concat")
    refused(replace("steps", np.float32([1e30, 1e-30, 1])), "do not fit a float", session, "concat")


@pytest.mark.parametrize("shape", [(1, 2, 5, 5, 4), (2, 2, 5, 4, 4), (2, 2, 5, 4)])
def test_concat_of_tensors_that_do_not_fit(shape: tuple[int, ...], session) -> None:
    make, (x, _) = CASES["concat"]
    model = single(make, [x, rolled(*shape)])
    model.onnx.functions.clear()
    proto = model.to_proto()
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    with pytest.raises(Exception, match="residual has"):
        session(proto, library=True).run(None, {"x0": x, "x1": rolled(*shape)})


def test_reference_refuses_another_layout_version() -> None:
    make, inputs = CASES["conv"]
    model = single(make, inputs)
    attribute(onnx_ir.AttrInt64("layout_version", 2))(model.onnx.graph[0])
    with pytest.raises(ModelError, match="layout_version 2"):
        expected_of(model, inputs)


def test_node_builder_refuses_what_does_not_fit() -> None:
    graph = onnx_ir.Graph([], [], nodes=[], name="g")
    build, x = QuadsBuilder(graph), onnx_ir.Value(name="x")
    common = {"name": "n", "x_scale": X, "y_scale": Y}
    with pytest.raises(ValueError, match="weight_shape"):
        build.conv(x, packed(8, 8), weight_shape=(8, 1, 1, 9), conv=POINT, **common)
    with pytest.raises(ValueError, match="bias"):
        build.conv(x, packed(8, 8), weight_shape=(8, 1, 1, 8), conv=POINT, bias=np.zeros(7), **common)
    with pytest.raises(ValueError, match="explicit pads"):
        build.max_pool(x, ConvGeometry((3,), (1,), None, (1,), 1), name="n")
