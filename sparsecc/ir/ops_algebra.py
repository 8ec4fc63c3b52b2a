"""The names of the operators of sparse tensor algebra, and the making of their nodes.

A sparse operand comes as the arrays of its storage (CSR): ``positions`` where each row begins, ``coordinates`` of its
columns, ``values``. All of them may be constants or computed. Values may have leading axes (batch, heads), over which
the pattern is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters

import onnx_ir as ir

from sparsecc.algebra.notation import Access, Product, parse
from sparsecc.errors import SpecError
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION

__all__ = [
    "CUTS",
    "EINSUMS",
    "FORMAT",
    "Csr",
    "algebra_names",
    "einsum_node",
    "einsum_operator",
    "sparse_attention_node",
    "sparse_softmax_node",
]

CUTS = "cuts"
"""Attribute of the operators in ``EINSUMS``: ints ``[2 * (parts + 1)]``, rows and then entries before each part."""

FORMAT = "csr"
"""How sparse operands are stored: the only value of the attribute so far."""

EINSUMS: Mapping[str, str] = {
    "SparseEinsumVector": "ij,j->i",
    "SparseEinsum": "ij,jn->in",
    "SparseEinsumSampled": "ij,ik,jk->ij",
}
"""Operators by name with the expression they evaluate; the first operand is the sparse one."""


@dataclass(frozen=True)
class Csr:
    """A sparse matrix in a graph.

    Attributes:
        positions: int32 or int64 ``[rows + 1]``: row r has the entries ``positions[r]`` to ``positions[r + 1]``.
        coordinates: int32 or int64 ``[entries]``: their columns, rising in each row.
        values: float32 ``[..., entries]``.
        shape: int64 ``[2]``: rows and columns.
    """

    positions: ir.Value
    coordinates: ir.Value
    values: ir.Value
    shape: ir.Value


def algebra_names() -> frozenset[str]:
    """Return the types of all operators of this module."""
    return frozenset({*EINSUMS, "SparseSoftmax", "SparseAttention"})


def einsum_operator(equation: str) -> tuple[str, str]:
    """Return which operator evaluates ``equation``, and the equation as einsum subscripts.

    Args:
        equation: index notation or einsum subscripts, the sparse operand first: ``y(i) = A(i,j) * x(j)`` or
            ``ij,j->i``, ``ij,jn->in`` or ``ij,ik,jk->ij`` in any letters. Each operand may have leading indices; the
            result has the longest list of them, and those of the others are the end of it, as NumPy broadcasts:
            ``ij,bjn->bin``, ``hij,bhjn->bhin``.

    Raises:
        SpecError: it is none of these, or no expression at all.
    """
    assignment = parse(equation)
    factors = assignment.value.factors if isinstance(assignment.value, Product) else ()
    accesses = [item for item in factors if isinstance(item, Access)]
    terms = [item.indices for item in (*accesses, assignment.output)]
    for name, form in EINSUMS.items():
        wanted = form.replace("->", ",").split(",")
        if len(accesses) == len(factors) == len(wanted) - 1 and _is_form(terms, wanted):
            names = dict.fromkeys(index for term in terms for index in term)
            short = all(len(index) == 1 for index in names)
            letters = {
                index: index if short else letter for index, letter in zip(names, ascii_letters, strict=False)
            }
            texts = ["".join(letters[index] for index in term) for term in terms]
            return name, f"{','.join(texts[:-1])}->{texts[-1]}"
    raise SpecError(
        f"no sparse operator evaluates '{equation}': write one of {', '.join(EINSUMS.values())} in any letters, with "
        "the same leading indices in each operand where there is a batch, as in ij,bjn->bin"
    )


def _is_form(terms: Sequence[tuple[str, ...]], wanted: Sequence[str]) -> bool:
    """Whether the terms are those of a form in other letters, with leading indices that broadcast."""
    letters: dict[str, str] = {}
    leading = []
    for term, form in zip(terms, wanted, strict=True):
        head, tail = term[: len(term) - len(form)], term[len(term) - len(form) :]
        if len(term) < len(form):
            return False
        if any(letters.setdefault(own, index) != index for own, index in zip(form, tail, strict=True)):
            return False
        leading.append(head)
    used = [*letters.values(), *leading[-1]]
    longest = max(leading, key=len)
    return (
        len(set(used)) == len(used)
        and leading[-1] == longest
        and all(longest[len(longest) - len(head) :] == head for head in leading)
    )


def einsum_node(equation: str, operand: Csr, *dense: ir.Value, name: str) -> ir.Node:
    """Return a node that evaluates ``equation``, not yet in a graph.

    ``ij,j->i`` and ``ij,jn->in`` have a dense result, ``[..., i]`` or ``[..., i, n]``. That of ``ij,ik,jk->ij`` has the
    pattern of the operand: the node gives its values ``[..., entries]``.

    Args:
        equation: see ``einsum_operator``.
        operand: the first one.
        dense: the others, float32.
        name: of the node.

    Raises:
        SpecError: no operator evaluates it, or it has another number of operands.
    """
    operator, text = einsum_operator(equation)
    if len(dense) != text.count(","):
        raise SpecError(f"'{equation}' has {text.count(',')} dense operands, {len(dense)} are given")
    return ir.Node(
        DOMAIN,
        operator,
        [operand.positions, operand.coordinates, operand.values, operand.shape, *dense],
        [ir.AttrString("equation", text), ir.AttrString("format", FORMAT)],
        name=name,
        version=DOMAIN_VERSION,
    )


def sparse_softmax_node(positions: ir.Value, values: ir.Value, *, name: str) -> ir.Node:
    """Return a node of softmax over the stored entries of each row, not yet in a graph.

    Args:
        positions: see ``Csr``.
        values: float32 ``[..., entries]``.
        name: of the node.
    """
    return ir.Node(
        DOMAIN, "SparseSoftmax", [positions, values], [ir.AttrString("format", FORMAT)], name=name,
        version=DOMAIN_VERSION,
    )  # fmt: skip


def sparse_attention_node(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    positions: ir.Value,
    coordinates: ir.Value,
    shape: ir.Value,
    *,
    scale: float,
    name: str,
) -> ir.Node:
    """Return a node of attention in which each query sees some keys, not yet in a graph.

    Args:
        q: float32 ``[B, heads, S, size]``.
        k: ``[B, heads, T, size]``.
        v: ``[B, heads, T, size]``.
        positions: see ``Csr``, a row for each query.
        coordinates: the keys that it sees, the same for all heads.
        shape: int64 ``[2]``: S and T.
        scale: factor of the scores.
        name: of the node.
    """
    return ir.Node(
        DOMAIN,
        "SparseAttention",
        [q, k, v, positions, coordinates, shape],
        [ir.AttrFloat32("scale", scale), ir.AttrString("format", FORMAT)],
        name=name,
        version=DOMAIN_VERSION,
    )
