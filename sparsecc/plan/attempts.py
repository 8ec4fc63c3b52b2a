"""Choices made real: the models, and what was measured of them, which later runs know by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import sparsecc
from sparsecc.errors import ScoreError
from sparsecc.plan.guard import Attempt
from sparsecc.plan.items import Choice
from sparsecc.plan.making import Made, Setting, make
from sparsecc.plan.metric import Metric
from sparsecc.plan.results import Results
from sparsecc.pm import Pipeline

__all__ = ["Attempts"]

#: Version of what is kept of earlier runs.
_FORMAT = 1


class Attempts:
    """Makes models and judges them.

    Of a model that an earlier run made the figures are known; it is made again on demand.

    Args:
        setting: of the runs.
        metric: that models are judged by.
        destination: where the result will go, which decides about data files and so about sizes.
        results: where figures are kept.
        pipeline_of: what makes the model of a choice.
        score: of the input model.
        ms: measured time of the input model.

    Attributes:
        count: how many models this run has made.
    """

    def __init__(
        self,
        setting: Setting,
        metric: Metric,
        destination: Path,
        results: Results,
        pipeline_of: Callable[[Choice], Pipeline],
        score: Callable[[], float],
        ms: float,
    ) -> None:
        self._setting = setting
        self._metric = metric
        self._destination = destination
        self._results = results
        self._pipeline_of = pipeline_of
        self._score = score
        self._ms = ms
        self._found: dict[str, Attempt] = {}
        self._made: dict[str, Made] = {}
        self._base: str | None = None
        self.count = 0

    def get(self, choice: Choice) -> Attempt:
        """What is measured of the model of ``choice``, by this run or an earlier one."""
        key = self._key(choice)
        known = self._found.get(key) or self._known(key, choice)
        if known is None:
            return self.make(choice)
        self._found[key] = known
        return known

    def make(self, choice: Choice) -> Attempt:
        """Make the model of ``choice`` in any case, and measure it."""
        key = self._key(choice)
        made = make(self._pipeline_of(choice), self._setting)
        score = self._scored(made) if made.kept else self._score()
        attempt = Attempt(
            choice,
            self._ms * made.latency.after_ms / made.latency.before_ms,  # both measured in turns
            score,
            self._metric.damage(self._score(), score),
            made.model.written_nbytes(self._destination),
        )
        self._made[key], self._found[key] = made, attempt
        self.count += 1
        figures = {"ms": attempt.ms, "score": attempt.score, "drop": attempt.drop, "bytes": attempt.bytes}
        if math.isfinite(score):
            self._results.put("attempt", key, figures)
        return attempt

    def _scored(self, made: Made) -> float:
        """Score of a model; NaN, which keeps no limit, where the metric has no finite number for it."""
        try:
            return self._metric.score(made.model)
        except ScoreError:
            return math.nan

    def made(self, choice: Choice) -> Made | None:
        """The model of ``choice``; None where this run has not made it, or has let go of it."""
        return self._made.get(self._key(choice))

    def keep_only(self, choice: Choice) -> None:
        """Let go of all models but that of ``choice``: they are large."""
        key = self._key(choice)
        self._made = {name: made for name, made in self._made.items() if name == key}

    def _known(self, key: str, choice: Choice) -> Attempt | None:
        """What an earlier run measured; None for a run that is watched, where all passes must run."""
        found = None if self._setting.context.instruments else self._results.get("attempt", key)
        try:
            figures = {name: float((found or {})[name]) for name in ("ms", "score", "drop", "bytes")}
        except (KeyError, TypeError, ValueError):
            return None
        if not all(math.isfinite(value) for value in figures.values()):
            return None
        nbytes = int(figures.pop("bytes"))
        return Attempt(choice, bytes=nbytes, **figures)

    def _key(self, choice: Choice) -> str:
        if self._base is None:
            self._base = self._content()
        return f"{self._base} {self._pipeline_of(choice)}"

    def _content(self) -> str:
        """All that an attempt depends on beside the choice."""
        setting, context = self._setting, self._setting.context
        facts = {
            "format": _FORMAT,
            "version": sparsecc.__version__,
            "model": setting.original.fingerprint(),
            "data": "" if setting.data is None else setting.data.fingerprint(),
            "metric": [self._metric.name, self._metric.digest()],
            "timed": {name: list(array.shape) for name, array in sorted(setting.timed.items())},
            "seed": context.seed,
            "threads": context.threads,
            "target": str(context.target),
            "overrides": [str(item) for item in context.overrides],
            "library": setting.library,
            "keep_slower": setting.keep_slower,
            "machine": setting.table.facts,
            "times": None if setting.elsewhere is None else setting.table.document()["times_ms"],
            "file": self._destination.name,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
