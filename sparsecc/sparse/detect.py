"""Patterns that the zeros of a weight already obey."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.sparse.mask import block_view, group_planes
from sparsecc.sparse.pattern import Pattern

__all__ = ["BLOCK_WORTH", "GROUP_WORTH", "density", "detect", "matches"]

BLOCK_WORTH = 0.95
"""A block pattern is recognised when at least this fraction of what its blocks would store is non-zero."""

GROUP_WORTH = 0.9
"""An N:M pattern is recognised when non-zeros fill at least this fraction of what it would store: any very
sparse random matrix obeys some loose N:M, which says nothing."""

_GROUPS = (2, 4, 8, 16)
_BLOCKS = (
    "64x64",
    "32x32",
    "16x16",
    "8x8",
    "16x4",
    "32x1",
    "4x4",
    "16x1",
    "1x16",
    "8x1",
    "1x8",
    "4x1",
    "1x4",
)


def density(weight: NDArray[Any]) -> float:
    """Return the fraction of entries that are not zero, 0..1; 0.0 for an empty array. NaN counts as kept."""
    return int(np.count_nonzero(weight)) / weight.size if weight.size else 0.0


def matches(weight: NDArray[Any], pattern: Pattern) -> bool:
    """Return whether the zeros of ``weight [N, K]`` obey ``pattern``.

    ``dense`` and ``unstructured`` always hold. N:M holds if no group has more than n non-zeros. A block
    pattern holds if the blocks that have a non-zero are full to ``BLOCK_WORTH`` overall (any matrix could
    be stored in blocks; this says whether it was made in blocks).
    """
    kept = np.asarray(weight) != 0
    if pattern.kind == "nm":
        return _largest_group(kept, pattern.m) <= pattern.n
    if pattern.kind == "block":
        return _block_fill(kept, pattern)[0] >= BLOCK_WORTH
    return True


def detect(weight: NDArray[Any]) -> tuple[Pattern, ...]:
    """Return the sparse patterns that the zeros of ``weight [N, K]`` obey, most structured first.

    Blocks (larger first, those with at least one empty block), then N:M for M = 2, 4, 8, 16 (the tightest
    N of each M, if non-zeros fill it
    and it says more than a smaller M does), then ``unstructured``; empty if nothing is zero.
    """
    kept = np.asarray(weight) != 0
    if kept.all():
        return ()
    found = [pattern for pattern in map(Pattern.parse, _BLOCKS) if _is_blocked(kept, pattern)]
    best = 1.0
    for m in _GROUPS:
        n = max(1, _largest_group(kept, m))
        if n / m < best and kept.shape[1] >= m and density(kept) >= GROUP_WORTH * n / m:
            best = n / m
            found.append(Pattern("nm", n=n, m=m))
    return (*found, Pattern("unstructured"))


def _is_blocked(kept: NDArray[np.bool_], pattern: Pattern) -> bool:
    fill, empty = _block_fill(kept, pattern)
    return fill >= BLOCK_WORTH and empty > 0


def _block_fill(kept: NDArray[np.bool_], pattern: Pattern) -> tuple[float, int]:
    """Return (non-zeros / entries inside touched blocks, number of empty blocks); edges count what exists."""
    touched = block_view(kept, pattern).any((1, 3))
    rows = np.minimum(pattern.rows, kept.shape[0] - pattern.rows * np.arange(touched.shape[0]))
    cols = np.minimum(pattern.cols, kept.shape[1] - pattern.cols * np.arange(touched.shape[1]))
    stored = int(rows @ touched.astype(np.int64) @ cols)
    fill = int(np.count_nonzero(kept)) / stored if stored else 1.0
    return fill, int(touched.size - np.count_nonzero(touched))


def _largest_group(kept: NDArray[np.bool_], m: int) -> int:
    return int(group_planes(kept, m, False).sum(0, dtype=np.int8).max(initial=0))
