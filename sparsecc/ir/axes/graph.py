"""The graph of coupled axes of a model: what must be permuted or cut together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir.axes.builder import Builder, Edit, Part
from sparsecc.ir.axes.rules import RULES, SEVERAL_INPUTS, place
from sparsecc.ir.axes.shape_rules import SHAPE_RULES
from sparsecc.ir.axes.units import Atoms, components
from sparsecc.ir.model import Model

__all__ = ["AxisGraph", "Orbit", "known_shapes"]

Level = Literal["order", "removal"]


@dataclass(frozen=True, eq=False)
class Orbit:
    """Units that stand in the same places of the same constants, so that each can take the place of another.

    A unit is an index shared by all coupled axes: a neuron of a feed-forward layer, a channel of a residual stream,
    an attention head with all its dimensions.

    Attributes:
        name: of the first node whose weight produces the units.
        units: their numbers, in the order of the first part.
        parts: the constants in which they stand, producers first.
        reason: why they cannot be reordered (or removed); None if they can.
    """

    name: str
    units: Atoms
    parts: tuple[Part, ...]
    reason: str | None

    def consumers(self) -> list[Part]:
        """The weights whose columns are these units."""
        return [part for part in self.parts if part.role == "columns"]


class AxisGraph:
    """Which axes of which constants are coupled, found by one walk over the main graph.

    An operator that no rule knows, a body, a quantised weight or anything else that is not followed freezes the
    positions it touches, with the reason; a wrong guess is never made.

    Attributes:
        graph: networkx multigraph; nodes are (tensor or constant, axes), edges the operators between them.
        parts: axes of constants that follow.
        edits: nodes whose own numbers must follow a removal.
    """

    def __init__(self, model: Model) -> None:
        builder = Builder()
        with known_shapes(model):
            for node in model.onnx.graph:
                _visit(builder, node)
            _freeze_ends(builder, model)
        self.graph: nx.MultiDiGraph = builder.graph
        self.parts = tuple(builder.parts.values())
        self.edits: tuple[Edit, ...] = tuple(builder.edits)
        self._fields = [field.atoms for fields in builder.fields.values() for field in fields]
        self.order = components(builder.count, builder.same_pairs)
        tied = [*builder.same_pairs, *builder.tied_pairs]
        self.removal = components(builder.count, [*tied, *builder.counted_pairs])
        _fix_ambiguous(builder, self.order)
        self._rows = _rows(self.order, components(builder.count, tied))
        self._fixed = _reasons(self.order, builder.fixed)
        self._kept = _reasons(self.removal, builder.kept)

    def units(self, atoms: Atoms, level: Level) -> Atoms:
        """Return the unit of each atom: what can be reordered, or removed, as one."""
        return (self.order if level == "order" else self.removal)[atoms]

    def orbits(self, level: Level) -> list[Orbit]:
        """Return all orbits in the order of the model, the frozen ones with the reason."""
        reasons = self._fixed if level == "order" else self._kept
        labels = self.removal if level == "removal" else self.order
        # What goes through other tensors is computed otherwise: it cannot change places, nor leave them empty.
        seen = _signatures(self._lines(labels, level), seed=1)
        found = []
        for members in nx.weakly_connected_components(self.graph):
            parts = [part for part in self.parts if part.key in members]
            for group in _same_places(parts, labels, seen, None if level == "removal" else self._rows):
                found.append(self._orbit(group, parts, level, reasons))
        first = {id(part): number for number, part in enumerate(self.parts)}
        return sorted(found, key=lambda orbit: (first[id(orbit.parts[0])], int(orbit.units[0])))

    def _lines(self, labels: Atoms, level: Level) -> Iterator[Atoms]:
        """The units of each tensor; for their order those of each row of a grid, which may be cut anew by a Reshape."""
        for atoms in self._fields:
            split = level == "order" and atoms.ndim > 1
            yield from labels[atoms].reshape(len(atoms) if split else 1, -1)

    def _orbit(self, units: Atoms, parts: list[Part], level: Level, reasons: dict[int, str]) -> Orbit:
        standing = [part for part in parts if np.isin(units, self.units(part.atoms, level)).any()]
        standing.sort(key=lambda part: ("rows", "vector", "columns").index(part.role))
        reason = next((reasons[unit] for unit in units.tolist() if unit in reasons), None)
        node = standing[0].node
        places = self.units(standing[0].atoms, level).ravel()
        ordered = places[np.sort(np.unique(places, return_index=True)[1])]
        name = node.name or node.outputs[0].name or node.op_type
        return Orbit(name, ordered[np.isin(ordered, units)], tuple(standing), reason)


@contextlib.contextmanager
def known_shapes(model: Model) -> Iterator[None]:
    """Infer shapes for the walk only: looking at a model must not change it."""
    values = [value for graph in model.graphs() for node in graph for value in node.outputs]
    before = [(value, value.shape, value.type) for value in values]
    model.infer_shapes()
    try:
        yield
    finally:
        for value, shape, type_ in before:
            value.shape, value.type = shape, type_


def _visit(b: Builder, node: onnx_ir.Node) -> None:
    rule = RULES.get(node.op_type) or SHAPE_RULES.get(node.op_type)
    bodies = any(
        attribute.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    )
    refs = any(attribute.is_ref() for attribute in node.attributes.values())
    if rule is None or bodies or refs or node.domain not in ("", "ai.onnx") or not node.outputs:
        b.freeze_inputs(node, f"{place(node)} is not followed")
        return
    rule(b, node)
    if node.op_type not in SEVERAL_INPUTS:
        b.freeze_values(node.inputs[1:], f"{place(node)} reads it as a setting")
    if node.op_type not in SHAPE_RULES and any(
        value.uses() or value.is_graph_output() for value in node.outputs[1:]
    ):
        b.freeze_values(node.inputs, f"{place(node)} has further outputs that are read")


def _freeze_ends(b: Builder, model: Model) -> None:
    """Outputs keep their form, and so do constants that someone else reads too."""
    for value in model.onnx.graph.outputs:
        for field in b.of(value):
            b.freeze(field.atoms, f"it is the output {value.name!r}")
    for part in b.parts.values():
        others = [use.node for use in part.value.uses() if (use.node, use.idx, part.axis) not in b.read]
        if others or part.value.is_graph_output():
            reader = place(others[0]) if others else "the caller"
            b.freeze(part.atoms, f"{part.value.name!r} is read by {reader} too, which is not followed")


def _fix_ambiguous(b: Builder, order: Atoms) -> None:
    """Different positions that are one unit, in one constant or where copies are cut apart: what goes where would be a
    guess.
    """
    for part in b.parts.values():
        atoms = np.unique(part.atoms)
        units, counts = np.unique(order[atoms], return_counts=True)
        if (counts > 1).any():
            b.fix(units[counts > 1], f"several positions of {part.value.name!r} are one and the same")
    for line, reason in b.single:
        units, counts = np.unique(order[line], return_counts=True)
        if (counts > 1).any():
            b.fix(units[counts > 1], reason)


def _reasons(labels: Atoms, frozen: list[tuple[Atoms, str]]) -> dict[int, str]:
    """The first reason of each unit."""
    reasons: dict[int, str] = {}
    for atoms, reason in frozen:
        for unit in np.unique(labels[atoms]).tolist():
            reasons.setdefault(unit, reason)
    return reasons


def _rows(order: Atoms, removal: Atoms) -> dict[int, int]:
    """The row (head) of each unit of a grid: another order is the same function within a row only."""
    units, first = np.unique(order, return_index=True)
    rows = removal[first]
    several, counts = np.unique(rows, return_counts=True)
    inside = np.isin(rows, several[counts > 1])
    return dict(zip(units[inside].tolist(), rows[inside].tolist(), strict=True))


def _same_places(
    parts: list[Part], labels: Atoms, seen: dict[int, int], rows: dict[int, int] | None
) -> Iterator[NDArray[np.int64]]:
    """Groups of units that stand equally often in the same constants, groups of their rows, tensors (a number of which
    ones is given) and rows of a grid.
    """
    lines = (row for part in parts for row in labels[part.atoms].reshape(-1, part.atoms.shape[-1]))
    groups: dict[tuple[int, int, int], list[int]] = {}
    for unit, signature in _signatures(lines, seed=0).items():
        groups.setdefault((signature, seen.get(unit, 0), (rows or {}).get(unit, -1)), []).append(unit)
    for members in groups.values():
        yield np.array(sorted(members), np.int64)


def _signatures(lines: Iterable[Atoms], seed: int) -> dict[int, int]:
    """A number for the lines in which each unit stands: two sets of lines agree by chance once in 2^62."""
    keys = np.random.default_rng(seed)
    found: dict[int, int] = {}
    for line in lines:
        key = int(keys.integers(1, 1 << 62)) | 1
        units, counts = np.unique(line, return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            found[unit] = (found.get(unit, 0) + key * count) % (1 << 62)
    return found
