"""The geometry of a convolution node, with ``auto_pad`` turned into numbers where they are known."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir

__all__ = ["ConvGeometry", "conv_geometry"]


@dataclass(frozen=True)
class ConvGeometry:
    """Attributes of a Conv over ``ndim`` spatial axes, all given even where the node leaves defaults out.

    Attributes:
        kernel_shape: entries per spatial axis.
        strides: steps per spatial axis.
        pads: zeros added, all begins then all ends; None if ``auto_pad`` depends on an unknown input size.
        dilations: distance between kernel entries per spatial axis.
        group: number of groups.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...] | None
    dilations: tuple[int, ...]
    group: int

    @property
    def ndim(self) -> int:
        """Number of spatial axes: 1, 2 or 3."""
        return len(self.kernel_shape)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel has one entry, so that the convolution is a matrix product per pixel."""
        return all(side == 1 for side in self.kernel_shape)


def conv_geometry(node: onnx_ir.Node, weight_shape: tuple[int, ...]) -> ConvGeometry:
    """Return the geometry of a Conv ``node`` whose weight is ``[Cout, Cin/group, *kernel]``."""
    kernel = tuple(weight_shape[2:])
    ones = (1,) * len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ones) or ones)
    dilations = tuple(node.attributes.get_ints("dilations", ones) or ones)
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    none = (0,) * (2 * len(kernel))
    pads: tuple[int, ...] | None = none
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_pads(node.inputs[0], kernel, strides, dilations, upper=auto_pad == "SAME_UPPER")
    elif auto_pad != "VALID":
        pads = tuple(node.attributes.get_ints("pads", none) or none)
    return ConvGeometry(kernel, strides, pads, dilations, node.attributes.get_int("group", 1) or 1)


def _same_pads(
    value: onnx_ir.Value | None,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    *,
    upper: bool,
) -> tuple[int, ...] | None:
    """Return the pads that make the output ceil(input / stride) long; an odd zero goes last if ``upper``."""
    sizes = _spatial_sizes(value, len(kernel))
    begins, ends = [], []
    for size, side, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        extent = (side - 1) * dilation + 1
        if stride == 1:
            total = extent - 1  # whatever the input size
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        else:
            return None
        less, more = total // 2, total - total // 2
        begins.append(less if upper else more)
        ends.append(more if upper else less)
    return (*begins, *ends)


def _spatial_sizes(value: onnx_ir.Value | None, ndim: int) -> tuple[int | None, ...]:
    if value is None or value.shape is None or len(value.shape) != ndim + 2:
        return (None,) * ndim
    return tuple(size if isinstance(size, int) else None for size in value.shape.dims[2:])
