"""How the values of tensors are distributed over the calibration inputs, for choosing quantised ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.collect import Tapped, tensor_groups
from sparsecc.calib.source import Batches
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.pm import Progress

__all__ = ["Histogram", "histograms"]

_BINS = 2048


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the finite values of a tensor in equal bins.

    Attributes:
        low: smallest value.
        high: largest value; ``low`` too if there was none, or only one.
        counts: int64 ``[bins]``, bins of equal width from ``low`` to ``high``.
        zeros: how many values are exactly zero; they are in ``counts`` too.
    """

    low: float
    high: float
    counts: NDArray[np.int64]
    zeros: int


def histograms(
    model: Model,
    names: Sequence[str],
    batches: Batches,
    *,
    count: int,
    byte_budget: int,
    threads: int,
    progress: Progress,
) -> dict[str, Histogram]:
    """Run ``model`` twice over all batches and return the histogram of each named tensor of its main graph.

    Tensors are taken in groups as in ``collect``; nothing but limits and counts outlives a batch.

    Raises:
        UsageError: there are no batches, one does not fit the model, or a name is no tensor of it.
        ModelError: onnxruntime refuses the model.
    """
    first = next(batches(), None)
    if first is None:
        raise UsageError("the calibration data hold no samples; give at least one")
    found: dict[str, Histogram] = {}
    groups = tensor_groups(model, names, first, byte_budget)
    done, total = 0, 2 * count * len(groups)
    for group in groups:
        tapped = Tapped(model, group, threads)
        limits = {name: (np.inf, -np.inf) for name in group}
        for batch in batches():
            for name, array in tapped.run(batch).items():
                values = array[np.isfinite(array)]
                low, high = limits[name]
                limits[name] = (
                    float(values.min(initial=low)),
                    float(values.max(initial=high)),
                )
            done += 1
            progress("measuring ranges", done, total)
        limits = {name: (low, high) if low <= high else (0.0, 0.0) for name, (low, high) in limits.items()}
        counts = {name: np.zeros(_BINS, np.int64) for name in group}
        zeros = dict.fromkeys(group, 0)
        for batch in batches():
            for name, array in tapped.run(batch).items():
                values = array[np.isfinite(array)]
                zeros[name] += values.size - int(np.count_nonzero(values))
                # float32 does not tell the edges of narrow bins apart
                counts[name] += np.histogram(values.astype(np.float64), _BINS, _widened(*limits[name]))[0]
            done += 1
            progress("measuring ranges", done, total)
        found |= {name: Histogram(*limits[name], counts[name], zeros[name]) for name in group}
    return found


def _widened(low: float, high: float) -> tuple[float, float]:
    """Limits that numpy takes: all values in one bin if they are equal."""
    return (low, high) if low < high else (low, low + max(1.0, abs(low)))
