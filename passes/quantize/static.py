"""Sites rewritten with ranges known beforehand: QuantizeLinear / DequantizeLinear pairs that onnxruntime fuses.

::

    x                     x -> Q -> DQ
    Conv(x, W, b), Relu   Conv(x, DQ(W_int8), DQ(b_int32)) -> Q -> DQ      Relu is the saturation at zero
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
from sparsecc.passes.quantize.weights import Int8Weights
from sparsecc.passes.tidy.graph import (
    add_constant,
    constant_of,
    float_attribute,
    float_constant,
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
        """Give the nodes of ``site`` int8 weights, convolutions int32 biases; return the weights as written."""
        inputs = [node.inputs[0] for node in site.nodes]
        scales = [self._input_scales[value] for value in inputs if value is not None]
        weights = _with_room_for_bias(site, weights, min(scales))
        array, axis = _as_read(site, weights.codes)
        codes = add_constant(self.model.graph, f"{site.weight_name}.int8", array, self._taken)
        scale = add_constant(self.model.graph, f"{site.weight_name}.scale", weights.scales, self._taken)
        for node, x_scale in zip(site.nodes, scales, strict=True):
            node.name = node.name or site.name
            if node.op_type == "Gemm":
                node = self._as_matmul(node)
            node.replace_input_with(1, self._dequantize(node, [codes, scale], f"{node.name}.weight", axis))
            if node.op_type == "Conv":
                self._quantize_bias(node, x_scale * weights.scales)
        return weights

    def _as_matmul(self, node: onnx_ir.Node) -> onnx_ir.Node:
        """Replace a Gemm by MatMul and Add: onnxruntime fuses that form with bytes in and floats out."""
        product = self._node("MatMul", node.inputs[:2], str(node.name))
        nodes = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(self._node("Add", [product.outputs[0], node.inputs[2]], f"{node.name}.bias"))
        onnx_ir.convenience.replace_nodes_and_values(
            self.model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs
        )
        return product

    def _quantize_bias(self, node: onnx_ir.Node, scale: NDArray[np.float32]) -> None:
        """Give the bias of a Conv as int32 in units of ``scale``, the product of both scales."""
        bias = float_constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is None:
            return
        stored = np.rint(bias / scale.astype(np.float64)).astype(np.int32)
        constants = [
            add_constant(self.model.graph, f"{node.name}.bias.int32", stored, self._taken),
            add_constant(self.model.graph, f"{node.name}.bias.scale", scale.astype(np.float32), self._taken),
        ]
        node.replace_input_with(2, self._dequantize(node, constants, f"{node.name}.bias", 0))

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


def _as_read(site: Site, codes: NDArray[np.int8]) -> tuple[NDArray[np.int8], int]:
    """Return ``codes [N, K]`` as the operator reads its weight, and the axis of the outputs."""
    if site.op == "Conv":
        return codes.reshape(site.weight_shape), 0
    return np.ascontiguousarray(codes.T), 1


def _with_room_for_bias(site: Site, weights: Int8Weights, x_scale: np.float32) -> Int8Weights:
    """Return ``weights`` with larger scales where the bias would not fit int32 in units of both scales.

    That is so for outputs whose weights are next to nothing beside their bias.
    """
    floor = np.zeros(site.shape[0])
    for node in site.nodes:
        bias = float_constant(node.inputs[2]) if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None:
            floor = np.maximum(floor, np.abs(bias) / (float(x_scale) * _LARGEST_BIAS))
    if (weights.scales >= floor).all():
        return weights
    scales = np.maximum(weights.scales, floor).astype(np.float32)
    codes = np.rint(weights.codes * (weights.scales.astype(np.float64) / scales)[:, None]).astype(np.int8)
    return Int8Weights(codes, scales, weights.relative_error)
