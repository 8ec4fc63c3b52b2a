"""Every place of a model that holds a tensor, to read or swap tensors without touching the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir

__all__ = ["Slot", "Tensor", "all_graphs", "stub", "swapped", "tensor_slots"]

Tensor: TypeAlias = "onnx_ir.TensorProtocol"

_TENSOR = onnx_ir.AttributeType.TENSOR
_TENSORS = onnx_ir.AttributeType.TENSORS


@dataclass(frozen=True, eq=False)
class Slot:
    """An initializer (``owner`` is its value) or a tensor attribute (``owner`` is the node)."""

    owner: onnx_ir.Value | onnx_ir.Node
    attribute: str = ""
    index: int = 0

    @property
    def is_initializer(self) -> bool:
        """Whether ONNX lets the tensor live in an external file everywhere, as it does for initializers."""
        return isinstance(self.owner, onnx_ir.Value)

    def get(self) -> Tensor:
        """Return the tensor held now."""
        if isinstance(self.owner, onnx_ir.Value):
            assert self.owner.const_value is not None
            return self.owner.const_value
        attr = self.owner.attributes[self.attribute]
        return attr.as_tensor() if attr.type == _TENSOR else attr.as_tensors()[self.index]

    def set(self, tensor: Tensor) -> None:
        """Hold ``tensor`` from now on; copies of the model that shared the old one keep it."""
        if isinstance(self.owner, onnx_ir.Value):
            self.owner.const_value = tensor
            return
        attr = self.owner.attributes[self.attribute]
        value: Tensor | tuple[Tensor, ...] = tensor
        if attr.type == _TENSORS:
            value = (*attr.as_tensors()[: self.index], tensor, *attr.as_tensors()[self.index + 1 :])
        self.owner.attributes[self.attribute] = onnx_ir.Attr(
            self.attribute, attr.type, value, doc_string=attr.doc_string
        )


def all_graphs(model: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    """Yield the main graph, then function bodies, each followed by the bodies of its If, Loop and Scan."""
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        yield root
        yield from root.subgraphs()


def tensor_slots(model: onnx_ir.Model) -> Iterator[Slot]:
    """Yield every slot of every graph: initializers in stored order, then attributes in node order."""
    for graph in all_graphs(model):
        for value in tuple(graph.initializers.values()):
            if value.const_value is not None:
                yield Slot(value)
        for node in graph:
            yield from _attribute_slots(node)


def _attribute_slots(node: onnx_ir.Node) -> Iterator[Slot]:
    for name, attr in tuple(node.attributes.items()):
        if attr.is_ref():
            continue
        if attr.type == _TENSOR:
            yield Slot(node, name)
        elif attr.type == _TENSORS:
            yield from (Slot(node, name, index) for index in range(len(attr.as_tensors())))


@contextlib.contextmanager
def swapped(model: onnx_ir.Model, place: Callable[[Slot, Tensor], Tensor]) -> Iterator[None]:
    """Hold ``place(slot, tensor)`` in every slot inside the block; the former tensors come back after it."""
    changed: list[tuple[Slot, Tensor]] = []
    try:
        for slot in tensor_slots(model):
            old = slot.get()
            if (new := place(slot, old)) is not old:
                changed.append((slot, old))
                slot.set(new)
        yield
    finally:
        for slot, old in changed:
            slot.set(old)


def stub(tensor: Tensor, *, empty: bool = False) -> Tensor:
    """Return a tensor of the same name, type and shape that serialises to one element.

    ``empty`` gives shape [0] instead: onnx.checker, unlike shape inference, compares bytes with shape.
    """
    if tensor.dtype == onnx_ir.DataType.STRING:
        return tensor
    return onnx_ir.Tensor(
        np.zeros(1 if tensor.size and not empty else 0, tensor.dtype.numpy()),
        dtype=tensor.dtype,
        shape=onnx_ir.Shape([0] if empty else tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
