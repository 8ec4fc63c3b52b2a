"""From index notation and formats to loops: their order, what each walks, and where the work is cut anew.

An expression becomes a sum of products. All sparse operands of the products are walked together in one order of loops,
each loop over what its operands store (union for sums, intersection for products). An operand that is not stored by all
loops around it is looked up. Indices that only dense arrays have are no loops: they are the *tail* of each step.

Under an intersection whole subtrees are skipped, and a sparse coordinate may choose the subtree of another operand, so
how much work is left is known only once such a loop is done. There a *phase* ends: what survives is listed, and the
rest is cut into equal parts anew (Chougule et al. 2026, arXiv 2604.17198; the rules here are our own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparsecc.algebra.levels import LevelFormat, format_levels
from sparsecc.algebra.notation import (
    Access,
    Assignment,
    Expression,
    Number,
    Product,
    accesses,
    parse,
)
from sparsecc.algebra.ordering import Storage, level_indices, sorted_loops, storage_order
from sparsecc.errors import SpecError

__all__ = ["Loop", "Nest", "Operand", "Term", "nests"]

Kind = Literal["dense", "one operand", "union", "intersection", "mixed"]

#: Products that an expression may become: brackets multiply them.
_MOST_TERMS = 64


@dataclass(frozen=True)
class Operand:
    """One use of a sparse tensor, or all coordinates of some loops that no sparse operand of a product has.

    Attributes:
        access: its number among ``Assignment.inputs``; None if it is all coordinates.
        name: for people.
        indices: of the levels, the outermost first.
        formats: of the levels: dense or compressed.
    """

    access: int | None
    name: str
    indices: tuple[str, ...]
    formats: tuple[LevelFormat, ...]

    def compressed(self, index: str) -> bool:
        """Whether it stores some coordinates of this index only."""
        return index in self.indices and self.formats[self.indices.index(index)] != "dense"


@dataclass(frozen=True)
class Term:
    """One product of the sum that the expression is.

    Attributes:
        coefficient: the product of its numbers.
        operands: numbers in ``Nest.operands``.
        arrays: accesses of dense arrays.
        indices: its loops, in order.
    """

    coefficient: float
    operands: tuple[int, ...]
    arrays: tuple[Access, ...]
    indices: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        index: its name.
        kind: ``dense`` (all coordinates), ``one operand``, ``union``, ``intersection`` or ``mixed``.
        walked: operands whose stored coordinates are visited.
        located: operands in which what the others visit is looked up.
        ends_phase: whether the work is cut anew after it.
    """

    index: str
    kind: Kind
    walked: tuple[int, ...]
    located: tuple[int, ...]
    ends_phase: bool = False


