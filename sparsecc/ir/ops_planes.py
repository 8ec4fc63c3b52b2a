"""The names of the operators on quad planes, and the making of their nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.geometry import ConvGeometry
from sparsecc.ir.names import graph_names
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION, initializer
from sparsecc.sparse import LAYOUT_VERSION, QuantizedTensor

__all__ = ["ByteScale", "QuadsBuilder"]


@dataclass(frozen=True)
class ByteScale:
    """A number is ``scale * (byte - zero_point)``."""

    scale: float
    zero_point: int


class QuadsBuilder:
    """Makes operator nodes, not yet in ``graph``, whose constants are initializers of ``graph``.

    Args:
        graph: the graph (or subgraph) which the nodes will be put into, for the reason given in
            ``sparse_op_node``.
        taken: as for ``sparse_op_node``.
    """

    def __init__(self, graph: ir.Graph, taken: set[str] | None = None) -> None:
        self._graph = graph
        self._taken = graph_names(graph) if taken is None else taken

    def conv(
        self,
        x: ir.Value,
        weight: QuantizedTensor,
        *,
        name: str,
        weight_shape: Sequence[int],
        conv: ConvGeometry,
        x_scale: ByteScale,
        y_scale: ByteScale,
        bounds: tuple[int, int] = (0, 255),
        bias: NDArray[np.float32] | None = None,
        residual: tuple[ir.Value, ByteScale] | None = None,
    ) -> ir.Node:
        """Return a convolution, with what is added to it if anything is.

        Args:
            x: quad planes.
            weight: the packed matrix ``[Cout, kernel * Cin / group]``, columns in the order (kernel, cin).
            name: of the node, and prefix of its initializers.
            weight_shape: ``[Cout, kernel..., Cin / group]``.
            conv: geometry, with explicit pads.
            x_scale: of x.
            y_scale: of the result.
            bounds: least and largest byte of the result.
            bias: ``[Cout]``; ``None`` is zeros.
            residual: quad planes that are added, and their scale.

        Raises:
            ValueError: the arguments do not fit together (a mistake of the calling pass).
        """
        shape = tuple(weight_shape)
        if len(shape) < 3 or (shape[0], int(np.prod(shape[1:]))) != weight.shape:
            raise ValueError(f"weight_shape {shape} is no shape of a packed weight {weight.shape}")
        bias = np.zeros(shape[0], np.float32) if bias is None else bias.astype(np.float32, copy=False)
        if bias.shape != shape[:1]:
            raise ValueError(f"bias has shape {bias.shape}, the weight has {shape[0]} outputs")
        scales = [x_scale, y_scale, *([] if residual is None else [residual[1]])]
        inputs = [
            x,
            *([] if residual is None else [residual[0]]),
            self._constant(f"{name}.values", weight.values),
            self._constant(f"{name}.indices", weight.indices),
            self._constant(f"{name}.shape", np.array(shape, np.int64)),
            self._constant(f"{name}.scales", weight.scales),
            self._constant(f"{name}.bias", bias),
            *self._quantization(name, scales, bounds),
        ]
        attributes = [
            ir.AttrString("layout", str(weight.pattern)),
            ir.AttrInt64("layout_version", LAYOUT_VERSION),
            *_geometry(conv),
            ir.AttrInt64("group", conv.group),
        ]
        family = "BlockSparseConvQuads" if residual is None else "BlockSparseConvAddQuads"
        return self._node(family, inputs, attributes, name)

    def add(
        self,
        x: tuple[ir.Value, ByteScale],
        residual: tuple[ir.Value, ByteScale],
        *,
        name: str,
        y_scale: ByteScale,
        bounds: tuple[int, int] = (0, 255),
    ) -> ir.Node:
        """Return the sum of two tensors of the same shape, each with its scale."""
        constants = self._quantization(name, [x[1], y_scale, residual[1]], bounds)
        return self._node("AddQuads", [x[0], residual[0], *constants], [], name)

    def concat(
        self,
        x: tuple[ir.Value, ByteScale],
        behind: tuple[ir.Value, ByteScale],
        *,
        name: str,
        y_scale: ByteScale,
        bounds: tuple[int, int] = (0, 255),
    ) -> ir.Node:
        """Return the quads of x and behind them those of another tensor, each with its scale."""
        constants = self._quantization(name, [x[1], y_scale, behind[1]], bounds)
        return self._node("ConcatQuads", [x[0], behind[0], *constants], [], name)

    def max_pool(self, x: ir.Value, geometry: ConvGeometry, *, name: str) -> ir.Node:
        """Return MaxPool of quad planes; ``geometry`` has explicit pads, all smaller than the kernel."""
        attributes = [ir.AttrInt64s("kernel_shape", list(geometry.kernel_shape)), *_geometry(geometry)]
        return self._node("MaxPoolQuads", [x], attributes, name)

    def mean(
        self,
        x: ir.Value,
        *,
        name: str,
        x_scale: ByteScale,
        y_scale: ByteScale,
        bounds: tuple[int, int] = (0, 255),
    ) -> ir.Node:
        """Return GlobalAveragePool of quad planes."""
        constants = self._quantization(name, [x_scale, y_scale], bounds)
        return self._node("GlobalAveragePoolQuads", [x, *constants], [], name)

    def quantize(self, x: ir.Value, scale: ByteScale, *, name: str) -> ir.Node:
        """Return the conversion of float32 ``[B, C, space...]`` to quad planes."""
        return self._node("QuantizeQuads", [x, *self._quantization(name, [scale], None)], [], name)

    def dequantize(self, x: ir.Value, scale: ByteScale, channels: int, *, name: str) -> ir.Node:
        """Return the conversion of quad planes to float32 ``[B, channels, space...]``."""
        constants = self._quantization(name, [scale], None)
        return self._node("DequantizeQuads", [x, *constants], [ir.AttrInt64("channels", channels)], name)

    def _quantization(
        self, name: str, scales: Sequence[ByteScale], bounds: tuple[int, int] | None
    ) -> list[ir.Value]:
        constants = [
            self._constant(f"{name}.steps", np.array([item.scale for item in scales], np.float32)),
            self._constant(f"{name}.zero_points", np.array([item.zero_point for item in scales], np.uint8)),
        ]
        if bounds is not None:
            constants.append(self._constant(f"{name}.bounds", np.array(bounds, np.uint8)))
        return constants

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        return initializer(self._graph, self._taken, name, array)

    def _node(self, op: str, inputs: list[ir.Value], attributes: list[ir.Attr], name: str) -> ir.Node:
        node = ir.Node(DOMAIN, op, inputs, attributes, name=name, version=DOMAIN_VERSION)
        dtype = ir.DataType.FLOAT if op == "DequantizeQuads" else ir.DataType.UINT8
        node.outputs[0].type = ir.TensorType(dtype)
        return node


def _geometry(geometry: ConvGeometry) -> list[ir.Attr]:
    if geometry.pads is None:
        raise ValueError("an operator on quad planes needs explicit pads")
    return [
        ir.AttrInt64s("strides", list(geometry.strides)),
        ir.AttrInt64s("pads", list(geometry.pads)),
        ir.AttrInt64s("dilations", list(geometry.dilations)),
    ]
