"""Masks that keep an exact number of weights by score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse.pattern import Pattern

__all__ = ["Scope", "block_view", "group_planes", "keep_capped", "keep_mask", "keep_units"]

Scope = Literal["layer", "row"]
BoolArray = NDArray[np.bool_]


def keep_mask(
    score: NDArray[Any], pattern: Pattern, sparsity: float | None = None, scope: Scope = "layer"
) -> BoolArray:
    """Return the mask ``[N, K]`` of the entries to keep: those of highest score, in an exact number.

    Units are entries, or blocks. Of all units (``layer``), or of the units of each row or block row
    (``row``), ``pattern.keep_count`` are kept. N:M keeps exactly n of every m consecutive entries of a
    row, min(n, r) of a short last group, and ignores ``sparsity`` and ``scope``. A block's score is the
    sum over the entries it has: a partial block at the edge is a unit like the others, so it needs
    higher scores to stay. **Ties**: of equal scores the one of lower row-major index is kept.

    Args:
        score: ``[N, K]`` of any real dtype; infinities are in order.
        pattern: what may be zero.
        sparsity: 0..1, fraction of units to drop; None where the pattern implies it.
        scope: what one count spans.

    Raises:
        ModelError: a score is NaN.
        SpecError: the score is no matrix, or sparsity or scope is wrong.
    """
    score = _as_scores(score)
    if pattern.kind == "dense":
        return np.ones(score.shape, bool)
    if pattern.kind == "nm":
        return _keep_groups(score, pattern.n, pattern.m)
    if scope not in ("layer", "row"):
        raise SpecError(f"unknown scope {scope!r}: write layer or row")
    grid = pattern.grid((score.shape[0], score.shape[1]))
    total = grid[1] if scope == "row" else grid[0] * grid[1]
    return keep_units(score, pattern, pattern.keep_count(total, sparsity), scope)


def keep_units(score: NDArray[Any], pattern: Pattern, count: int, scope: Scope = "layer") -> BoolArray:
    """As ``keep_mask`` with an unstructured or block pattern, for a number of units instead of a sparsity."""
    score = _as_scores(score)
    units = _block_sums(score, pattern) if pattern.kind == "block" else score
    flat = units.reshape(1, -1) if scope == "layer" else units
    keep = _keep_largest(flat, count).reshape(units.shape)
    if pattern.kind == "block":
        keep = keep.repeat(pattern.rows, 0)[: score.shape[0]].repeat(pattern.cols, 1)[:, : score.shape[1]]
    return keep


def keep_capped(
    score: NDArray[Any], caps: Sequence[tuple[int, int]], count: int, scope: Scope = "row"
) -> BoolArray:
    """Return the mask of exactly ``count`` entries per row, or in all, with the highest sum of scores under caps.

    A cap ``(n, m)`` allows at most ``n`` of every ``m`` consecutive entries of a row. Widths divide one another, so
    that the groups are nested: taking the best of every group from the innermost out is then optimal for any scores
    (nested caps are a matroid, of which the mask is the best basis). Ties as in ``keep_mask``.

    Args:
        score: ``[N, K]`` of any real dtype.
        caps: most entries of groups of a width.
        count: entries to keep per row (``row``) or in all (``layer``).
        scope: what ``count`` spans.

    Raises:
        ModelError: a score is NaN.
        SpecError: widths do not divide one another, or the caps do not leave ``count`` entries.
    """
    score = _as_scores(score).astype(np.float64)
    allowed = np.ones(score.shape, bool)
    inner = 1
    for n, m in sorted(caps, key=lambda cap: cap[1]):
        if m % inner:
            raise SpecError(f"caps must be nested: {m} is no multiple of {inner}; choose widths that divide")
        inner = m
        ranked = np.where(allowed, score, -np.inf)
        groups = group_planes(ranked, m, -np.inf).transpose(1, 2, 0).reshape(-1, m)
        best = _keep_largest(groups, min(n, m)).reshape(len(score), -1)[:, : score.shape[1]]
        allowed &= best
    room = allowed.sum(1).min() if scope == "row" else allowed.sum()
    if count > room:
        raise SpecError(
            f"the caps leave {room} entries, but {count} are to be kept: raise the sparsity or the caps"
        )
    ranked = np.where(allowed, score, -np.inf)
    flat = ranked.reshape(1, -1) if scope == "layer" else ranked
    return _keep_largest(flat, count).reshape(score.shape)


def block_view(matrix: NDArray[Any], pattern: Pattern) -> NDArray[Any]:
    """Return ``[grid rows, R, grid cols, C]`` over a matrix padded with zeros to whole blocks."""
    grid = pattern.grid((matrix.shape[0], matrix.shape[1]))
    pad = (grid[0] * pattern.rows - matrix.shape[0], grid[1] * pattern.cols - matrix.shape[1])
    if any(pad):
        matrix = np.pad(matrix, ((0, pad[0]), (0, pad[1])))
    return matrix.reshape(grid[0], pattern.rows, grid[1], pattern.cols)


def group_planes(matrix: NDArray[Any], m: int, fill: Any) -> NDArray[Any]:
    """Return ``[m, N, groups]`` contiguous: plane j holds entry j of every group, ``fill`` beyond K."""
    rows, cols = matrix.shape
    groups = -(-cols // m)
    if pad := groups * m - cols:
        matrix = np.pad(matrix, ((0, 0), (0, pad)), constant_values=fill)
    return np.ascontiguousarray(matrix.reshape(rows, groups, m).transpose(2, 0, 1))


def _block_sums(score: NDArray[Any], pattern: Pattern) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinities of both signs in one block: refused below
        sums: NDArray[np.float64] = block_view(score, pattern).sum((1, 3), dtype=np.float64)
    _refuse_nan(sums)
    return sums


def _keep_groups(score: NDArray[Any], n: int, m: int) -> BoolArray:
    """Keep the n best of each group by counting, for each entry, the entries ahead of it.

    m(m-1)/2 whole-plane comparisons beat a sort of many tiny groups several times over.
    """
    planes = group_planes(score, m, -np.inf)
    rank = np.zeros(planes.shape, np.int8)
    for low in range(m):
        for high in range(low + 1, m):
            ahead = planes[low] >= planes[high]
            rank[high] += ahead
            rank[low] += ~ahead
    keep = (rank < n).transpose(1, 2, 0).reshape(score.shape[0], planes.shape[2] * m)
    return np.ascontiguousarray(keep[:, : score.shape[1]])


def _keep_largest(units: NDArray[Any], count: int) -> BoolArray:
    """Keep exactly ``count`` entries of each row of ``units``."""
    length = units.shape[1]
    if count == 0 or length == 0 or count == length:
        return np.full(units.shape, count > 0, bool)
    threshold = np.partition(units, length - count, axis=1)[:, length - count, None]
    keep: BoolArray = units > threshold
    tied = units == threshold
    missing = count - keep.sum(1, keepdims=True)
    if (tied.sum(1, keepdims=True) > missing).any():
        tied &= np.cumsum(tied, axis=1, dtype=np.int64) <= missing
    keep |= tied
    return keep


def _as_scores(score: NDArray[Any]) -> NDArray[Any]:
    score = np.asarray(score)
    if score.ndim != 2:
        raise SpecError(f"scores must be a matrix [outputs, inputs], got shape {score.shape}")
    if score.dtype not in (np.float32, np.float64):
        # Half types widen exactly; integers need float64. Both for speed and for -inf as padding.
        score = score.astype(np.float64 if score.dtype.kind in "iu" else np.float32)
    _refuse_nan(score)
    return score


def _refuse_nan(score: NDArray[Any]) -> None:
    if np.isnan(score).any():
        row, col = np.argwhere(np.isnan(score))[0]
        raise ModelError(
            f"score is NaN at [{row}, {col}]: the weights or the calibration data hold NaN or infinity; "
            "repair them or leave this site out"
        )
