"""The best factors of low rank for a layer and its inputs. Arrays in, arrays out; float64, no ONNX.

For inputs ``X`` with ``gram = X^T X`` the distance of two weights is ``Q(E) = tr(E gram E^T) = ||X E^T||_F^2``. With
``gram`` diagonal this is a weighted SVD (ASVD, OATS); with ``shifted_target`` in the place of the weight it is
reduced-rank regression towards the outputs of another model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsecc.passes.prune.gram import Matrix

__all__ = ["Factors", "affordable_rank", "best_factors", "leading", "subspace_step", "truncated"]


@dataclass(frozen=True)
class Factors:
    """A matrix of low rank as a product, or a stack of them.

    Attributes:
        left: ``[..., N, r]``.
        right: ``[..., r, K]``.
    """

    left: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        """Inner size."""
        return int(self.left.shape[-1])

    @property
    def size(self) -> int:
        """Numbers in both."""
        return self.left.size + self.right.size

    def product(self) -> Matrix:
        """Return the matrix ``[..., N, K]``."""
        return np.asarray(self.left @ self.right)

    def balanced(self) -> Factors:
        """Return the same matrix with columns of ``left`` as long as the rows of ``right``: what narrow types want."""
        lengths = np.linalg.norm(self.left, axis=-2), np.linalg.norm(self.right, axis=-1)
        usable = (lengths[0] > 0) & (lengths[1] > 0)
        scale = np.sqrt(np.divide(lengths[1], lengths[0], out=np.ones(usable.shape), where=usable))
        return Factors(self.left * scale[..., None, :], self.right / scale[..., None])


def affordable_rank(rows: int, columns: int, share: float, multiple: int = 1) -> int:
    """Return the largest rank, a multiple of ``multiple``, whose factors hold ``share`` of the weights of a matrix."""
    rank = int(share * rows * columns / (rows + columns) + 1e-9)
    return min(rank, rows, columns) // multiple * multiple


def best_factors(weight: Matrix, gram: Matrix, rank: int) -> Factors:
    """Return the factors of ``rank`` with the smallest ``Q(weight - product)``.

    Found from the side that is smaller: by the principal components of the outputs (as LLM-ROM does), which needs no
    inverse, or by the SVD of the weight whitened with a Cholesky factor (SVD-LLM, Wang et al. 2024). Both give the
    same matrix.

    Args:
        weight: ``[N, K]``, or a stack ``[..., N, K]`` of them, each with factors of its own.
        gram: ``[K, K]``, positive semi-definite; definite where ``N > K``.
        rank: at most ``min(N, K)``; 0 gives empty factors.

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not definite where it must be.
    """
    rows, columns = weight.shape[-2:]
    if rows <= columns:
        basis = leading(weight @ gram @ weight.swapaxes(-1, -2), rank)
        return Factors(basis, basis.swapaxes(-1, -2) @ weight)
    root = np.linalg.cholesky(gram)
    found = truncated(weight @ root, rank)
    return Factors(found.left, np.linalg.solve(root.T, found.right.swapaxes(-1, -2)).swapaxes(-1, -2))


def truncated(matrix: Matrix, rank: int) -> Factors:
    """Return the factors of ``rank`` nearest to ``matrix [..., N, K]`` in Frobenius norm, of its truncated SVD."""
    rows, columns = matrix.shape[-2:]
    turned = matrix.swapaxes(-1, -2)
    if rows <= columns:
        basis = leading(matrix @ turned, rank)
        return Factors(basis, basis.swapaxes(-1, -2) @ matrix)
    basis = leading(turned @ matrix, rank)
    return Factors(matrix @ basis, basis.swapaxes(-1, -2))


def subspace_step(matrix: Matrix, start: Matrix, rank: int) -> tuple[Factors, Matrix]:
    """Return factors of ``rank`` that are nearly the best for ``matrix`` in Frobenius norm, and the next start.

    One warm-started step of subspace iteration. The distance is never above that of any matrix of that rank whose
    rows lie in the span of ``start``; the next start spans the rows of the factors, so that a step only improves.

    Args:
        matrix: ``[N, K]``.
        start: ``[s, K]``, s at least ``rank``: a guess of what spans its rows.
        rank: wanted.
    """
    columns = np.linalg.qr(matrix @ start.T)[0]
    inner, values, rows = np.linalg.svd(columns.T @ matrix, full_matrices=False)
    return Factors(columns @ (inner[:, :rank] * values[:rank]), rows[:rank]), rows


def leading(matrix: Matrix, rank: int) -> Matrix:
    """Return the eigenvectors of symmetric matrices with the ``rank`` largest eigenvalues, as columns."""
    vectors = np.linalg.eigh((matrix + matrix.swapaxes(-1, -2)) / 2)[1]
    return np.asarray(vectors[..., vectors.shape[-1] - rank :])
