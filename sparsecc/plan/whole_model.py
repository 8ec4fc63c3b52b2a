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

    Attributes:
        rest: ms of what is no site.
        share: of the time of sites alone.
    """

    rest: float
    share: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> ModelFit:
        """Fit to measured models: (sum of their sites' times, their own time), in ms.

        The first is the input model, which the line goes through: what is predicted is a difference from it. The
        others tell the share; without any it is 1, or less where the sites take longer alone than the model.

        Raises:
            MeasurementError: there is none, or a time is not a positive number.
        """
        if not points or not all(0 <= total < np.inf and 0 < ms < np.inf for total, ms in points):
            raise MeasurementError(f"no times to fit the time of a model to: {list(points)[:3]}")
        (first, before), *others = points
        saved = np.array([[(first - total) / ms] for total, ms in others])
        if saved.any():
            (found,) = nonnegative_fit(saved, np.array([(before - ms) / ms for _, ms in others]))
            return cls(before - float(found) * first, float(found))
        share = min(1.0, before / first) if first else 1.0
        return cls(before - share * first, share)


def sum_of(items: Sequence[Item], choice: Choice | None = None) -> float:
    """Time of all sites in ms, in the forms that they have or, with ``choice``, get."""
    return sum(item.candidates[0 if choice is None else choice.chosen[item.name]].time.ms for item in items)


def predict_model(
    before_ms: float, items: Sequence[Item], choice: Choice, fit: ModelFit | None = None
) -> Estimate:
    """Predict the time of a model in which each item takes the candidate chosen for it.

    Without ``fit`` sites cost in the model what they cost alone. Where those of the input model take longer alone than
    the whole model (onnxruntime reorders the inputs of a convolution once for several), they are taken to share it,
    and what replaces them to share nothing.

    Args:
        before_ms: measured time of the input model.
        items: all that may change.
        choice: by name of each item the number of its candidate.
        fit: from whole models measured with other choices.

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
    dense = ModelFit.of([(sum_of(items), before_ms)])
    if not changed:
        return Estimate(before_ms, "measured")
    old, new = (dense.share, 1.0) if fit is None else (fit.share, fit.share)
    ms = before_ms - sum(old * one.ms - new * other.ms for one, other in changed)
    least = new * sum(other.ms for _, other in changed)
    ms = max(ms, least)
    unsure = sum(old * one.ms * one.spread + new * other.ms * other.spread for one, other in changed)
    return Estimate(ms, "interpolated", unsure / ms)
