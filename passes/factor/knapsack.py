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

from sparsecc.passes.factor.knapsack_search import better
from sparsecc.passes.factor.knapsack_table import Agreement, Picks, Table, Vector, undominated

__all__ = ["Agreement", "Assignment", "capped", "dual_bound", "front", "knapsack", "lagrangian", "total"]

#: Steps between the cheapest and the dearest assignment on a front.
_FRONT_STEPS = 8_192


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


def knapsack(
    costs: Sequence[Vector],
    errors: Sequence[Vector],
    budget: float,
    agreements: Sequence[Agreement] = (),
) -> Assignment | None:
    """Return the assignment with the smallest sum of errors that costs at most ``budget``; None if there is none.

    What one price for all layers gives is near the optimum; the sums of candidates that its bound does not rule out
    are searched for a better one. The result is the optimum where all costs are multiples of a common step of which
    the budget holds fewer than 8,192, and wherever those sums are few; it is never worse than ``lagrangian``, and
    ``dual_bound`` says how far from the optimum it may be.

    Args:
        costs: per layer those of its candidates, at least 0.
        errors: per layer and candidate.
        budget: at least 0.
        agreements: layers that must agree; none of them in two.
    """
    table = _within(costs, errors, budget, agreements)
    if table is None:
        return None
    priced = table.priced(budget)
    best = table.spent(priced.picks, budget)
    if table.error(best) > priced.bound:
        best = better(table, priced, budget, best)
    return total(costs, errors, table.chosen(best))


def front(
    costs: Sequence[Vector],
    errors: Sequence[Vector],
    agreements: Sequence[Agreement] = (),
    steps: int = _FRONT_STEPS,
) -> list[Assignment]:
    """Return assignments by rising cost and falling error, over all budgets, from one dynamic programme.

    None of them is beaten by another in both. Where all costs are multiples of a common step of which the dearest
    assignment holds not too many, they are all that are optimal for some budget; else costs are rounded to steps.

    Args:
        costs: as for ``knapsack``.
        errors: likewise.
        agreements: likewise.
        steps: that the costs between the cheapest and the dearest assignment are cut into.
    """
    table = Table.of(costs, errors, agreements)
    if table is None:
        return []
    above, _ = _above_least(table)
    step = _step(above, float(above.max(axis=1, initial=0.0).sum()), steps)
    units = np.rint(above / step).astype(np.int64) if step else above.astype(np.int64)
    count = int(units.max(axis=1, initial=0).sum())
    best, trail = _dynamic(table, units, count)
    lower = np.flatnonzero(best < np.append(np.inf, best[:-1]))
    found = [total(costs, errors, table.chosen(picks)) for picks in _traced(table, units, trail, lower)]
    own = undominated(np.array([way.cost for way in found]), np.array([way.error for way in found]))
    return [found[at] for at in own]


def lagrangian(
    costs: Sequence[Vector],
    errors: Sequence[Vector],
    budget: float,
    agreements: Sequence[Agreement] = (),
) -> Assignment | None:
    """Return an assignment within ``budget`` from one price per cost for all layers; None if there is none.

    The price is the smallest, to rounding, at which the layers, each for itself, choose what the budget holds; what
    is left of it is spent on the best moves that still fit.

    Args:
        costs: as for ``knapsack``.
        errors: likewise.
        budget: likewise.
        agreements: likewise.
    """
    table = _within(costs, errors, budget, agreements)
    if table is None:
        return None
    return total(costs, errors, table.chosen(table.spent(table.priced(budget).picks, budget)))


def dual_bound(
    costs: Sequence[Vector],
    errors: Sequence[Vector],
    budget: float,
    agreements: Sequence[Agreement] = (),
) -> float:
    """Return a number that no assignment within ``budget`` has a smaller sum of errors than; infinite if there is none.

    The best over prices ``p >= 0`` of the sum over layers of the smallest ``error + p * cost``, less ``p * budget``.

    Args:
        costs: as for ``knapsack``.
        errors: likewise.
        budget: likewise.
        agreements: likewise.
    """
    table = _within(costs, errors, budget, agreements)
    return math.inf if table is None else table.priced(budget).bound


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


