"""A matrix as a product of sparse factors (FAuST). Arrays in, arrays out; real or complex, no ONNX.

palm4MSA and its hierarchical use (Le Magoarou and Gribonval 2016), with sets of matrices that hold so many entries in
each row and in each column. Fast transforms are such products: they come back exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Limits", "Mask", "digit_reversal", "greedy_support", "palm4msa", "product", "sparse_factors"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Norm = Callable[[Array], float]

#: Magnitudes that differ by less, relative to the largest, are equal: the first of them then counts more.
_TIE = 1e-5

#: The curvature is taken to be so many times what it is, for the rounding.
_STEP = 1.0 + 1e-9

#: Rounds of the search for the largest singular value.
_POWERS = 30

#: Side of matrices whose singular values are found at once.
_SMALL = 64

#: Steps end where the squared error falls by less than this share, or below this share of the matrix.
_LEAST_GAIN, _EXACT = 1e-6, 1e-26


@dataclass(frozen=True)
class Limits:
    """How many blocks a factor may hold.

    Attributes:
        per_row: in each row of blocks.
        per_column: in each column of blocks.
        block: rows and columns of a block; 2 for complex numbers as real matrices.
    """

    per_row: int
    per_column: int
    block: int = 1

    def support(self, matrix: Array) -> Mask:
        """Return the mask of the entries that stay."""
        size = self.block
        rows, columns = (axis // size for axis in matrix.shape)
        norms = np.linalg.norm(matrix.reshape(rows, size, columns, size), axis=(1, 3))
        kept = greedy_support(norms, self.per_row, self.per_column)
        return np.repeat(np.repeat(kept, size, 0), size, 1)


def greedy_support(scores: NDArray[np.float64], per_row: int, per_column: int) -> Mask:
    """Return the mask of large scores, at most so many in each row and column, taken from the largest down.

    Equal scores are taken row by row from the first column on, which gives blocks where all are equal.
    """
    kept = np.zeros(scores.shape, bool)
    if per_row >= scores.shape[1] and per_column >= scores.shape[0]:
        return ~kept
    top = float(scores.max(initial=0.0))
    if top == 0:
        return kept
    order = np.argsort(-np.rint(scores / (top * _TIE)), axis=None, kind="stable")
    rows, columns = np.unravel_index(order[: np.count_nonzero(scores)], scores.shape)
    in_row, in_column = [per_row] * scores.shape[0], [per_column] * scores.shape[1]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        if in_row[row] and in_column[column]:
            in_row[row] -= 1
            in_column[column] -= 1
            kept[row, column] = True
    return kept


def product(factors: Sequence[Array]) -> Array:
    """Return the product of matrices, the first one leftmost."""
    whole = factors[0]
    for factor in factors[1:]:
        whole = whole @ factor
    return whole


def palm4msa(
    matrix: Array, start: Sequence[Array], limits: Sequence[Limits], steps: int
) -> tuple[list[Array], list[float]]:
    """Return factors within ``limits`` whose product is closer to ``matrix``, and the squared errors on the way.

    The first of these is that of the start.

    A step takes each factor in turn, the last first, down the gradient by one over its Lipschitz constant and back
    into its set, and then scales the product as suits best. The error never rises: where the greedy set of entries is
    worse than the one before, that one stays.

    Args:
        matrix: ``[N, K]``.
        start: factors that are multiplied, the first leftmost, within ``limits``.
        limits: of each.
        steps: at most.
    """
    factors, errors = list(start), [_distance(matrix, start)]
    norm: Norm = _nearly_the_norm
    while errors[-1] > _EXACT * np.square(np.abs(matrix)).sum() and len(errors) <= steps:
        found = _sweep(matrix, factors, limits, norm)
        error = _distance(matrix, found)
        if error > errors[-1] and norm is _nearly_the_norm:
            norm = _norm  # a step was too long
            continue
        factors = found
        errors.append(error)
        if error > errors[-2] * (1 - _LEAST_GAIN):
            break
    return factors, errors


def sparse_factors(
    matrix: Array, radices: Sequence[int], steps: int = 30, block: int = 1
) -> tuple[list[Array], float]:
    """Return sparse factors with a product close to ``matrix``, and their squared error.

    Factors are split off at the right one after another, each time followed by steps for all of them. Inputs are
    taken in their own order and with their digits reversed, in which the fast Fourier transform has them; the better
    result stays, its last factor in the order of the inputs.

    Args:
        matrix: ``[n, n]``, real or complex.
        radices: their product is ``n / block``; one factor for each, with so many blocks in a row and in a column.
        steps: of each fit, at most.
        block: rows and columns that belong together.
    """
    count = matrix.shape[1] // block
    best: tuple[list[Array], float] | None = None
    for order in (np.arange(count), digit_reversal(radices)):
        columns = (order[:, None] * block + np.arange(block)).ravel()
        factors, error = _hierarchical(matrix[:, columns], radices, steps, block)
        if best is None or error < best[1]:
            ordered = np.zeros_like(factors[-1])
            ordered[:, columns] = factors[-1]
            best = [*factors[:-1], ordered], error
        if error <= _EXACT * np.square(np.abs(matrix)).sum():
            break
    assert best is not None, "there are two orders"
    return best


def digit_reversal(radices: Sequence[int]) -> NDArray[np.intp]:
    """Return the numbers below the product of ``radices`` in the order of their reversed digits."""
    count = math.prod(radices)
    return np.arange(count).reshape(radices[::-1]).transpose(range(len(radices))[::-1]).ravel()


def _hierarchical(matrix: Array, radices: Sequence[int], steps: int, block: int) -> tuple[list[Array], float]:
    size = len(matrix)
    left, factors = size // block, [matrix]
    limits: list[Limits] = []
    for radix in radices[:0:-1]:
        left //= radix
        rest, split = Limits(left, left, block), Limits(radix, radix, block)
        pair = [np.eye(size, dtype=matrix.dtype), np.zeros_like(matrix)]
        pair, _ = palm4msa(factors[0], pair, [rest, split], steps)
        limits = [rest, split, *limits[1:]]
        factors, _ = palm4msa(matrix, [*pair, *factors[1:]], limits, steps)
    return factors, _distance(matrix, factors)


def _distance(matrix: Array, factors: Sequence[Array]) -> float:
    return float(np.square(np.abs(matrix - product(factors))).sum())


def _sweep(matrix: Array, factors: Sequence[Array], limits: Sequence[Limits], norm: Norm) -> list[Array]:
    """Return the factors after a step of each, the product scaled as suits best."""
    found = list(factors)
    for at in reversed(range(len(found))):
        found[at] = _step(matrix, found, at, limits[at], norm)
    whole = product(found)
    energy = float(np.vdot(whole, whole).real)
    if energy:
        found[0] = found[0] * (np.vdot(whole, matrix) / energy)
    return found


def _step(matrix: Array, factors: Sequence[Array], at: int, limits: Limits, norm: Norm) -> Array:
    """Return one factor after a step down the gradient, within its limits."""
    factor = factors[at]
    left = product(factors[:at]) if at else np.eye(len(matrix), dtype=matrix.dtype)
    right = (
        product(factors[at + 1 :]) if at + 1 < len(factors) else np.eye(matrix.shape[1], dtype=matrix.dtype)
    )
    steepest = _STEP * (norm(left) * norm(right)) ** 2
    if steepest == 0:
        return factor
    moved = factor - left.conj().T @ (left @ factor @ right - matrix) @ right.conj().T / steepest
    found, before = np.where(limits.support(moved), moved, 0), np.where(factor != 0, moved, 0)
    nearer = np.linalg.norm(found) >= np.linalg.norm(before)
    return np.asarray(found if nearer else before)


def _norm(matrix: Array) -> float:
    return float(np.linalg.norm(matrix, 2))


def _nearly_the_norm(matrix: Array) -> float:
    """Return the largest singular value, or somewhat less, by power iteration."""
    if min(matrix.shape) <= _SMALL:
        return _norm(matrix)
    vector = np.cos(np.arange(matrix.shape[1])).astype(matrix.dtype)
    size = 0.0
    for _ in range(_POWERS):
        vector = matrix.conj().T @ (matrix @ vector)
        size = float(np.linalg.norm(vector))
        if size == 0:
            return _norm(matrix)
        vector = vector / size
    return float(np.sqrt(size))
