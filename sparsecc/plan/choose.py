"""One candidate for each item: the best under a budget, all that are best for some budget, and what is safer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.passes.factor import knapsack as solver
from sparsecc.plan.items import Candidate, Choice, Item

__all__ = ["QUANTITIES", "Quantity", "back_off", "bound", "choice_of", "choose", "front"]

Vector = NDArray[np.float64]

Quantity = Literal["ms", "bytes", "damage"]

#: What can be limited and minimised.
QUANTITIES: tuple[Quantity, ...] = ("ms", "bytes", "damage")

#: How often the interval that holds the price of a second limit is halved.
_HALVINGS = 10

#: Powers of 16 by which that price may differ from the ratio of what there is to lose and to save.
_POWERS = 12


def _amount(item: Item, candidate: Candidate, quantity: Quantity) -> float:
    """What ``candidate`` of ``item`` adds to ``quantity``."""
    if quantity == "ms":
        return candidate.time.ms
    return float(candidate.bytes) if quantity == "bytes" else item.damage(candidate)


def choice_of(items: Sequence[Item], chosen: Mapping[str, int]) -> Choice:
    """Return the choice of these numbers of candidates, by name of the item, with its sums."""
    pairs = [(item, item.candidates[chosen[item.name]]) for item in items]
    return Choice(
        {item.name: chosen[item.name] for item in items},
        math.fsum(candidate.time.ms for _, candidate in pairs),
        sum(candidate.bytes for _, candidate in pairs),
        math.fsum(item.damage(candidate) for item, candidate in pairs),
    )


def choose(
    items: Sequence[Item],
    *,
    limit: Quantity,
    budget: float,
    minimise: Quantity,
    also: tuple[Quantity, float] | None = None,
    agree: str | None = None,
) -> Choice | None:
    """Return the choice with the least of ``minimise`` whose ``limit`` is at most ``budget``; None if there is none.

    With one limit it is as exact as ``sparsecc.passes.factor.knapsack.knapsack``. A second one has a price, found by
    halving; both are kept, and ``bound`` says how far from the best the result may be. Candidates whose figures are not
    all finite are never chosen.

    Args:
        items: to choose for; no name twice.
        limit: what is limited.
        budget: its most, for all items together.
        minimise: another quantity.
        also: a second limit with its most.
        agree: label of groups: items that have the same text for it take only candidates with custom operators, or only
            without.

    Raises:
        UsageError: quantities that are not different or not known, or names that are not unique.
    """
    problem = _Problem.of(items, limit, minimise, also, agree)
    if problem is None:
        return None
    found = problem.within(budget) if also is None else problem.within_both(budget, also[1])
    return None if found is None else problem.choice(found.chosen)


def bound(
    items: Sequence[Item],
    *,
    limit: Quantity,
    budget: float,
    minimise: Quantity,
    also: tuple[Quantity, float] | None = None,
    agree: str | None = None,
) -> float:
    """Return a number below which ``minimise`` is for no choice within the limits; infinite if there is none.

    By Lagrangian duality; the arguments are those of ``choose``.
    """
    problem = _Problem.of(items, limit, minimise, also, agree)
    if problem is None:
        return math.inf
    return problem.bound(budget) if also is None else problem.bound_of_both(budget, also[1])


def front(
    items: Sequence[Item], by: Quantity = "ms", *, agree: str | None = None, points: int = 64
) -> list[Choice]:
    """Return the choices of least damage for rising amounts of ``by``, from one dynamic programme over all budgets.

    None is beaten by another in both. Of very many those are left out that differ little from a neighbour both in
    ``by`` and in the order of magnitude of their damage; the first and the last always stay.

    Args:
        items: as for ``choose``.
        by: ``ms`` or ``bytes``.
        agree: as for ``choose``.
        points: into how many intervals ``by``, and as well the damage, are cut; one choice of each stays.

    Raises:
        UsageError: as for ``choose``.
    """
    problem = _Problem.of(items, by, "damage", None, agree)
    if problem is None:
        return []
    ways = solver.front(problem.costs, problem.values, problem.agreements)
    cost = np.array([way.cost for way in ways])
    damage = np.array([way.error for way in ways])
    with np.errstate(divide="ignore"):
        magnitude = np.log(np.maximum(damage, damage.max(initial=0.0) * 1e-9))
    firsts = {int(at) for axis in (cost, magnitude) for at in _first_of_each(axis, points)}
    kept = sorted(firsts | {0, len(ways) - 1}) if ways else []
    return [problem.choice(ways[at].chosen) for at in kept]


def back_off(
    items: Sequence[Item],
    choice: Choice,
    *,
    by: Quantity = "ms",
    agree: str | None = None,
    most: float | None = None,
) -> Choice | None:
    """Return the next safer choice: the item that does most damage for what it gains takes a step towards dense.

    Each step takes away the most damage for what it adds to ``by``. It is the way back where an assembled model misses
    its metric; it ends where no item does any damage.

    Args:
        items: as for ``choose``.
        choice: one of each item's candidates.
        by: ``ms`` or ``bytes``.
        agree: as for ``choose``; items that agree change sides together.
        most: go on until the predicted damage is at most this, or nothing is safer; by default one step.

    Returns:
        The choice, or None where no candidate of any item does less damage.
    """
    together = _agreeing(items, agree)
    grouped = {item.name for group in together for item in group}
    units = [*([item] for item in items if item.name not in grouped), *together]
    chosen = dict(choice.chosen)
    steps = [_safer(unit, chosen, by) for unit in units]
    damage, taken = choice.damage, False
    while not taken or (most is not None and damage > most):
        at = max(range(len(units)), key=lambda unit: steps[unit].order, default=None)
        if at is None or not steps[at].moves:
            break
        chosen.update(steps[at].moves)
        damage -= steps[at].gain
        steps[at] = _safer(units[at], chosen, by)
        taken = True
    return choice_of(items, chosen) if taken else None


@dataclass(frozen=True)
class _Step:
    """Candidates to move items to, the damage that goes and what it costs; no moves: there is nothing safer."""

    moves: Mapping[str, int]
    gain: float = 0.0
    cost: float = 0.0

    @property
    def order(self) -> tuple[float, float]:
        """What makes a step better: damage for its cost, then damage."""
        if not self.moves:
            return -math.inf, 0.0
        return (self.gain / self.cost if self.cost > 0 else math.inf), self.gain


def _safer(unit: Sequence[Item], chosen: Mapping[str, int], by: Quantity) -> _Step:
    """The best step of one item, or of items that agree on custom operators: of one of them, or of all."""
    steps = []
    for item in unit:
        now = item.candidates[chosen[item.name]]
        for number, own in enumerate(item.candidates):
            if len(unit) == 1 or own.custom_ops == now.custom_ops:
                steps.append(_step(item, now, number, by))
    safer = [step for step in steps if step.gain > 0 and math.isfinite(step.cost)]
    if len(unit) > 1:
        safer += _other_side(unit, chosen, by)
    return max(safer, key=lambda step: step.order, default=_Step({}))


def _other_side(unit: Sequence[Item], chosen: Mapping[str, int], by: Quantity) -> list[_Step]:
    """The step of all items to the cheapest on the other side that do no more damage, if it takes some away."""
    steps = []
    for item in unit:
        now = item.candidates[chosen[item.name]]
        sides = [n for n, own in enumerate(item.candidates) if own.custom_ops != now.custom_ops]
        ways = [_step(item, now, number, by) for number in sides]
        ways = [way for way in ways if way.gain >= 0 and math.isfinite(way.cost)]
        if not ways:
            return []
        steps.append(min(ways, key=lambda way: way.cost))
    gain, cost = math.fsum(step.gain for step in steps), math.fsum(step.cost for step in steps)
    moves = {name: number for step in steps for name, number in step.moves.items()}
    return [_Step(moves, gain, cost)] if gain > 0 else []


def _step(item: Item, now: Candidate, number: int, by: Quantity) -> _Step:
    own = item.candidates[number]
    gain = item.damage(now) - item.damage(own)
    return _Step({item.name: number}, gain, _amount(item, own, by) - _amount(item, now, by))


def _first_of_each(values: Vector, count: int) -> NDArray[np.intp]:
    """The first position in each of ``count`` equal intervals of sorted values."""
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if not math.isfinite(high - low) or high <= low:
        return np.zeros(0, np.intp)
    interval = np.minimum((values - low) * (count / (high - low)), count - 1).astype(np.intp)
    return np.unique(interval, return_index=True)[1]


def _agreeing(items: Iterable[Item], label: str | None) -> list[list[Item]]:
    """The items that have the same text for ``label``, two or more of them each."""
    by_text: dict[str, list[Item]] = {}
    for item in items:
        if label is not None and item.groups is not None and label in item.groups:
            by_text.setdefault(item.groups[label], []).append(item)
    return [group for group in by_text.values() if len(group) > 1]


@dataclass(frozen=True)
class _Problem:
    """Arrays of what may be chosen: costs, values to minimise and, with a second limit, costs of that."""

    items: Sequence[Item]
    numbers: list[NDArray[np.intp]]
    costs: list[Vector]
    values: list[Vector]
    second: list[Vector]
    agreements: list[solver.Agreement]

    @classmethod
    def of(
        cls,
        items: Sequence[Item],
        limit: Quantity,
        minimise: Quantity,
        also: tuple[Quantity, float] | None,
        agree: str | None,
    ) -> _Problem | None:
        """The arrays; None where an item has no candidate with finite figures."""
        wanted = [limit, minimise, *([] if also is None else [also[0]])]
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(QUANTITIES):
            raise UsageError(
                f"cannot choose by {', '.join(wanted)}: give different ones of {', '.join(QUANTITIES)}"
            )
        twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
        if twice:
            raise UsageError(f"two items are named '{twice[0]}': names of items must differ")
        amounts = {
            quantity: [
                np.array([_amount(item, own, quantity) for own in item.candidates], np.float64)
                for item in items
            ]
            for quantity in QUANTITIES
        }
        rest = [quantity for quantity in QUANTITIES if quantity not in wanted]
        numbers = []
        for own in zip(*(amounts[quantity] for quantity in (*wanted, *rest)), strict=True):
            # Where candidates are equal the first is taken: it is the one with the least of what is left.
            order = np.lexsort(own[::-1])
            numbers.append(order[np.isfinite(np.stack(own)).all(axis=0)[order]])
        if not all(own.size for own in numbers):
            return None
        picked = {
            quantity: [own[at] for own, at in zip(amounts[quantity], numbers, strict=True)]
            for quantity in wanted
        }
        return cls(
            items,
            numbers,
            picked[limit],
            picked[minimise],
            [] if also is None else picked[also[0]],
            _agreements(items, numbers, agree),
        )

    def choice(self, chosen: Sequence[int]) -> Choice:
        """The choice of these positions in the arrays."""
        return choice_of(
            self.items,
            {item.name: int(own[at]) for item, own, at in zip(self.items, self.numbers, chosen, strict=True)},
        )

    def within(self, budget: float) -> solver.Assignment | None:
        return solver.knapsack(self.costs, self.values, budget, self.agreements)

    def bound(self, budget: float) -> float:
        return solver.dual_bound(self.costs, self.values, budget, self.agreements)

    def priced(self, price: float) -> _Problem:
        """The problem in which the second cost has a price."""
        values = [own + price * cost for own, cost in zip(self.values, self.second, strict=True)]
        return _Problem(self.items, self.numbers, self.costs, values, self.second, self.agreements)

    def swapped(self) -> _Problem:
        """The problem with the limits in the other order."""
        return _Problem(self.items, self.numbers, self.second, self.values, self.costs, self.agreements)

    def within_both(self, budget: float, second: float) -> solver.Assignment | None:
        """The best of what keeps both limits while each in turn has a price; None if nothing does."""
        least = solver.knapsack(self.costs, self.second, budget, self.agreements)
        if least is None or least.error > second:
            return None
        found = [
            solver.total(self.costs, self.values, least.chosen),
            *self._seen(budget, second),
            *self.swapped()._seen(second, budget),
        ]
        return min(found, key=lambda way: way.error)

    def _seen(self, budget: float, second: float) -> list[solver.Assignment]:
        """Assignments within both limits, at prices of the second."""
        found = []

        def keeps(price: float) -> bool:
            way = self.priced(price).within(budget)
            if way is None or solver.total(self.second, self.values, way.chosen).cost > second:
                return False
            found.append(solver.total(self.costs, self.values, way.chosen))
            return True

        self._try_prices(keeps)
        return found

    def bound_of_both(self, budget: float, second: float) -> float:
        """The best bound at prices of the second limit; infinite if nothing keeps both."""
        least = solver.knapsack(self.costs, self.second, budget, self.agreements)
        if least is None or least.error > second:
            return math.inf
        best = -math.inf

        def keeps(price: float) -> bool:
            nonlocal best
            priced = self.priced(price)
            best = max(best, priced.bound(budget) - price * second)
            way = solver.lagrangian(priced.costs, priced.values, budget, priced.agreements)
            return way is None or solver.total(self.second, self.values, way.chosen).cost <= second

        self._try_prices(keeps)
        return best

    def _try_prices(self, keeps: Callable[[float], bool]) -> None:
        """Try prices of the second limit near the least that keeps it: 0, then powers, then halves between them."""
        if keeps(0.0):
            return
        save, lose = (sum(float(np.ptp(own)) for own in each) for each in (self.second, self.values))
        high = (lose / save if save else 0.0) or 1.0
        step = 1 / 16 if keeps(high) else 16.0
        for _ in range(_POWERS):
            low, high = (high, high * step) if step > 1 else (high * step, high)
            if keeps(high if step > 1 else low) == (step > 1):
                break
            high = high if step > 1 else low
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if keeps(middle) else (middle, high)


def _agreements(
    items: Sequence[Item], numbers: Sequence[NDArray[np.intp]], label: str | None
) -> list[solver.Agreement]:
    """What the solver must keep together."""
    place = {item.name: at for at, item in enumerate(items)}
    marks = [
        np.array([item.candidates[at].custom_ops for at in own], np.bool_)
        for item, own in zip(items, numbers, strict=True)
    ]
    groups = [tuple(place[item.name] for item in group) for group in _agreeing(items, label)]
    return [solver.Agreement(group, tuple(marks[at] for at in group)) for group in groups]
