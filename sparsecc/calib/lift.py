"""Bringing tensors out of the bodies of If, Loop and Scan into the main graph of a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir.names import free_name, value_names

__all__ = ["SHAPE_LENGTH", "LiftError", "Lifted", "Lifter", "twins"]

_GRAPH = onnx_ir.AttributeType.GRAPH


#: Length of a lifted shape: the rank, then the sizes; of a branch not taken the rank is -1.
SHAPE_LENGTH = 10


class LiftError(Exception):
    """A tensor cannot be brought out; the text is the reason."""


@dataclass(frozen=True)
class Lifted:
    """A tensor of a body as it shows in the main graph.

    Attributes:
        value: the tensor of the main graph.
        stacked: leading axes that count the rounds of Loop and Scan, outermost first.
    """

    value: onnx_ir.Value
    stacked: int


class Lifter:
    """Adds outputs to the nodes around bodies, so that what is computed inside can be read outside.

    Args:
        root: the main graph; it is changed.
        taken: names in use in the whole model; those of new values are added.
    """

    def __init__(self, root: onnx_ir.Graph, taken: set[str]) -> None:
        self._root = root
        self._taken = taken
        self._holders = {id(body): node for node, body in _bodies(root)}

    @classmethod
    def of(cls, model: onnx_ir.Model) -> Lifter:
        """Return the one for the main graph of ``model``."""
        return cls(model.graph, value_names(model))

    def shape_of(self, value: onnx_ir.Value) -> Lifted:
        """Return the shape of ``value`` as a tensor of the main graph, int64, ``SHAPE_LENGTH`` long.

        Raises:
            LiftError: the value is in a function, or in the body of another operator.
        """
        graph = self._graph_of(value)
        # The same length whatever the rank: what a loop stacks must be alike in every round.
        shape = self._add(graph, "Shape", [value])
        rank = self._add(graph, "Shape", [shape])
        padding = self._constant(graph, np.full(SHAPE_LENGTH, -1, np.int64))
        first = self._constant(graph, np.arange(SHAPE_LENGTH))
        padded = self._add(graph, "Concat", [rank, shape, padding], axis=0)
        return self._lift(graph, self._add(graph, "Gather", [padded, first]), padding)

    def copy_of(
        self, value: onnx_ir.Value, dtype: np.dtype[Any], reader: onnx_ir.Node | None = None
    ) -> Lifted:
        """Return ``value``, of type ``dtype``, as a tensor of the main graph.

        A branch of If that is not taken gives a vector without elements instead. With ``reader``, which may be
        in a body further inside, that is the branch it is in: the value counts where it is read.

        Raises:
            LiftError: as ``shape_of``; or the value is in a branch in a loop, where not every round computes it.
        """
        graph = self._graph_of(value if reader is None else reader.outputs[0])
        around = [holder.op_type for holder in self._around(graph)]
        if "If" in around and set(around[around.index("If") :]) != {"If"}:
            raise LiftError("it is inside a branch in a loop")
        out = self._add(graph, "Identity", [value], dtype=dtype)
        return self._lift(graph, out, self._constant(graph, np.zeros(0, dtype)))

    def _graph_of(self, value: onnx_ir.Value) -> onnx_ir.Graph:
        graph = value.graph
        if not isinstance(graph, onnx_ir.Graph) or (
            graph is not self._root and id(graph) not in self._holders
        ):
            raise LiftError("it is inside a function body, whose tensors onnxruntime does not return")
        for holder in self._around(graph):
            if holder.domain != "" or holder.op_type not in ("If", "Loop", "Scan"):
                raise LiftError(f"it is inside {holder.op_type}, whose tensors onnxruntime does not return")
            if {"scan_output_axes", "scan_output_directions"} & set(holder.attributes):
                raise LiftError("it is inside a Scan that stacks its outputs in its own way")
        return graph

    def _around(self, graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
        """Yield the nodes in whose bodies ``graph`` is, innermost first."""
        while graph is not self._root:
            holder = self._holders[id(graph)]
            yield holder
            graph = _graph_around(holder)

    def _lift(self, graph: onnx_ir.Graph, value: onnx_ir.Value, otherwise: onnx_ir.Value) -> Lifted:
        """Hand ``value`` of ``graph`` on outwards; where a branch is not taken the constant ``otherwise``."""
        stacked = 0
        assert otherwise.const_value is not None
        nothing = otherwise.const_value.numpy()
        for holder in self._around(graph):
            for attribute in holder.attributes.values():
                if attribute.type == _GRAPH:
                    body = attribute.as_graph()
                    body.outputs.append(value if body is graph else self._constant(body, nothing))
            holder.resize_outputs(len(holder.outputs) + 1)
            value = self._named(holder.outputs[-1], nothing.dtype)
            stacked += holder.op_type != "If"
            graph = _graph_around(holder)
        return Lifted(value, stacked)

    def _add(
        self,
        graph: onnx_ir.Graph,
        op: str,
        inputs: Sequence[onnx_ir.Value],
        dtype: Any = np.int64,
        **attributes: Any,
    ) -> onnx_ir.Value:
        node = onnx_ir.node(op, inputs, attributes)
        graph.append(node)
        return self._named(node.outputs[0], np.dtype(dtype))

    def _constant(self, graph: onnx_ir.Graph, array: NDArray[Any]) -> onnx_ir.Value:
        tensor = onnx_ir.Tensor(array)
        value = self._add(graph, "Constant", [], array.dtype, value=tensor)
        value.const_value = tensor
        return value

    def _named(self, value: onnx_ir.Value, dtype: np.dtype[Any]) -> onnx_ir.Value:
        value.name = free_name("sparsecc_lifted", self._taken)
        value.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(dtype))
        return value


def _graph_around(node: onnx_ir.Node) -> onnx_ir.Graph:
    assert isinstance(node.graph, onnx_ir.Graph)
    return node.graph


def twins(ours: onnx_ir.Graph, theirs: onnx_ir.Graph) -> dict[onnx_ir.Value, onnx_ir.Value]:
    """Return, for each value of ``ours`` and the bodies in it, the one it was copied to in ``theirs``."""
    found = dict(zip(ours.inputs, theirs.inputs, strict=True))
    found.update((value, theirs.initializers[name]) for name, value in ours.initializers.items())
    for mine, copied in zip(ours, theirs, strict=True):
        found.update(zip(mine.outputs, copied.outputs, strict=True))
        for name, attribute in mine.attributes.items():
            if attribute.type == _GRAPH and not attribute.is_ref():
                found.update(twins(attribute.as_graph(), copied.attributes[name].as_graph()))
    return found


def _bodies(graph: onnx_ir.Graph) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Graph]]:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == _GRAPH and not attribute.is_ref():
                body = attribute.as_graph()
                yield node, body
                yield from _bodies(body)
