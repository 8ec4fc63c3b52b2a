"""The time of a whole model from those of its sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsecc.errors import MeasurementError
from sparsecc.plan.cost_model import nonnegative_fit
from sparsecc.plan.items import Choice, Estimate, Item

__all__ = ["ModelFit", "predict_model", "sum_of"]


@dataclass(frozen=True)
class ModelFit:
    """``time of the model = rest + share * sum of the times of its sites``.

    Alone, a site is timed with its weights in the cache and pays for both its borders; in the model neighbours share
    these. The share says how much of a site's time alone is gained when it goes.

    Attributes:
        rest: ms of what is no site.
        share: of the time of sites alone.
    """

    rest: float
    share: float = 1.0

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> ModelFit:
        """Fit to measured models: (sum of their sites' times, their own time), in ms.

        One is taken at its word. Of several, the first is the input model, which the line goes through: what is
        predicted is a difference from it.

        Raises:
            MeasurementError: there is none, or a time is not a positive number.
        """
        if not points or not all(0 <= total < np.inf and 0 < ms < np.inf for total, ms in points):
            raise MeasurementError(f"no times to fit the time of a model to: {list(points)[:3]}")
        (first, before), *others = points
        saved = np.array([[(first - total) / ms] for total, ms in others])
        if len(others) == 0 or not saved.any():
            return cls(before - first)
        gained = np.array([(before - ms) / ms for _, ms in others])
        (share,) = nonnegative_fit(saved, gained)
        return cls(before - float(share) * first, float(share))


def sum_of(items: Sequence[Item], choice: Choice | None = None) -> float:
    """Time of all sites in ms, in the forms that they have or, with ``choice``, get."""
    return sum(
        item.candidates[0 if choice is None else choice.chosen[item.name]].time.ms for item in items
    )  # fmt: skip


def predict_model(
    before_ms: float, items: Sequence[Item], choice: Choice, fit: ModelFit | None = None
) -> Estimate:
    """Predict the time of a model in which each item takes the candidate chosen for it.

    Args:
        before_ms: measured time of the input model.
        items: all that may change.
        choice: by name of each item the number of its candidate.
        fit: from whole models measured with other choices; without one, what sites gain alone the model gains.

    Returns:
        Time and spread, that of all changed sites as if they erred the same way; ``measured`` if nothing changes.

    Raises:
        MeasurementError: ``before_ms`` is not a positive number.
    """
    changed = [
        (item.candidates[0].time, item.candidates[choice.chosen[item.name]].time)
        for item in items
        if choice.chosen[item.name] != 0
    ]
    chosen = fit or ModelFit.of([(sum_of(items), before_ms)])
    if not changed:
        return Estimate(before_ms, "measured")
    saved = sum(old.ms - new.ms for old, new in changed)
    unsure = chosen.share * sum(time.ms * time.spread for pair in changed for time in pair)
    least = chosen.share * sum(new.ms for _, new in changed)
    ms = max(before_ms - chosen.share * saved, least)
    return Estimate(ms, "interpolated", unsure / ms)
