"""Which rows and columns of a weight stand best for all of it. Arrays in, arrays out; float64, no ONNX.

Columns are inputs, and inputs differ in size and go together: both selections look at the weight behind its inputs,
the first at their sizes alone, the second at all of their second moments.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix

__all__ = [
    "Index",
    "Selection",
    "column_shares",
    "deim",
    "leading_vectors",
    "leverage",
    "most",
    "pick_columns",
    "pick_rows",
    "scaled",
]

Index = NDArray[np.intp]
Selection = Literal["deim", "leverage"]

#: Singular values below this share of the largest are rounding: squares of them are what is computed.
_SMALLEST = 1e-7


def deim(basis: Matrix) -> Index:
    """Return the points at which interpolation by the columns of ``basis`` is well conditioned, as many as columns.

    Discrete empirical interpolation (Chaturantabut and Sorensen 2010; for CUR Sorensen and Embree 2016): the next
    point is where a column differs most from its interpolant by the columns before it at the points found. Solving
    those systems in turn is elimination with the largest entry of a column as pivot, which is how it is computed.
    A column that is nothing but rounding gives the next point that is free.

    Args:
        basis: ``[n, r]`` with r at most n; the length of a column does not matter.

    Returns:
        ``[r]``, all different, in the order of selection.
    """
    rest = basis / np.where((top := np.abs(basis).max(0, initial=0)) > 0, top, 1.0)
    free = np.ones(len(rest), bool)
    points = np.empty(rest.shape[1], np.intp)
    for at in range(rest.shape[1]):
        sizes = np.where(free, np.abs(rest[:, at]), -1.0)
        points[at] = point = int(np.argmax(sizes))
        free[point] = False
        if sizes[point] > _SMALLEST:
            rest[:, at + 1 :] -= np.outer(rest[:, at] / rest[point, at], rest[point, at + 1 :])
    return points


def leverage(basis: Matrix) -> NDArray[np.float64]:
    """Return the squared length of each row of ``basis [n, r]``, ``[n]``: statistical leverage if it is orthonormal."""
    return np.asarray(np.square(basis).sum(1), np.float64)


def most(scores: NDArray[np.float64], count: int) -> Index:
    """Return the ``count`` entries with the highest scores, ascending; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def scaled(weight: Matrix, energy: NDArray[np.float64], *, absolute: bool = False) -> Matrix:
    """Return ``weight [N, K]`` with each column as long as its input makes it.

    Args:
        weight: ``[N, K]``.
        energy: ``[K]``, mean square of each input.
        absolute: without signs, as CURing has it. That hides how rows and columns relate; it is here to compare.
    """
    return np.asarray((np.abs(weight) if absolute else weight) * np.sqrt(energy))


def pick_rows(matrix: Matrix, count: int, selection: Selection) -> Index:
    """Return ``count`` rows of ``matrix [N, K]`` that span its rows well.

    Args:
        matrix: ``scaled`` for ``deim``, whitened (``W L`` with ``L L^T`` the Gram matrix) for ``leverage``.
        count: at most ``min(N, K)``.
        selection: how.
    """
    vectors = leading_vectors(matrix, count)
    return deim(vectors) if selection == "deim" else most(leverage(vectors), count)


def pick_columns(
    weight: Matrix, matrix: Matrix, energy: NDArray[np.float64], count: int, selection: Selection
) -> Index:
    """Return ``count`` columns of ``weight [N, K]`` that span well what it does to its inputs.

    Args:
        weight: ``[N, K]``.
        matrix: as for ``pick_rows``.
        energy: ``[K]``, mean square of each input.
        count: at most ``min(N, K)``.
        selection: how.
    """
    if selection == "deim":
        return deim(leading_vectors(matrix.T, count))
    return most(leverage(column_shares(weight, matrix, energy, count)), count)


def column_shares(weight: Matrix, whitened: Matrix, energy: NDArray[np.float64], count: int) -> Matrix:
    """Return what each column of ``weight [N, K]`` gives to the leading outputs, ``[K, at most count]``.

    ``whitened = W L = U S V^T`` mixes columns; what a column gives to the directions U is ``S^-1 U^T w_j s_j`` with
    ``s_j`` the size of its input. That is V itself where inputs do not go together. Directions of no size are left
    out.

    Args:
        weight: ``[N, K]``.
        whitened: ``[N, K]``.
        energy: ``[K]``, mean square of each input.
        count: at most ``min(N, K)``.
    """
    left = leading_vectors(whitened, count)
    sizes = np.linalg.norm(left.T @ whitened, axis=1)
    real = sizes > _SMALLEST * sizes.max(initial=0)
    return np.asarray(scaled(weight, energy).T @ (left[:, real] / sizes[real]))


def leading_vectors(matrix: Matrix, count: int) -> Matrix:
    """Return the ``count`` leading left singular vectors ``[N, count]``, largest first; rounding where there are none.

    From the eigenvectors of the smaller product: squares cost accuracy only among values that carry nothing.
    """
    rows, columns = matrix.shape
    product = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    vectors = np.linalg.eigh(product)[1][:, ::-1][:, :count]
    if rows <= columns:
        return np.asarray(vectors)
    left = matrix @ vectors
    lengths = np.linalg.norm(left, axis=0)
    return np.asarray(left / np.where(lengths > 0, lengths, 1.0))
