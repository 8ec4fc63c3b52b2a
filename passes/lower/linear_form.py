"""What a linear site computes together with the bias and activation behind it: the unit that lowering replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.ir import ConvGeometry, Model, Site, conv_geometry
from sparsecc.ir.quantized import data_input, integer_chain
from sparsecc.ir.trace import RefusedError
from sparsecc.passes.lower.activations import Activation, constant_array, elementwise_region
from sparsecc.passes.tidy.graph import float_attribute

__all__ = [
    "MIN_OPSET",
    "Borders",
    "Int8Weight",
    "LinearForm",
    "Refusal",
    "borders",
    "linear_form",
    "lowerable",
]

#: The function bodies of the sparse operators use CumSum and ScatterND, which opset 11 has first.
MIN_OPSET = 11


class Refusal(Exception):  # noqa: N818  (a value with a reason, raised and caught inside this package)
    """Why a site cannot be lowered; the text goes to the report."""


class Int8Weight(NamedTuple):
    """The integers of a quantised weight, int8 ``[N, K]``, and the scale of each output, float32 ``[N]``."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]


@dataclass(frozen=True)
class LinearForm:
    """``output = activation(linear(source, weight) + bias + residual)``.

    Attributes:
        node: the MatMul, Gemm or Conv.
        weight: float32 [N, K], with Gemm's alpha folded in.
        bias: float32 [N], zeros where there is none.
        activation: what follows, possibly nothing.
        absorbed: the nodes after ``node`` that the fused operator replaces.
        output: the value the fused operator produces.
        conv: geometry of this node's convolution (nodes that share a weight may differ in stride), or ``None``.
        int8: the weight as integers, where ``source`` is quantised before it meets them.
        adder: the node that adds what is not constant, one of ``absorbed``; ``None`` where nothing is.
        dequantize: the DequantizeLinear whose bytes, of a given scale, are ``source``; else that is float32.
    """

    node: onnx_ir.Node
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    activation: Activation
    absorbed: tuple[onnx_ir.Node, ...]
    output: onnx_ir.Value
    conv: ConvGeometry | None
    int8: Int8Weight | None = None
    adder: onnx_ir.Node | None = None
    dequantize: onnx_ir.Node | None = None

    @property
    def residual(self) -> onnx_ir.Value | None:
        """What ``adder`` adds; asked of the graph, where another site may have replaced it."""
        if self.adder is None:
            return None
        before = (self.node, *self.absorbed[: self.absorbed.index(self.adder)])
        own = {value for node in before for value in node.outputs}
        (other,) = (value for value in self.adder.inputs if value not in own)
        return other

    @property
    def source(self) -> onnx_ir.Value:
        """What is multiplied; asked of the graph, where another site may have replaced it."""
        value = data_input(self.node) if self.dequantize is None else self.dequantize.inputs[0]
        assert value is not None  # linear_form refuses the others
        return value


class _Core(NamedTuple):
    """The operator itself, without what follows: its bias operand, result, and other nodes it takes."""

    bias: onnx_ir.Value | None
    output: onnx_ir.Value
    absorbed: tuple[onnx_ir.Node, ...] = ()
    int8: Int8Weight | None = None
    dequantize: onnx_ir.Node | None = None


def lowerable(model: Model, site: Site, node: onnx_ir.Node) -> ConvGeometry | None:
    """The geometry of a convolution, ``None`` for the others.

    Raises:
        Refusal: there is no sparse operator for this kind of site.
    """
    if site.op not in ("MatMul", "Gemm", "Conv"):
        raise Refusal(f"no sparse operator for {site.op} yet: its weights are pruned as values only")
    if model.opset < MIN_OPSET:
        raise Refusal(f"opset {model.opset} is below {MIN_OPSET}; convert the model to a newer opset first")
    if site.quantization is None and site.dtype != np.float32:
        raise Refusal(f"{site.dtype.name} weights: the CPU kernels compute in float32 only")
    if site.scope == "function":
        raise Refusal("inside a local function: packed weights cannot be stored there; inline it first")
    if site.op != "Conv":
        return None
    geometry = conv_geometry(node, site.weight_shape)
    if geometry.pads is None:
        raise Refusal("auto_pad depends on the input size, which is not static")
    if len(geometry.kernel_shape) > 2:
        raise Refusal("three-dimensional convolution has no sparse operator")
    if site.depthwise:
        raise Refusal("depthwise: onnxruntime's own kernel is faster than any sparse form")
    return geometry


