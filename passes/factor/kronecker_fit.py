"""Weights as sums of Kronecker products that suit their outputs. Arrays in, arrays out; float64, no ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.btt_fit import solve_stack
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["KroneckerSum", "fit", "project", "rearranged"]

Stack = NDArray[np.float64]

#: Sweeps stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class KroneckerSum:
    """``sum_t left_t (x) right_t``.

    Attributes:
        left: ``[t, n1, k1]``.
        right: ``[t, n2, k2]``.
    """

    left: Stack
    right: Stack

    def total(self) -> Matrix:
        """Return the matrix ``[n1 n2, k1 k2]``."""
        (_, n1, k1), (_, n2, k2) = self.left.shape, self.right.shape
        whole = np.tensordot(self.left, self.right, (0, 0))
        return np.asarray(whole.transpose(0, 2, 1, 3).reshape(n1 * n2, k1 * k2))

    def balanced(self) -> KroneckerSum:
        """Return the same sum with both factors of every term of one length: what narrow types want."""
        left, right = (np.sqrt(np.square(part).sum((1, 2))) for part in (self.left, self.right))
        usable = (left > 0) & (right > 0)
        scale = np.sqrt(np.divide(right, left, out=np.ones_like(left), where=usable))[:, None, None]
        return KroneckerSum(self.left * scale, self.right / scale)


def rearranged(weight: Matrix, outer: tuple[int, int]) -> Matrix:
    """Return ``[n1 k1, n2 k2]``, where a Kronecker product is one of two vectors (Van Loan, Pitsianis 1993).

    Args:
        weight: ``[n1 n2, k1 k2]``.
        outer: ``(n1, k1)``.
    """
    n1, k1 = outer
    rows, columns = weight.shape
    four = weight.reshape(n1, rows // n1, k1, columns // k1)
    return four.transpose(0, 2, 1, 3).reshape(n1 * k1, -1)


def project(weight: Matrix, outer: tuple[int, int], terms: int) -> KroneckerSum:
    """Return the nearest sum of ``terms`` Kronecker products in Frobenius norm: an SVD of the rearranged weight."""
    (n1, k1), (rows, columns) = outer, weight.shape
    left, values, right = np.linalg.svd(rearranged(weight, outer), full_matrices=False)
    return KroneckerSum(
        (left[:, :terms] * values[:terms]).T.reshape(-1, n1, k1),
        right[:terms].reshape(-1, rows // n1, columns // k1),
    )


def fit(
    target: Matrix, gram: Matrix, outer: tuple[int, int], terms: int, sweeps: int
) -> tuple[KroneckerSum, list[float]]:
    """Return a sum with a small ``Q(target - total)``, and ``Q`` at the start and after each sweep: it never rises.

    Starts at the projection. A sweep solves all left factors, then all right ones, by least squares with the full Gram
    matrix; rows of a factor share their normal equations.

    Args:
        target: ``[n1 n2, k1 k2]``.
        gram: ``[K, K]``, positive definite.
        outer: ``(n1, k1)``.
        terms: at most ``min(n1 k1, n2 k2)``.
        sweeps: at most.
    """
    n1, k1 = outer
    found = project(target, outer, terms)
    n2, k2 = found.right.shape[1:]
    slope = (target @ gram).reshape(n1, n2, k1, k2)
    squares = gram.reshape(k1, k2, k1, k2)
    objectives = [quadratic_error(target - found.total(), gram)]
    for _ in range(sweeps):
        right = found.right
        left = _solved(right, squares.transpose(1, 0, 3, 2), slope.transpose(1, 0, 3, 2))
        step = KroneckerSum(left, _solved(left, squares, slope))
        error = quadratic_error(target - step.total(), gram)
        if error > objectives[-1]:  # normal equations may be close to singular
            break
        found = step
        objectives.append(error)
        if error >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return found, objectives


def _solved(known: Stack, squares: Stack, slope: Stack) -> Stack:
    """Return the best factors ``[t, n, k]`` beside ``known [t, m, l]``.

    Args:
        known: the other ones.
        squares: ``[l, k, l, k]``, second moments of the inputs.
        slope: ``[m, n, l, k]``, the target times them.
    """
    terms, _, inner = known.shape
    size = squares.shape[1]
    pairs = np.einsum("tml,umj->tulj", known, known, optimize=True).reshape(terms**2, inner**2)
    moments = squares.transpose(0, 2, 1, 3).reshape(inner**2, size**2)
    normal = (pairs @ moments).reshape(terms, terms, size, size).transpose(0, 2, 1, 3)
    wanted = np.tensordot(known, slope, ((1, 2), (0, 2))).transpose(0, 2, 1)
    solved = solve_stack(normal.reshape(terms * size, -1), wanted.reshape(terms * size, -1))
    return np.asarray(solved.reshape(terms, size, -1).transpose(0, 2, 1))
