"""Store the cuts of constant sparse operands, so that nobody searches for them when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparsecc.algebra import SplitTable, Tensor, Walk, split
from sparsecc.errors import SparseccError, SpecError
from sparsecc.ir import Model, name_matches
from sparsecc.ir.constant_patterns import constant_pattern, csr_pattern
from sparsecc.ir.cuts import store_cuts
from sparsecc.ir.ops_algebra import EINSUMS
from sparsecc.ir.packed import is_linear, packed_weight
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.passes.partition.regions import fitting_parts, footprint_of, largest_set, regions
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["Partition"]

_MOST_PARTS = 4096
_SHAPE = 3  # the input behind positions, coordinates and values


@dataclass(frozen=True)
class Partition(Pass):
    """Cut the work of products with constant sparse patterns into equal parts, once and for all.

    Changes: nodes ``SparseEinsum``, ``SparseEinsumVector`` and ``SparseEinsumSampled`` whose pattern is constant get
    the attribute ``cuts``: rows and entries before each part, a row and an entry counting one step each. A part has at
    most ``ceil(work / parts)`` steps. The number of parts is a power of two, so that every smaller one is in the table
    as well; kernels take as many as the work is worth. Sums may be added up in another order, nothing else changes.

    ``fit=l2`` makes parts smaller where they do not fit the second-level cache of the target: products over equal
    patterns that are joined by what flows between them (a graph network's layers, scores and weights of attention)
    get one table of as many parts as it takes for all that a part of them reads and writes.

    Packed weights (``SparseMatMul`` and others) are dealt by the library when a session packs them, for the instruction
    set that is found then, more evenly than by any table (ADR 0048). ``packed=true`` stores one beside them, for
    devices whose kernels read it: rows and blocks (or single weights) of the stored form before each part. For the
    target ``cuda`` this is done in any case. The library does not look at it.

    Sample: ``partition{parts=16}``

    Attributes:
        parts: how many, a power of two of at most 4096; the least where ``fit`` asks for more.
        fit: ``l2``: parts fit the second-level cache of the target.
        packed: store tables of packed weights too.
        match: which nodes: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "partition"
    lossless: ClassVar[bool] = True

    parts: int = 64
    fit: Literal["none", "l2"] = "none"
    packed: bool = False
    match: str = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.parts <= _MOST_PARTS or self.parts & (self.parts - 1):
            raise SpecError(
                f"partition: parts must be a power of two of at most {_MOST_PARTS}, got {self.parts}"
            )

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Cut every node that matches."""
        report = PassReport(self.name)
        shapes = _Shapes(model)
        for graph in model.graphs():
            nodes = [
                node for node in graph if node.domain == DOMAIN and name_matches(self.match, str(node.name))
            ]
            patterns = dict(_patterns([node for node in nodes if node.op_type in EINSUMS], report))
            groups = regions(graph, patterns) if self.fit == "l2" else ([node] for node in patterns)
            for group in groups:
                self._cut(group, patterns[group[0]], ctx, shapes, report)
            for node in nodes:
                if is_linear(node):
                    self._cut_packed(node, ctx, report)
        return report

    def _cut(
        self, group: Sequence[ir.Node], pattern: Tensor, ctx: PassContext, shapes: _Shapes, report: PassReport
    ) -> None:
        """One table for products over one pattern."""
        parts, detail, numbers = self.parts, "", dict[str, int]()
        if self.fit == "l2":
            parts, detail, numbers = self._fitting(group, pattern, ctx, shapes)
        table = split([Walk.of(pattern)], parts)
        if len(group) > 1:
            detail += f"; one table for {', '.join(str(node.name) for node in group)}"
        for node in group:
            _store(node, table, detail, numbers, report)

    def _fitting(
        self, group: Sequence[ir.Node], pattern: Tensor, ctx: PassContext, shapes: _Shapes
    ) -> tuple[int, str, dict[str, int]]:
        """How many parts fit the cache, what is to be said about it, and figures."""
        positions = group[0].inputs[0]
        assert positions is not None, "its pattern has been read"
        wide = positions.dtype != ir.DataType.INT32
        footprint = footprint_of(group, 8 if wide else 4, shapes.width)
        if footprint is None:
            return self.parts, "; how much a part touches depends on shapes that are not known", {}
        cache = ctx.target.resolved().l2_bytes or 0
        finest = split([Walk.of(pattern)], _MOST_PARTS)
        least = fitting_parts(pattern, finest, footprint, cache)
        parts = max(self.parts, least or _MOST_PARTS)
        numbers = {"set_bytes": largest_set(pattern, finest, footprint, parts), "cache_bytes": cache}
        return parts, "" if least else "; not even so many fit the cache", numbers

    def _cut_packed(self, node: ir.Node, ctx: PassContext, report: PassReport) -> None:
        name = str(node.name)
        if not self.packed and ctx.target.name != "cuda":
            reason = (
                "the library deals packed weights itself, more evenly than a table (packed=true stores one)"
            )
            return report.skip(name, reason)
        try:
            pattern = _packed_pattern(node)
        except SparseccError as error:
            return report.skip(name, f"its weight is malformed: {error}")
        return _store(node, split([Walk.of(pattern)], self.parts), " for kernels that read it", {}, report)


def _store(
    node: ir.Node, table: SplitTable, detail: str, numbers: dict[str, int], report: PassReport
) -> None:
    if not store_cuts(node, table.cursors[0]):
        return report.skip(str(node.name), "it is cut like that already")
    return report.change(
        str(node.name), f"cut into {table.parts} parts{detail}", parts=table.parts, work=table.work,
        max=int(table.part_work().max()), balance=table.balance, **numbers,
    )  # fmt: skip


class _Shapes:
    """Shapes of a model's tensors as far as they can be known, found when somebody asks; the model stays as it is."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._widths: dict[str, int] | None = None

    def width(self, value: ir.Value) -> int | None:
        """How long the last dimension is."""
        if self._widths is None:
            inferred = self._model.copy()
            inferred.infer_shapes()
            self._widths = {
                str(found.name): found.shape[-1]
                for graph in inferred.graphs()
                for found in _values(graph)
                if found.shape is not None and len(found.shape) and isinstance(found.shape[-1], int)
            }
        return self._widths.get(str(value.name))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _patterns(nodes: Sequence[ir.Node], report: PassReport) -> Iterator[tuple[ir.Node, Tensor]]:
    """Products with their patterns; why others have none is reported."""
    for node in nodes:
        try:
            pattern = constant_pattern((*node.inputs[:2], node.inputs[_SHAPE]))
        except SparseccError as error:
            report.skip(str(node.name), f"its components are malformed: {error}")
            continue
        if pattern is None:
            report.skip(str(node.name), "its pattern is computed when the model runs, and so are its cuts")
        else:
            yield node, pattern


def _packed_pattern(node: ir.Node) -> Tensor:
    """Rows of blocks, or of single weights, of a packed weight as they are in the file."""
    weight = packed_weight(node)
    places = weight.validate()
    rows, columns = weight.pattern.grid(weight.shape)
    positions = np.searchsorted(places, np.arange(rows + 1) * columns)
    return csr_pattern(rows, columns, positions, places % max(columns, 1))