def _channel_constant(
    value: onnx_ir.Value | None, outputs: int, axis: int, rank: int | None
) -> npt.NDArray[np.float32] | None:
    """``value`` as [outputs] if it is a constant that varies along one axis only (counted from the end)."""
    array = constant_array(value)
    if array is None or array.ndim > (axis if rank is None else rank):
        return None  # leading ones could raise the rank of the result
    if array.size == 1:
        return np.full(outputs, array.reshape(()), np.float32)
    if array.size != outputs or array.ndim < axis or array.shape[-axis] != outputs:
        return None
    return array.reshape(outputs).astype(np.float32)


def _added_constant(
    value: onnx_ir.Value, outputs: int, axis: int
) -> tuple[onnx_ir.Node, npt.NDArray[np.float32]] | None:
    """The Add node that adds one constant per output channel to ``value``, and that constant."""
    consumers = value.consumers()
    if value.is_graph_output() or len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    (node,) = consumers
    if node.domain not in ("", "ai.onnx") or node.graph is not value.graph:
        return None
    if len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    rank = len(value.shape) if value.shape is not None else None
    constant = _channel_constant(other, outputs, axis, rank)
    return None if constant is None else (node, constant)


def _dequantized_bias(value: onnx_ir.Value) -> npt.NDArray[np.float32] | None:
    """The numbers of an int32 constant ``[outputs]`` behind DequantizeLinear with a scale for each."""
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    codes, scale, *zeros = (constant_array(item) for item in producer.inputs)
    if codes is None or scale is None or codes.ndim != 1 or scale.shape not in ((), codes.shape):
        return None
    if any(zero is None or zero.any() for zero in zeros):
        return None
    return np.asarray(codes.astype(np.float64) * scale, np.float32)


class Borders(NamedTuple):
    """Where a site begins and ends when it is timed alone, and the types of these values."""

    source: onnx_ir.Value
    output: onnx_ir.Value
    source_type: onnx_ir.DataType = onnx_ir.DataType.FLOAT
    output_type: onnx_ir.DataType = onnx_ir.DataType.FLOAT


def borders(node: onnx_ir.Node) -> Borders | None:
    """The borders of a MatMul, Gemm or Conv that no sparse operator need exist for; None where there are none.

    With quantised input from the bytes of the input to those of the output; else with the activation behind it.
    """
    source, output = node.inputs[0], node.outputs[0]
    if source is None:
        return None
    producer = source.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        readers = output.consumers()
        code = onnx_ir.DataType.UINT8
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
            return Borders(producer.inputs[0], readers[0].outputs[0], code, code)
        return Borders(producer.inputs[0], output, code)
    region = elementwise_region(output)
    return Borders(source, output if region is None else region.output)


def _core(site: Site, node: onnx_ir.Node) -> _Core:
    """The core of a site's node, quantised or not.

    Raises:
        Refusal: it is quantised in a way that no operator has.
    """
    source, last = data_input(node), node.inputs[-1]
    assert node.inputs[0] is not None
    if site.quantization is None:
        return _Core(last if len(node.inputs) > 2 else None, node.outputs[0])
    if node.domain == "" and node.op_type == "MatMulInteger":
        try:
            chain = integer_chain(node)
        except RefusedError as error:
            raise Refusal(str(error)) from None
        if not chain.dynamic:
            raise Refusal(_FIXED_RANGE)
        return _Core(None, chain.output, chain.nodes, _int8_weight(site))
    if node.op_type == "DynamicQuantizeMatMul" and source is not None:
        return _Core(_operand(node, 4), node.outputs[0], (), _int8_weight(site))
    if node.op_type == "MatMulIntegerToFloat" and source is not None:
        quantizer = node.inputs[0].producer()
        assert quantizer is not None  # data_input
        operands = [node.inputs[0], node.inputs[2], _operand(node, 4)]
        if quantizer.op_type != "DynamicQuantizeLinear" or operands != list(quantizer.outputs):
            raise Refusal(_FIXED_RANGE)
        return _Core(_operand(node, 6), node.outputs[0], (), _int8_weight(site))
    bias = last if len(node.inputs) > 2 else None
    producer = node.inputs[0].producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            return _Core(bias, node.outputs[0])
    elif node.op_type in ("MatMul", "Gemm") and _is_plain_bytes(producer):
        return _Core(bias, node.outputs[0], (), _int8_weight(site), producer)
    raise Refusal(_FIXED_RANGE)


