"""Store the cuts of constant sparse operands, so that nobody searches for them when the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.algebra import Compressed, Dense, Tensor, Walk, split
from sparsecc.errors import SparseccError, SpecError
from sparsecc.ir import Model, name_matches
from sparsecc.ir.ops_algebra import CUTS, EINSUMS
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["Partition"]

_MOST_PARTS = 4096
_COMPONENTS = 3  # inputs that must be constant: positions, coordinates and, behind the values, shape


@dataclass(frozen=True)
class Partition(Pass):
    """Cut the work of products with constant sparse patterns into equal parts, once and for all.

    Changes: nodes ``SparseEinsum``, ``SparseEinsumVector`` and ``SparseEinsumSampled`` whose pattern is constant get
    the attribute ``cuts``: rows and entries before each part, a row and an entry counting one step each. A part has at
    most ``ceil(work / parts)`` steps. The number of parts is a power of two, so that every smaller one is in the table
    as well; kernels take as many as the work is worth. Sums may be added up in another order, nothing else changes.

    Packed weights (``SparseMatMul`` and others) are dealt when a session packs them, for the instruction set that is
    found then (ADR 0016): there is nothing to store.

    Sample: ``partition{parts=16}``

    Attributes:
        parts: how many, a power of two of at most 4096.
        match: which nodes: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "partition"
    lossless: ClassVar[bool] = True

    parts: int = 64
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
        for graph in model.graphs():
            for node in graph:
                if (
                    node.domain == DOMAIN
                    and node.op_type in EINSUMS
                    and name_matches(self.match, str(node.name))
                ):
                    self._cut(node, report)
        return report

    def _cut(self, node: ir.Node, report: PassReport) -> None:
        name = str(node.name)
        try:
            pattern = _pattern(node)
        except SparseccError as error:
            return report.skip(name, f"its components are malformed: {error}")
        if pattern is None:
            return report.skip(name, "its pattern is computed when the model runs, and so are its cuts")
        table = split([Walk.of(pattern)], self.parts)
        cuts = table.cursors[0].reshape(-1).tolist()  # rows, then entries
        old = node.attributes.get(CUTS)
        if old is not None and old.type == ir.AttributeType.INTS and list(old.as_ints()) == cuts:
            return report.skip(name, "it is cut like that already")
        node.attributes[CUTS] = ir.AttrInt64s(CUTS, cuts)
        return report.change(
            name, f"cut into {self.parts} parts", work=table.work, max=int(table.part_work().max()),
            balance=table.balance,
        )  # fmt: skip


def _pattern(node: ir.Node) -> Tensor | None:
    """The pattern as a CSR matrix, checked; None if it is not constant."""
    arrays: list[NDArray[np.int64]] = []
    for value in (*node.inputs[:2], node.inputs[_COMPONENTS]):
        if value is None or value.const_value is None or value.is_graph_input():
            return None
        arrays.append(value.const_value.numpy())
    positions, coordinates, shape = arrays
    if (
        any(array.ndim != 1 or array.dtype.kind != "i" for array in arrays)
        or len(shape) != 2
        or not len(positions)
    ):
        raise SpecError("they must be lists of integers, and the shape two of them")
    rows, columns = (int(side) for side in shape)
    if min(rows, columns) < 0:
        raise SpecError(f"the shape is {rows} x {columns}")
    levels = (Dense(rows), Compressed(columns, positions, coordinates))
    return Tensor(
        (rows, columns), (0, 1), levels, np.broadcast_to(np.float32(1), len(coordinates))
    ).validated()
