"""Operators between QuantizeLinear and DequantizeLinear that can run on bytes in quad planes.

A *stored* tensor is the result of a QuantizeLinear with one scale, read through DequantizeLinear. A *step* is an
operator that reads stored tensors and whose result is stored: those are rewritten, and between them bytes stay in
quad planes. A *region* is a set of steps connected by stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.ir import ConvGeometry, conv_geometry
from sparsecc.ir.ops_planes import ByteScale
from sparsecc.ir.quantized import dequantized_scale
from sparsecc.ir.trace import RefusedError
from sparsecc.passes.lower.activations import Activation, constant_array, elementwise_region
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.tidy.graph import int_attribute, only_consumer
from sparsecc.sparse import Pattern, QuantizedTensor

__all__ = [
    "ByteConv",
    "Step",
    "Stored",
    "find_steps",
    "fuse_additions",
    "is_result",
    "readers_of",
    "regions_of",
]

#: Shapes of blocks that weights are stored in, the fewest bytes win; kernels regroup whatever it is.
_BLOCKS = (Pattern.parse("16x4"), Pattern.parse("8x4"), Pattern.parse("4x4"))
_BOUNDS = (0, 255)
_LANES = 4  # channels of a quad
_OPERATORS = frozenset({"Conv", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of bytes; one of these per QuantizeLinear."""

    quantizer: onnx_ir.Node
    scale: ByteScale

    @property
    def real(self) -> onnx_ir.Value:
        """What was quantised."""
        value = self.quantizer.inputs[0]
        assert value is not None  # find_steps refuses the others
        return value

    @property
    def shape(self) -> tuple[int | str | None, ...] | None:
        """Shape in the order NCHW, as far as it is known."""
        shape = self.real.shape
        return None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)


