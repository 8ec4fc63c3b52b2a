"""Sites rewritten with ranges known beforehand: QuantizeLinear / DequantizeLinear pairs that onnxruntime fuses.

::

    x                     x -> Q -> DQ
    Conv(x, W, b), Relu   Conv(x, DQ(W_int8), DQ(b_int32)) -> Q -> DQ      Relu is the saturation at zero
    Gemm(x, W, b)         Gemm(x, DQ(W_int8), DQ(b_int32)), floats or bytes out
    Add, pooling, ...     the same between such tensors, so that a region stays in uint8

A tensor is quantised once, where it is made; everything that reads it reads the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, value_names
from sparsecc.passes.quantize.ranges import ActivationScale
from sparsecc.passes.quantize.weights import Int8Weights, name_of
from sparsecc.passes.tidy.graph import (
    add_constant,
    constant_of,
    float_attribute,
    float_constant,
    int_attribute,
    only_consumer,
)

__all__ = ["ByteTensor", "StaticWriter", "quantized_tensors", "static_refusal"]

_MIN_OPSET = 13  # DequantizeLinear with one scale per channel

#: Give their input's values back, so input and output have one scale.
_TRANSPARENT = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}
)
#: Have a form on bytes in onnxruntime, or cost nothing beside one.
_CAPABLE = _TRANSPARENT | {"Add", "Concat", "AveragePool", "GlobalAveragePool", "Pad"}
#: All inputs of these are data; of the others only the first.
_MANY = frozenset({"Add", "Concat"})
_LARGEST_BIAS = float(2**30)


@dataclass(frozen=True)
class ByteTensor:
    """A tensor to be held in uint8.

    Attributes:
        value: what its readers read, after the activation.
        start: what is quantised: ``value``, or the input of the Relu or Clip that saturation stands for.
        same_as: the tensor whose scale it has, if not its own.
    """

    value: onnx_ir.Value
    start: onnx_ir.Value
    same_as: onnx_ir.Value | None = None


def static_refusal(model: Model, site: Site) -> str | None:
    """Return why ``site`` cannot be written in this form, or None."""
    if model.opset < _MIN_OPSET:
        return f"opset {model.opset} is below {_MIN_OPSET}; convert the model to a newer opset first"
    if not site.in_main_graph:
        return "inside a subgraph, whose tensors cannot be calibrated: use activations=dynamic"
    for node in site.nodes:
        if node.op_type == "Gemm" and (float_attribute(node, "alpha", 1), float_attribute(node, "beta", 1)) != (
            1, 1
        ):  # fmt: skip
            return "Gemm with alpha or beta: run tidy first"
        if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = float_constant(node.inputs[2])
            if bias is None or bias.shape != site.shape[:1]:
                return "its bias is not one constant per output"
    return None


def quantized_tensors(model: onnx_ir.Model, sites: Collection[Site]) -> list[ByteTensor]:
    """Return the tensors of the main graph to be held in uint8 when ``sites`` are, in graph order.

    The inputs of all sites, the outputs of convolutions (after the activation), and what lies between these
    where onnxruntime computes on bytes.
    """
    nodes = {node for site in sites for node in site.nodes}
    convolutions = {node for node in nodes if node.op_type == "Conv"}
    read = {node.inputs[0] for node in nodes}
    useful = _leading_to(model.graph, read)
    found = {value: ByteTensor(value, value) for value in model.graph.inputs if value in read}
    for node in model.graph:
        value = node.outputs[0] if node.outputs else None
        if value is None or value in found:
            continue
        inputs = _data(node)
        between = (
            value in useful and _capable(node) and bool(inputs) and all(item in found for item in inputs)
        )
        if node in convolutions or (between and node.op_type not in _TRANSPARENT):
            end = _saturating_reader(value) or value
            found[end] = ByteTensor(end, value)
        elif between:
            found[value] = ByteTensor(value, value, inputs[0])
        elif value in read:
            start = node.inputs[0] if node.inputs else None
            absorbed = start is not None and start not in found and _saturating_reader(start) is value
            found[value] = ByteTensor(value, start if absorbed and start is not None else value)
    return list(found.values())


def _leading_to(graph: onnx_ir.Graph, read: Collection[onnx_ir.Value | None]) -> set[onnx_ir.Value | None]:
    """The values from which one of ``read`` is reached through operators that have a form on bytes."""
    useful = set(read)
    for node in reversed(graph):
        if node.outputs and node.outputs[0] in useful and (_capable(node) or _saturates(node)):
            useful.update(_data(node))
    return useful


def _data(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    return list(node.inputs) if node.op_type in _MANY else list(node.inputs[:1])


def _capable(node: onnx_ir.Node) -> bool:
    if node.domain != "" or node.op_type not in _CAPABLE or any(value.uses() for value in node.outputs[1:]):
        return False
    return node.op_type != "Pad" or node.attributes.get_string("mode", "constant") == "constant"


def _saturates(node: onnx_ir.Node) -> bool:
    """Whether a uint8 range that begins at zero does what ``node`` does."""
    if node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return False
    if node.op_type == "Relu":
        return True
    low = float_constant(node.inputs[1]) if len(node.inputs) > 1 else None
    high = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return low is not None and low.size == 1 and not low.any() and (len(node.inputs) < 3 or high is not None)


def _saturating_reader(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """The result of the Relu or Clip that alone reads ``value``, if saturation can stand for it."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    node = uses[0].node
    inside = value.producer() is None or node.graph is value.producer().graph  # type: ignore[union-attr]
    output = node.outputs[0]
    return (
        output if inside and uses[0].idx == 0 and _saturates(node) and not output.is_graph_output() else None
    )


