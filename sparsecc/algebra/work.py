"""Work of an expression and its division into equal parts, phase by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.baselines import entry_split, one_split, row_split
from sparsecc.algebra.gather import Gathered, WalkLevel
from sparsecc.algebra.joins import index_sizes
from sparsecc.algebra.levels import Dense, Tensor
from sparsecc.algebra.nest import Nest, Operand, nests
from sparsecc.algebra.notation import Assignment, parse
from sparsecc.algebra.ordering import Storage, storage_order
from sparsecc.algebra.splitter import Walk, split
from sparsecc.algebra.visit import Phase, Survivors, survivors, visit

__all__ = ["Plan", "Problem", "cut", "plan", "problem"]

#: Parts, where nothing else is asked for: the same for any number of threads, so that results are.
_MOST_PARTS = 64

#: Steps below which one more part costs more than it saves.
_LEAST_WORK = 16_384


_NOTHING = np.zeros(1, np.int64)


@dataclass(frozen=True, eq=False)
class Problem:
    """An expression with its operands.

    Attributes:
        assignment: the expression.
        inputs: the operands, one for each of its inputs: trees and arrays.
        sizes: of the indices.
        nests: whose results are added up.
    """

    assignment: Assignment
    inputs: tuple[Tensor | NDArray[Any], ...]
    sizes: Mapping[str, int]
    nests: tuple[Nest, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return tuple(self.sizes[index] for index in self.assignment.output.indices)

    def array(self, name: str) -> NDArray[Any]:
        """Return a dense operand."""
        number = next(at for at, access in enumerate(self.assignment.inputs) if access.name == name)
        found = self.inputs[number]
        assert isinstance(found, np.ndarray)  # as its storage said
        return found


@dataclass(frozen=True, eq=False)
class Plan(Problem):
    """An expression cut into parts.

    Attributes:
        phases: of each nest; fewer than it has if nothing is left before.
    """

    phases: tuple[tuple[Phase, ...], ...]

    @property
    def every_phase(self) -> list[Phase]:
        """All of them, one after the other."""
        return [phase for phases in self.phases for phase in phases]

    @property
    def work(self) -> int:
        """Of all phases."""
        return sum(phase.table.work for phase in self.every_phase)

    @property
    def bound(self) -> int:
        """The most work that parts with the same number can have together, all phases added up."""
        return sum(phase.table.bound for phase in self.every_phase)

    @property
    def largest(self) -> int:
        """The largest parts of all phases together: a phase waits for its slowest part."""
        return sum(int(phase.table.part_work().max()) for phase in self.every_phase)

    @property
    def mean(self) -> float:
        """Work of a part, all phases added up."""
        return sum(phase.table.work / phase.table.parts for phase in self.every_phase)

    @property
    def balance(self) -> float:
        """``largest / mean``; 1 is perfect."""
        return self.largest / self.mean if self.work else 1.0

    @cached_property
    def row_balance(self) -> float:
        """Largest part / mean, were the coordinates of the outermost loop cut evenly."""
        found = [sum(map(row_split, phases), _NOTHING).max() for phases in self.phases if phases]
        return self._relative(found)

    @cached_property
    def entry_balance(self) -> float:
        """Largest part / mean, were the stored entries of the largest operand cut evenly in each phase."""
        return self._relative([entry_split(phase).max() for phase in self.every_phase])

    @cached_property
    def single_balance(self) -> float:
        """Largest part / mean, were everything cut once, as well as one can without phases."""
        found = [sum(one_split(phases), _NOTHING).max() for phases in self.phases if phases]
        return self._relative(found)

    def _relative(self, largest: Sequence[int]) -> float:
        return float(sum(largest) / self.mean) if self.work else 1.0


def plan(
    expression: str | Assignment,
    operands: Mapping[str, Tensor | NDArray[Any]],
    parts: int | None = None,
    *,
    output: str | None = None,
    speeds: Sequence[float] | None = None,
    weights: tuple[int, int] = (1, 1),
    convert: bool = False,
) -> Plan:
    """Divide the work of an expression into parts, each phase anew.

    >>> import numpy as np
    >>> from sparsecc.algebra import Tensor
    >>> A = Tensor.from_coordinates(np.array([[2, c] for c in range(97)]), np.ones(97), (4, 97), "csr")
    >>> cut = plan("y(i) = A(i,j) * x(j)", {"A": A, "x": np.ones(97)}, parts=4)
    >>> cut.work, cut.largest, cut.bound, round(cut.balance, 2), round(cut.row_balance, 2)
    (101, 26, 26, 1.03, 3.88)

    Args:
        expression: for ``notation.parse``.
        operands: by name.
        parts: how many; by default up to 64, fewer where there is little work. Not with ``speeds``.
        output: format of the result; None: a dense array.
        speeds: of unequal workers, each of which gets one part.
        weights: cost of a coordinate of an upper loop, and of one at which values are computed (times the sizes of
            indices that only dense arrays have); (0, 1) counts values alone.
        convert: store operands anew whose levels no order of loops suits, instead of refusing them.

    Raises:
        SpecError: operands are missing or do not fit, no order of loops suits all of them, or there is too much work.
    """
    return cut(problem(expression, operands, output, convert), parts, speeds, weights)


def problem(
    expression: str | Assignment,
    operands: Mapping[str, Tensor | NDArray[Any]],
    output: str | None = None,
    convert: bool = False,
) -> Problem:
    """Return an expression with its operands as they are walked; see ``plan``."""
    assignment = parse(expression) if isinstance(expression, str) else expression
    sizes = index_sizes(assignment, operands)
    inputs = _inputs(assignment, operands, convert)
    found = nests(assignment, [Storage.of(item) for item in inputs], output)
    return Problem(assignment, inputs, sizes, found)


def cut(
    whole: Problem,
    parts: int | None = None,
    speeds: Sequence[float] | None = None,
    weights: tuple[int, int] = (1, 1),
) -> Plan:
    """Divide the work of an expression into parts; see ``plan``."""
    phases = []
    for nest in whole.nests:
        trees = tuple(_tree(operand, whole.inputs, whole.sizes) for operand in nest.operands)
        phases.append(tuple(_phases(nest, trees, whole.sizes, parts, speeds, weights)))
    return Plan(whole.assignment, whole.inputs, whole.sizes, whole.nests, tuple(phases))


def _inputs(
    assignment: Assignment, operands: Mapping[str, Tensor | NDArray[Any]], convert: bool
) -> tuple[Tensor | NDArray[Any], ...]:
    """The operands as they are walked: trees, and arrays instead of tensors with dense levels only."""
    known: dict[str, Tensor | NDArray[Any]] = {}
    for name, operand in operands.items():
        if isinstance(operand, Tensor):
            operand = operand.to_dense() if Storage.of(operand).is_array else operand.tree()
        known[name] = operand
    inputs = [known[access.name] for access in assignment.inputs]
    if convert:
        entries = [item.values.size if isinstance(item, Tensor) else 0 for item in inputs]
        changes = storage_order(assignment, [Storage.of(item) for item in inputs], entries)
        for number, order in changes.items():
            tensor = inputs[number]
            assert isinstance(tensor, Tensor)  # arrays suit any order
            inputs[number] = tensor.converted(",".join(tensor.formats), order)
    return tuple(inputs)


def _tree(
    operand: Operand, inputs: Sequence[Tensor | NDArray[Any]], sizes: Mapping[str, int]
) -> tuple[WalkLevel, ...]:
    if operand.access is None:
        return tuple(Dense(sizes[index]) for index in operand.indices)
    tensor = inputs[operand.access]
    assert isinstance(tensor, Tensor)  # as its storage said
    return tensor.levels  # type: ignore[return-value]  # a tree has no singletons


def _phases(
    nest: Nest,
    trees: tuple[tuple[WalkLevel, ...], ...],
    sizes: Mapping[str, int],
    parts: int | None,
    speeds: Sequence[float] | None,
    weights: tuple[int, int],
) -> list[Phase]:
    found: list[Phase] = []
    left: Survivors | None = None
    for loops in nest.phases:
        walks, views = _walks(nest, loops, trees, left, sizes, weights)
        every = tuple(walks.values())
        count = parts
        if parts is None and speeds is None:
            count = min(_MOST_PARTS, sum(walk.work for walk in every) // _LEAST_WORK + 1)
        phase = Phase(nest, loops, trees, left, views, walks, split(every, count, speeds))
        found.append(phase)
        if loops[-1] + 1 < len(nest.loops):
            left = _survivors(phase, every)
            if not len(left.places):
                break
    return found


def _survivors(phase: Phase, walks: Sequence[Walk]) -> Survivors:
    """What is left for the next phase. That does not depend on the parts, so many small ones are not gone through."""
    if phase.table.parts > _MOST_PARTS:
        phase = replace(phase, table=split(walks, _MOST_PARTS))
    pieces = [survivors(phase, visit(phase, part)) for part in range(phase.table.parts)]
    nodes = zip(*(piece.nodes for piece in pieces), strict=True)
    return Survivors(np.concatenate([piece.places for piece in pieces]), tuple(map(np.concatenate, nodes)))


def _walks(
    nest: Nest,
    loops: range,
    trees: tuple[tuple[WalkLevel, ...], ...],
    left: Survivors | None,
    sizes: Mapping[str, int],
    weights: tuple[int, int],
) -> tuple[dict[int, Walk], dict[int, Gathered]]:
    """The walks of a phase by operand, and what they have below the survivors."""
    walks: dict[int, Walk] = {}
    views: dict[int, Gathered] = {}
    counted: set[int] = set()  # loops with a dense level that somebody counts already
    for number, operand in enumerate(nest.operands):
        mine = [at for at in loops if number in nest.loops[at].walked]
        if not mine:
            continue
        depth = operand.indices.index(nest.loops[mine[0]].index)
        levels: Sequence[WalkLevel] = trees[number][depth : depth + len(mine)]
        if left is not None:
            views[number] = Gathered(levels, left.nodes[number])
            levels = (Dense(len(left.places)), *views[number].levels)
        steps = ([] if left is None else [-1]) + mine
        costs = []
        for step, level in zip(steps, levels, strict=True):
            again = isinstance(level, Dense) and step in counted
            costs.append(_cost(nest, number, step, step == loops[-1], again, sizes, weights))
            if isinstance(level, Dense):
                counted.add(step)
        walks[number] = Walk(tuple(levels), tuple(costs))
    return walks, views


def _cost(
    nest: Nest,
    operand: int,
    loop: int,
    last: bool,
    again: bool,
    sizes: Mapping[str, int],
    weights: tuple[int, int],
) -> int:
    """Cost of a coordinate of an operand in a loop; -1 is the list of survivors."""
    upper, leaf = weights
    widths = [
        math.prod(sizes[i] for i in {i for array in term.arrays for i in array.indices} if i in nest.tail)
        for term in nest.terms
        if operand in term.operands and len(term.indices) == loop + 1
    ]
    if widths:
        return leaf * max(widths)
    if again:
        return 0
    return max(upper, leaf) if last else upper
