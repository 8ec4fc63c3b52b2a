"""How one budget of weights is dealt to layers. Arrays in, arrays out; float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["bounded", "by_curves", "erk", "lamp", "outlier_share", "owl"]

Vector = NDArray[np.float64]


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> Vector:
    """Return the density of each layer by Erdos-Renyi-Kernel (Evci et al., "Rigging the Lottery", 2020).

    A layer of ``shape`` (outputs, inputs, kernel...) gets a density proportional to the sum of its sizes over their
    product; those that would get more than 1 stay dense and the others share what is left.

    Args:
        shapes: of the weights.
        density: of all of them together, in (0, 1].
    """
    sizes = np.array([np.prod(shape, dtype=np.float64) for shape in shapes])
    raw = np.array([sum(shape) for shape in shapes]) / sizes
    dense = np.zeros(len(sizes), bool)
    while True:
        left = density * sizes.sum() - sizes[dense].sum()
        scale = left / (raw * sizes)[~dense].sum() if not dense.all() else 0.0
        over = ~dense & (raw * scale > 1)
        if not over.any():
            return np.where(dense, 1.0, raw * scale)
        dense |= over


def lamp(squares: Sequence[NDArray[np.float64]], density: float) -> Vector:
    """Return the density of each layer by LAMP (Lee et al., "Layer-adaptive Sparsity", 2021).

    The score of a weight is its square over the sum of all squares in its layer that are not smaller; the best of
    all layers together stay. The largest of a layer scores 1, so that no layer ends up empty; the scale of a
    layer does not matter.

    Args:
        squares: per layer the squared weights, or what dropping each of them costs.
        density: of all of them together, in (0, 1].
    """
    scores = []
    for layer in squares:
        ordered = np.sort(layer.reshape(-1).astype(np.float64))
        behind = np.cumsum(ordered[::-1])[::-1]
        scores.append(np.divide(ordered, behind, out=np.zeros_like(ordered), where=behind > 0))
    joined = np.concatenate(scores)
    kept = max(1, round(density * len(joined)))
    order = np.argsort(-joined, kind="stable")[:kept]
    bounds = np.cumsum([0, *(len(score) for score in scores)])
    counts, _ = np.histogram(order, bounds)
    return counts / np.diff(bounds)


def outlier_share(score: NDArray[np.float64], times: float) -> float:
    """Return the share of scores that are above ``times`` their mean, OWL's measure of how much a layer matters."""
    mean = float(score.mean()) if score.size else 0.0
    return float(np.count_nonzero(score > times * mean)) / score.size if mean > 0 else 0.0


def owl(sizes: Sequence[int], shares: Sequence[float], density: float, spread: float) -> Vector:
    """Return the density of each layer by OWL (Yin et al., "Outlier Weighed Layerwise Sparsity", 2024).

    Layers with more outliers keep more, in proportion, between the least and the most by ``2 * spread``; all are moved
    by one amount so that together they keep ``density`` of the weights, none less than nothing or more than all.

    Args:
        sizes: weights per layer.
        shares: ``outlier_share`` per layer.
        density: of all layers together, in (0, 1].
        spread: most that a layer may be away from ``density`` where layers are of one size.
    """
    found, weights = np.asarray(shares, np.float64), np.asarray(sizes, np.float64)
    width = float(np.ptp(found))
    lifted = 2 * spread * (found - found.min()) / width if width > 0 else np.zeros(len(found))
    low, high = -float(lifted.max()), 1.0
    for _ in range(60):  # what all keep rises with the amount, step by step
        middle = (low + high) / 2
        enough = np.average(np.clip(lifted + middle, 0.0, 1.0), weights=weights) >= density
        low, high = (low, middle) if enough else (middle, high)
    return np.clip(lifted + high, 0.0, 1.0)


def bounded(densities: Vector, sizes: Sequence[int], density: float, least: float) -> Vector:
    """Return ``densities`` times one factor, none below ``least`` or above 1, that keep ``density`` together.

    A layer that must keep more than it was dealt takes it from the others, in proportion to what they have.

    Args:
        densities: per layer, in [0, 1].
        sizes: weights per layer.
        density: of all layers together; below ``least`` every layer gets that.
        least: of every layer.
    """
    weights = np.asarray(sizes, np.float64)
    low, high = 0.0, 1.0 / max(float(densities[densities > 0].min(initial=1.0)), 1e-12)
    for _ in range(100):  # what all keep rises with the factor
        factor = (low + high) / 2
        enough = np.average(np.clip(factor * densities, least, 1.0), weights=weights) >= density
        low, high = (low, factor) if enough else (factor, high)
    return np.clip(high * densities, least, 1.0)


def by_curves(sizes: Sequence[int], densities: Vector, errors: Sequence[Vector], density: float) -> Vector:
    """Return the density of each layer that makes the sum of errors smallest, on the convex hulls of the curves.

    Steps along the hulls are taken in the order of error per weight saved, the last one in part: the optimum of the
    piecewise linear problem, which uses the budget up.

    Args:
        sizes: weights per layer.
        densities: at which the errors are known, falling from 1.
        errors: per layer the error at each density.
        density: of all layers together; at least the last of ``densities``.
    """
    steps = []
    for layer, (size, curve) in enumerate(zip(sizes, errors, strict=True)):
        corners = _hull(densities, np.maximum.accumulate(curve))
        for here, there in pairwise(corners):
            saved = size * (densities[here] - densities[there])
            steps.append(((curve[there] - curve[here]) / saved, layer, saved))
    result = np.full(len(sizes), densities[0])
    excess = densities[0] * sum(sizes) - density * sum(sizes)
    for _, layer, saved in sorted(steps):
        taken = min(saved, max(excess, 0.0))
        result[layer] -= taken / sizes[layer]
        excess -= taken
    return result


def _hull(densities: Vector, errors: Vector) -> list[int]:
    """Positions of the lower convex hull of a curve over falling densities."""
    corners: list[int] = []
    for at in range(len(densities)):
        while len(corners) > 1 and _slope(densities, errors, corners[-2], corners[-1]) >= _slope(
            densities, errors, corners[-1], at
        ):
            corners.pop()
        corners.append(at)
    return corners


def _slope(densities: Vector, errors: Vector, first: int, second: int) -> float:
    return float((errors[second] - errors[first]) / (densities[first] - densities[second]))
