"""Nodes that take the place of the one node of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.hybrid.rewriting import PART_KEY, Rewriter
from sparsecc.passes.tidy.graph import float_attribute, float_constant

__all__ = ["Chain"]

#: From here on Split reads the sizes of its parts from an input.
_SPLIT_INPUT_OPSET = 13


class Chain:
    """Collects the nodes that compute a site in another way; ``finish`` puts them into the graph.

    All of them are marked as parts of the site and named after it.

    Args:
        rewriter: of the model; its shapes are inferred.
        site: MatMul, Gemm or Conv of one node.

    Attributes:
        site: whose place is taken.
        source: what it reads.
    """

    def __init__(self, rewriter: Rewriter, site: Site) -> None:
        self.site = site
        self._rewriter = rewriter
        self._node = rewriter.part(site)
        self._made: list[onnx_ir.Node] = []
        source = self._node.inputs[0]
        assert source is not None, "a site reads something"
        self.source = source

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the weight."""
        return self.site.dtype

    def constant(self, array: NDArray[Any], name: str) -> onnx_ir.Value:
        """Return a new initialiser named after the site."""
        return self._rewriter.constant(self._node, f"{self._node.name}.{name}", array)

    def shared(self, array: NDArray[Any], name: str) -> onnx_ir.Value:
        """Return an initialiser of the graph that all chains with the same ``array`` of that name read."""
        graph = self._node.graph
        assert isinstance(graph, onnx_ir.Graph), "refused inside functions"
        known = graph.initializers.get(name)
        if known is not None and known.const_value is not None and not known.is_graph_input():
            held = known.const_value.numpy()
            if held.dtype == array.dtype and np.array_equal(held, array):
                return known
        return self._rewriter.constant(self._node, name, array)

    def node(
        self,
        op: str,
        inputs: Sequence[onnx_ir.Value | None],
        name: str,
        attributes: Sequence[onnx_ir.Attr] | Mapping[str, Any] = (),
        dtype: onnx_ir.DataType | None = None,
    ) -> onnx_ir.Value:
        """Add a standard operator and return its one result, of the type of the site's unless ``dtype`` is given."""
        made = self._rewriter.node(self._node, op, inputs, f"{self._node.name}.{name}", attributes)
        made.metadata_props[PART_KEY] = self._node.metadata_props[PART_KEY]
        if dtype is not None:
            made.outputs[0].type = onnx_ir.TensorType(dtype)
        self._made.append(made)
        return made.outputs[0]

    def shorten(self, value: onnx_ir.Value) -> None:
        """Give a result of ``node`` a name of a few letters and its node none: of many nodes names weigh."""
        made = value.producer()
        assert made is not None, "just made"
        made.name = None
        value.name = self._rewriter.short_name()

    def matmul(self, x: onnx_ir.Value, weight: NDArray[Any], name: str) -> onnx_ir.Value:
        """Add ``x @ weight.T`` for a constant ``weight [N, K]``."""
        return self.node("MatMul", [x, self.constant(weight.T, f"{name}.weight")], name)

    def common(self, weight: NDArray[Any], name: str) -> onnx_ir.Value:
        """Return ``source @ weight.T``; the product that another chain has added already if it has the same weight."""
        for node, _ in self.source.uses():
            held = (
                node.inputs[1].const_value
                if node.op_type == "MatMul" and node.inputs[1] is not None
                else None
            )
            if (
                held is not None
                and PART_KEY in node.metadata_props
                and np.array_equal(held.numpy(), weight.T)
            ):
                return node.outputs[0]
        return self.matmul(self.source, weight, name)

    def split(self, x: onnx_ir.Value, sizes: Sequence[int], name: str) -> list[onnx_ir.Value]:
        """Cut the last axis of ``x`` into parts of these sizes, which are all of it."""
        if len(sizes) == 1:
            return [x]
        given: list[onnx_ir.Value] = [x]
        attributes: dict[str, Any] = {"axis": self.leading}
        if self._rewriter.opset < _SPLIT_INPUT_OPSET:
            attributes["split"] = list(sizes)
        else:
            given.append(self.shape(sizes, f"{name}.sizes"))
        made = self._rewriter.node(
            self._node, "Split", given, f"{self._node.name}.{name}", attributes, len(sizes)
        )
        made.metadata_props[PART_KEY] = self._node.metadata_props[PART_KEY]
        self._made.append(made)
        return list(made.outputs)

    def concat(self, parts: Sequence[onnx_ir.Value], name: str) -> onnx_ir.Value:
        """Put ``parts`` together along the last axis."""
        return parts[0] if len(parts) == 1 else self.node("Concat", parts, name, {"axis": self.leading})

    @property
    def leading(self) -> int:
        """Axes of ``source`` before the last: of a MatMul whose input has a known rank, or a Gemm."""
        if self.site.op == "Gemm":
            return 1
        shape = self.source.shape
        assert shape is not None, "refused before"
        return shape.rank() - 1

    def shape(self, sizes: Sequence[int], name: str) -> onnx_ir.Value:
        """Return a constant for Reshape."""
        return self.constant(np.array(sizes, np.int64), name)

    def reshape(self, x: onnx_ir.Value, last: Sequence[int], name: str) -> onnx_ir.Value:
        """Cut what comes behind the leading axes of ``x``, which stay whatever their lengths, into axes ``last``."""
        return self.node("Reshape", [x, self.shape([0] * self.leading + list(last), f"{name}.shape")], name)

    def transpose(self, x: onnx_ir.Value, order: Sequence[int], name: str) -> onnx_ir.Value:
        """Put the axes behind the leading ones into ``order``, counted from the first of them."""
        perm = [*range(self.leading), *(self.leading + axis for axis in order)]
        return self.node("Transpose", [x], name, {"perm": perm})

    def conv(
        self,
        x: onnx_ir.Value,
        weight: NDArray[Any],
        name: str,
        attributes: Sequence[onnx_ir.Attr] | Mapping[str, Any] = (),
    ) -> onnx_ir.Value:
        """Add a convolution with a constant ``weight [N, C, kernel...]``; no attributes mean a step of 1 everywhere."""
        return self.node("Conv", [x, self.constant(weight, f"{name}.weight")], name, attributes)

    def pointwise(self, x: onnx_ir.Value, weight: NDArray[Any], name: str) -> onnx_ir.Value:
        """Add a product along channels, ``weight [N, C]``: a convolution of kernel 1."""
        spatial = (1,) * (len(self.site.weight_shape) - 2)
        return self.conv(x, weight.reshape(*weight.shape, *spatial), name)

    @property
    def geometry(self) -> Sequence[onnx_ir.Attr]:
        """The attributes of the site's convolution."""
        return list(self._node.attributes.values())

    def finish(self, value: onnx_ir.Value) -> None:
        """Put alpha and bias of the site behind ``value`` and let it take over name and readers of the old result."""
        if self.site.op == "Conv":
            self._add_bias_of_conv(value)
        elif self.site.op == "Gemm":
            alpha = float_attribute(self._node, "alpha", 1.0)
            if alpha != 1:
                factor = self.constant(np.asarray(alpha, self.dtype), "alpha")
                value = self.node("Mul", [value, factor], "scaled")
            self._add_bias_of_gemm(value)
        self._rewriter.replace(self._node, self._made)

    def _bias(self) -> onnx_ir.Value | None:
        return self._node.inputs[2] if len(self._node.inputs) > 2 else None

    def _add_bias_of_conv(self, value: onnx_ir.Value) -> None:
        bias, last = self._bias(), self._made[-1]
        if bias is None:
            return
        if last.op_type == "Conv" and len(last.inputs) == 2:
            last.resize_inputs(3)
            last.replace_input_with(2, bias)
            return
        shape = self.constant(
            np.array([-1] + [1] * (len(self.site.weight_shape) - 2), np.int64), "bias_shape"
        )
        self.node("Add", [value, self.node("Reshape", [bias, shape], "bias_column")], "biased")

    def _add_bias_of_gemm(self, value: onnx_ir.Value) -> None:
        bias, beta = self._bias(), float_attribute(self._node, "beta", 1.0)
        if bias is None:
            return
        held = float_constant(bias)
        if beta != 1 and held is not None:
            bias = self.constant((beta * held).astype(self.dtype), "bias")
        elif beta != 1:
            bias = self.node(
                "Mul", [bias, self.constant(np.asarray(beta, self.dtype), "beta")], "scaled_bias"
            )
        self.node("Add", [value, bias], "biased")
