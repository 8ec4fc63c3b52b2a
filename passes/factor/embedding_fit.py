"""The best factors of a table of vectors, by how often each is read. Arrays in, arrays out; float64, no ONNX.

A table ``W [V, d]`` of low rank is ``A B`` with ``A = W into`` and ``B = back``: what is sought is a subspace of the d
directions, so that second moments ``[d, d]`` of the rows are all that is needed of a table of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import Matrix, damped, quadratic_error

__all__ = ["column_metric", "project", "row_moment", "row_weights", "subspace", "weighted_error"]

#: Rows that are float64 at a time.
_ROWS = 4096

#: Ridge, relative to the mean of the diagonal, that keeps moments of fewer rows than directions regular.
_RIDGE = 1e-9


def row_weights(counts: NDArray[np.int64] | None, rows: int, floor: float) -> NDArray[np.float64]:
    """Return what an error in each row counts, ``[V]``, 1 on the average.

    Args:
        counts: how often each row was read, ``[V]``; None, or all zero, for nothing known.
        rows: V.
        floor: share of the whole that is dealt out evenly, also to rows that were never read.
    """
    total = 0 if counts is None else int(counts.sum())
    if counts is None or not total:
        return np.ones(rows)
    return np.asarray(floor + (1 - floor) * rows * counts / total, np.float64)


def row_moment(table: NDArray[Any], weights: NDArray[np.float64]) -> Matrix:
    """Return ``W^T diag(weights) W``, ``[d, d]``."""
    total = np.zeros((table.shape[1],) * 2)
    for some, rows in _parts(table):
        total += rows.T @ (weights[some, None] * rows)
    return total


def column_metric(moment: Matrix, heads: Matrix | None) -> Matrix:
    """Return the G ``[d, d]`` with which errors of rows ``E`` cost ``tr(E G E^T)``.

    Rows that are read count alike in all directions. Where a head multiplies with the table, the directions of what it
    reads count too, and both so that losing everything would cost the same.

    Args:
        moment: of the rows, as ``row_moment`` gives it.
        heads: second moments ``[d, d]`` of what heads read; None without heads.
    """
    metric = np.eye(len(moment))
    if heads is None:
        return metric
    seen, lost = float(np.trace(moment)), float(np.einsum("ij,ij->", moment, heads))
    return np.asarray(metric + (seen / lost) * heads) if lost > 0 else metric


def subspace(moment: Matrix, metric: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Return ``into [d, r]`` and ``back [r, d]`` with which ``W into back`` comes closest to ``W``.

    The weighted low-rank problem ``min tr(F (W - A B) G (W - A B)^T)`` with ``moment = W^T F W``: its A has the rows
    ``w G B^T (B G B^T)^-1``. ``back`` has orthonormal rows.

    Args:
        moment: ``[d, d]``.
        metric: G, ``[d, d]``, positive definite.
        rank: r, at most d.
    """
    root = np.asarray(np.linalg.cholesky(damped(moment, _RIDGE)[0]).T, np.float64)
    right = best_factors(root, metric, rank).right
    back = np.linalg.qr(right.T)[0].T
    seen = back @ metric
    return np.asarray(np.linalg.solve(seen @ back.T, seen).T), np.asarray(back)


def project(table: NDArray[Any], into: Matrix, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return ``table @ into`` as ``dtype``, ``[V, r]``."""
    found = np.empty((len(table), into.shape[1]), dtype)
    for some, rows in _parts(table):
        found[some] = rows @ into
    return found


def weighted_error(
    table: NDArray[Any],
    near: NDArray[Any],
    back: Matrix,
    weights: NDArray[np.float64],
    metric: Matrix,
) -> float:
    """Return ``tr(F E G E^T) / tr(F W G W^T)`` for ``E = near back - W`` as it is stored; 0 where W is."""
    lost = whole = 0.0
    for some, rows in _parts(table):
        scale = np.sqrt(weights[some, None])
        lost += quadratic_error(scale * (near[some].astype(np.float64) @ back - rows), metric)
        whole += quadratic_error(scale * rows, metric)
    return lost / whole if whole else 0.0


def _parts(table: NDArray[Any]) -> Iterator[tuple[slice, Matrix]]:
    for start in range(0, len(table), _ROWS):
        some = slice(start, start + _ROWS)
        yield some, table[some].astype(np.float64)
