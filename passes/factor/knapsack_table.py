"""The candidates of a multiple-choice knapsack as one matrix, and choices in it by one price for all layers.

Each layer is a row, its candidates sorted by cost, dominated ones left out. A layer of an ``Agreement`` is two rows:
its marked candidates and the others. Float64, no ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agreement", "Picks", "Priced", "Table", "undominated"]

Vector = NDArray[np.float64]
Numbers = NDArray[np.intp]

#: How often a multiplier is halved: beyond that it is exact to rounding.
_HALVINGS = 100

#: A price beyond which layers are taken to choose what is cheapest.
_HIGHEST = 1e100

#: Share of the budget below which a difference of costs is taken to be nothing.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Agreement:
    """Layers that all take a marked candidate, or all take one that is not.

    Attributes:
        layers: their numbers.
        marks: for each of them which of its candidates are marked.
    """

    layers: tuple[int, ...]
    marks: tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True)
class Picks:
    """A cell of the table for each layer: ``rows`` and ``columns``, ``[layers]`` each."""

    rows: Numbers
    columns: Numbers


@dataclass(frozen=True)
class Priced:
    """What layers choose at the price at which they keep the budget.

    Attributes:
        picks: their choices.
        price: the one with the best bound.
        bound: no choices within the budget have a smaller sum of errors.
    """

    picks: Picks
    price: float
    bound: float


@dataclass(frozen=True)
class Table:
    """Candidates of layers.

    Attributes:
        costs: ``[rows, widest]``, 0 where a row has no candidate.
        errors: likewise, infinite there.
        numbers: which candidate of the layer it is.
        stages: sets of layers that are chosen for independently, each with its alternatives, which are lists of rows.
        layers: of each row.
    """

    costs: Vector
    errors: Vector
    numbers: Numbers
    stages: tuple[tuple[Numbers, ...], ...]
    layers: Numbers

    @classmethod
    def of(
        cls, costs: Sequence[Vector], errors: Sequence[Vector], agreements: Sequence[Agreement] = ()
    ) -> Table | None:
        """Return the table, or None where the layers of an agreement cannot agree."""
        rows: list[tuple[int, Numbers]] = []
        stages: list[tuple[Numbers, ...]] = []

        def add(layers: Sequence[int], candidates: Sequence[Numbers]) -> Numbers:
            start = len(rows)
            rows.extend(
                (layer, own[undominated(costs[layer][own], errors[layer][own])])
                for layer, own in zip(layers, candidates, strict=True)
            )
            return np.arange(start, len(rows))

        together = {layer for agreement in agreements for layer in agreement.layers}
        for layer, own in enumerate(costs):
            if layer not in together:
                stages.append((add([layer], [np.arange(len(own))]),))
        for agreement in agreements:
            ways = [[np.flatnonzero(marks == way) for marks in agreement.marks] for way in (True, False)]
            open_ways = [way for way in ways if all(own.size for own in way)]
            if not open_ways:
                return None
            stages.append(tuple(add(agreement.layers, way) for way in open_ways))
        return cls._filled(costs, errors, rows, stages)

    @classmethod
    def _filled(
        cls,
        costs: Sequence[Vector],
        errors: Sequence[Vector],
        rows: Sequence[tuple[int, Numbers]],
        stages: Sequence[tuple[Numbers, ...]],
    ) -> Table:
        shape = len(rows), max((own.size for _, own in rows), default=1)
        table = cls(
            np.zeros(shape),
            np.full(shape, np.inf),
            np.zeros(shape, np.intp),
            tuple(stages),
            np.array([layer for layer, _ in rows], np.intp),
        )
        for row, (layer, own) in enumerate(rows):
            table.costs[row, : own.size] = costs[layer][own]
            table.errors[row, : own.size] = errors[layer][own]
            table.numbers[row, : own.size] = own
        return table

    def chosen(self, picks: Picks) -> tuple[int, ...]:
        """Return the numbers of the candidates, by layer."""
        return tuple(self.numbers[picks.rows, picks.columns].tolist())

    def cost(self, picks: Picks) -> float:
        """Return the sum of costs."""
        return math.fsum(self.costs[picks.rows, picks.columns].tolist())

    def error(self, picks: Picks) -> float:
        """Return the sum of errors."""
        return math.fsum(self.errors[picks.rows, picks.columns].tolist())

    def reduced(self, price: float) -> tuple[Vector, Vector]:
        """Return ``error + price * cost`` of all cells, and the least of each row."""
        values = self.errors + price * self.costs
        return values, values.min(axis=1)

    def at(self, price: float) -> Picks:
        """Return what layers choose at ``price``; of what is equally good the cheapest."""
        values, _ = self.reduced(price)
        columns = values.argmin(axis=1)  # candidates are sorted by cost: the first is the cheapest
        own = np.arange(len(columns))
        return self._best_ways(columns, values[own, columns], self.costs[own, columns])

    def cheapest(self) -> Picks:
        """Return the choices of least cost; of what costs the same that of least error."""
        columns = np.zeros(len(self.layers), np.intp)
        return self._best_ways(columns, self.costs[:, 0], self.errors[:, 0])

    def _best_ways(self, columns: Numbers, first: Vector, second: Vector) -> Picks:
        """Of each stage the alternative with the least sum of ``first``, then of ``second``."""
        best = [
            ways[0]
            if len(ways) == 1
            else min(ways, key=lambda way: (math.fsum(first[way]), math.fsum(second[way])))
            for ways in self.stages
        ]
        rows = np.concatenate([np.zeros(0, np.intp), *best])
        rows = rows[np.argsort(self.layers[rows])]
        return Picks(rows, columns[rows])

    def priced(self, budget: float) -> Priced:
        """Return what layers choose at the least price, to rounding, at which they keep ``budget``.

        Some choices are within the budget.
        """
        budget = min(
            budget, math.fsum(self.costs.max(axis=1).tolist())
        )  # more is no use, and may be infinite
        best_price, bound = 0.0, -math.inf

        def at(price: float) -> tuple[Picks, float]:
            nonlocal best_price, bound
            picks = self.at(price)
            cost = self.cost(picks)
            value = self.error(picks) + price * (cost - budget)
            if value > bound:
                best_price, bound = price, value
            return picks, cost

        picks, cost = at(0.0)
        if cost <= budget:
            return Priced(picks, best_price, bound)
        low, high = 0.0, 1.0
        while at(high)[1] > budget:
            if high > _HIGHEST:
                return Priced(self.cheapest(), best_price, bound)
            high *= 4
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (low, middle) if at(middle)[1] <= budget else (middle, high)
        return Priced(at(high)[0], best_price, bound)

    def spent(self, picks: Picks, budget: float) -> Picks:
        """Return ``picks`` with moves to better candidates that the rest of ``budget`` holds, the best per cost first.

        Layers that agree keep what they agree on.
        """
        costs, errors = self.costs[picks.rows], self.errors[picks.rows]
        columns, own = picks.columns.copy(), np.arange(len(picks.columns))
        refused = np.zeros(costs.shape, np.bool_)
        least = _NOTHING * (budget or 1.0)
        while True:
            left = budget - math.fsum(costs[own, columns].tolist())
            gain = errors[own, columns][:, None] - errors
            price = costs - costs[own, columns][:, None]
            fits = (gain > 0) & (price <= left) & ~refused
            if not fits.any():
                return Picks(picks.rows, columns)
            worth = np.where(fits, gain, 0.0) / np.maximum(price, least)
            layer, column = np.unravel_index(int(worth.argmax()), worth.shape)
            before, columns[layer] = columns[layer], column
            if math.fsum(costs[own, columns].tolist()) > budget:  # by rounding alone
                columns[layer] = before
                refused[layer, column] = True


def undominated(costs: Vector, errors: Vector) -> Numbers:
    """Return the numbers of the candidates that no other beats in both, by cost; of equal ones the first."""
    if not costs.size:
        return np.zeros(0, np.intp)
    order = np.lexsort((errors, costs))
    least = np.minimum.accumulate(errors[order])
    kept: Numbers = order[np.append(True, least[1:] < least[:-1])]
    return kept
