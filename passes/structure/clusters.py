"""Groups of experts that do the same: distances, and clusters merged from the closest pair on. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Merge", "after", "coactivation", "distances", "merges"]

#: Two clusters, by their smallest members, and how far apart their most distant members are.
Merge = tuple[int, int, float]


def distances(
    rows: NDArray[np.float64], together: NDArray[np.float64] | None, weight: float
) -> NDArray[np.float64]:
    """Return ``[E, E]``: how unlike experts are, with an infinite diagonal.

    Args:
        rows: ``[E, H]``, the router's row of each expert.
        together: ``[E, E]``, how often two experts are chosen together, or None.
        weight: of that, both measured in their means.
    """
    apart = np.sqrt(np.maximum(np.square(rows[:, None] - rows[None]).sum(-1), 0))
    found = apart / (_mean(apart) or 1.0)
    if together is not None and (mean := _mean(together)):
        found = found - weight * together / mean
    np.fill_diagonal(found, np.inf)
    return np.asarray(found, np.float64)


def _mean(matrix: NDArray[np.float64]) -> float:
    count = len(matrix)
    return float(matrix.sum() - np.trace(matrix)) / (count * (count - 1))


def coactivation(scores: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Return ``[E, E]``: for how many rows of ``scores [n, E]`` two experts are both among the ``most`` largest."""
    chosen = np.zeros(scores.shape)
    np.put_along_axis(chosen, np.argpartition(-scores, most - 1, axis=1)[:, :most], 1.0, axis=1)
    return np.asarray(chosen.T @ chosen, np.float64)


def merges(distance: NDArray[np.float64]) -> list[Merge]:
    """Return all merges down to one cluster, closest first; a cluster is as far as its most distant members.

    That is agglomeration where all cross pairs must be under a threshold, for every threshold at once.
    """
    apart = np.maximum(distance, distance.T)
    np.fill_diagonal(apart, np.inf)
    found: list[Merge] = []
    alive = list(range(len(apart)))
    while len(alive) > 1:
        part = apart[np.ix_(alive, alive)]
        first, second = sorted(int(item) for item in np.unravel_index(int(part.argmin()), part.shape))
        keep, gone = alive[first], alive[second]
        found.append((keep, gone, float(part[first, second])))
        merged = np.maximum(apart[keep], apart[gone])
        apart[keep], apart[:, keep] = merged, merged
        apart[keep, keep] = np.inf
        alive.remove(gone)
    return found


def after(merged: Sequence[Merge], count: int) -> list[list[int]]:
    """Return the clusters of ``count`` experts after these merges, by their smallest members."""
    clusters = {number: [number] for number in range(count)}
    for keep, gone, _ in merged:
        clusters[keep] += clusters.pop(gone)
    return [sorted(members) for _, members in sorted(clusters.items())]
