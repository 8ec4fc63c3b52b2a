"""Pruning scores and the masking of one weight matrix. Arrays in, arrays out; no ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.sparse import density

__all__ = ["Pruned", "compared", "is_pruned", "magnitude_score", "prune_matrix", "wanda_score"]

Matrix = NDArray[Any]

#: Rows that are looked at first.
_SOME_ROWS = 192


@dataclass(frozen=True)
class Pruned:
    """A pruned weight matrix and what pruning it cost.

    Attributes:
        weight: ``[N, K]`` in the dtype it came in.
        density_before: non-zeros / all, before.
        density_after: non-zeros / all, after.
        relative_error: ``||W - pruned||_F / ||W||_F``.
        kept_score: squared scores kept / all squared scores; the mask minimises 1 minus this.
    """

    weight: Matrix
    density_before: float
    density_after: float
    relative_error: float
    kept_score: float


def magnitude_score(weight: Matrix) -> Matrix:
    """Return ``|W|`` as float32 (float64 stays): keeping the largest minimises ``||W - pruned||_F``."""
    score: Matrix = np.abs(weight.astype(np.result_type(weight.dtype, np.float32), copy=False))
    return score


def wanda_score(weight: Matrix, mean_square: NDArray[np.float64], groups: int = 1) -> Matrix:
    """Return ``|W_ij| * sqrt(mean(x_j**2))`` up to a factor, the metric of Wanda (Sun et al. 2023, eq. 1).

    A factor common to the matrix changes no mask, so the mean stands for the norm, relative to the largest.

    Args:
        weight: ``[N, K]``; with ``groups`` the rows are equally many per group.
        mean_square: ``[K]``, or ``[groups, K]`` when each group of rows reads other inputs.
        groups: number of row groups.

    Raises:
        UsageError: the statistics have another length than the reduction axis.
    """
    rows, columns = weight.shape
    if mean_square.size not in (columns, groups * columns):
        raise UsageError(
            f"calibration gave {mean_square.size} column statistics for a weight of {columns} columns "
            f"and {groups} groups; use a calibration source that measures the unfolded input"
        )
    largest = float(mean_square.max(initial=0.0)) or 1.0
    norms = np.sqrt(np.broadcast_to(mean_square.reshape(-1, columns), (groups, columns)) / largest)
    per_group = magnitude_score(weight).reshape(groups, rows // groups, columns)
    scaled: Matrix = (per_group * norms[:, None, :].astype(per_group.dtype)).reshape(rows, columns)
    return scaled


def is_pruned(weight: Matrix, selection: Selection, groups: int = 1) -> bool:
    """Whether the zeros of ``weight [N, K]`` already obey the pattern at this sparsity or a higher one.

    The mask that keeps as many non-zeros as it may drops none exactly then.
    """
    by_rows = selection.scope == "row" or selection.pattern.kind == "nm"
    if groups == 1 and by_rows and len(weight) > _SOME_ROWS and not is_pruned(weight[:_SOME_ROWS], selection):
        return False  # rows are alike as a rule, so that a few tell
    present = (weight != 0).astype(np.float32)
    return not (weight[~_grouped_mask(present, selection, groups)] != 0).any()


def prune_matrix(
    weight: Matrix, score: Matrix, selection: Selection, groups: int = 1, protected: Mask | None = None
) -> Pruned:
    """Return ``weight [N, K]`` with the units of lowest score set to zero, an exact count (``Selection``).

    The score of a block is the sum of its squared scores, so that masks of every pattern are the best there
    are for the sum of squares: no other of that pattern and count keeps a larger share.

    Each of ``groups`` equal blocks of rows is a problem of its own: no count or block straddles two. Units with
    ``protected`` entries stay as long as the pattern has room for them.
    """
    ranking = _relative_squares(score) if selection.pattern.kind == "block" else score
    if protected is not None:
        ranking = np.where(protected, np.inf, ranking)
    keep = _grouped_mask(ranking, selection, groups)
    return compared(weight, np.where(keep, weight, weight.dtype.type(0)), score)


def compared(weight: Matrix, pruned: Matrix, score: Matrix) -> Pruned:
    """Return ``pruned [N, K]`` with its figures beside ``weight`` and its scores."""
    return Pruned(
        weight=pruned,
        density_before=density(weight),
        density_after=density(pruned),
        relative_error=_relative_error(weight, pruned),
        kept_score=1.0 - _share(score, pruned == 0),
    )


def _relative_error(weight: Matrix, pruned: Matrix) -> float:
    wide = weight.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0)) or 1.0  # squares of the extremes stay in range
    norm = float(np.linalg.norm(wide / largest))
    return float(np.linalg.norm((wide - pruned) / largest)) / norm if norm else 0.0


def _grouped_mask(score: Matrix, selection: Selection, groups: int) -> Mask:
    return np.concatenate([selection.mask(block) for block in np.split(score, groups)])


def _share(score: Matrix, mask: Mask) -> float:
    """Return sum of squares under the mask / sum of squares, in [0, 1]; 0 when all are zero."""
    squares = _relative_squares(score)
    total = float(squares.sum())
    return min(1.0, float(squares[mask].sum()) / total) if total else 0.0


def _relative_squares(score: Matrix) -> NDArray[np.float64]:
    """Return ``(score / max)**2`` in float64: squares of float32 extremes stay in range."""
    largest = float(score.max(initial=0.0)) or 1.0
    return np.square(score.astype(np.float64) / largest)
