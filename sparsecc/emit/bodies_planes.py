"""Pieces of function bodies of operators on quad planes; the rules of ``sparsecc.emit.decoding`` hold here too."""

from __future__ import annotations

from sparsecc.emit.decoding import CONSTANTS

__all__ = [
    "CONV",
    "CONV_WEIGHT",
    "PLANE_CONSTANTS",
    "STORE",
    "dequantize",
    "from_quads",
    "planes_first",
    "to_quads",
]

PLANE_CONSTANTS = (
    CONSTANTS
    + """
  four = Constant <value = int64[1] {4}> ()
  index_1 = Constant <value = int64 {1}> ()
  index_2 = Constant <value = int64 {2}> ()
"""
)

# From [Cout, kernel..., Cin / group] in int8 to what Conv reads. The last step is left to DequantizeLinear: before
# floats onnxruntime would quantise the weights once more, in its own way, where x and y are bytes.
CONV_WEIGHT = """
  last = Sub (rank, one)
  group_channels = Slice (shape, last, rank)
  kernel_sides = Slice (shape, one, last)
  by_place_shape = Concat <axis = 0> (outputs, minus_one, group_channels)
  by_place = Reshape (weight, by_place_shape)
  by_channel = Transpose <perm = [0, 2, 1]> (by_place)
  conv_shape = Concat <axis = 0> (outputs, group_channels, kernel_sides)
  conv_codes = Reshape (by_channel, conv_shape)
  conv_weight = DequantizeLinear <axis = 0> (conv_codes, scales)
  group_count = Constant <value_int: int = @group> ()
  channels = Mul (group_channels, group_count)
"""

CONV = """
  convolved = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
    (x_real, conv_weight, bias)
"""

STORE = """
  y_scale = Gather <axis = 0> (steps, index_1)
  y_zero_point = Gather <axis = 0> (zero_points, index_1)
  y_stored = QuantizeLinear (z, y_scale, y_zero_point)
  low_bound = Gather <axis = 0> (bounds, first_axis)
  high_bound = Gather <axis = 0> (bounds, index_1)
  y_kept = Clip (y_stored, low_bound, high_bound)
"""


def dequantize(name: str, index: int) -> str:
    """From the bytes of input ``name`` to ``<name>_floats``, with the scale and zero point at ``index``."""
    at = "first_axis" if index == 0 else f"index_{index}"
    return f"""
  {name}_scale = Gather <axis = 0> (steps, {at})
  {name}_zero_point = Gather <axis = 0> (zero_points, {at})
  {name}_floats = DequantizeLinear ({name}, {name}_scale, {name}_zero_point)
"""


def planes_first(name: str, source: str) -> str:
    """From quads of ``source`` to ``<name>_planes`` [B, 4 * quads, space...]."""
    return f"""
  {name}_shape = Shape ({source})
  {name}_rank = Shape ({name}_shape)
  {name}_lanes_at = Sub ({name}_rank, one)
  {name}_batch = Slice ({name}_shape, zero, one)
  {name}_quads = Slice ({name}_shape, one, two)
  {name}_sides = Slice ({name}_shape, two, {name}_lanes_at)
  {name}_pixels = ReduceProd <keepdims = 1> ({name}_sides)
  {name}_flat_shape = Concat <axis = 0> ({name}_batch, {name}_quads, {name}_pixels, four)
  {name}_flat = Reshape ({source}, {name}_flat_shape)
  {name}_turned = Transpose <perm = [0, 1, 3, 2]> ({name}_flat)
  {name}_all_channels = Mul ({name}_quads, four)
  {name}_planes_shape = Concat <axis = 0> ({name}_batch, {name}_all_channels, {name}_sides)
  {name}_planes = Reshape ({name}_turned, {name}_planes_shape)
"""


def from_quads(name: str, index: int, channels: str) -> str:
    """From quads to ``<name>_real`` [B, channels, space...], in floats."""
    return (
        dequantize(name, index)
        + planes_first(name, f"{name}_floats")
        + f"  {name}_real = Slice ({name}_planes, zero, {channels}, one)\n"
    )


def to_quads(source: str) -> str:
    """From bytes [B, C, space...] to ``y`` in quads, with zeros in channels that do not exist."""
    return f"""
  out_shape = Shape ({source})
  out_rank = Shape (out_shape)
  out_batch = Slice (out_shape, zero, one)
  out_channels = Slice (out_shape, one, two)
  out_sides = Slice (out_shape, two, out_rank)
  out_pixels = ReduceProd <keepdims = 1> (out_sides)
  out_channels_up = Add (out_channels, three)
  out_quads = Div (out_channels_up, four)
  out_all_channels = Mul (out_quads, four)
  out_missing = Sub (out_all_channels, out_channels)
  out_flat_shape = Concat <axis = 0> (out_batch, out_channels, out_pixels)
  out_flat = Reshape ({source}, out_flat_shape)
  out_pads = Concat <axis = 0> (zero, zero, zero, zero, out_missing, zero)
  out_padded = Pad (out_flat, out_pads)
  out_planes_shape = Concat <axis = 0> (out_batch, out_quads, four, out_pixels)
  out_planes = Reshape (out_padded, out_planes_shape)
  out_turned = Transpose <perm = [0, 1, 3, 2]> (out_planes)
  y_shape = Concat <axis = 0> (out_batch, out_quads, out_sides, four)
  y = Reshape (out_turned, y_shape)
"""