@dataclass(frozen=True)
class Nest:
    """A nest of loops.

    Attributes:
        assignment: what it is for.
        operands: the sparse ones.
        terms: products that are added up; the loops of each are the first ones of the nest.
        loops: the outermost first.
        tail: indices that only dense arrays have.
        output_class: 1: nothing is added up across steps; 2: sums go to places that are known or follow the loops; 3: a
            loop that is summed over is outside of one that makes new places in a sparse result.
        in_order: whether results come in the order of the indices of the output.
    """

    assignment: Assignment
    operands: tuple[Operand, ...]
    terms: tuple[Term, ...]
    loops: tuple[Loop, ...]
    tail: tuple[str, ...]
    output_class: Literal[1, 2, 3]
    in_order: bool

    @property
    def order(self) -> tuple[str, ...]:
        """Indices of the loops."""
        return tuple(loop.index for loop in self.loops)

    @property
    def phases(self) -> tuple[range, ...]:
        """Numbers of the loops of each phase."""
        ends = [at + 1 for at, loop in enumerate(self.loops) if loop.ends_phase]
        starts = [0, *ends]
        return tuple(range(a, b) for a, b in zip(starts, [*ends, len(self.loops)], strict=True) if a < b)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Indices of the result that are loops, in the order of the result."""
        return tuple(index for index in self.assignment.output.indices if index in self.order)

    def __str__(self) -> str:
        lines = []
        for loop in self.loops:
            walked = ", ".join(self.operands[at].name for at in loop.walked)
            located = ", ".join(self.operands[at].name for at in loop.located)
            lines.append(
                f"{loop.index}: {loop.kind}, walks {walked}" + (f", looks up {located}" if located else "")
            )
            if loop.ends_phase:
                lines.append("-- the work is cut anew --")
        if self.tail:
            lines.append(f"each step: {', '.join(self.tail)}")
        return "\n".join([*lines, f"output: class {self.output_class}"])


def nests(
    expression: str | Assignment,
    storages: Mapping[str, Storage | str] | Sequence[Storage],
    output: str | None = None,
) -> tuple[Nest, ...]:
    """Return the loop nests whose results add up to an expression; one, unless its products share no loops.

    >>> print(*nests("Y(i,k) = A(i,j) * B(j,k)", {"A": "csr", "B": "csr"}, output="csr"))
    i: dense, walks A
    j: one operand, walks A, looks up B
    -- the work is cut anew --
    k: one operand, walks B
    output: class 3

    Args:
        expression: for ``notation.parse``.
        storages: of the operands by name, or names of formats, those that are missing are dense arrays; or of each of
            the inputs.
        output: format of the result; None: a dense array.

    Raises:
        SpecError: no order of loops suits all operands; the message says which one to convert to what.
    """
    assignment = parse(expression) if isinstance(expression, str) else expression
    stored = list(storages) if not isinstance(storages, Mapping) else _by_name(assignment, storages)
    changes = storage_order(assignment, stored)
    for number, order in changes.items():
        access, form = assignment.inputs[number], ",".join(_walkable(stored[number].formats))
        raise SpecError(
            f"{assignment}: no order of loops suits {access}, whose levels are the modes {stored[number].order}, and "
            f"the others; convert it: {access.name}.converted('{form}', {order})"
        )
    return tuple(_nests(assignment, stored, output))


def _by_name(assignment: Assignment, storages: Mapping[str, Storage | str]) -> list[Storage]:
    """The storage of each input."""
    found = []
    for access in assignment.inputs:
        given = storages.get(access.name, "dense")
        found.append(Storage.named(given, len(access.indices)) if isinstance(given, str) else given)
    return found


def _walkable(formats: Sequence[LevelFormat]) -> tuple[LevelFormat, ...]:
    """Formats as they are walked: entries of a coordinate list become a tree."""
    return tuple("dense" if form == "dense" else "compressed" for form in formats)


@dataclass(frozen=True)
class _Factors:
    """A product of an expression that is a sum of products."""

    coefficient: float
    inputs: tuple[int, ...]


def _expanded(expression: Expression, first: int = 0) -> list[_Factors]:
    """The expression as a sum of products of its inputs, which are numbered from ``first`` on."""
    if isinstance(expression, Number):
        return [_Factors(expression.value, ())]
    if isinstance(expression, Access):
        return [_Factors(1.0, (first,))]
    product = isinstance(expression, Product)
    found = [_Factors(1.0, ())] if product else []
    for part in expression.factors if isinstance(expression, Product) else expression.terms:
        inner = _expanded(part, first)
        if product:
            inner = [
                _Factors(a.coefficient * b.coefficient, a.inputs + b.inputs) for a in found for b in inner
            ]
        found = inner if product else found + inner
        if len(found) > _MOST_TERMS:
            raise SpecError(
                f"'{expression}' becomes more than {_MOST_TERMS} products: compute it in several steps"
            )
        first += len(tuple(accesses(part)))
    return found


def _nests(assignment: Assignment, stored: Sequence[Storage], output: str | None) -> list[Nest]:
    lists = level_indices(assignment, stored)
    inputs = assignment.inputs
    sparse = {index for indices in lists.values() for index in indices}

    def loops_of(factors: _Factors) -> set[str]:
        return {index for number in factors.inputs for index in inputs[number].indices} & sparse

    left = _expanded(assignment.value)
    found = []
    while left:
        largest = max(left, key=lambda factors: len(loops_of(factors)))
        known = loops_of(largest)
        some = [factors for factors in left if loops_of(factors) <= known]
        constraints = [lists[number] for factors in some for number in factors.inputs if number in lists]
        order = sorted_loops([*constraints, *((index,) for index in sorted(known))], assignment)
        assert order is not None  # storage_order has seen to it
        fused = [factors for factors in some if loops_of(factors) == set(order[: len(loops_of(factors))])]
        found.append(_nest(assignment, stored, fused, order, output))
        left = [factors for factors in left if factors not in fused]
    return found


def _nest(
    assignment: Assignment,
    stored: Sequence[Storage],
    products: Sequence[_Factors],
    order: Sequence[str],
    output: str | None,
) -> Nest:
    """The nest of products whose loops are the first ones of ``order``."""
    inputs = assignment.inputs
    lists = level_indices(assignment, stored)
    used = sorted({number for factors in products for number in factors.inputs if number in lists})
    operands = [
        Operand(number, inputs[number].name, lists[number], _walkable(stored[number].formats))
        for number in used
    ]
    terms = []
    for factors in products:
        names = {index for number in factors.inputs for index in inputs[number].indices}
        indices = tuple(index for index in order if index in names)
        mine = [used.index(number) for number in factors.inputs if number in lists]
        for run in _missing(indices, {index for at in mine for index in operands[at].indices}):
            mine.append(len(operands))
            operands.append(Operand(None, f"all {','.join(run)}", run, format_levels("dense", len(run))))
        arrays = tuple(inputs[number] for number in factors.inputs if number not in lists)
        terms.append(Term(factors.coefficient, tuple(mine), arrays, indices))
    loops = [_loop(index, operands, terms) for index in order]
    every = dict.fromkeys(
        index for factors in products for number in factors.inputs for index in inputs[number].indices
    )
    outputs = [index for index in assignment.output.indices if index in order]
    first = set(order[: len(outputs)]) == set(outputs)
    return Nest(
        assignment,
        tuple(operands),
        tuple(terms),
        tuple(_with_phases(loops, operands, terms)),
        tuple(index for index in every if index not in order),
        1 if len(outputs) == len(order) else 2 if output is None or first else 3,
        tuple(outputs) == tuple(order[: len(outputs)]),
    )


def _missing(indices: Sequence[str], stored: set[str]) -> list[tuple[str, ...]]:
    """Runs of indices that no sparse operand has."""
    runs: list[tuple[str, ...]] = []
    for at, index in enumerate(indices):
        if index in stored:
            continue
        if runs and at and indices[at - 1] == runs[-1][-1]:
            runs[-1] += (index,)
        else:
            runs.append((index,))
    return runs


def _loop(index: str, operands: Sequence[Operand], terms: Sequence[Term]) -> Loop:
    having = [term for term in terms if index in term.indices]
    walked = {at for term in having for at in _walked(index, operands, term)}
    members = [{at for at in term.operands if index in operands[at].indices} for term in having]
    everyone = set().union(*members)
    deciding = {at for at in everyone if operands[at].compressed(index)}
    deciding |= {at for at in walked if any(not (mine & deciding) and at in mine for mine in members)}
    kind: Kind
    if not any(operands[at].compressed(index) for at in deciding):
        kind = "dense"
    elif len(deciding) == 1:
        kind = "one operand"
    elif all(deciding <= mine for mine in members):
        kind = "intersection"
    elif all(len(deciding & mine) == 1 for mine in members):
        kind = "union"
    else:
        kind = "mixed"
    return Loop(index, kind, tuple(sorted(walked)), tuple(sorted(everyone - walked)))


def _walked(index: str, operands: Sequence[Operand], term: Term) -> list[int]:
    """Operands of a product that are walked by a loop; the others are looked up.

    Those that store some coordinates only decide where there are any. One that is indexed by all loops around is walked
    once; one that is not would be walked again and again, so it is, only if there is none of the others: the one whose
    next loop outwards is nearest.
    """
    around = term.indices[: term.indices.index(index)]
    having = [at for at in term.operands if index in operands[at].indices]
    candidates = [at for at in having if operands[at].compressed(index)] or having

    def own(at: int) -> list[int]:
        indices = operands[at].indices
        return [around.index(outer) for outer in indices[: indices.index(index)]]

    aligned = [at for at in candidates if len(own(at)) == len(around)]
    return aligned or [max(candidates, key=lambda at: (max(own(at), default=-1), -at))]


def _with_phases(loops: Sequence[Loop], operands: Sequence[Operand], terms: Sequence[Term]) -> list[Loop]:
    found, start = list(loops), 0
    for at, loop in enumerate(loops[:-1]):
        following = loops[at + 1]
        ends = any(
            not all(operand in loops[before].walked for before in range(start, at + 1))
            for operand in following.walked
        )
        if ends or _prunes(loop, operands, terms):
            found[at] = replace(loop, ends_phase=True)
            start = at + 1
    return found


def _prunes(loop: Loop, operands: Sequence[Operand], terms: Sequence[Term]) -> bool:
    """Whether a coordinate that one operand lacks lets subtrees of another be skipped."""
    for term in terms:
        choosers = [at for at in term.operands if operands[at].compressed(loop.index)]
        for at in set(term.operands) & set(loop.walked):
            below = operands[at].indices[-1] != loop.index
            if below and any(other != at for other in choosers):
                return True
    return False