@dataclass(frozen=True, eq=False)
class ByteConv:
    """What a convolution has besides its input; AveragePool is one too, of each channel alone.

    Attributes:
        codes: int8 ``[Cout, kernel..., Cin / group]``.
        scales: float32 ``[Cout]``.
        bias: float32 ``[Cout]``.
        geometry: with explicit pads.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    geometry: ConvGeometry

    @property
    def density(self) -> float:
        """Share of weights that are not zero."""
        return float(np.count_nonzero(self.codes)) / max(self.codes.size, 1)

    def packed(self) -> QuantizedTensor:
        """The weight in the blocks that take the fewest bytes."""
        matrix = self.codes.reshape(self.codes.shape[0], -1)
        forms = (QuantizedTensor.from_codes(matrix, self.scales, pattern) for pattern in _BLOCKS)
        return min(forms, key=lambda form: form.nbytes)


@dataclass(frozen=True, eq=False)
class Step:
    """One operator to rewrite.

    Attributes:
        node: the operator in floating point.
        sources: the stored tensors it reads, for a convolution with an addition the other summand last.
        target: the stored tensor it makes.
        bounds: least and largest byte of the result, from the activation behind it.
        conv: of a convolution.
        window: of a MaxPool.
        absorbed: an Add that a convolution took over.
    """

    node: onnx_ir.Node
    sources: tuple[Stored, ...]
    target: Stored
    bounds: tuple[int, int] = _BOUNDS
    conv: ByteConv | None = None
    window: ConvGeometry | None = None
    absorbed: onnx_ir.Node | None = None


# ---- finding -------------------------------------------------------------------------------------------


@dataclass
class _Finder:
    """Reads one graph; the same QuantizeLinear always gives the same ``Stored``."""

    stored: dict[onnx_ir.Node, Stored] = field(default_factory=dict)

    def step(self, node: onnx_ir.Node) -> Step:
        """The step of one node.

        Raises:
            Refusal: why it is none.
        """
        target, bounds = self._target(node)
        if node.op_type == "Conv":
            source = self._source(node.inputs[0])
            return Step(node, (source,), target, bounds, conv=_byte_conv(node))
        sources = tuple(self._source(value) for value in node.inputs)
        for source in sources:
            if (
                source.shape is None
                or len(source.shape) not in (3, 4)
                or not isinstance(source.shape[1], int)
            ):
                raise Refusal(
                    "what it reads is not known to have one or two spatial axes, or how many channels"
                )
        if node.op_type == "Concat":
            _check_concat(node, sources)
        if node.op_type == "AveragePool":
            return Step(node, sources, target, bounds, conv=_average(node, sources[0]))
        if node.op_type == "Add" and sources[0].shape != sources[1].shape:
            raise Refusal("its summands are not known to have the same shape")
        window = None
        if node.op_type == "MaxPool":
            window = _window(node, sources[0])
            if sources[0].scale != target.scale:
                raise Refusal("its input and its output have different scales")
            if bounds != _BOUNDS:
                raise Refusal("the operator has no bounds for the activation behind it")
        return Step(node, sources, target, bounds, window=window)

    def _target(self, node: onnx_ir.Node) -> tuple[Stored, tuple[int, int]]:
        """What stores the result, and the bounds that the activation in between sets."""
        if len([value for value in node.outputs if value.uses() or value.is_graph_output()]) != 1:
            raise Refusal("it has more than one result")
        result, activation = node.outputs[0], Activation()
        region = elementwise_region(result)
        if region is not None and region.activation.suffix in ("Relu", "Clip"):
            result, activation = region.output, region.activation
        quantizer = only_consumer(result)
        if quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.inputs[0] is not result:
            raise Refusal("its result is not quantised")
        target = self._of_quantizer(quantizer)
        return target, _bounds_of(activation, target.scale)

    def _source(self, value: onnx_ir.Value | None) -> Stored:
        dequantizer = None if value is None else value.producer()
        if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            raise Refusal("what it reads is not stored as bytes")
        codes = dequantizer.inputs[0]
        quantizer = None if codes is None else codes.producer()
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            raise Refusal("what it reads is not made by QuantizeLinear")
        stored = self._of_quantizer(quantizer)
        if _byte_scale(dequantizer) != stored.scale:
            raise Refusal("what it reads is stored with one scale and read with another")
        return stored

    def _of_quantizer(self, node: onnx_ir.Node) -> Stored:
        if node not in self.stored:
            scale = _byte_scale(node)
            if scale is None or node.inputs[0] is None:
                raise Refusal("a tensor around it is not stored in bytes with one constant scale")
            self.stored[node] = Stored(node, scale)
        return self.stored[node]


def _byte_scale(node: onnx_ir.Node) -> ByteScale | None:
    """The scale of a QuantizeLinear or DequantizeLinear, as if its bytes were unsigned."""
    scale = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if scale.dtype != np.float32 or zero.dtype not in (np.uint8, np.int8) or "block_size" in node.attributes:
        return None
    if len(node.inputs) < 3 and (node.op_type == "DequantizeLinear" or "output_dtype" in node.attributes):
        return None  # the type of the bytes is not told here
    step = float(scale.reshape(()))
    if not (np.isfinite(step) and step > 0):
        return None
    return ByteScale(step, int(zero.reshape(())) + (128 if zero.dtype == np.int8 else 0))


def _bounds_of(activation: Activation, scale: ByteScale) -> tuple[int, int]:
    """Rounding keeps the order, so clipping before it is clipping after it to the rounded bounds."""
    if activation.suffix == "":
        return _BOUNDS
    low, high = activation.parameters.get("lo", 0.0), activation.parameters.get("hi", np.inf)
    with np.errstate(over="ignore"):
        stored = np.rint(np.array([low, high], np.float32) / np.float32(scale.scale)) + scale.zero_point
    least, most = np.clip(stored, *_BOUNDS)
    return int(least), int(most)


def _byte_conv(node: onnx_ir.Node) -> ByteConv:
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        raise Refusal("its weight is not quantised")
    tensor = onnx_ir.convenience.get_const_tensor(producer.inputs[0]) if producer.inputs[0] else None
    if tensor is None or len(tensor.shape) not in (3, 4):
        raise Refusal("its weight is no constant of one or two spatial axes")
    try:
        scale = dequantized_scale(producer, tensor)
    except RefusedError as error:
        raise Refusal(str(error)) from error
    if scale.scale.size > 1 and scale.axis != 0:
        raise Refusal("its weight has scales along another axis than that of the outputs")
    codes = scale.shifted(tensor.numpy())
    if codes.size and (codes.min() < -128 or codes.max() > 127):
        raise Refusal("its weight less the zero point does not fit int8")
    geometry = conv_geometry(node, tuple(codes.shape))
    if geometry.pads is None:
        raise Refusal("auto_pad depends on the input size, which is not static")
    outputs = codes.shape[0]
    return ByteConv(
        np.ascontiguousarray(np.moveaxis(codes, 1, -1).astype(np.int8)),
        np.ascontiguousarray(np.broadcast_to(scale.scale, (outputs,)).astype(np.float32)),
        _bias(node, outputs),
        geometry,
    )


def _bias(node: onnx_ir.Node, outputs: int) -> npt.NDArray[np.float32]:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(outputs, np.float32)
    bias, producer = constant_array(value), value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        parts = [constant_array(item) for item in producer.inputs]
        if parts[0] is None or parts[1] is None or (len(parts) > 2 and (parts[2] is None or parts[2].any())):
            raise Refusal("its bias is quantised with a zero point, or not constant")
        bias = (parts[0].astype(np.float64) * parts[1].astype(np.float64)).astype(np.float32)
    if bias is None or bias.shape != (outputs,):
        raise Refusal("its bias is not constant")
    return bias.astype(np.float32)


def _window(node: onnx_ir.Node, source: Stored) -> ConvGeometry:
    kernel = tuple(node.attributes.get_ints("kernel_shape", ()) or ())
    if int_attribute(node, "storage_order", 0):
        raise Refusal("MaxPool with storage_order")
    geometry = conv_geometry(node, (1, 1, *kernel))
    if geometry.pads is None or len(kernel) not in (1, 2):
        raise Refusal(f"{node.op_type} with auto_pad, or over more than two axes")
    if int_attribute(node, "ceil_mode", 0):
        geometry = _ceiled(geometry, (source.shape or ())[2:])
    if any(pad >= kernel[axis % len(kernel)] for axis, pad in enumerate(geometry.pads or ())):
        raise Refusal(f"{node.op_type} with a pad that is not smaller than its kernel")
    return geometry


def _ceiled(geometry: ConvGeometry, sides: Sequence[int | str | None]) -> ConvGeometry:
    """The same windows without ceil_mode: as much more pad at the end as the last one needs."""
    assert geometry.pads is not None  # the caller refuses these
    axes = geometry.ndim
    pads = list(geometry.pads)
    for axis, side in enumerate(sides):
        if not isinstance(side, int):
            raise Refusal("ceil_mode over a size that is not known")
        stride = geometry.strides[axis]
        span = geometry.dilations[axis] * (geometry.kernel_shape[axis] - 1) + 1
        windows = -(-(side + pads[axis] + pads[axes + axis] - span) // stride) + 1
        last = (windows - 1) * stride - pads[axis]
        if last >= side:  # releases of onnxruntime do not agree on whether there is such a window
            raise Refusal("ceil_mode with a last window that begins behind the input")
        pads[axes + axis] = max(pads[axes + axis], last + span - side)
    return replace(geometry, pads=tuple(pads))


def _average(node: onnx_ir.Node, source: Stored) -> ByteConv:
    """AveragePool as a depthwise convolution whose weights are all 1."""
    geometry = _window(node, source)
    assert geometry.pads is not None  # _window refuses these
    counts_all = int_attribute(node, "count_include_pad", 0) and not int_attribute(node, "ceil_mode", 0)
    if any(geometry.pads) and not counts_all:
        raise Refusal("AveragePool over fewer pixels at the border")
    channels = source.shape[1] if source.shape is not None else None
    assert isinstance(channels, int)  # seen to by the caller
    kernel = geometry.kernel_shape
    return ByteConv(
        np.ones((channels, *kernel, 1), np.int8),
        np.full(channels, 1 / np.prod(kernel), np.float32),
        np.zeros(channels, np.float32),
        replace(geometry, group=channels),
    )


def _check_concat(node: onnx_ir.Node, sources: Sequence[Stored]) -> None:
    shapes = [source.shape or () for source in sources]
    if len(shapes) < 2:
        raise Refusal("Concat of one tensor")
    if int_attribute(node, "axis", 0) not in (1, 1 - len(shapes[0])):
        raise Refusal("Concat along another axis than that of the channels")
    for shape in shapes[:-1]:
        if not isinstance(shape[1], int) or shape[1] % _LANES:
            raise Refusal("Concat behind a number of channels that is no multiple of 4")


def find_steps(graph: onnx_ir.Graph, refuse: Callable[[onnx_ir.Node, str], None]) -> list[Step]:
    """Return the steps of ``graph`` in its order; ``refuse`` is told why a convolution is none."""
    finder, steps = _Finder(), []
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type not in _OPERATORS:
            continue
        try:
            steps.append(finder.step(node))
        except Refusal as refusal:
            if node.op_type == "Conv":
                refuse(node, str(refusal))
    return steps


def fuse_additions(steps: Sequence[Step]) -> list[Step]:
    """Let convolutions add what an Add would add to their result, which is then not rounded in between.

    Only where nothing else reads the result of the convolution, and its bytes are not bounded by an activation: a
    zero point at an end of the range may stand for one.
    """
    by_target = {step.target: step for step in steps}
    gone: set[Step] = set()
    made: dict[Step, Step] = {}
    for step in steps:
        if step.node.op_type != "Add" or step.sources[0] is step.sources[1]:
            continue
        for which in (1, 0):
            conv = by_target.get(step.sources[which])
            if conv is None or conv.conv is None or conv in gone or len(conv.sources) > 1:
                continue
            inside = 0 < conv.target.scale.zero_point < 255
            alone = len(readers_of(conv.target)) == 1 and not is_result(conv.target)
            if conv.bounds == _BOUNDS and inside and alone:
                made[step] = replace(
                    conv,
                    sources=(*conv.sources, step.sources[1 - which]),
                    target=step.target,
                    bounds=step.bounds,
                    absorbed=step.node,
                )
                gone.add(conv)
                break
    return [made.get(step, step) for step in steps if step not in gone]


def readers_of(stored: Stored) -> list[onnx_ir.Node]:
    """The nodes behind the DequantizeLinear of a stored tensor, and whatever else reads its bytes."""
    readers: list[onnx_ir.Node] = []
    codes = stored.quantizer.outputs[0]
    for node in codes.consumers():
        readers += node.outputs[0].consumers() if node.op_type == "DequantizeLinear" else [node]
    return readers


def is_result(stored: Stored) -> bool:
    """Whether the model returns it, as bytes or as floats."""
    codes = stored.quantizer.outputs[0]
    read = [node.outputs[0] for node in codes.consumers() if node.op_type == "DequantizeLinear"]
    return any(value.is_graph_output() for value in (codes, *read))


def regions_of(steps: Iterable[Step]) -> list[list[Step]]:
    """Return the steps in sets that are connected by stored tensors, in the order of their first steps."""
    parent: dict[Stored, Stored] = {}

    def root(stored: Stored) -> Stored:
        while parent.setdefault(stored, stored) is not stored:
            stored = parent[stored]
        return stored

    steps = list(steps)
    for step in steps:
        for source in step.sources:
            parent[root(source)] = root(step.target)
    regions: dict[Stored, list[Step]] = {}
    for step in steps:
        regions.setdefault(root(step.target), []).append(step)
    return list(regions.values())
