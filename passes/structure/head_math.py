"""Fewer dimensions for the heads of an attention. Arrays in, arrays out; float64, no ONNX.

The scores of a head are ``q . k``, its outputs ``W_o v``: each is a product over the dimensions of the head, so that a
projection of both sides to fewer of them is a low-rank approximation of the product (type II and III of MoDeGPT, Lin et
al. 2024; there type II only selects dimensions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix

__all__ = [
    "Reduction",
    "best_dimensions",
    "best_pairs",
    "block_diagonal",
    "dimension_errors",
    "moments_of",
    "pair_errors",
    "refitted",
]

#: Singular values below this share of the largest are zero.
_ZERO = 1e-12


@dataclass(frozen=True)
class Reduction:
    """Two projections ``[rank, d]`` such that ``(left a) . (right b)`` stands for ``a . b``.

    Attributes:
        left: of a.
        right: of b.
        error: mean square of what the products lose, for a and b that are independent of each other.
        total: mean square of the products.
    """

    left: Matrix
    right: Matrix
    error: float
    total: float

    def product(self) -> Matrix:
        """Return the ``[d, d]`` that stands for the identity between a and b."""
        return self.left.T @ self.right

    def scaled(self, factor: float) -> Reduction:
        """Return it with the products multiplied by ``factor``."""
        return Reduction(factor * self.left, self.right, self.error, self.total)


def moments_of(weight: Matrix, bias: NDArray[np.float64], gram: Matrix, mean: NDArray[np.float64]) -> Matrix:
    """Return the mean of ``y^T y``, ``[N, N]``, for ``y = W x + b``, from those of x: ``gram [K, K]``, ``mean [K]``."""
    through = weight @ mean
    cross = np.outer(through, bias)
    return np.asarray(weight @ gram @ weight.T + cross + cross.T + np.outer(bias, bias), np.float64)


def best_dimensions(left: Matrix, right: Matrix, rank: int) -> Reduction:
    """Return the best projections to ``rank`` dimensions for the second moments ``[d, d]`` of both sides.

    With ``A^1/2 B^1/2 = U S V^T`` no product of rank r is nearer than the truncation, whose error is the sum of the
    squares of the values left out; ``S_r^-1/2 V_r^T B^1/2`` and ``S_r^-1/2 U_r^T A^1/2`` reach it without an inverse of
    either matrix.
    """
    roots = _root(left), _root(right)
    u, s, vt = np.linalg.svd(roots[0] @ roots[1])
    kept = s[:rank]
    safe = kept > _ZERO * max(float(s[0]), np.finfo(float).tiny)
    scale = np.divide(1.0, np.sqrt(kept), out=np.zeros_like(kept), where=safe)[:, None]
    squares = np.square(s)
    return Reduction(
        scale * (vt[:rank] @ roots[1]),
        scale * (u[:, :rank].T @ roots[0]),
        float(squares[rank:].sum()),
        float(squares.sum()),
    )


def best_pairs(
    left: Matrix, right: Matrix, partners: Sequence[int], rank: int
) -> tuple[list[int], Reduction]:
    """Return the ``rank`` dimensions to keep, in pairs that turn together, and what that is as a reduction.

    The first half of the dimensions are the lower ones of their pairs, the second their partners. Turned by angles of
    all sizes, pairs are independent of each other, so the pairs of the largest products of both sides' energy are the
    best ones (the CR scores of MoDeGPT, by pairs).

    Args:
        left: second moments ``[d, d]``.
        right: of the other side.
        partners: the other dimension of each one's pair.
        rank: even.
    """
    low, high, scores = _pair_scores(left, right, partners)
    kept = np.sort(np.argsort(-scores, kind="stable")[: rank // 2])
    dimensions = [low[i] for i in kept] + [high[i] for i in kept]
    chosen = np.eye(len(left))[dimensions]
    lost = float(scores.sum() - scores[kept].sum())
    return dimensions, Reduction(chosen, chosen, max(0.0, lost) / 2, float(scores.sum()) / 2)


def dimension_errors(left: Matrix, right: Matrix) -> NDArray[np.float64]:
    """Return the error of ``best_dimensions`` by the dimensions kept, ``[d + 1]``."""
    squares = np.square(np.linalg.svd(_root(left) @ _root(right), compute_uv=False))
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def pair_errors(left: Matrix, right: Matrix, partners: Sequence[int]) -> NDArray[np.float64]:
    """Return the error of ``best_pairs`` by the dimensions kept, ``[d + 1]``; odd numbers keep a pair less."""
    scores = np.sort(_pair_scores(left, right, partners)[2])
    errors = np.append(np.cumsum(scores)[::-1], 0.0) / 2
    return np.repeat(errors, 2)[: len(left) + 1]


def refitted(target: Matrix, gram: Matrix, basis: Matrix) -> Matrix:
    """Return the weight ``[N, r]`` on ``basis [r, K]`` whose outputs are the nearest to those of ``target [N, K]``.

    Least squares ``T G P^T (P G P^T)^-1`` for ``gram [K, K]``, positive definite.
    """
    through = gram @ basis.T
    return np.asarray(np.linalg.lstsq(basis @ through, (target @ through).T, rcond=None)[0].T, np.float64)


def block_diagonal(blocks: Sequence[Matrix]) -> Matrix:
    """Return ``blocks`` of any shape along the diagonal of a matrix of zeros."""
    shape = sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)
    found, row, column = np.zeros(shape), 0, 0
    for block in blocks:
        found[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return found


def _pair_scores(
    left: Matrix, right: Matrix, partners: Sequence[int]
) -> tuple[list[int], list[int], NDArray[np.float64]]:
    """The lower and the other dimension of each pair, and the product of the energies of both sides."""
    low = [i for i, other in enumerate(partners) if i < other]
    high = [partners[i] for i in low]
    a, b = np.diagonal(left), np.diagonal(right)
    return low, high, (a[low] + a[high]) * (b[low] + b[high])


def _root(matrix: Matrix) -> Matrix:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T, np.float64)
