"""The planner: from items and a budget to a model that was measured to keep it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsecc.plan.attempts import Attempts
from sparsecc.plan.budget import Amount
from sparsecc.plan.choose import choice_of, front
from sparsecc.plan.guard import Attempt, Limits, Verdict, fastest_within, taken_back, verdict, within_budget
from sparsecc.plan.items import Choice, Item
from sparsecc.plan.making import Made, Setting
from sparsecc.plan.metric import Metric, OutputError
from sparsecc.plan.outlook import Effort, Pace
from sparsecc.plan.plan_file import pipeline_of
from sparsecc.plan.results import Results
from sparsecc.plan.space import Space, with_regions
from sparsecc.plan.whole_model import ModelFit, predict_model, sum_of

__all__ = ["ATTEMPTS", "Budget", "Planner"]

#: Attempts that the search makes by default.
ATTEMPTS = 6

#: Share of the input's time from which on a model is faster, not just by the noise of the clock.
_FASTER = 0.97


@dataclass(frozen=True)
class Budget:
    """What a user asks for; None where nothing is asked.

    Attributes:
        latency: most time of one run, in ms or as a share of the input's.
        size: most bytes of the file, or a share of the input's.
        drop: most that the metric may lose, in its unit or as a share of the input's score.
    """

    latency: Amount | None = None
    size: Amount | None = None
    drop: Amount | None = None


class Planner:
    """Chooses one candidate for each item, makes the choice real and measures what became of it.

    Args:
        setting: of the runs.
        items: that the choice is about.
        metric: that the model is judged by.
        options: of ``pipeline_of``.
        ms: measured time of the input model.
        nbytes: size of its file.
        destination: where the result will go, which decides about data files and so about sizes.
        notes: what the user should know of the items.
        results: where what is measured of models is kept; None: in memory.
        effort: what it took to find the items.
        score: of the input model; None: it is judged when it is needed.
    """

    def __init__(
        self,
        setting: Setting,
        items: Sequence[Item],
        metric: Metric,
        options: Mapping[str, Any],
        *,
        ms: float,
        nbytes: int,
        destination: Path,
        notes: Sequence[str] = (),
        results: Results | None = None,
        effort: Effort | None = None,
        score: float | None = None,
    ) -> None:
        self.setting = setting
        self.items = with_regions(items)
        self.metric = metric
        self.ms_before = ms
        self.bytes_before = nbytes
        self.options = dict(options)
        self.notes = tuple(notes)
        self.effort = effort or Effort()
        self._score = score
        self._results = results or Results(None)
        self._attempts = Attempts(
            setting,
            metric,
            destination,
            self._results,
            lambda choice: pipeline_of(self.items, choice, **self.options),
            lambda: self.score_before,
            ms,
        )
        self._path: list[Attempt] = []

    @cached_property
    def score_before(self) -> float:
        """Score of the input model."""
        return self.metric.score(self.setting.original) if self._score is None else self._score

    @cached_property
    def as_it_is(self) -> Choice:
        """The choice that leaves every item as it is."""
        return choice_of(self.items, {item.name: 0 for item in self.items})

    @cached_property
    def points(self) -> list[Choice]:
        """The Pareto front of predicted time and damage, from the model as it is to the fastest."""
        return self._whole.points

    @property
    def fastest(self) -> Choice:
        """The choice of the least predicted time."""
        return self.points[-1]

    @cached_property
    def points_by_size(self) -> list[Choice]:
        """The Pareto front of predicted size and damage, from the model as it is to the smallest."""
        found = [point for point in reversed(front(self.items, "bytes")) if point.bytes < self.as_it_is.bytes]
        return [self.as_it_is, *found]

    @property
    def smallest(self) -> Choice:
        """The choice of the least predicted size."""
        return self.points_by_size[-1]

    def limits(self, budget: Budget) -> Limits:
        """The budget in ms, bytes and the unit of the metric."""
        drop = None
        if budget.drop is not None:
            # A share of nothing would be nothing: the score of a distance from the input is 0.
            drop = budget.drop.of(self.score_before) if self.score_before else budget.drop.value
        return Limits(
            None if budget.latency is None else budget.latency.of(self.ms_before),
            None if budget.size is None else budget.size.of(self.bytes_before),
            drop,
        )

    def predicted_ms(self, choice: Choice) -> float:
        """Time of the whole model with ``choice``."""
        return predict_model(self.ms_before, self.items, choice, self._fit()).ms

    def predicted_bytes(self, choice: Choice) -> int:
        """Size of the file with ``choice``."""
        return max(0, self.bytes_before - self.as_it_is.bytes + choice.bytes)

    def predicted_drop(self, choice: Choice) -> float:
        """Drop of the metric with ``choice``: the error of the outputs is the root of what its squares add up to."""
        return math.sqrt(choice.damage) if isinstance(self.metric, OutputError) else choice.damage

    def choose(self, limits: Limits) -> Choice | None:
        """The choice that the limits are predicted to allow: of least damage, or with only a drop the fastest."""
        if limits.ms is None and limits.bytes is None:
            drop = math.inf if limits.drop is None else limits.drop
            regions = self._regions
            int8 = regions is not None and self.predicted_drop(regions.points[0]) <= drop
            points = regions.points if regions is not None and int8 else self.points
            return [point for point in points if self.predicted_drop(point) <= drop][-1]
        return self._cheapest(self._whole, limits.ms, limits.bytes)

    def search(self, limits: Limits, most: int | None = None) -> Verdict | None:
        """Make choices real until one keeps all limits; see ``sparsecc.plan.guard``.

        Args:
            limits: what must hold.
            most: attempts; by default ``ATTEMPTS``.

        Returns:
            None where no choice is predicted to keep the limits of time and size.
        """
        started = time.monotonic()
        try:
            return self._settled(limits, ATTEMPTS if most is None else most)
        finally:
            self._took(time.monotonic() - started)

    def _settled(self, limits: Limits, most: int) -> Verdict | None:
        """The end of searches, the last of which ends with a model of this run."""
        while True:
            self._path = []
            found = self._searched(limits, most)
            if found is None or self._attempts.made(found.best.choice) is not None:
                return found
            if self._attempts.make(found.best.choice) == found.best:
                return found
            # what is measured now is not what an earlier run left: what follows from it may be another model

    def _took(self, seconds: float) -> None:
        """Remember how long models took to make."""
        made, predicted = self._attempts.count, self.effort.predicted
        self.effort = replace(self.effort, making=seconds, models=made)
        if predicted is not None:
            pace = Pace(self._results, self.setting.table.facts)
            pace.learn("making", predicted.model_seconds * made, seconds)

    def made(self, found: Verdict) -> Made:
        """The model that a search ended with."""
        made = self._attempts.made(found.best.choice)
        assert made is not None, "a search ends with a model"
        return made

    def _searched(self, limits: Limits, most: int) -> Verdict | None:
        def assemble(choice: Choice) -> Attempt:
            self._path.append(self._attempts.get(choice))
            self._attempts.keep_only(verdict(self._path, limits).best.choice)
            return self._path[-1]

        if limits.ms is None and limits.bytes is None:
            return self._fastest(assemble, limits, most)
        found = self._within(self._whole, assemble, limits, most)
        if found is not None and found.misses == ("drop",) and self._regions is not None:
            # what parts by themselves lose may mislead, and int8 throughout may lose less
            other = self._within(self._regions, assemble, limits, most - len(found.attempts))
            found = verdict([*found.attempts, *(other.attempts if other else ())], limits)
        return found

    def _within(
        self, space: Space, assemble: Callable[[Choice], Attempt], limits: Limits, most: int
    ) -> Verdict | None:
        """The choice of least damage in ``space`` that keeps the limits on time and size."""

        def cheapest(ms: float | None, size: float | None) -> Choice | None:
            return self._cheapest(space, ms, size)

        return within_budget(cheapest, assemble, limits, self.predicted_ms, self.predicted_bytes, most)

    @cached_property
    def _whole(self) -> Space:
        return Space.whole(self.items)

    @cached_property
    def _regions(self) -> Space | None:
        return Space.regions(self.items)

    def _fastest(self, assemble: Callable[[Choice], Attempt], limits: Limits, most: int) -> Verdict:
        """The fastest choice that holds.

        Where the model is faster in int8 throughout, it is looked for among those that stay so; if that loses too much,
        among those between it and the model as it is.
        """
        space, points, known = self._whole, self.points, list[Attempt]()
        if self._regions is not None:
            int8 = self._regions.points[0]
            known.append(assemble(int8))
            faster = known[0].ms < _FASTER * self.ms_before
            if faster and not limits.misses(known[0]):
                space, points = self._regions, self._regions.points
            elif faster:
                points = [self.as_it_is, *reversed(taken_back(int8, self.as_it_is, space.safer)), int8]
        most = max(most, len(known) + 1)
        return fastest_within(points, assemble, space.safer, self.predicted_drop, limits, most, known)

    def _cheapest(self, space: Space, ms: float | None, size: float | None) -> Choice | None:
        """The choice of least damage in ``space`` within a predicted time and size of the model."""
        left = None if size is None else size - self.predicted_bytes(self.as_it_is) + self.as_it_is.bytes
        if ms is None:
            most = math.inf if left is None else left
            return space.cheapest("bytes", most) if most >= 0 else None
        fit = self._fit()
        sites = (ms - fit.rest) / fit.share if fit.share else math.inf
        return space.cheapest("ms", sites, None if left is None else ("bytes", left)) if sites >= 0 else None

    def _fit(self) -> ModelFit:
        """The time of models from those of their sites, from all that were measured."""
        measured = [(attempt.choice.ms, attempt.ms) for attempt in self._path]
        return ModelFit.of([(sum_of(self.items), self.ms_before), *measured])
