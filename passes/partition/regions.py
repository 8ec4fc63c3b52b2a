"""Products over one constant pattern that follow each other, and how many parts of them fit into a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.algebra import Compressed, SplitTable, Tensor
from sparsecc.ir.sparse_ops import DOMAIN

__all__ = ["Footprint", "fitting_parts", "footprint_of", "largest_set", "regions"]

Int64 = NDArray[np.int64]

_FLOAT = 4

#: Operators that work row by row, so that a part of what they read is a part of what they give.
_ROW_WISE = frozenset(
    {
        "Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
        "LayerNormalization", "LeakyRelu", "Log", "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid",
        "Softplus", "SparseSoftmax", "Sqrt", "Sub", "Tanh",
    }
)  # fmt: skip


def regions(graph: ir.Graph, products: Mapping[ir.Node, Tensor]) -> Iterator[list[ir.Node]]:
    """Yield the products of a graph in groups that walk equal patterns and are joined by what flows between them.

    Args:
        graph: in which they are.
        products: with their patterns as CSR matrices.
    """
    alike: dict[bytes, list[ir.Node]] = {}
    for node, pattern in products.items():
        alike.setdefault(_digest(pattern), []).append(node)
    for members in alike.values():
        flow = nx.Graph()
        flow.add_nodes_from(members)
        for node in graph:
            if node in members or _is_row_wise(node):
                values = (*node.inputs, *node.outputs)
                flow.add_edges_from(
                    (node, value) for value in values if value is not None and value.const_value is None
                )
        for component in nx.connected_components(flow):
            joined = [node for node in members if node in component]
            if joined:
                yield joined


def _is_row_wise(node: ir.Node) -> bool:
    if node.op_type in ("Gemm", "MatMul"):
        weight = node.inputs[1]
        return not node.domain and weight is not None and weight.const_value is not None
    return node.op_type in _ROW_WISE and node.domain in ("", DOMAIN)


def _digest(pattern: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(pattern.shape).encode())
    rows = _rows(pattern)
    for array in (rows.pos, rows.crd):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return digest.digest()


def _rows(pattern: Tensor) -> Compressed:
    rows = pattern.levels[1]
    assert isinstance(rows, Compressed), "that is what CSR has"
    return rows


@dataclass(frozen=True)
class Footprint:
    """Bytes that products over a pattern touch.

    Attributes:
        row: for each row: its position, and rows of dense operands and results.
        entry: for each stored entry: its coordinate, and values.
        column: for each coordinate that occurs: rows of dense operands that are looked up.
    """

    row: int
    entry: int
    column: int


def footprint_of(
    nodes: Sequence[ir.Node], index_bytes: int, width: Callable[[ir.Value], int | None]
) -> Footprint | None:
    """Return what products over one pattern touch together, each tensor once; None if a width is not known.

    Args:
        nodes: the products.
        index_bytes: size of a position and of a coordinate.
        width: how long the last dimension of a tensor is.
    """
    rows: dict[ir.Value, int | None] = {}
    columns: dict[ir.Value, int | None] = {}
    entries: set[ir.Value] = set()
    for node in nodes:
        _, _, values, _, *dense = (value for value in node.inputs if value is not None)
        entries.add(values)
        result = node.outputs[0]
        if node.op_type == "SparseEinsumSampled":
            entries.add(result)
            rows[dense[0]], columns[dense[1]] = width(dense[0]), width(dense[1])
        else:
            wide = 1 if node.op_type == "SparseEinsumVector" else width(dense[0])
            rows[result], columns[dense[0]] = wide, wide
    known = [[wide for wide in found.values() if wide is not None] for found in (rows, columns)]
    if [len(known[0]), len(known[1])] != [len(rows), len(columns)]:
        return None
    return Footprint(
        index_bytes + _FLOAT * sum(known[0]), index_bytes + _FLOAT * len(entries), _FLOAT * sum(known[1])
    )


def largest_set(pattern: Tensor, table: SplitTable, footprint: Footprint, parts: int) -> int:
    """Return the bytes that the part touches which touches most, of ``parts`` taken from a table of more."""
    return _largest(table, footprint, parts, _seen_before(_rows(pattern).crd))


def fitting_parts(pattern: Tensor, table: SplitTable, footprint: Footprint, cache_bytes: int) -> int | None:
    """Return the smallest power of two of parts each of which touches no more than fits; None if none does.

    Args:
        pattern: CSR.
        table: of the pattern's rows and entries, with the most parts there may be, a power of two.
        footprint: of those who walk it.
        cache_bytes: that a part may touch.
    """
    before, parts = _seen_before(_rows(pattern).crd), 1
    while parts <= table.parts:
        if _largest(table, footprint, parts, before) <= cache_bytes:
            return parts
        parts *= 2
    return None


def _seen_before(coordinates: NDArray[np.integer[Any]]) -> Int64:
    """For each entry, the last one before it with the same coordinate; -1 if there is none."""
    order = np.argsort(coordinates, kind="stable")
    before = np.full(len(order), -1, np.int64)
    same = coordinates[order[1:]] == coordinates[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _largest(table: SplitTable, footprint: Footprint, parts: int, before: Int64) -> int:
    rows, entries = table.cursors[0][:, :: table.parts // parts]
    counts = np.diff(entries)
    new = before < np.repeat(entries[:-1], counts)  # in its part
    passed = np.concatenate([[0], np.cumsum(new)])
    columns = passed[entries[1:]] - passed[entries[:-1]]
    work = (np.diff(rows) + 1) * footprint.row + counts * footprint.entry + columns * footprint.column
    return int(work.max())