_FIXED_RANGE = "quantised with a fixed range of its input: no sparse operator takes it in this form"


def _is_plain_bytes(dequantize: onnx_ir.Node) -> bool:
    """Whether it reads uint8 of one constant scale and zero point, as the operators take them."""
    scale, zero_point = (constant_array(_operand(dequantize, index)) for index in (1, 2))
    if scale is None or zero_point is None or scale.shape != () or zero_point.shape != ():
        return False
    return scale.dtype == np.float32 and zero_point.dtype == np.uint8 and bool(0 < scale < np.inf)


def _operand(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _int8_weight(site: Site) -> Int8Weight:
    codes, scales = site.codes(), site.output_scales()
    if scales is None:
        raise Refusal("the scales of its weight vary along the inputs")
    if np.abs(codes).max(initial=0) > np.iinfo(np.int8).max:
        raise Refusal("its weights less their zero point do not fit int8")
    return Int8Weight(codes.astype(np.int8), scales)


def _times(weight: Int8Weight, factor: np.float32) -> Int8Weight:
    """``weight`` times a factor, which its scales take over."""
    scales = weight.scales * factor
    if not ((scales > 0) & np.isfinite(scales)).all():
        raise Refusal(f"its alpha, {factor:g}, leaves no positive scales of its integers")
    return Int8Weight(weight.codes, scales)


def _adder(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The Add node, the only reader of ``value``, whose other operand has surely the same shape, or ``None``.

    That operand does not depend on ``value``, which has no other reader.
    """
    consumers = value.consumers()
    if value.is_graph_output() or len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    (node,) = consumers
    if node.domain not in ("", "ai.onnx") or node.graph is not value.graph or len(set(node.inputs)) != 2:
        return None
    (other,) = (operand for operand in node.inputs if operand is not value)
    shapes = [None if operand is None else operand.shape for operand in (value, other)]
    if (
        any(shape is None or any(_unknown(dim) for dim in shape) for shape in shapes)
        or shapes[0] != shapes[1]
    ):
        return None
    return node


def _unknown(dim: int | onnx_ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is None


def linear_form(model: Model, site: Site, node: onnx_ir.Node, *, adds: bool = False) -> LinearForm:
    """The linear form around one consumer ``node`` of ``site``.

    With ``adds`` the form of a convolution also takes an Add of something as large as its result, such as the
    shortcut of a residual block: only where the graph is rewritten, because the form is then no function of its
    source alone.

    Raises:
        Refusal: the site has no sparse operator, or Gemm's C is not one constant per output.
    """
    conv = lowerable(model, site, node)
    outputs = site.shape[0]
    weight = site.numpy()
    bias = np.zeros(outputs, np.float32)
    axis = 1  # of the output channels, counted from the end
    core = _core(site, node)
    own_bias, int8 = core.bias, core.int8
    if node.op_type == "Gemm":
        alpha = np.float32(float_attribute(node, "alpha", 1.0))
        weight = weight * alpha
        int8 = None if int8 is None else _times(int8, alpha)
        scale = np.float32(float_attribute(node, "beta", 1.0))
    else:
        scale = np.float32(1)
    if conv is not None:
        axis = len(conv.kernel_shape) + 1
    if own_bias is not None:
        constant = _dequantized_bias(own_bias)
        if constant is None:
            constant = _channel_constant(own_bias, outputs, 1, 2)
        if constant is None:
            raise Refusal("its bias is not one constant per output")
        bias = bias + scale * constant
    output = core.output
    absorbed = list(core.absorbed)
    added = _added_constant(output, outputs, axis)
    if added is not None:
        absorbed.append(added[0])
        bias = bias + added[1]
        output = added[0].outputs[0]
    adder = _adder(output) if adds and conv is not None else None
    if adder is not None:
        absorbed.append(adder)
        output = adder.outputs[0]
    region = elementwise_region(output)
    if region is not None:
        absorbed.extend(region.nodes)
        output = region.output
    activation = region.activation if region is not None else Activation()
    return LinearForm(
        node,
        weight.astype(np.float32, copy=False),
        bias,
        activation,
        tuple(absorbed),
        output,
        conv,
        int8,
        adder,
        core.dequantize,
    )
