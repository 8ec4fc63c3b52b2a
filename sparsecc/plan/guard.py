"""Finding the fastest model that keeps what was promised: choices are made real, measured, and taken back.

Predictions put the candidates in order; what counts is what the assembled model measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsecc.plan.items import Choice

__all__ = ["Attempt", "Limits", "Verdict", "fastest_within", "taken_back", "verdict", "within_budget"]

#: Share by which a measured time or size may exceed its budget: noise of the clock.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Attempt:
    """A choice that was made real.

    Attributes:
        choice: what was chosen.
        ms: measured time of the model.
        score: of the model, in the unit of the metric.
        drop: what the metric lost against the input model; below 0 where it gained, NaN where it is no number.
        bytes: of the model's file.
    """

    choice: Choice
    ms: float
    score: float
    drop: float
    bytes: int


@dataclass(frozen=True)
class Limits:
    """What must hold of the assembled model; None where all is allowed.

    Attributes:
        ms: time of one run.
        bytes: size of the file.
        drop: of the metric.
    """

    ms: float | None = None
    bytes: float | None = None
    drop: float | None = None

    def misses(self, attempt: Attempt) -> tuple[str, ...]:
        """Which of ``ms``, ``bytes`` and ``drop`` the attempt exceeds."""
        found = []
        if self.ms is not None and attempt.ms > self.ms * (1 + _TOLERANCE):
            found.append("ms")
        if self.bytes is not None and attempt.bytes > self.bytes:
            found.append("bytes")
        if math.isnan(attempt.drop) or (self.drop is not None and not attempt.drop <= self.drop):
            found.append("drop")
        return tuple(found)


@dataclass(frozen=True)
class Verdict:
    """The end of a search.

    Attributes:
        best: the attempt to write: the one that keeps all limits and is the fastest; where none keeps them the one
            that comes closest.
        misses: the limits that ``best`` exceeds.
        attempts: all that were made, in order.
    """

    best: Attempt
    misses: tuple[str, ...]
    attempts: tuple[Attempt, ...]


def fastest_within(
    points: Sequence[Choice],
    assemble: Callable[[Choice], Attempt],
    safer: Callable[[Choice], Choice | None],
    predicted: Callable[[Choice], float],
    limits: Limits,
    most: int,
    known: Sequence[Attempt] = (),
) -> Verdict:
    """Find the fastest of ``points`` whose model loses no more than the limits allow.

    Bisection between the safest point and the fastest. The first guess is the fastest point whose predicted damage is
    allowed; what is measured of a point corrects the prediction for the others. While attempts are left it goes on
    between the last point that holds and the first that does not, with single items of the latter taken back. If
    nothing holds the safest point is made.

    Args:
        points: of a Pareto front, from the safest to the fastest; the first is known to hold.
        assemble: makes a choice real and measures it.
        safer: a choice with one item that does less damage; None if there is none.
        predicted: drop of the metric with a choice.
        limits: of the drop, and of the size if any.
        most: attempts, that of the safest point not counted; at least 1.
        known: attempts that were made before and count.
    """
    drop = math.inf if limits.drop is None else limits.drop
    search = _Bisection(assemble, predicted, limits, drop, most, known)
    floor, failed = search.run(points)
    if failed is not None:
        search.run([floor, *reversed(taken_back(failed, floor, safer)), failed])
    if all(limits.misses(attempt) for attempt in search.attempts):
        search.attempts.append(assemble(points[0]))
    return verdict(search.attempts, limits)


class _Bisection:
    """A search for the last of several points that holds.

    Attributes:
        attempts: made so far.
    """

    def __init__(
        self,
        assemble: Callable[[Choice], Attempt],
        predicted: Callable[[Choice], float],
        limits: Limits,
        drop: float,
        most: int,
        known: Sequence[Attempt],
    ) -> None:
        self.attempts = list(known)
        self._assemble = assemble
        self._predicted = predicted
        self._limits = limits
        self._drop = drop
        self._most = most
        self._scale = 1.0
        for attempt in known:
            self._learn(attempt)

    def run(self, points: Sequence[Choice]) -> tuple[Choice, Choice | None]:
        """The last of ``points`` that is known to hold, as the first is, and the first known not to, if any."""
        low, high = 0, len(points)
        failed = {self._key(attempt.choice) for attempt in self.attempts if self._limits.misses(attempt)}
        while high and self._key(points[high - 1]) in failed:
            high -= 1
        while high - low > 1 and len(self.attempts) < self._most:
            guess = sum(self._predicted(point) * self._scale <= self._drop for point in points) - 1
            at = guess if low < guess < high else (low + high) // 2
            attempt = self._assemble(points[at])
            self.attempts.append(attempt)
            if self._limits.misses(attempt):
                high = at
            else:
                low = at
            self._learn(attempt)
        return points[low], points[high] if high < len(points) else None

    def _learn(self, attempt: Attempt) -> None:
        """What is measured of a model corrects the prediction for the others."""
        predicted = self._predicted(attempt.choice)
        if attempt.drop > 0 and predicted > 0:
            self._scale = attempt.drop / predicted

    @staticmethod
    def _key(choice: Choice) -> tuple[int, ...]:
        return tuple(choice.chosen.values())


def within_budget(
    choose: Callable[[float | None, float | None], Choice | None],
    assemble: Callable[[Choice], Attempt],
    limits: Limits,
    predicted: Callable[[Choice], float],
    predicted_bytes: Callable[[Choice], float],
    most: int,
) -> Verdict | None:
    """Find the choice of least damage whose model keeps the limits on time and size.

    Where the model turns out slower or larger than predicted the budget is made smaller by the same share, and all is
    chosen again.

    Args:
        choose: the choice of least damage for a predicted time of the model (ms) and its size (bytes); None if there
            is none.
        assemble: makes a choice real and measures it.
        limits: of time, of size or of both.
        predicted: time of the whole model with a choice, in ms.
        predicted_bytes: its size.
        most: attempts.

    Returns:
        None where no choice is predicted to keep the limits.
    """
    ms, size = limits.ms, limits.bytes
    attempts: list[Attempt] = []
    seen: set[tuple[int, ...]] = set()
    for _ in range(most):
        choice = choose(ms, size)
        if choice is None or tuple(choice.chosen.values()) in seen:
            break
        seen.add(tuple(choice.chosen.values()))
        attempt = assemble(choice)
        attempts.append(attempt)
        misses = limits.misses(attempt)
        if "ms" in misses and ms is not None and limits.ms is not None:
            ms = min(ms, predicted(choice)) * limits.ms / attempt.ms
        if "bytes" in misses and size is not None and limits.bytes is not None:
            size = min(size, predicted_bytes(choice)) * limits.bytes / attempt.bytes
        if not {"ms", "bytes"} & set(misses):
            break
    return verdict(attempts, limits) if attempts else None


def taken_back(failed: Choice, floor: Choice, safer: Callable[[Choice], Choice | None]) -> list[Choice]:
    """Return the choices from ``failed`` back to the damage of ``floor``, item by item, both left out."""
    found: list[Choice] = []
    choice = safer(failed)
    while choice is not None and choice.damage > floor.damage:
        found.append(choice)
        choice = safer(choice)
    return found


def verdict(attempts: Sequence[Attempt], limits: Limits) -> Verdict:
    """Return the fastest attempt that holds, else the one with the fewest misses and the smallest drop."""
    holding = [attempt for attempt in attempts if not limits.misses(attempt)]
    if holding:
        best = min(holding, key=lambda attempt: (attempt.ms, attempt.bytes))
    else:
        best = min(
            attempts,
            key=lambda attempt: (len(limits.misses(attempt)), math.isnan(attempt.drop), attempt.drop),
        )
    return Verdict(best, limits.misses(best), tuple(attempts))
