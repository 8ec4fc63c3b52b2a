"""Operators on quad planes, uint8 ``[B, ceil(C / 4), space..., 4]``: declarations, shape rules, references.

``steps`` and ``zero_points`` hold a scale and a zero point for x, for y and for what is added, in this order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.emit.bodies_planes import (
    CONV,
    CONV_WEIGHT,
    PLANE_CONSTANTS,
    STORE,
    dequantize,
    from_quads,
    planes_first,
    to_quads,
)
from sparsecc.emit.decoding import BYTES, DENSE_WEIGHT, FILL_THE_GRID, GRID_OF_BLOCKS
from sparsecc.emit.operator import (
    Attribute,
    Attributes,
    Constants,
    Dim,
    Input,
    Operator,
    Output,
    Shapes,
    window_sizes,
)
from sparsecc.emit.reference import check_version, convolve
from sparsecc.sparse import Pattern, QuantizedTensor

__all__ = ["QuadsOp", "plane_operators"]

Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]

_LANES = 4
_QUADS = "[B,quads,H,W,4] or [B,quads,L,4]"


@dataclass(frozen=True)
class QuadsOp(Operator):
    """One operator on quad planes; all of them are their own family."""

    @property
    def name(self) -> str:
        """The name of the class, unless a subclass has several."""
        return type(self).__name__

    @property
    def oldest_opset(self) -> int:
        """DequantizeLinear, and Clip and Pad of bytes."""
        return 13

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Quad planes, unless a subclass has something else."""
        return (Output("y", "uint8", _QUADS, "the result"),)


