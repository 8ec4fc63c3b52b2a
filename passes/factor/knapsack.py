"""One candidate per layer within a budget, at the smallest sum of errors. Arrays in, arrays out; float64, no ONNX.

The multiple-choice knapsack problem: layer ``l`` has candidates with a cost (bytes, parameters, milliseconds) and an
error each, one of which is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Assignment", "capped", "dual_bound", "knapsack", "lagrangian", "total"]

Vector = NDArray[np.float64]

#: Steps that a budget is cut into where costs have no larger common measure.
_STEPS = 20_000

#: Share of a step that a cost may be above a whole number of them by rounding.
_ROUNDING = 1e-9

#: How often a multiplier is halved: beyond that it is exact to rounding.
_HALVINGS = 100

#: A price beyond which layers are taken to choose what is cheapest.
_HIGHEST = 1e100


@dataclass(frozen=True)
class Assignment:
    """A candidate for each layer.

    Attributes:
        chosen: its number, by layer.
        cost: of all of them together.
        error: likewise.
    """

    chosen: tuple[int, ...]
    cost: float
    error: float


def total(costs: Sequence[Vector], errors: Sequence[Vector], chosen: Sequence[int]) -> Assignment:
    """Return the assignment of ``chosen`` with its sums."""
    picks = [int(pick) for pick in chosen]
    return Assignment(
        tuple(picks),
        math.fsum(float(own[pick]) for own, pick in zip(costs, picks, strict=True)),
        math.fsum(float(own[pick]) for own, pick in zip(errors, picks, strict=True)),
    )


def knapsack(costs: Sequence[Vector], errors: Sequence[Vector], budget: float) -> Assignment | None:
    """Return the assignment with the smallest sum of errors that costs at most ``budget``; None if there is none.

    By dynamic programming over the budget in whole steps. Where all costs are multiples of a common step of which the
    budget holds not too many, the result is the optimum; else costs are rounded up, so that the budget is kept, and
    what is left of it is spent on the best moves that still fit. The result is never worse than ``lagrangian``.

    Args:
        costs: per layer those of its candidates, at least 0.
        errors: per layer and candidate.
        budget: at least 0.
    """
    easy = lagrangian(costs, errors, budget)
    if easy is None or easy.error <= dual_bound(costs, errors, budget):
        return easy
    step = _step(costs, budget)
    steps = int(budget / step + _ROUNDING) if step else 0
    units = [np.ceil(own / step - _ROUNDING).astype(np.int64) if step else _free(own) for own in costs]
    found = _dynamic(units, errors, steps)
    if found is None:
        return easy
    full = _spent(costs, errors, found, budget)
    return full if full.error <= easy.error else easy


def lagrangian(costs: Sequence[Vector], errors: Sequence[Vector], budget: float) -> Assignment | None:
    """Return an assignment within ``budget`` from one price per cost for all layers; None if there is none.

    The price is the smallest, to rounding, at which the layers, each for itself, choose what the budget holds; what
    is left of it is spent on the best moves that still fit.

    Args:
        costs: as for ``knapsack``.
        errors: likewise.
        budget: likewise.
    """
    if not math.fsum(float(own.min()) for own in costs) <= budget:
        return None
    return _spent(costs, errors, _priced(costs, errors, budget)[0], budget)


def dual_bound(costs: Sequence[Vector], errors: Sequence[Vector], budget: float) -> float:
    """Return a number that the errors of no assignment within ``budget`` sum up to less than.

    The best over prices ``p >= 0`` of the sum over layers of the smallest ``error + p * cost``, less ``p * budget``.

    Args:
        costs: as for ``knapsack``; some assignment is within the budget.
        errors: likewise.
        budget: likewise.
    """
    return _priced(costs, errors, budget)[1]


def capped(errors: Sequence[Vector], costs: Sequence[Vector], budget: float, mean: float) -> float | None:
    """Return the least of 1.0, 1.1 to 2.0 times ``mean`` with which candidates of no larger error reach ``budget``.

    The cap of ROCKET: a sum of errors alone may destroy one layer. Layers without such a candidate count with the
    one of least error.

    Args:
        errors: per layer those of its candidates.
        costs: likewise.
        budget: for all layers together.
        mean: of the errors of an allocation that treats layers alike.

    Returns:
        The cap, or None where even twice the mean does not reach the budget.
    """
    for tenths in range(10, 21):
        cap = mean * tenths / 10
        least = [float(own[allowed(loss, cap)].min()) for own, loss in zip(costs, errors, strict=True)]
        if math.fsum(least) <= budget:
            return cap
    return None


def allowed(errors: Vector, cap: float) -> NDArray[np.bool_]:
    """Return which candidates have an error of ``cap`` or less; the one of least error if none has."""
    within = errors <= cap
    return within if within.any() else np.arange(len(errors)) == int(errors.argmin())


def _free(costs: Vector) -> NDArray[np.int64]:
    """Steps with a budget of nothing: what costs something is out of reach."""
    return (costs > 0).astype(np.int64)


def _step(costs: Sequence[Vector], budget: float) -> float:
    """The largest common measure of whole costs, or the size of a step where that is too small for the budget."""
    values = np.concatenate([np.asarray(own, np.float64) for own in costs])
    if np.array_equal(values, np.round(values)) and values.max(initial=0.0) < 2**53:
        common = math.gcd(*(int(value) for value in values))
        if common and budget / common <= _STEPS:
            return float(common)
    return budget / _STEPS


def _dynamic(units: Sequence[NDArray[np.int64]], errors: Sequence[Vector], steps: int) -> list[int] | None:
    """The best choice by whole steps, or None where no choice fits."""
    best = np.zeros(steps + 1)
    picks = []
    for own, loss in zip(units, errors, strict=True):
        new = np.full(steps + 1, np.inf)
        pick = np.full(steps + 1, -1, np.int32)
        for at, (unit, error) in enumerate(zip(own.tolist(), loss.tolist(), strict=True)):
            if unit > steps:
                continue
            moved = best[: steps + 1 - unit] + error
            better = moved < new[unit:]
            new[unit:][better] = moved[better]
            pick[unit:][better] = at
        best = new
        picks.append(pick)
    at = int(best.argmin())
    if not np.isfinite(best[at]):
        return None
    chosen = []
    for own, pick in zip(reversed(units), reversed(picks), strict=True):
        chosen.append(int(pick[at]))
        at -= int(own[chosen[-1]])
    return chosen[::-1]


def _priced(costs: Sequence[Vector], errors: Sequence[Vector], budget: float) -> tuple[list[int], float]:
    """What layers choose at the price at which they keep the budget, and the best bound seen on the way."""

    def at(price: float) -> tuple[list[int], float, float]:
        # Of candidates equally good at this price the cheapest: otherwise none of the prices may keep the budget.
        picks = [
            int(np.lexsort((own, loss + price * own))[0]) for own, loss in zip(costs, errors, strict=True)
        ]
        found = total(costs, errors, picks)
        return picks, found.cost, found.error + price * (found.cost - budget)

    picks, cost, bound = at(0.0)
    if cost <= budget:
        return picks, bound
    cheapest = [int(np.lexsort((loss, own))[0]) for own, loss in zip(costs, errors, strict=True)]
    low, high = 0.0, 1.0
    while at(high)[1] > budget:
        if high > _HIGHEST:
            return cheapest, bound
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        picks, cost, value = at(middle)
        bound = max(bound, value)
        low, high = (low, middle) if cost <= budget else (middle, high)
    picks, _, value = at(high)
    return picks, max(bound, value)


def _spent(
    costs: Sequence[Vector], errors: Sequence[Vector], chosen: Sequence[int], budget: float
) -> Assignment:
    """``chosen`` with moves to better candidates that what is left of the budget holds, the best per cost first."""
    picks = list(chosen)
    left = budget - total(costs, errors, picks).cost
    while True:
        best, move = 0.0, None
        for layer, (own, loss) in enumerate(zip(costs, errors, strict=True)):
            gain, price = loss[picks[layer]] - loss, own - own[picks[layer]]
            fits = (gain > 0) & (price <= left)
            if not fits.any():
                continue
            worth = np.where(fits, gain / np.maximum(price, _ROUNDING * (budget or 1.0)), 0.0)
            at = int(worth.argmax())
            if worth[at] > best:
                best, move = float(worth[at]), (layer, at)
        if move is None:
            return total(costs, errors, picks)
        left -= float(costs[move[0]][move[1]] - costs[move[0]][picks[move[0]]])
        picks[move[0]] = move[1]
