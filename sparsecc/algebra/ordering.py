"""The one order of loops that suits how all operands of an expression are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from sparsecc.algebra.levels import LevelFormat, Tensor, format_levels
from sparsecc.algebra.notation import Assignment

__all__ = ["Storage", "level_indices", "sorted_loops", "storage_order"]


@dataclass(frozen=True)
class Storage:
    """How an operand is stored.

    Attributes:
        formats: of the levels.
        order: the mode that each level stores, the outermost first.
    """

    formats: tuple[LevelFormat, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, operand: Tensor | NDArray[Any]) -> Storage:
        """Return how this one is."""
        if isinstance(operand, Tensor):
            return cls(operand.formats, operand.order)
        return cls(format_levels("dense", operand.ndim), tuple(range(operand.ndim)))

    @classmethod
    def named(cls, name: str, modes: int) -> Storage:
        """Return what a name of ``levels.format_levels`` stands for."""
        return cls(format_levels(name, modes), (1, 0) if name == "csc" else tuple(range(modes)))

    @property
    def is_array(self) -> bool:
        """Whether all levels are dense: such an operand is only ever looked up."""
        return all(form == "dense" for form in self.formats)


def storage_order(
    assignment: Assignment, stored: Sequence[Storage], entries: Sequence[int] | None = None
) -> dict[int, tuple[int, ...]]:
    """Return the order of modes in which some operands must be stored for all loops to have one order.

    Args:
        assignment: the expression.
        stored: of each of its inputs.
        entries: how many values each has: those with most are kept as they are, else those that come first.

    Returns:
        The new order of levels by number of the input; empty if all suit.
    """
    lists = level_indices(assignment, stored)
    kept: list[tuple[str, ...]] = []
    late: list[int] = []
    for number in sorted(lists, key=lambda number: -entries[number] if entries else 0):
        indices = lists[number]
        if sorted_loops([*kept, indices], assignment) is None:
            late.append(number)
        else:
            kept.append(indices)
    changes = {}
    for number in late:
        loops = sorted_loops([*kept, *((index,) for index in lists[number])], assignment)
        modes = assignment.inputs[number].indices
        assert loops is not None  # what is kept can be ordered, single indices add nothing
        changes[number] = tuple(modes.index(index) for index in loops if index in modes)
        kept.append(tuple(modes[mode] for mode in changes[number]))
    return changes


def level_indices(assignment: Assignment, stored: Sequence[Storage]) -> dict[int, tuple[str, ...]]:
    """Return the indices of the levels of each sparse input."""
    return {
        number: tuple(access.indices[mode] for mode in storage.order)
        for number, (access, storage) in enumerate(zip(assignment.inputs, stored, strict=True))
        if not storage.is_array
    }


def sorted_loops(lists: Sequence[Sequence[str]], assignment: Assignment) -> tuple[str, ...] | None:
    """Return an order that all lists agree with, indices of the result first where there is a choice; None: no such."""
    names = [*assignment.output.indices, *(index for access in assignment.inputs for index in access.indices)]
    known = {index for indices in lists for index in indices}
    left = [index for index in dict.fromkeys(names) if index in known]
    found: list[str] = []
    while left:
        for index in left:
            if all(not set(some[: some.index(index)]) & set(left) for some in lists if index in some):
                break
        else:
            return None
        left.remove(index)
        found.append(index)
    return tuple(found)