def _within(
    costs: Sequence[Vector], errors: Sequence[Vector], budget: float, agreements: Sequence[Agreement]
) -> Table | None:
    """The table of candidates, or None where not even the cheapest are within the budget."""
    table = Table.of(costs, errors, agreements)
    return table if table is not None and table.cost(table.cheapest()) <= budget else None


def _above_least(table: Table) -> tuple[Vector, float]:
    """Costs above the least of each layer, 0 where there is no candidate, and the sum of those."""
    least = np.full(len(table.costs), np.inf)
    np.minimum.at(least, table.layers, table.costs[:, 0])
    above = table.costs - least[table.layers][:, None]
    layers = np.unique(table.layers)
    return np.where(np.isfinite(table.errors), above, 0.0), math.fsum(least[layers].tolist())


def _step(costs: Vector, budget: float, steps: int) -> float:
    """The largest common measure of whole costs, or the size of a step where that is too small for the budget."""
    if np.array_equal(costs, np.round(costs)) and costs.max(initial=0.0) < 2**53:
        common = math.gcd(*(int(value) for value in np.unique(costs)))
        if common and budget / common <= steps:
            return float(common)
    return budget / steps


#: For each stage which of its alternatives is best by steps, where it has several, and the columns chosen in each row.
_Trail = list[tuple[NDArray[np.intp] | None, list[list[NDArray[np.integer]]]]]


def _dynamic(table: Table, units: NDArray[np.int64], steps: int) -> tuple[Vector, _Trail]:
    """The least sum of errors for each number of steps, infinite where nothing fits, and how it comes about."""
    best = np.zeros(steps + 1)
    trail: _Trail = []
    for ways in table.stages:
        ends, columns = [], []
        for way in ways:
            end, chosen = best, []
            for row in way.tolist():
                end, pick = _added(end, units[row], table.errors[row])
                chosen.append(pick)
            ends.append(end)
            columns.append(chosen)
        which = None if len(ends) == 1 else np.argmin(ends, axis=0)
        best = np.min(ends, axis=0)
        trail.append((which, columns))
    return best, trail


def _added(best: Vector, units: NDArray[np.int64], errors: Vector) -> tuple[Vector, NDArray[np.integer]]:
    """``best`` with one more layer, and which of its candidates is chosen at each number of steps."""
    steps = len(best) - 1
    new = np.full(steps + 1, np.inf)
    pick = np.zeros(steps + 1, np.min_scalar_type(len(errors)))
    for at, (unit, error) in enumerate(zip(units.tolist(), errors.tolist(), strict=True)):
        if unit > steps or not math.isfinite(error):
            continue
        moved = best[: steps + 1 - unit] + error
        lower = moved < new[unit:]
        np.copyto(new[unit:], moved, where=lower)
        np.copyto(pick[unit:], at, where=lower, casting="unsafe")
    return new, pick


def _traced(table: Table, units: NDArray[np.int64], trail: _Trail, steps: NDArray[np.intp]) -> list[Picks]:
    """The choices that a dynamic programme made for each of ``steps``."""
    left = steps.copy()
    rows, columns = np.zeros((2, len(steps), int(table.layers.max(initial=-1)) + 1), np.intp)
    for ways, (which, picks) in zip(reversed(table.stages), reversed(trail), strict=True):
        way_of = np.zeros(len(steps), np.intp) if which is None else which[left]
        for number, (way, chosen) in enumerate(zip(ways, picks, strict=True)):
            own = np.flatnonzero(way_of == number)
            for row, pick in zip(reversed(way.tolist()), reversed(chosen), strict=True):
                column = pick[left[own]].astype(np.intp)
                rows[own, table.layers[row]], columns[own, table.layers[row]] = row, column
                left[own] -= units[row, column]
    return [Picks(*own) for own in zip(rows, columns, strict=True)]
