"""A weight that reads some of its inputs only and makes up for the others. Arrays in, arrays out; float64, no ONNX.

Every input left out is predicted from those that stay, which is the interpolative decomposition of what the weight
does to its inputs: ``What = T P`` with P picking columns.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.skeleton_selection import (
    Index,
    column_shares,
    deim,
    leading_vectors,
    leverage,
    most,
    scaled,
)
from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.structure.obs import Consumer, compensate, removal_curve

__all__ = ["UnitSelection", "kept_units", "transfer", "unit_columns"]

UnitSelection = Literal["greedy", "deim", "leverage"]


def unit_columns(columns: int, width: int) -> NDArray[np.int64]:
    """Return the columns ``[K / width, width]`` of each unit: entries of a kernel, or inputs picked together."""
    return np.arange(columns, dtype=np.int64).reshape(-1, width)


def kept_units(
    weight: Matrix,
    gram: Matrix,
    energy: NDArray[np.float64],
    count: int,
    selection: UnitSelection,
    *,
    width: int = 1,
    steps: int = 64,
) -> Index:
    """Return the ``count`` units of inputs to read, ascending.

    ``greedy`` removes units by what their removal costs exactly, with the others making up for it, in at most
    ``steps`` steps (group optimal brain surgeon). ``deim`` and ``leverage`` look at the columns behind the sizes of
    their inputs and at the whitened weight; both see at most ``min(N, K)`` directions, so that of more units ``deim``
    takes those with the longest columns.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        energy: ``[K]``, mean square of each input.
        count: at most ``K / width``.
        selection: how.
        width: columns of the weight per unit.
        steps: of ``greedy``.
    """
    columns = unit_columns(weight.shape[1], width)
    if selection == "greedy":
        curve = removal_curve([Consumer(weight, gram, columns)], steps, damping=0.0, keep=count)
        return np.sort(curve.order[len(columns) - count :]).astype(np.intp)
    if selection == "leverage":
        whitened = weight @ np.linalg.cholesky(gram)
        shares = column_shares(weight, whitened, energy, min(count * width, *weight.shape))
        return most(leverage(shares).reshape(-1, width).sum(1), count)
    unfolded = _by_unit(scaled(weight, energy), width)
    points = deim(leading_vectors(unfolded.T, min(count, *unfolded.shape)))
    lengths = np.linalg.norm(unfolded, axis=0)
    lengths[points] = np.inf
    return most(lengths, count)


def transfer(weight: Matrix, gram: Matrix, kept: Index, *, width: int = 1) -> Matrix:
    """Return the T ``[N, count * width]`` with which ``T x[kept]`` comes closest to ``weight x``: least squares.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        kept: units that are read, ascending.
        width: columns of the weight per unit.
    """
    reads = np.zeros(weight.shape[1], bool)
    reads[unit_columns(len(reads), width)[kept].ravel()] = True
    return compensate(weight, reads, gram, gram, damping=0.0)[:, reads]


def _by_unit(matrix: Matrix, width: int) -> Matrix:
    """Return ``[N * width, K / width]``: one column for each input."""
    rows, columns = matrix.shape
    return matrix.reshape(rows, columns // width, width).swapaxes(1, 2).reshape(rows * width, -1)
