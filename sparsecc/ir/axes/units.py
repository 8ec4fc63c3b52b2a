"""Positions of axes that must go together, as components of an undirected graph over integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Atoms", "components"]

Atoms = NDArray[np.int64]
"""Numbers of positions; the same number means the same position of the same thing."""


def components(count: int, pairs: Sequence[tuple[Atoms, Atoms]]) -> Atoms:
    """Return for each of ``count`` atoms the smallest atom it is connected with.

    Args:
        count: number of atoms.
        pairs: arrays of equal shape; entry i of the first is connected with entry i of the second.
    """
    label = np.arange(count, dtype=np.int64)
    if not pairs:
        return label
    left = np.concatenate([pair[0].ravel() for pair in pairs])
    right = np.concatenate([pair[1].ravel() for pair in pairs])
    while True:
        low = np.minimum(label[left], label[right])
        if np.array_equal(label[left], label[right]):
            return label
        # The roots of both sides hang below the smaller; jumping pointers then flattens the trees.
        np.minimum.at(label, label[left], low)
        np.minimum.at(label, label[right], low)
        while not np.array_equal(label, label[label]):
            label = label[label]
