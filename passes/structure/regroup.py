"""Searching an order of units whose masks keep a larger share of the scores. Arrays in, arrays out; no ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsecc.sparse import Pattern, Scope, keep_mask

__all__ = ["BlockTerm", "GroupTerm", "Term", "regroup"]

Array = NDArray[np.float32]
Order = NDArray[np.int64]

#: Gains below this share of all scores are rounding.
_TOLERANCE = 1e-6

#: A round that gains less ends the ascent.
_WORTH = 1e-5

#: Pairs looked at per unit and round.
_PAIRS = 32

#: So few units are searched from random orders too: exchanges of two alone end in poor orders there.
_FEW, _SHUFFLES = 256, 4


class Term(Protocol):
    """What one weight matrix says about an order of units."""

    def score(self, order: Order) -> float:
        """Return the share of the scores that the mask of this order keeps."""

    def values(self, order: Order) -> Array:
        """Return ``[slots, slots]``: what slot j would add if it held what slot i holds, all else unchanged."""

    def groups(self) -> Order | None:
        """Return the group of each slot if values hold for one change per group only, else None."""


@dataclass(frozen=True)
class BlockTerm:
    """Units are rows (or columns) that share mask bits in blocks.

    With the mask held, what is kept is a sum over units, so any number of exchanges may be made at once; a new mask
    then keeps at least as much.

    Attributes:
        features: ``[units, F]``: scores of each unit, summed over what a mask bit spans in the other direction.
        fixed: ``[groups, F]``: the same for positions that are not among the units, summed by group.
        group: group of each slot.
        sparsity: share of blocks to drop.
        scope: what one count of blocks spans.
        by_row: units are rows; otherwise columns.
    """

    features: Array
    fixed: Array
    group: Order
    sparsity: float
    scope: Scope
    by_row: bool

    def _mask(self, order: Order) -> tuple[Array, NDArray[np.bool_]]:
        sums = self.fixed.copy()
        np.add.at(sums, self.group, self.features[order])
        scores = sums if self.by_row else sums.T
        mask = keep_mask(scores, Pattern("unstructured"), self.sparsity, self.scope)
        return sums, mask if self.by_row else mask.T

    def score(self, order: Order) -> float:
        """Return the sum of the kept blocks."""
        sums, mask = self._mask(order)
        return float(sums[mask].sum(dtype=np.float64))

    def values(self, order: Order) -> Array:
        """Return the scores under the mask of each slot's group."""
        kept = self._mask(order)[1].astype(np.float32)
        return np.asarray((kept @ self.features[order].T)[self.group], np.float32)

    def groups(self) -> Order | None:
        """Return None: exchanges do not disturb each other."""
        return None


@dataclass
class GroupTerm:
    """Units are columns of which N of every M neighbours are kept in each row.

    Attributes:
        scores: ``[R, K]`` of the whole matrix.
        position: column of each slot.
        n: kept of each group.
        m: size of a group.
    """

    scores: Array
    position: Order
    n: int
    m: int
    _last: tuple[Order, Array] | None = field(default=None, init=False, repr=False)

    def _placed(self, order: Order) -> Array:
        placed = self.scores.copy()
        placed[:, self.position] = self.scores[:, self.position[order]]
        return placed

    def score(self, order: Order) -> float:
        """Return the sum of the N largest of every group."""
        placed = self._placed(order)
        mask = keep_mask(placed, Pattern("nm", n=self.n, m=self.m))
        return float(placed[mask].sum(dtype=np.float64))

    def values(self, order: Order) -> Array:
        """Return, slot by slot, what its group keeps with another unit in it.

        Only the groups that changed since the last call are computed again.
        """
        placed = self._placed(order)
        candidates = placed[:, self.position]
        values, slots = self._known(order)
        for slot in slots:
            column = self.position[slot]
            start = column // self.m * self.m
            rest = np.delete(placed[:, start : start + self.m], column - start, axis=1)
            # Without the slot's own: the kept ones, and the least a newcomer must exceed to be kept.
            if rest.shape[1] < self.n:
                base, least = rest.sum(1), np.zeros(len(rest), np.float32)
            else:
                ranked = -np.partition(-rest, self.n - 1, axis=1)[:, : self.n]
                base, least = ranked.sum(1), ranked.min(1)
            values[slot] = base.sum() + np.maximum(candidates - least[:, None], 0).sum(0)
        self._last = (order, values)
        return values

    def _known(self, order: Order) -> tuple[Array, Order]:
        """Values that still hold, with columns where the units are now, and the slots to compute."""
        if self._last is None:
            return np.empty((len(order), len(order)), np.float32), np.arange(len(order))
        before, values = self._last
        groups = self.groups()
        touched = np.isin(groups, groups[order != before])
        return values[:, np.argsort(before)[order]], np.flatnonzero(touched)

    def groups(self) -> Order:
        """Return the group of each slot: a second change in a group would meet another threshold."""
        return self.position // self.m


