"""Layers of experts that read one input, in the forms of graphs that are understood, and what takes their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.ir.names import free_name, value_names
from sparsecc.passes.factor.expert_bases import Bases
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.passes.structure.expert_axes import Cut, ExpertAxes, array_in
from sparsecc.passes.tidy.graph import add_constant, bypass, int_attribute, only_consumer

__all__ = ["ExpertLayer", "Rewriting", "layer_of"]


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The same layer of all experts.

    Attributes:
        node: the product, a MatMul or Einsum.
        source: what all experts read, its last axis as long as K.
        look_up: the Gather that takes the weights of the chosen experts, or None where all are computed.
        order: axes of the result as positions in (expert, token, output).
        dtype: of the constant.
        stored: axes of the constant that are (expert, output, input).
    """

    node: onnx_ir.Node
    source: onnx_ir.Value
    look_up: onnx_ir.Node | None
    order: tuple[int, int, int]
    constant: onnx_ir.Value
    stored: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Of the node."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its weights."""
        return self._array().dtype

    def weights(self) -> NDArray[np.float64]:
        """Return ``[E, N, K]``."""
        return np.ascontiguousarray(self._array().transpose(self.stored)).astype(np.float64)

    def _array(self) -> NDArray[Any]:
        array = array_in(self.constant)
        assert array is not None, "layer_of looked"
        return array


def layer_of(cut: Cut, axes: ExpertAxes) -> ExpertLayer | str:
    """Return the layer whose weights are the constant of ``cut``, or why it cannot be written with shared bases."""
    node, constant = cut.node, cut.node.inputs[cut.index]
    array = array_in(constant)
    if (
        constant is None
        or array is None
        or array.ndim != 3
        or node.op_type not in ("Einsum", "Gather", "MatMul")
    ):
        return "it holds no stacked weights of layers"
    if PART_KEY in node.metadata_props:
        return "it is part of a layer that was rewritten already"
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return "its weights are no plain numbers, or NaN or infinite"
    if node.op_type == "Einsum":
        return _of_einsum(cut, constant, axes)
    if node.op_type == "MatMul":
        source = node.inputs[0]
        shape = None if source is None or source.shape is None else source.shape.dims
        if cut.index != 1 or cut.axis != -3 or source is None or source in axes.values:
            return "each of its experts reads rows of its own"
        if shape is None or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
            return "its tokens are not known to lie along one axis"
        return ExpertLayer(node, source, None, (0, 1, 2), constant, (0, 2, 1))
    reader = only_consumer(node.outputs[0])
    index = node.inputs[1]
    rank = None if index is None or index.shape is None else len(index.shape)
    if reader is None or reader.op_type != "MatMul" or reader.inputs[1] is not node.outputs[0] or rank != 2:
        return "the weights that are looked up are not read by one product"
    source = reader.inputs[0]
    shape = None if source is None or source.shape is None else source.shape.dims
    if source is None or shape is None or len(shape) != 4 or tuple(shape[1:3]) != (1, 1):
        return "each of its experts reads rows of its own"
    if int_attribute(node, "axis", 0) != 0:
        return "its experts are not looked up on the first axis"
    return ExpertLayer(reader, source, node, (0, 1, 2), constant, (0, 2, 1))


def _of_einsum(cut: Cut, constant: onnx_ir.Value, axes: ExpertAxes) -> ExpertLayer | str:
    node = cut.node
    terms, _, result = (node.attributes.get_string("equation", "") or "").replace(" ", "").partition("->")
    letters = terms.split(",")
    source = node.inputs[1 - cut.index] if len(node.inputs) == 2 else None
    if source is None or source in axes.values:
        return "each of its experts reads rows of its own"
    weight, rows = letters[cut.index], letters[1 - cut.index]
    expert, shared = weight[cut.axis], set(weight) & set(rows)
    kinds = (len(set(weight)), len(set(result)), len(set(rows)), len(shared)) == (3, 3, 2, 1)
    if not kinds or rows[-1] not in shared or expert in rows or set(result) != set(weight) ^ set(rows):
        return "its equation is no product of rows with the weights of all experts"
    (output,) = set(weight) - shared - {expert}
    stored = (weight.index(expert), weight.index(output), weight.index(rows[-1]))
    order = [(expert, rows[0], output).index(letter) for letter in result]
    return ExpertLayer(node, source, None, (order[0], order[1], order[2]), constant, stored)