@dataclass(frozen=True)
class ConvQuads(QuadsOp):
    """A convolution with packed int8 weights, and what is added to it before it is stored."""

    residual: bool

    @property
    def name(self) -> str:
        """``BlockSparseConvQuads`` or ``BlockSparseConvAddQuads``."""
        return "BlockSparseConvAddQuads" if self.residual else "BlockSparseConvQuads"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x and the residual must be a constant initializer."""
        residual = Input("residual", "uint8", "as y", "added to the convolution")
        return (
            Input("x", "uint8", _QUADS, "the activations"),
            *((residual,) if self.residual else ()),
            Input("values", "int8", "[blocks,R,C]", "the kept weights"),
            Input("indices", "uint8", "[bytes]", "where they stand: the gap stream"),
            Input(
                "shape",
                "int64",
                "[rank]",
                "of the dense weight: [Cout,kh,kw,Cin/group] or [Cout,kw,Cin/group]",
            ),
            Input("scales", "float32", "[Cout]", "what the values of each output are to be multiplied by"),
            Input("bias", "float32", "[Cout]", "added to the convolution"),
            *_quantization(3 if self.residual else 2),
            _bounds(),
        )

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        return (
            Attribute("layout", "string", "R outputs by C inputs a block, such as `8x4`"),
            Attribute("layout_version", "int", "1"),
            *_geometry(),
            Attribute("group", "int", "as in Conv"),
        )

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where x and the weight's own shape are known."""
        x, shape = inputs[0], constants.get("shape")
        if x is None or shape is None or len(x) != len(shape) + 1:
            return (None,)
        sides = window_sizes(x[2:-1], [int(side) for side in shape[1:-1]], attributes)
        return ((x[0], -(-int(shape[0]) // _LANES), *sides, _LANES),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form: everything to floats in NCHW, Conv, and back."""
        body = "".join(
            (
                PLANE_CONSTANTS,
                GRID_OF_BLOCKS,
                BYTES,
                FILL_THE_GRID,
                DENSE_WEIGHT["BlockSparseConv"],
                CONV_WEIGHT,
                from_quads("x", 0, "channels"),
                CONV,
                from_quads("residual", 2, "outputs") if self.residual else "",
                "  z = Add (convolved, residual_real)\n" if self.residual else "  z = Identity (convolved)\n",
                STORE,
                to_quads("y_kept"),
            )
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Bytes]:
        """Return y computed by NumPy, in double precision before it is stored.

        Args:
            inputs: arrays in the order of ``inputs``.
            attributes: values by name, as on the node.

        Raises:
            ModelError: the packed weight is malformed.
        """
        arrays = self.by_name(inputs)
        check_version(attributes)
        shape = [int(side) for side in arrays["shape"]]
        weight = QuantizedTensor(
            Pattern.parse(str(attributes["layout"])),
            (shape[0], int(np.prod(shape[1:]))),
            cast("NDArray[np.int8]", arrays["values"]),
            cast("NDArray[np.uint8]", arrays["indices"]),
            cast("NDArray[np.float32]", arrays["scales"]),
        )
        codes = np.moveaxis(weight.decode_codes().reshape(shape), -1, 1).astype(np.float64)
        channels = shape[-1] * cast(int, attributes["group"])
        zero_points, steps = arrays["zero_points"].astype(np.float64), arrays["steps"].astype(np.float64)
        sums = convolve(planes_to_nchw(arrays["x"], channels) - zero_points[0], codes, attributes)
        per_output = (-1, *[1] * (len(shape) - 2))
        z = sums * (weight.scales.astype(np.float64) * steps[0]).reshape(per_output)
        z += arrays["bias"].astype(np.float64).reshape(per_output)
        if self.residual:
            z += (planes_to_nchw(arrays["residual"], shape[0]) - zero_points[2]) * steps[2]
        return (nchw_to_planes(_stored(z, arrays)),)


@dataclass(frozen=True)
class PairQuads(QuadsOp):
    """Two tensors with scales of their own, joined as numbers; the order of channels does not matter here."""

    @property
    @abstractmethod
    def join(self) -> str:
        """What joins both, in ONNX's text form."""

    @abstractmethod
    def joined(self, x: Array, residual: Array) -> Array:
        """Join both by NumPy."""

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = (
            PLANE_CONSTANTS
            + dequantize("x", 0)
            + dequantize("residual", 2)
            + f"  z = {self.join} (x_floats, residual_floats)\n"
            + STORE
            + "  y = Identity (y_kept)\n"
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Bytes]:
        """Return y computed by NumPy, in double precision before it is stored."""
        arrays = self.by_name(inputs)
        z = self.joined(_real(arrays, "x", 0), _real(arrays, "residual", 2))
        return (_stored(z, arrays).astype(np.uint8),)


@dataclass(frozen=True)
class AddQuads(PairQuads):
    """The sum of two tensors with scales of their own."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x and the residual must be a constant initializer."""
        summands = (
            Input("x", "uint8", _QUADS, "one summand"),
            Input("residual", "uint8", "as x", "the other"),
        )
        return (*summands, *_quantization(3), _bounds())

    @property
    def join(self) -> str:
        """A sum."""
        return "Add"

    def joined(self, x: Array, residual: Array) -> Array:
        """Return the sum."""
        return x + residual

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[Sequence[Dim] | None]:
        """Return the shape of x."""
        return (inputs[0],)


@dataclass(frozen=True)
class ConcatQuads(PairQuads):
    """The channels of two tensors one behind the other, quad by quad."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x and the residual must be a constant initializer."""
        both = (
            Input("x", "uint8", _QUADS, "what comes first: all lanes of its quads are channels"),
            Input("residual", "uint8", "as x but for the quads", "what comes second"),
        )
        return (*both, *_quantization(3), _bounds())

    @property
    def join(self) -> str:
        """Quads one behind the other."""
        return "Concat <axis = 1>"

    def joined(self, x: Array, residual: Array) -> Array:
        """Return the quads one behind the other."""
        return np.concatenate([x, residual], axis=1)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where those of both inputs are known."""
        x, behind = inputs[:2]
        if x is None or behind is None or len(x) != len(behind) or len(x) < 4:
            return (None,)
        quads = x[1] + behind[1] if isinstance(x[1], int) and isinstance(behind[1], int) else None
        return ((x[0], quads, *x[2:]),)


@dataclass(frozen=True)
class MaxPoolQuads(QuadsOp):
    """MaxPool: the bytes are in the order of the numbers they stand for."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """X alone."""
        return (Input("x", "uint8", _QUADS, "the activations"),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        return (Attribute("kernel_shape", "ints", "as in MaxPool, pads smaller than it"), *_geometry())

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where that of x is known."""
        x, kernel = inputs[0], attributes["kernel_shape"]
        if x is None or len(x) != len(kernel) + 3:
            return (None,)
        return ((*x[:2], *window_sizes(x[2:-1], kernel, attributes), _LANES),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = (
            PLANE_CONSTANTS
            + planes_first("x", "x")
            + """
  pooled = MaxPool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads,
    dilations: ints = @dilations> (x_planes)
"""
            + to_quads("pooled")
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Bytes]:
        """Return y computed by NumPy."""
        x = planes_to_nchw(cast(Bytes, inputs[0]), inputs[0].shape[1] * _LANES)
        kernel, strides, pads, dilations = (
            cast("list[int]", attributes[key]) for key in ("kernel_shape", "strides", "pads", "dilations")
        )
        axes = len(kernel)
        x = np.pad(x, [(0, 0), (0, 0), *((pads[axis], pads[axes + axis]) for axis in range(axes))])
        spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + axes)))
        every = [slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations))]
        return (nchw_to_planes(windows[tuple(every)].max(tuple(range(-axes, 0)))),)


