"""What the rules of operators write down while the graph is walked: fields, parts, ties, freezes, edits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import numpy as np
import onnx_ir

from sparsecc.ir.axes.units import Atoms
from sparsecc.ir.trace import captured_inputs

__all__ = ["Builder", "Edit", "Field", "Part", "Role", "constant", "dims"]

Role = Literal["rows", "columns", "vector"]
Dims = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Field:
    """Axes of a tensor whose positions are known by number.

    Attributes:
        name: of the tensor.
        axes: which axes, all with more than one position as a rule; the first is the one that may be cut.
        atoms: number of each position, one array axis per entry of ``axes``. Several positions may carry one
            number: they always go together (the pixels of a channel that Flatten laid out).
    """

    name: str
    axes: tuple[int, ...]
    atoms: Atoms

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Node of the graph of coupled axes."""
        return self.name, self.axes


@dataclass(frozen=True, eq=False)
class Part:
    """An axis of a constant that follows the positions of a tensor.

    Attributes:
        value: the constant.
        axis: of the constant as stored.
        atoms: ``[size of the axis]``. Of a grouped convolution ``[groups, rows per group]`` for its rows and
            ``[groups, size of the axis]`` for its columns, since each group of rows reads channels of its own.
        role: ``rows`` of a weight that produces the positions, ``columns`` of one that consumes them, or a
            ``vector`` beside them (bias, parameters of a normalisation, depthwise kernel).
        node: first node that reads the constant so.
    """

    value: onnx_ir.Value
    axis: int
    atoms: Atoms
    role: Role
    node: onnx_ir.Node

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Node of the graph of coupled axes."""
        return f"{self.value.name}", (self.axis,)


@dataclass(frozen=True, eq=False)
class Edit:
    """A node whose own numbers (sizes, indices, group) must follow when positions go away.

    Attributes:
        node: the node.
        kind: which numbers.
        fields: of its outputs for ``reshape`` and ``split``, of its input for the others (``pad``: and output).
        axis: the axis meant, where one is; for ``slice`` its place among those listed.
    """

    node: onnx_ir.Node
    kind: Literal["reshape", "split", "slice", "gather", "pad", "group"]
    fields: tuple[Field, ...]
    axis: int = 0


class Builder:
    """The record of one walk over the main graph of a model.

    Two levels of sameness: atoms that are the *same* index (``same``), and atoms that can only be removed together
    though they differ (``tie``: the dimensions of one head). Two ways of standing still: ``fix`` forbids another
    order, ``keep`` forbids removal.
    """

    def __init__(self) -> None:
        self.count = 0
        self.fields: dict[onnx_ir.Value, tuple[Field, ...]] = {}
        self.parts: dict[tuple[onnx_ir.Value, int], Part] = {}
        self.edits: list[Edit] = []
        self.graph: nx.MultiDiGraph = nx.MultiDiGraph()
        self.same_pairs: list[tuple[Atoms, Atoms]] = []
        self.tied_pairs: list[tuple[Atoms, Atoms]] = []
        self.counted_pairs: list[tuple[Atoms, Atoms]] = []
        self.fixed: list[tuple[Atoms, str]] = []
        self.kept: list[tuple[Atoms, str]] = []
        self.single: list[tuple[Atoms, str]] = []
        self.read: set[tuple[onnx_ir.Node, int, int]] = set()

    def fresh(self, *shape: int) -> Atoms:
        """Return new atoms."""
        size = int(np.prod(shape))
        atoms = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return atoms

    def of(self, value: onnx_ir.Value | None) -> tuple[Field, ...]:
        """Return the fields of a tensor."""
        return () if value is None else self.fields.get(value, ())

    def put(
        self,
        node: onnx_ir.Node,
        value: onnx_ir.Value,
        axes: tuple[int, ...],
        atoms: Atoms,
        *origins: Field | Part,
    ) -> Field:
        """Record a field of ``value``, an output of ``node``, with what it comes from."""
        field = Field(value.name or "", axes, atoms)
        self.fields[value] = (*self.of(value), field)
        self.graph.add_node(field.key, field=field)
        for origin in origins:
            self.link(node, origin, field)
        if len(axes) > 1:
            self.tie_rows(atoms)
        return field

    def link(self, node: onnx_ir.Node, source: Field | Part, target: Field | Part) -> None:
        """Record that ``node`` couples two axes."""
        self.graph.add_edge(source.key, target.key, op=node.op_type, node=node.name or node.outputs[0].name)

    def part(
        self, node: onnx_ir.Node, index: int, axis: int, atoms: Atoms, role: Role, *fields: Field
    ) -> Part | None:
        """Record that an axis of constant input ``index`` follows ``atoms``; None, and a freeze, if it cannot."""
        value = node.inputs[index]
        shape = None if value is None else constant(value)
        if value is None or shape is None:
            self.freeze(atoms, f"{_name(node)} reads something there that is no constant")
            return None
        axis %= len(shape)
        if shape[axis] != (atoms.shape[-1] if role == "columns" else atoms.size):
            self.freeze(atoms, f"{value.name!r} of {_name(node)} has another size")
            return None
        self.read.add((node, index, axis))
        known = self.parts.get((value, axis))
        if known is not None and known.atoms.shape != atoms.shape:
            self.freeze(atoms, f"{value.name!r} is shared by nodes that see it differently")
            self.freeze(known.atoms, f"{value.name!r} is shared by nodes that see it differently")
            return None
        if known is not None:
            self.same(known.atoms, atoms)
        part = known or Part(value, axis, atoms, role, node)
        if role != "vector" and part.role == "vector":
            part = Part(value, axis, part.atoms, role, node)
        self.parts[value, axis] = part
        self.graph.add_node(part.key, part=part)
        for field in fields:
            self.link(node, field, part)
        return part

    def same(self, left: Atoms, right: Atoms) -> None:
        """Make equally placed atoms one and the same index."""
        left, right = np.broadcast_arrays(left, right)
        self.same_pairs.append((left, right))

    def tie_rows(self, atoms: Atoms, rows: Atoms | None = None) -> None:
        """Let atoms with the same first index, and the rows of ``rows``, only be removed together."""
        flat = atoms.reshape(len(atoms), -1)
        self.tied_pairs.append(tuple(np.broadcast_arrays(flat[:, :1], flat)))  # type: ignore[arg-type]
        if rows is not None:
            other = rows.reshape(len(rows), -1)
            self.tied_pairs.append((flat[:, 0], other[:, 0]))

    def count_alike(self, atoms: Atoms, groups: int) -> None:
        """Let the k-th position of every group leave with those of the others: each keeps equally many."""
        by_group = atoms.reshape(groups, -1)
        self.counted_pairs.append(tuple(np.broadcast_arrays(by_group[:1], by_group)))  # type: ignore[arg-type]

    def rows_of(self, field: Field) -> Atoms:
        """Return one new atom per first index of a field, tied to its row, in fixed order."""
        rows = self.fresh(len(field.atoms))
        self.tie_rows(field.atoms, rows)
        self.fix(rows, "whole rows of a grid keep their order")
        return rows

    def fix(self, atoms: Atoms, reason: str) -> None:
        """Forbid another order of these positions."""
        self.fixed.append((atoms, reason))

    def keep(self, atoms: Atoms, reason: str) -> None:
        """Forbid the removal of these positions."""
        self.kept.append((atoms, reason))

    def once(self, atoms: Atoms, at: int, reason: str) -> None:
        """Fix the order of what stands more than once along axis ``at``: the copies may not be told apart behind."""
        self.single += [(line, reason) for line in np.moveaxis(atoms, at, -1).reshape(-1, atoms.shape[at])]

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """Forbid both."""
        self.fix(atoms, reason)
        self.keep(atoms, reason)

    def freeze_inputs(self, node: onnx_ir.Node, reason: str) -> None:
        """Freeze all fields that ``node`` reads, in bodies of it too."""
        self.freeze_values(captured_inputs(node), reason)

    def freeze_values(self, values: Iterable[onnx_ir.Value | None], reason: str) -> None:
        """Freeze all fields of some tensors."""
        for value in values:
            for field in self.of(value):
                self.freeze(field.atoms, reason)

    def edit(self, node: onnx_ir.Node, kind: str, fields: Iterable[Field], axis: int = 0) -> None:
        """Record that numbers of ``node`` follow a removal."""
        self.edits.append(Edit(node, kind, tuple(fields), axis))  # type: ignore[arg-type]


def constant(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of an initialiser that no caller can override, or None."""
    if value is None or value.is_graph_input() or not value.is_initializer() or value.const_value is None:
        return None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def dims(value: onnx_ir.Value | None) -> Dims | None:
    """Return the sizes of a tensor, None for each that is not known; None if the rank is not."""
    if (shape := constant(value)) is not None:
        return shape
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape.dims)


def _name(node: onnx_ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"
