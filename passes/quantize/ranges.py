"""Ranges of uint8 activations from how their values are distributed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecc.pm import HistogramLike

__all__ = ["ActivationScale", "Method", "activation_scale", "choose_range"]

Method = Literal["absmax", "percentile", "mse"]

_STEPS = 255
_FRACTIONS = np.linspace(0.02, 1.0, 99)


class ActivationScale(NamedTuple):
    """uint8 code q stands for ``(q - zero_point) * scale``."""

    scale: np.float32
    zero_point: int


def activation_scale(low: float, high: float) -> ActivationScale:
    """Return the scale of the range [low, high] with zero in it; zero is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / _STEPS)
    if not (np.isfinite(scale) and scale >= np.finfo(np.float32).tiny):
        return ActivationScale(np.float32(1), 0)
    return ActivationScale(scale, int(np.clip(np.rint(-low / float(scale)), 0, _STEPS)))


def choose_range(found: HistogramLike, method: Method, percentile: float) -> tuple[float, float]:
    """Return (low, high) with zero between them.

    ``absmax`` takes all values; ``percentile`` leaves out the share 1 - percentile / 100 at either end; ``mse``
    minimises the squared error of clipping and rounding together.
    """
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if method == "absmax" or not found.counts.any() or found.low == found.high:
        return low, high
    edges = np.linspace(found.low, found.high, found.counts.size + 1)
    if method == "percentile":
        share = np.cumsum(found.counts) / found.counts.sum()
        first = int(np.searchsorted(share, 1 - percentile / 100, side="right"))
        last = int(np.searchsorted(share, percentile / 100))
        return min(float(edges[first]), 0.0), max(float(edges[min(last + 1, edges.size - 1)]), 0.0)
    return _least_squares(found, (edges[1:] + edges[:-1]) / 2, low, high)


def _least_squares(
    found: HistogramLike, centers: NDArray[np.float64], low: float, high: float
) -> tuple[float, float]:
    """The range of least expected error among fractions of both ends.

    A value inside is off by scale**2 / 12 in the mean, zeros by nothing; one outside by its distance to the end.
    """
    lows = np.unique(low * _FRACTIONS)
    highs = np.unique(high * _FRACTIONS)
    counts = found.counts.astype(np.float64)
    above = np.array([counts @ np.maximum(centers - end, 0) ** 2 for end in highs])
    below = np.array([counts @ np.maximum(end - centers, 0) ** 2 for end in lows])
    scale = (highs[None, :] - lows[:, None]) / _STEPS
    rounding = scale**2 / 12 * (counts.sum() - found.zeros)
    row, column = np.unravel_index(np.argmin(above[None, :] + below[:, None] + rounding), scale.shape)
    return float(lows[row]), float(highs[column])