@dataclass(frozen=True)
class GlobalAveragePoolQuads(QuadsOp):
    """The mean of every channel."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x must be a constant initializer."""
        return (Input("x", "uint8", _QUADS, "the activations"), *_quantization(2), _bounds())

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where that of x is known."""
        x = inputs[0]
        return (None if x is None else (*x[:2], *[1] * (len(x) - 3), _LANES),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = (
            PLANE_CONSTANTS
            + dequantize("x", 0)
            + planes_first("x", "x_floats")
            + "  z = GlobalAveragePool (x_planes)\n"
            + STORE
            + to_quads("y_kept")
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Bytes]:
        """Return y computed by NumPy, in double precision before it is stored."""
        arrays = self.by_name(inputs)
        real = _real(arrays, "x", 0)
        mean = real.mean(tuple(range(2, real.ndim - 1)), keepdims=True)
        return (_stored(mean, arrays).astype(np.uint8),)


@dataclass(frozen=True)
class QuantizeQuads(QuadsOp):
    """QuantizeLinear, from planes of floats."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x must be a constant initializer."""
        return (Input("x", "float32", "[B,C,H,W] or [B,C,L]", "the activations"), *_quantization(1, "y"))

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where that of x is known."""
        x = inputs[0]
        if x is None or len(x) < 3:
            return (None,)
        return ((x[0], -(-x[1] // _LANES) if isinstance(x[1], int) else None, *x[2:], _LANES),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = (
            PLANE_CONSTANTS
            + """
  y_scale = Gather <axis = 0> (steps, first_axis)
  y_zero_point = Gather <axis = 0> (zero_points, first_axis)
  y_stored = QuantizeLinear (x, y_scale, y_zero_point)
"""
            + to_quads("y_stored")
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Bytes]:
        """Return y computed by NumPy: in float32, as QuantizeLinear is."""
        x, steps, zero_points = (np.asarray(array) for array in inputs)
        stored = np.rint(x / np.float32(steps[0])) + float(zero_points[0])
        return (nchw_to_planes(np.clip(stored, 0, 255)),)


@dataclass(frozen=True)
class DequantizeQuads(QuadsOp):
    """DequantizeLinear, to planes of floats."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but x must be a constant initializer."""
        return (Input("x", "uint8", _QUADS, "the activations"), *_quantization(1))

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Floats."""
        return (Output("y", "float32", "[B,C,H,W] or [B,C,L]", "the result"),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """How many channels there are."""
        return (Attribute("channels", "int", "C"),)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where that of x is known."""
        x = inputs[0]
        return (None if x is None else (x[0], int(attributes["channels"]), *x[2:-1]),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = (
            PLANE_CONSTANTS
            + """
  channel_count = Constant <value_int: int = @channels> ()
  channels = Reshape (channel_count, one)
"""
            + from_quads("x", 0, "channels")
            + "  y = Identity (x_real)\n"
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[NDArray[np.float32]]:
        """Return y computed by NumPy."""
        x, steps, zero_points = (np.asarray(array) for array in inputs)
        stored = planes_to_nchw(x, cast(int, attributes["channels"]))
        return (((stored - float(zero_points[0])).astype(np.float32) * np.float32(steps[0])),)


def plane_operators() -> Iterator[QuadsOp]:
    """Yield every operator on quad planes."""
    yield from (ConvQuads(False), ConvQuads(True), AddQuads(), ConcatQuads(), MaxPoolQuads())
    yield from (GlobalAveragePoolQuads(), QuantizeQuads(), DequantizeQuads())


# ---- what the declarations share ----------------------------------------------------------------------


def _quantization(count: int, of: str = "x") -> tuple[Input, ...]:
    which = {1: f"of {of}", 2: "of x and y", 3: "of x, y and the residual"}[count]
    return (
        Input("steps", "float32", f"[{count}]", f"scales {which}"),
        Input("zero_points", "uint8", f"[{count}]", f"zero points {which}"),
    )


def _bounds() -> Input:
    return Input("bounds", "uint8", "[2]", "least and largest byte of y: an activation such as Relu")


def _geometry() -> tuple[Attribute, ...]:
    return (
        Attribute("strides", "ints", "as in Conv, one per spatial axis"),
        Attribute("pads", "ints", "as in Conv, begins then ends"),
        Attribute("dilations", "ints", "as in Conv, one per spatial axis"),
    )


def planes_to_nchw(x: NDArray[Any], channels: int) -> Array:
    """Return quad planes as float64 ``[B, channels, space...]``."""
    planes = np.moveaxis(x, -1, 2).astype(np.float64)
    return planes.reshape(x.shape[0], x.shape[1] * _LANES, *x.shape[2:-1])[:, :channels]


def nchw_to_planes(y: Array) -> Bytes:
    """Return integers ``[B, C, space...]`` as quad planes; channels that do not exist are 0."""
    space = y.shape[2:]
    y = np.pad(y, [(0, 0), (0, -y.shape[1] % _LANES), *((0, 0) for _ in space)])
    planes = y.reshape(y.shape[0], y.shape[1] // _LANES, _LANES, *space)
    return np.ascontiguousarray(np.moveaxis(planes, 2, -1).astype(np.uint8))


def _real(arrays: Mapping[str, NDArray[Any]], name: str, index: int) -> Array:
    stored = arrays[name].astype(np.float64) - float(arrays["zero_points"][index])
    return stored * float(arrays["steps"][index])


def _stored(z: Array, arrays: Mapping[str, NDArray[Any]]) -> Array:
    stored = np.rint(z / float(arrays["steps"][1])) + float(arrays["zero_points"][1])
    return cast(Array, np.clip(stored, *arrays["bounds"].astype(np.float64)))