class Rewriting:
    """Writes layers of experts with shared bases in standard operators.

    Args:
        model: changed in place; remove what is dead afterwards.
    """

    def __init__(self, model: Model) -> None:
        self._used = value_names(model.onnx)
        self._nodes = {node.name for graph in model.graphs() for node in graph if node.name}

    def put(self, layer: ExpertLayer, bases: Bases) -> None:
        """Put ``bases`` in the place of the weights of ``layer``."""
        count, width, columns = bases.shared.shape
        own = bases.own.transpose(0, 2, 1)
        z = self._node(layer, "MatMul", layer.source, bases.shared.reshape(-1, columns).T, name="bases")
        if layer.look_up is not None:
            result = self._looked_up(layer, z, bases)
        elif count == 1:
            result = self._node(layer, "MatMul", z, own, name="experts")
        else:
            # Bases first: then the mixtures of all experts are one product over all tokens.
            z = self._reshaped(layer, z, [-1, count, width])
            z = self._node(layer, "Transpose", z, name="by_basis", perm=[1, 0, 2])
            z = self._reshaped(layer, z, [count, -1])
            z = self._node(layer, "MatMul", bases.mixing, z, name="mixed")
            z = self._reshaped(layer, z, [len(own), -1, width])
            result = self._node(layer, "MatMul", z, own, name="experts")
        if layer.order != (0, 1, 2):
            result = self._node(layer, "Transpose", result, name="ordered", perm=list(layer.order))
        bypass(layer.node, result)

    def _looked_up(self, layer: ExpertLayer, z: onnx_ir.Value, bases: Bases) -> onnx_ir.Value:
        """``[tokens, chosen, 1, N]`` of ``z [tokens, 1, 1, M * r]``."""
        look_up = layer.look_up
        assert look_up is not None, "only then"
        index, (count, width, _) = look_up.inputs[1], bases.shared.shape
        assert index is not None, "Gather needs it"
        own = self._node(layer, "Gather", bases.own.transpose(0, 2, 1), index, name="experts_of", axis=0)
        if count > 1:
            mixing = self._node(layer, "Gather", bases.mixing[:, None], index, name="mixing_of", axis=0)
            z = self._node(
                layer, "MatMul", mixing, self._reshaped(layer, z, [0, 1, count, width]), name="mixed"
            )
        return self._node(layer, "MatMul", z, own, name="experts")

    def _reshaped(self, layer: ExpertLayer, x: onnx_ir.Value, shape: list[int]) -> onnx_ir.Value:
        return self._node(layer, "Reshape", x, np.array(shape, np.int64), name="shape")

    def _node(
        self, layer: ExpertLayer, op: str, *inputs: onnx_ir.Value | NDArray[Any], name: str, **attributes: Any
    ) -> onnx_ir.Value:
        graph, name = layer.node.graph, f"{layer.name}.{name}"
        assert isinstance(graph, onnx_ir.Graph), "routers are looked for in the main graph"
        values = [
            item if isinstance(item, onnx_ir.Value) else self._constant(graph, name, item, layer.dtype)
            for item in inputs
        ]
        node = onnx_ir.node(op, values, attributes, name=free_name(name, self._nodes))
        node.metadata_props[PART_KEY] = layer.name
        node.outputs[0].name = free_name(f"{name}.out", self._used)
        node.outputs[0].type = layer.node.outputs[0].type
        graph.insert_before(layer.node, node)
        return node.outputs[0]

    def _constant(
        self, graph: onnx_ir.Graph, name: str, array: NDArray[Any], dtype: np.dtype[Any]
    ) -> onnx_ir.Value:
        stored = np.ascontiguousarray(array).astype(array.dtype if array.dtype.kind == "i" else dtype)
        return add_constant(graph, f"{name}.weight", stored, self._used)
