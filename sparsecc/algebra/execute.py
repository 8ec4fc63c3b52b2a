"""A plan carried out part by part, in vectorised NumPy.

Each part computes from its row of the split table alone, so parts run in any order and on any number of threads.
Results do not depend on that: what two parts both add to is added in the order of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.entries import ordered
from sparsecc.algebra.joins import Array, Entries, listed, looked_up
from sparsecc.algebra.levels import MOST_VALUES, Tensor
from sparsecc.algebra.nest import Nest, Term
from sparsecc.algebra.splitter import Int64
from sparsecc.algebra.visit import Frontier, Phase, alive, places, visit
from sparsecc.algebra.work import Plan
from sparsecc.errors import SpecError

__all__ = ["Engine", "execute", "result_dtype"]


class Engine(Protocol):
    """Computes the parts of phases in which products end, instead of NumPy."""

    def add_to(self, out: NDArray[Any], plan: Plan, nest: Nest, phase: Phase, threads: int) -> None:
        """Add what the parts of a phase compute to a dense result, row-major."""

    def entries(self, plan: Plan, nest: Nest, phase: Phase, threads: int) -> Iterator[Entries]:
        """Yield what the parts of a phase compute, in their order; neighbours may have a place in common."""


def execute(
    plan: Plan, format: str | None = None, threads: int = 1, engine: Engine | None = None
) -> Tensor | NDArray[Any]:
    """Compute the expression of a plan.

    Args:
        plan: from ``work.plan``.
        format: of the result (``levels.format_levels``); None: a dense array.
        threads: that parts run on; results are the same bits for any number.
        engine: what computes the parts; None: NumPy.

    Raises:
        SpecError: the result would be too large as a dense array.
        ModelError: or in a format with dense levels.
    """
    every = [
        _Kernel(plan, nest, phases, engine) for nest, phases in zip(plan.nests, plan.phases, strict=True)
    ]
    indices = plan.assignment.output.indices
    shape = plan.shape
    if format is None:
        if math.prod(shape) > MOST_VALUES:
            raise SpecError(
                f"a dense result has {math.prod(shape)} values: ask for a sparse one, as format='csf'"
            )
        out = np.zeros(shape, result_dtype(plan))
        for kernel in every:
            kernel.add_to(out, threads)
        return out
    pieces = [
        listed(piece, indices, plan.sizes)
        for kernel in every
        for piece in kernel.results(threads)
        if len(piece.places)
    ]
    if not pieces:
        return Tensor.from_coordinates(
            np.zeros((0, len(shape)), np.int64), np.zeros(0, result_dtype(plan)), shape, format
        )
    found = np.concatenate([piece.places for piece in pieces])
    values = np.concatenate([piece.values for piece in pieces]).astype(result_dtype(plan), copy=False)
    return Tensor.from_coordinates(found, values, shape, format, sum_duplicates=True)


def result_dtype(plan: Plan) -> np.dtype[Any]:
    """Return the type of the result: that of the operands, and of numbers that are not 1."""
    types: list[Any] = [item.values.dtype if isinstance(item, Tensor) else item.dtype for item in plan.inputs]
    weak = [1.0] if any(term.coefficient != 1 for nest in plan.nests for term in nest.terms) else []
    return np.result_type(*types, *weak)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """One nest of loops of a plan.

    Attributes:
        plan: of the whole expression.
        nest: the loops.
        phases: their parts.
        engine: what computes them; None: NumPy.
    """

    plan: Plan
    nest: Nest
    phases: Sequence[Phase]
    engine: Engine | None

    @property
    def tail(self) -> tuple[str, ...]:
        """Indices of the result that are computed together at each step."""
        return tuple(index for index in self.plan.assignment.output.indices if index in self.nest.tail)

    def results(self, threads: int) -> Iterator[Entries]:
        """Yield what each part of each phase computes, in order; each place at most once within a part."""
        yield from self._without_loops()
        for phase in self.phases:
            if not self._ends_in(phase):
                continue
            if self.engine is not None:
                yield from self.engine.entries(self.plan, self.nest, phase, threads)
            else:
                yield from _map(partial(self._part, phase), range(phase.table.parts), threads)

    def add_to(self, out: NDArray[Any], threads: int) -> None:
        """Add all results to a dense array.

        Where results follow the loops a part shares at most its first place with those before it. It adds all others to
        the array itself and hands that one, the carry, back, to be added in the order of the parts.
        """
        order = self.plan.assignment.output.indices
        view = out.transpose([order.index(index) for index in (*self.nest.outputs, *self.tail)])
        for piece in self._without_loops():
            _add(view, piece.places, piece.values)
        for phase in self.phases:
            if not self._ends_in(phase):
                continue
            if self.engine is not None:
                self.engine.add_to(out, self.plan, self.nest, phase, threads)
                continue
            work = partial(self._store, phase, view) if self.nest.in_order else partial(self._part, phase)
            for piece in _map(work, range(phase.table.parts), threads):
                _add(view, piece.places, piece.values)

    def _store(self, phase: Phase, view: NDArray[Any], part: int) -> Entries:
        found = self._part(phase, part)
        before = phase.path(part)[: len(self.nest.outputs)]
        open_ = len(before) == len(self.nest.outputs) and (part > 0)
        carried = int(open_ and len(found.places) > 0 and np.array_equal(found.places[0], before))
        _add(view, found.places[carried:], found.values[carried:])
        return Entries(found.indices, found.places[:carried], found.tail, found.values[:carried])

    def _ends_in(self, phase: Phase) -> bool:
        return any(len(term.indices) - 1 in phase.loops for term in self.nest.terms)

    def _part(self, phase: Phase, part: int) -> Entries:
        frontiers = visit(phase, part)
        later = phase.survivors is not None
        pieces = []
        for term in self.nest.terms:
            last = len(term.indices) - 1
            if frontiers and last in phase.loops:
                pieces.append(self._term(phase, frontiers[: last - phase.loops[0] + 1 + later], term))
        if not pieces:
            nothing = np.zeros(self._step(0), result_dtype(self.plan))
            return self._entries(np.zeros((0, len(self.nest.outputs)), np.int64), nothing)
        found = np.concatenate([piece.places for piece in pieces])
        return self._entries(*ordered(found, np.concatenate([piece.values for piece in pieces])))

    def _term(self, phase: Phase, frontiers: Sequence[Frontier], term: Term) -> Entries:
        """What a product is at the entries of the last frontier that are the part's own."""
        last = frontiers[-1]
        mask = alive(last, term)
        mask[: last.opened] = False
        chosen = np.flatnonzero(mask)
        factors = [
            tensor.values[last.nodes[operand][chosen]]
            for operand in term.operands
            if (tensor := self._tensor(operand)) is not None
        ]
        values = reduce(np.multiply, factors, np.ones(len(chosen), result_dtype(self.plan)))
        return self._computed(term, places(phase, frontiers, chosen), values)

    def _without_loops(self) -> Iterator[Entries]:
        """Products of dense arrays alone that have no index in common with a sparse operand."""
        for term in self.nest.terms:
            if not term.indices:
                yield self._computed(term, np.zeros((1, 0), np.int64), np.ones(1, result_dtype(self.plan)))

    def _computed(self, term: Term, found: Int64, values: NDArray[Any]) -> Entries:
        """Values times numbers and dense arrays, at the places of the result."""
        if term.coefficient != 1:
            values = values * term.coefficient
        entries = Entries(term.indices, found, (), values)
        arrays = [Array(access.indices, self.plan.array(access.name)) for access in term.arrays]
        entries = looked_up(entries, arrays, frozenset(self.plan.assignment.output.indices))
        axes = [0, *(1 + entries.tail.index(index) for index in self.tail)]
        columns = [term.indices.index(index) for index in self.nest.outputs]
        return self._entries(found[:, columns], entries.values.transpose(axes))

    def _entries(self, found: Int64, values: NDArray[Any]) -> Entries:
        return Entries(self.nest.outputs, found, self.tail, values)

    def _step(self, count: int) -> tuple[int, ...]:
        return (count, *(self.plan.sizes[index] for index in self.tail))

    def _tensor(self, operand: int) -> Tensor | None:
        access = self.nest.operands[operand].access
        found = self.plan.inputs[access] if access is not None else None
        return found if isinstance(found, Tensor) else None


def _add(view: NDArray[Any], found: Int64, values: NDArray[Any]) -> None:
    """Add values at places ``[n, modes]`` of which no two are equal."""
    if not found.shape[1]:
        view[...] += values.sum(0)
    elif len(found):
        view[tuple(found.T)] += values


def _map(work: Callable[[int], Entries], parts: range, threads: int) -> Iterator[Entries]:
    """Results of all parts in their order."""
    if threads <= 1 or len(parts) <= 1:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(min(threads, len(parts))) as pool:
        yield from pool.map(work, parts)