@dataclass
class StaticWriter:
    """Rewrites one model: first its tensors, then the weights of the sites that read them."""

    model: onnx_ir.Model
    scales: Mapping[str, ActivationScale]
    _taken: set[str] = field(init=False)
    _input_scales: dict[onnx_ir.Value, np.float32] = field(default_factory=dict)
    _constants: dict[str, tuple[onnx_ir.Value, onnx_ir.Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._taken = value_names(self.model)

    def write_tensors(self, tensors: list[ByteTensor]) -> None:
        """Put QuantizeLinear and DequantizeLinear behind each tensor."""
        owner: dict[onnx_ir.Value, str] = {}
        for tensor in tensors:
            name = tensor.value.name or ""
            owner[tensor.value] = name if tensor.same_as is None else owner[tensor.same_as]
        for tensor in tensors:
            self._quantize(tensor, owner[tensor.value])

    def write_site(self, site: Site, weights: Int8Weights) -> Int8Weights:
        """Give the nodes of ``site`` int8 weights and int32 biases; return the weights as written."""
        for node in site.nodes:
            node.name = name_of(site, node)
        nodes = [
            self._as_gemm(node, site.shape[0]) if node.op_type == "MatMul" else node for node in site.nodes
        ]
        scales = [self._input_scales[value] for node in nodes if (value := node.inputs[0]) is not None]
        weights = _with_room_for_bias(nodes, weights, min(scales))
        constants: dict[int, list[onnx_ir.Value]] = {}
        for node, x_scale in zip(nodes, scales, strict=True):
            axis = _output_axis(node)
            if axis not in constants:
                array = weights.codes.reshape(site.weight_shape) if site.op == "Conv" else weights.codes
                array = np.ascontiguousarray(array.T) if axis else array
                constants[axis] = self._constants_of(site.weight_name, array, weights.scales)
            node.replace_input_with(1, self._dequantize(node, constants[axis], f"{node.name}.weight", axis))
            bias = _bias(node)
            if bias is not None:
                scale = (x_scale * weights.scales).astype(np.float32)
                stored = np.rint(bias / scale.astype(np.float64)).astype(np.int32)
                inputs = self._constants_of(f"{node.name}.bias", stored, scale)
                node.replace_input_with(2, self._dequantize(node, inputs, f"{node.name}.bias", 0))
        return weights

    def _constants_of(
        self, name: str, codes: NDArray[np.generic], scale: NDArray[np.float32]
    ) -> list[onnx_ir.Value]:
        """The inputs of a DequantizeLinear; onnxruntime's QGemm wants zero points written out."""
        graph, zeros = self.model.graph, np.zeros(scale.shape, codes.dtype)
        return [
            add_constant(graph, f"{name}.{codes.dtype}", codes, self._taken),
            add_constant(graph, f"{name}.scale", scale, self._taken),
            add_constant(graph, f"{name}.zero_point", zeros, self._taken),
        ]

    def _as_gemm(self, node: onnx_ir.Node, outputs: int) -> onnx_ir.Node:
        """Return a MatMul of matrices and the bias behind it as one Gemm, else the node itself.

        onnxruntime makes a Gemm of the two before it looks for int8, and takes that only with an int32 bias.
        """
        x, product = node.inputs[0], node.outputs[0]
        add = only_consumer(product)
        if add is None or add.op_type != "Add" or x is None or x.shape is None or x.shape.rank() != 2:
            return node
        bias = next((value for value in add.inputs if value is not product), None)
        constant = float_constant(bias)
        if constant is None or constant.shape != (outputs,) or outputs == 1:
            return node
        gemm = self._node("Gemm", [x, node.inputs[1], bias], str(node.name))
        gemm.name = node.name
        onnx_ir.convenience.replace_nodes_and_values(
            self.model.graph, add, [add, node], [gemm], add.outputs, gemm.outputs
        )
        return gemm

    def _quantize(self, tensor: ByteTensor, owner: str) -> None:
        scale, zero_point = self._scale_constants(owner)
        name = tensor.value.name or ""
        users = list(tensor.value.uses())
        quantize = self._node("QuantizeLinear", [tensor.start, scale, zero_point], f"{name}.quantized")
        dequantize = self._node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero_point], f"{name}.dequantized"
        )
        result = dequantize.outputs[0]
        result.shape, result.type = tensor.value.shape, tensor.value.type
        for node, index in users:
            node.replace_input_with(index, result)
        graph = self.model.graph
        for index, output in enumerate(graph.outputs):
            if output is tensor.value:
                name = str(tensor.value.name)
                tensor.value.name, result.name = free_name(f"{name}.exact", self._taken), name
                graph.outputs[index] = result
        producer = tensor.start.producer()
        if producer is None:
            graph.insert_before(graph[0], [quantize, dequantize])
        else:
            graph.insert_after(producer, [quantize, dequantize])
        self._input_scales[result] = self.scales[owner].scale

    def _scale_constants(self, owner: str) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        if owner not in self._constants:
            scale, zero_point = self.scales[owner]
            graph = self.model.graph
            self._constants[owner] = (
                add_constant(graph, f"{owner}.scale", np.array(scale, np.float32), self._taken),
                add_constant(graph, f"{owner}.zero_point", np.array(zero_point, np.uint8), self._taken),
            )
        return self._constants[owner]

    def _dequantize(
        self, before: onnx_ir.Node, inputs: list[onnx_ir.Value], name: str, axis: int
    ) -> onnx_ir.Value:
        node = self._node("DequantizeLinear", inputs, name, axis=axis)
        self.model.graph.insert_before(before, node)
        return node.outputs[0]

    def _node(
        self, op_type: str, inputs: Sequence[onnx_ir.Value | None], name: str, **attributes: int
    ) -> onnx_ir.Node:
        node = onnx_ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = free_name(name, self._taken)
        return node


def _output_axis(node: onnx_ir.Node) -> int:
    """The axis of the outputs in the weight as the operator reads it."""
    return int(node.op_type == "MatMul" or (node.op_type == "Gemm" and not int_attribute(node, "transB", 0)))


def _bias(node: onnx_ir.Node) -> NDArray[np.float64] | None:
    return None if len(node.inputs) < 3 else float_constant(node.inputs[2])


def _with_room_for_bias(nodes: list[onnx_ir.Node], weights: Int8Weights, x_scale: np.float32) -> Int8Weights:
    """Return ``weights`` with larger scales where a bias would not fit int32 in units of both scales.

    That is so for outputs whose weights are next to nothing beside their bias.
    """
    floor = np.zeros(weights.scales.shape)
    for bias in map(_bias, nodes):
        if bias is not None:
            floor = np.maximum(floor, np.abs(bias) / (float(x_scale) * _LARGEST_BIAS))
    if (weights.scales >= floor).all():
        return weights
    scales = np.maximum(weights.scales, floor).astype(np.float32)
    codes = np.rint(weights.codes * (weights.scales.astype(np.float64) / scales)[:, None]).astype(np.int8)
    return Int8Weights(codes, scales, weights.relative_error)
