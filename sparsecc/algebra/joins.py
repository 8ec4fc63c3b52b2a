"""Expressions evaluated by joins of coordinate lists: the reference, in vectorised NumPy.

Each sparse operand is a list of coordinates with values. A product joins lists on the indices that they share, a sum
merges them, and a reduction adds up what agrees on the other indices, in the order of the lists, so that results do not
depend on anything but the operands. Dense operands are looked up; indices that only they have stay dense.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Tensor
from sparsecc.algebra.notation import (
    Access,
    Assignment,
    Expression,
    Number,
    Product,
    left_of,
    needed_by_others,
    parse,
)
from sparsecc.errors import SpecError

__all__ = ["Array", "Entries", "evaluate", "index_sizes", "listed", "looked_up"]

#: Numbers of a temporary array: what is looked up in dense operands is taken piece by piece.
_PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class Entries:
    """Part of an expression as a list.

    Attributes:
        indices: of the columns.
        places: ``[n, indices]``, each place once, in lexicographic order.
        tail: indices that are dense.
        values: ``[n, *tail]``.
    """

    indices: tuple[str, ...]
    places: NDArray[np.int64]
    tail: tuple[str, ...]
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Array:
    """Part of an expression that is dense."""

    indices: tuple[str, ...]
    values: NDArray[Any]


_Part = Entries | Array


def evaluate(
    expression: str | Assignment, operands: Mapping[str, Tensor | NDArray[Any]], format: str | None = None
) -> Tensor | NDArray[Any]:
    """Evaluate an expression of sparse tensors and dense arrays.

    Args:
        expression: for ``notation.parse``.
        operands: by name.
        format: of the result (``levels.format_levels``); None: a dense array.

    Raises:
        SpecError: the expression is none, or operands are missing, of the wrong order, or differ in the size of an
            index.
    """
    assignment = parse(expression) if isinstance(expression, str) else expression
    sizes = index_sizes(assignment, operands)
    found = _Evaluation(operands, sizes).part(assignment.value, assignment.output.indices)
    order = assignment.output.indices
    shape = tuple(sizes[index] for index in order)
    if format is None:
        return _as_array(found, order, sizes).values
    if isinstance(found, Array):
        values = _as_array(found, order, sizes).values
        places = np.argwhere(values)
        return Tensor.from_coordinates(places, values[tuple(places.T)], shape, format)
    entries = listed(found, order, sizes)
    return Tensor.from_coordinates(entries.places, entries.values, shape, format)


def index_sizes(assignment: Assignment, operands: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, int]:
    """Return the size of each index of an expression.

    Raises:
        SpecError: operands are missing, of the wrong order, or differ in the size of an index.
    """
    sizes: dict[str, int] = {}
    for access in assignment.inputs:
        if access.name not in operands:
            raise SpecError(f"{assignment}: no operand {access.name}")
        shape = operands[access.name].shape
        if len(shape) != len(access.indices):
            raise SpecError(f"{access} has {len(access.indices)} indices, the operand {len(shape)} modes")
        for index, size in zip(access.indices, shape, strict=True):
            if sizes.setdefault(index, int(size)) != size:
                raise SpecError(f"{assignment}: index {index} is {sizes[index]} and, in {access}, {size}")
    return sizes


class _Evaluation:
    def __init__(self, operands: Mapping[str, Tensor | NDArray[Any]], sizes: Mapping[str, int]) -> None:
        self._operands = operands
        self._sizes = sizes

    def part(self, expression: Expression, needed: Collection[str]) -> _Part:
        """Return the value of an expression over the indices that it has among the needed ones."""
        if isinstance(expression, Number):
            return Array((), np.asarray(expression.value))
        if isinstance(expression, Access):
            return _reduced(self._operand(expression), frozenset(needed))
        if isinstance(expression, Product):
            factors = [
                self.part(factor, needed_by_others(expression, at, needed))
                for at, factor in enumerate(expression.factors)
            ]
            return self._product(factors, frozenset(needed))
        kept = tuple(sorted(left_of(expression, needed)))
        return self._sum([self.part(term, needed) for term in expression.terms], kept)

    def _operand(self, access: Access) -> _Part:
        operand = self._operands[access.name]
        if isinstance(operand, np.ndarray):
            return Array(access.indices, operand)
        return _sorted(Entries(access.indices, operand.coordinates(), (), operand.values))

    def _product(self, factors: Sequence[_Part], needed: frozenset[str]) -> _Part:
        lists = [item for item in factors if isinstance(item, Entries)]
        arrays = [item for item in factors if isinstance(item, Array)]
        if not lists:
            kept = tuple(sorted(needed & {index for item in arrays for index in item.indices}))
            return Array(kept, _einsum([(item.indices, item.values) for item in arrays], kept))
        joined = reduce(_joined, sorted((_listed_tail(item, self._sizes) for item in lists), key=_length))
        return _reduced(looked_up(joined, arrays, needed), needed)

    def _sum(self, terms: Sequence[_Part], kept: tuple[str, ...]) -> _Part:
        if any(isinstance(term, Array) for term in terms):
            arrays = [_as_array(term, kept, self._sizes).values for term in terms]
            return Array(kept, reduce(np.add, arrays))
        lists = [listed(term, kept, self._sizes) for term in terms if isinstance(term, Entries)]
        places = np.concatenate([item.places for item in lists])
        return _merged(Entries(kept, places, (), np.concatenate([item.values for item in lists])))


def _length(entries: Entries) -> int:
    return len(entries.places)


def _einsum(operands: Sequence[tuple[tuple[str, ...], NDArray[Any]]], kept: Sequence[str]) -> NDArray[Any]:
    names = dict.fromkeys(index for indices, _ in operands for index in indices)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    subscripts = ",".join("".join(letters[index] for index in indices) for indices, _ in operands)
    return np.asarray(
        np.einsum(
            f"{subscripts}->{''.join(letters[index] for index in kept)}", *(array for _, array in operands)
        )
    )


def _sorted(entries: Entries) -> Entries:
    """The same list with sorted columns and rows."""
    columns = sorted(range(len(entries.indices)), key=lambda at: entries.indices[at])
    places = entries.places[:, columns]
    order = np.lexsort(places.T[::-1]) if places.shape[1] else np.arange(len(places))
    indices = tuple(entries.indices[at] for at in columns)
    return Entries(indices, places[order], entries.tail, entries.values[order])


def _merged(entries: Entries) -> Entries:
    """Sort a list and add up values at the same place, in the order in which they came."""
    entries = _sorted(entries)
    if not len(entries.places):
        return entries
    new = np.ones(len(entries.places), bool)
    new[1:] = (np.diff(entries.places, axis=0) != 0).any(1)
    if new.all():
        return entries
    values = np.add.reduceat(entries.values, np.flatnonzero(new), axis=0)
    return Entries(entries.indices, entries.places[new], entries.tail, values)


def _reduced(part: _Part, needed: frozenset[str]) -> _Part:
    """Sum over the indices that are not needed."""
    if isinstance(part, Array):
        axes = tuple(at for at, index in enumerate(part.indices) if index not in needed)
        kept = tuple(index for index in part.indices if index in needed)
        return Array(kept, np.asarray(part.values.sum(axis=axes))) if axes else part
    axes = tuple(1 + at for at, index in enumerate(part.tail) if index not in needed)
    values = part.values.sum(axis=axes) if axes else part.values
    tail = tuple(index for index in part.tail if index in needed)
    columns = [at for at, index in enumerate(part.indices) if index in needed]
    indices = tuple(part.indices[at] for at in columns)
    return _merged(Entries(indices, part.places[:, columns], tail, values))


def _joined(left: Entries, right: Entries) -> Entries:
    """The natural join: all pairs that agree on the shared indices, values multiplied."""
    shared = tuple(index for index in left.indices if index in right.indices)
    keys = [_keys(item, shared) for item in (left, right)]
    both, numbers = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)
    first, second = numbers[: len(left.places)], numbers[len(left.places) :]
    order = np.argsort(second, kind="stable")
    starts = np.searchsorted(second[order], np.arange(len(both) + 1))
    counts = np.diff(starts)[first]
    mine = np.repeat(np.arange(len(first)), counts)
    steps = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
    theirs = order[np.repeat(starts[first], counts) + steps]
    own = [at for at, index in enumerate(right.indices) if index not in shared]
    places = np.concatenate([left.places[mine], right.places[theirs][:, own]], axis=1)
    indices = left.indices + tuple(right.indices[at] for at in own)
    return _sorted(Entries(indices, places, (), left.values[mine] * right.values[theirs]))


def _keys(entries: Entries, shared: Sequence[str]) -> NDArray[np.int64]:
    return entries.places[:, [entries.indices.index(index) for index in shared]]


def looked_up(entries: Entries, arrays: Sequence[Array], needed: frozenset[str]) -> Entries:
    """Multiply with what dense operands have at the places; indices of theirs alone are summed over or kept dense."""
    if not arrays:
        return entries
    extra = dict.fromkeys(index for item in arrays for index in item.indices if index not in entries.indices)
    tail = tuple(index for index in extra if index in needed)
    width = max(1, int(np.prod([_size(arrays, index) for index in extra], dtype=np.int64)))
    step = max(1, _PIECE // width)
    pieces = []
    for start in range(0, max(len(entries.places), 1), step):
        places, values = entries.places[start : start + step], entries.values[start : start + step]
        operands: list[tuple[tuple[str, ...], NDArray[Any]]] = [(("",), values)]
        for item in arrays:
            operands.append(_gathered(item, entries.indices, places))
        pieces.append(_einsum(operands, ("", *tail)))
    return Entries(entries.indices, entries.places, tail, np.concatenate(pieces))


def _size(arrays: Sequence[Array], index: str) -> int:
    return int(next(item.values.shape[item.indices.index(index)] for item in arrays if index in item.indices))


def _gathered(
    item: Array, indices: Sequence[str], places: NDArray[np.int64]
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """The entries of a dense operand at ``places``: the first axis runs over them where it has any of their indices."""
    own = [index for index in item.indices if index in indices]
    rest = [index for index in item.indices if index not in indices]
    moved = item.values.transpose([item.indices.index(index) for index in (*own, *rest)])
    if not own:
        return tuple(rest), moved
    return ("", *rest), moved[tuple(places[:, indices.index(index)] for index in own)]


def _listed_tail(entries: Entries, sizes: Mapping[str, int]) -> Entries:
    return listed(entries, (*entries.indices, *entries.tail), sizes) if entries.tail else entries


def listed(entries: Entries, order: Sequence[str], sizes: Mapping[str, int]) -> Entries:
    """The list with columns in this order and no dense tail."""
    indices, places, values = entries.indices, entries.places, entries.values
    if entries.tail:
        grid = np.indices([sizes[index] for index in entries.tail]).reshape(len(entries.tail), -1).T
        places = np.concatenate(
            [np.repeat(places, len(grid), axis=0), np.tile(grid, (len(places), 1))], axis=1
        )
        indices, values = indices + entries.tail, values.reshape(-1)
    columns = [indices.index(index) for index in order]
    return Entries(tuple(order), places[:, columns], (), values)


def _as_array(part: _Part, order: Sequence[str], sizes: Mapping[str, int]) -> Array:
    """The part as a dense array over the indices in this order."""
    if isinstance(part, Array):
        return Array(tuple(order), part.values.transpose([part.indices.index(index) for index in order]))
    columns = (*part.indices, *part.tail)
    dense = np.zeros([sizes[index] for index in columns], part.values.dtype)
    dense[tuple(part.places.T)] = part.values if part.indices else part.values.sum(0)
    return Array(tuple(order), dense.transpose([columns.index(index) for index in order]))
