"""Planes of bits that weights are stacked of, in the order of what they are worth: a model of several sizes.

``factor-bitstack`` stores each plane as three initialisers and says in the metadata which site the planes belong to,
the most useful one first. A weight is the sum of the planes that its Concat nodes list, so that a smaller model is the
same graph with the last planes left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from sparsecc.errors import ModelError

if TYPE_CHECKING:
    from sparsecc.ir.model import Model

__all__ = ["PARTS", "Planes", "plane_name"]

_KEY = "sparsecc.planes"

_AGAIN = "start from the file that factor-bitstack wrote"

#: What a plane consists of: packed signs, and the factors of the magnitudes.
PARTS = ("signs", "left", "right")


def plane_name(place: int, part: str) -> str:
    """Return the name of the initialiser with a part of the plane at ``place``; names sort as places do."""
    return f"plane.{place:06d}.{part}"


@dataclass(frozen=True)
class Planes:
    """The planes of a model.

    Attributes:
        sites: names of the sites that are stacked of planes.
        order: for each plane, the most useful first, the index of its site. Every site has one among the first
            ``len(sites)``.
    """

    sites: tuple[str, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, model: Model) -> Planes | None:
        """Return the planes of ``model``, or None if it has none.

        Raises:
            ModelError: the graph is not what the metadata says.
        """
        text = model.metadata.get(_KEY)
        if text is None:
            return None
        try:
            document = json.loads(text)
            sites, order = tuple(document["sites"]), tuple(document["order"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ModelError(f"its metadata '{_KEY}' does not parse: {_AGAIN}") from None
        numbers = all(type(item) is int and 0 <= item < len(sites) for item in order)
        if not numbers or not all(isinstance(name, str) for name in sites):
            raise ModelError(f"its metadata '{_KEY}' is no list of sites and places: {_AGAIN}")
        if sorted(order[: len(sites)]) != list(range(len(sites))):
            raise ModelError(f"its metadata '{_KEY}' does not begin with a plane of every site: {_AGAIN}")
        found = cls(sites, order)
        for part in PARTS:
            _check_stacks(model, order, part)
        return found

    def describe(self, model: Model) -> None:
        """Write these planes into the metadata of ``model``."""
        model.metadata[_KEY] = json.dumps({"sites": self.sites, "order": self.order}, separators=(",", ":"))

    def first(self, model: Model, count: int) -> Model:
        """Return a model with the first ``count`` planes, which shares all weights with ``model``.

        Args:
            model: whose planes these are.
            count: between ``len(sites)`` and ``len(order)``.
        """
        smaller = model.copy()
        for place in range(count, len(self.order)):
            for part in PARTS:
                value, reader = _reader(smaller, place, part)
                kept = [item for item in reader.inputs if item is not value]
                for at, item in enumerate(kept):
                    reader.replace_input_with(at, item)
                reader.resize_inputs(len(kept))
                _forget_shapes(reader)
                assert value.graph is not None, "an initialiser"
                del value.graph.initializers[str(value.name)]
        Planes(self.sites, self.order[:count]).describe(smaller)
        return smaller

    def largest(self, model: Model, nbytes: int, path: Path) -> int | None:
        """Return the most planes with which the files at ``path`` take ``nbytes``, or None if the fewest take more."""
        low, high = len(self.sites) - 1, len(self.order)
        while low < high:
            middle = (low + high + 1) // 2
            if self.first(model, middle).written_nbytes(path) <= nbytes:
                low = middle
            else:
                high = middle - 1
        return low if low >= len(self.sites) else None


def _check_stacks(model: Model, order: Sequence[int], part: str) -> None:
    """Check that one Concat per site lists this part of its planes, the most useful first, and nothing else.

    Raises:
        ModelError: that is not so.
    """
    stacks: dict[int, list[onnx_ir.Value]] = {}
    readers: dict[int, onnx_ir.Node] = {}
    for place, site in enumerate(order):
        value, reader = _reader(model, place, part)
        stacks.setdefault(site, []).append(value)
        if readers.setdefault(site, reader) is not reader:
            raise ModelError(f"plane '{value.name}' is not with the others of its site: {_AGAIN}")
    for site, planes in stacks.items():
        if list(readers[site].inputs) != planes:
            raise ModelError(f"'{readers[site].name}' reads other planes than its metadata says: {_AGAIN}")


def _reader(model: Model, place: int, part: str) -> tuple[onnx_ir.Value, onnx_ir.Node]:
    """Return the initialiser with a part of a plane and the Concat that reads it.

    Raises:
        ModelError: there is none, something else reads it, or it is a result of the model.
    """
    name = plane_name(place, part)
    value = next((graph.initializers[name] for graph in model.graphs() if name in graph.initializers), None)
    uses = [] if value is None else list(value.uses())
    if value is None or len(uses) != 1 or uses[0].node.op_type != "Concat" or value.is_graph_output():
        raise ModelError(f"plane '{name}' is not where its metadata says: {_AGAIN}")
    return value, uses[0].node


def _forget_shapes(node: onnx_ir.Node) -> None:
    """Drop the shapes that count planes: all from ``node`` to the Einsum that adds planes up."""
    behind = [node]
    while behind:
        for value in behind.pop().outputs:
            value.shape = None
            behind += [use.node for use in value.uses() if use.node.op_type in ("Cast", "Gather")]
