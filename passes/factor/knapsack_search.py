"""The optimum of a multiple-choice knapsack of which something near is known: the states that its bound leaves.

At a price ``p`` all choices within the budget have errors of at least the bound at ``p``, plus what each candidate has
of ``error + p * cost`` above the least of its layer. Sums of candidates with which that reaches the errors known are
left out; little stays where the bound is close (as in Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.knapsack_table import Picks, Priced, Table, Vector, undominated

__all__ = ["better"]

Numbers = NDArray[np.intp]

#: Most states that are kept: of the first search, which is to find something better quickly, and of the second. Costs
#: that are multiples of a common step of which the budget holds fewer than the latter never have more.
_STATES = (512, 8192)

#: Share of the errors to which what is found must be near the bound for a second search to be left out.
_NEAR = 1e-6

#: Share by which sums may be off by rounding; what is found is added up exactly.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class _States:
    """Sums over the layers so far, and for each the state before and the cell that was added to it.

    ``row`` is -1 where states of several alternatives come together: then ``columns`` says of which.
    """

    cost: Vector
    error: Vector
    sources: tuple[_States, ...]
    before: Numbers
    columns: Numbers
    row: int = -1


def better(table: Table, priced: Priced, budget: float, known: Picks) -> Picks:
    """Return the choices within ``budget`` of least error, or ``known``, which are within it, if none have less.

    Where states are too many the most promising are kept, and the result may not be the optimum.

    Args:
        table: of all candidates.
        priced: a good price and its bound.
        budget: for all layers together.
        known: choices of small error.
    """
    for most in _STATES:
        search = _Search(table, priced.price, budget, table.error(known), most)
        known = search.best() or known
        if not search.lossy or table.error(known) * (1 - _NEAR) <= priced.bound:
            break
    return known


class _Search:
    def __init__(self, table: Table, price: float, budget: float, known: float, most: int) -> None:
        self.table, self.price, self.budget, self.known = table, price, budget, known
        self.most, self.lossy = most, False
        self.most_cost = budget * (1 + _ROUNDING)
        self.most_value = (known + price * budget) * (1 + _ROUNDING)
        # What the layers after each row take at least, of cost and of error + price * cost.
        self.cost_left, self.value_left = np.zeros((2, len(table.layers)))
        value = table.reduced(price)[1]
        cost_after = value_after = 0.0
        for ways in reversed(table.stages):
            totals = []
            for way in ways:
                cost, least = cost_after, value_after
                for row in reversed(way.tolist()):
                    self.cost_left[row], self.value_left[row] = cost, least
                    cost += float(table.costs[row, 0])
                    least += float(value[row])
                totals.append((cost, least))
            cost_after, value_after = (min(own) for own in zip(*totals, strict=True))

    def best(self) -> Picks | None:
        """The choices of least error below the one known."""
        nothing = np.zeros(1, np.intp)
        states = _States(np.zeros(1), np.zeros(1), (), nothing, nothing)
        for ways in self.table.stages:
            ends = tuple(self._through(states, way) for way in ways)
            states = ends[0] if len(ends) == 1 else self._joined(ends)
        for at in np.argsort(states.error, kind="stable").tolist():
            picks = _traced(states, at, self.table)
            if self.table.cost(picks) <= self.budget and self.table.error(picks) < self.known:
                return picks
        return None

    def _through(self, states: _States, rows: Numbers) -> _States:
        for row in rows.tolist():
            states = self._added(states, row)
        return states

    def _added(self, states: _States, row: int) -> _States:
        """The states with each candidate of ``row``, without those that lead nowhere."""
        width = int(np.isfinite(self.table.errors[row]).sum())
        cost = states.cost[:, None] + self.table.costs[row, :width]
        error = states.error[:, None] + self.table.errors[row, :width]
        value = error + self.price * cost + self.value_left[row]
        before, columns = np.nonzero(
            (cost + self.cost_left[row] <= self.most_cost) & (value < self.most_value)
        )
        cost, error = cost[before, columns], error[before, columns]
        return self._pruned(_States(cost, error, (states,), before, columns, row))

    def _joined(self, ends: tuple[_States, ...]) -> _States:
        """The states of all alternatives as one."""
        sizes = [end.cost.size for end in ends]
        return self._pruned(
            _States(
                np.concatenate([end.cost for end in ends]),
                np.concatenate([end.error for end in ends]),
                ends,
                np.concatenate([np.arange(size) for size in sizes]),
                np.repeat(np.arange(len(ends)), sizes),
            )
        )

    def _spread(self, cost: Vector, error: Vector) -> Numbers:
        """Of states by cost the most promising in each of ``most`` equal intervals of cost."""
        interval = ((cost - cost[0]) * (self.most / (cost[-1] - cost[0]))).astype(np.intp)
        order = np.lexsort((error + self.price * cost, interval))
        kept: Numbers = order[np.diff(interval[order], prepend=-1) > 0]
        return kept

    def _pruned(self, states: _States) -> _States:
        """The undominated states, by cost."""
        kept = undominated(states.cost, states.error)
        if kept.size > self.most:
            self.lossy = True
            kept = kept[self._spread(states.cost[kept], states.error[kept])]
        return _States(
            states.cost[kept],
            states.error[kept],
            states.sources,
            states.before[kept],
            states.columns[kept],
            states.row,
        )


def _traced(states: _States, at: int, table: Table) -> Picks:
    """The cells that a state is the sum of."""
    rows, columns = [], []
    while states.sources:
        column, before = int(states.columns[at]), int(states.before[at])
        if states.row >= 0:
            rows.append(states.row)
            columns.append(column)
        states = states.sources[column if states.row < 0 else 0]
        at = before
    order = np.argsort(table.layers[rows])
    return Picks(np.array(rows, np.intp)[order], np.array(columns, np.intp)[order])