def regroup(terms: Sequence[Term], units: int, rounds: int) -> tuple[Order, float, float]:
    """Return an order (the unit that comes to each slot), and the score before and with it.

    Ascends by exchanges of two units, many disjoint ones per round, from the present order, for blocks from one
    sorted by similarity, for few units from random ones too; the best end counts. The score never falls below that
    of the present order.

    Args:
        terms: the matrices concerned; their scores add up.
        units: number of units and slots.
        rounds: most rounds from each start, which bounds the time.
    """
    identity = np.arange(units, dtype=np.int64)
    before = _total(terms, identity)
    best, reached = identity, before
    blocks = [term for term in terms if isinstance(term, BlockTerm)]
    starts = [identity, *([_by_similarity(blocks)] if blocks else [])]
    if units <= _FEW:
        rng = np.random.default_rng(0)
        starts += [rng.permutation(units) for _ in range(_SHUFFLES)]
    for start in starts:
        order, score = _ascend(terms, start, rounds)
        if score > reached + _TOLERANCE:
            best, reached = order, score
    return best, before, reached


def _total(terms: Sequence[Term], order: Order) -> float:
    return sum(term.score(order) for term in terms)


def _by_similarity(terms: Sequence[BlockTerm]) -> Order:
    """Units in the order of the first principal direction of their score profiles."""
    profiles = np.concatenate([term.features for term in terms], axis=1, dtype=np.float64)
    profiles -= profiles.mean(0)
    return np.argsort(np.linalg.eigh(profiles @ profiles.T)[1][:, -1], kind="stable")


def _ascend(terms: Sequence[Term], start: Order, rounds: int) -> tuple[Order, float]:
    order, score = start, _total(terms, start)
    for _ in range(rounds):
        changed = _exchange(terms, order)
        if changed is None:
            break
        reached = _total(terms, changed)
        if reached <= score:
            break
        gained = reached - score
        order, score = changed, reached
        if gained < _WORTH:
            break
    return order, score


def _exchange(terms: Sequence[Term], order: Order) -> Order | None:
    """Exchange disjoint pairs of slots by falling gain; None if no pair gains."""
    gain = np.zeros((len(order), len(order)), np.float32)
    grouping = [found for term in terms if (found := term.groups()) is not None]
    for term in terms:
        values = term.values(order)
        own = values.diagonal()
        change = values + values.T - own[:, None] - own[None, :]
        groups = term.groups()
        if groups is not None:
            change[groups[:, None] == groups[None, :]] = 0
        gain += change
    first, second = np.nonzero(np.triu(gain, 1) > _TOLERANCE)
    value = gain[first, second]
    if len(value) > _PAIRS * len(order):
        largest = np.argpartition(-value, _PAIRS * len(order))[: _PAIRS * len(order)]
        first, second, value = first[largest], second[largest], value[largest]
    ranked = np.lexsort((second, first, -value))
    used: list[set[Any]] = [set() for _ in range(1 + len(grouping))]
    changed = order.copy()
    for pair in zip(first[ranked].tolist(), second[ranked].tolist(), strict=True):
        touched = [set(pair), *({int(groups[item]) for item in pair} for groups in grouping)]
        if any(old & new for old, new in zip(used, touched, strict=True)):
            continue
        for old, new in zip(used, touched, strict=True):
            old |= new
        changed[[pair[0], pair[1]]] = changed[[pair[1], pair[0]]]
    return None if np.array_equal(changed, order) else changed
