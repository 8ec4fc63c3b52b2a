"""The best weights for a given mask: per-row least squares on the support. Arrays in, arrays out; float64."""

from __future__ import annotations

import numpy as np

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.selection import Mask

__all__ = ["fit_rows", "refit_rows"]

#: Conjugate gradients stop when no row's residual is above this share of where it started.
_TOLERANCE = 1e-6


def refit_rows(
    target: Matrix, mask: Mask, gram: Matrix, start: Matrix | None = None, steps: int = 20
) -> Matrix:
    """Return the weights on ``mask`` that minimise ``Q(weights - target)``, row by row.

    Conjugate gradients on all rows at once, projected on the mask, the Gram matrix scaled to a unit diagonal
    (as ALPS does, Meng et al. 2024). A step costs ``2 N K**2`` operations; the error falls with every step, so
    that stopping early is never worse than the start.

    Args:
        target: ``[N, K]``.
        mask: ``[N, K]``, True where a weight may stay.
        gram: ``[K, K]``, positive definite (``damped``).
        start: weights to start from, zero outside the mask; default the masked target.
        steps: most steps.

    Returns:
        ``[N, K]``, exactly zero outside the mask; of the type of ``target``: float32 takes half the time and is good
        where the error alone is wanted.
    """
    first = np.where(mask, target if start is None else start, 0.0)
    return fit_rows((target - first) @ gram, mask, gram, first, steps)


def fit_rows(rest: Matrix, mask: Mask, gram: Matrix, start: Matrix, steps: int = 20) -> Matrix:
    """As ``refit_rows``, by what is left to explain: for samples ``Z ~ weights A`` with any rows ``A [K, d]``.

    Args:
        rest: ``[N, K]``, ``(target - start) gram``, or ``(Z - start A) A^T``.
        mask: ``[N, K]``, True where a weight may stay.
        gram: ``[K, K]``, ``A A^T``, with no zero on its diagonal.
        start: ``[N, K]``, zero outside the mask.
        steps: most steps.

    Returns:
        ``[N, K]``, exactly zero outside the mask.
    """
    scale = 1.0 / np.sqrt(np.diag(gram))
    matrix = scale[:, None] * gram * scale
    keep = mask.astype(rest.dtype)
    solution = keep * (start / scale)
    residual = keep * (rest * scale)
    direction = residual.copy()
    norm = np.einsum("ij,ij->i", residual, residual)
    goal = np.square(_TOLERANCE) * np.einsum("ij,ij->i", solution, solution)
    for _ in range(steps):
        active = norm > goal
        if not active.any():
            break
        image = keep * (direction @ matrix)
        curvature = np.einsum("ij,ij->i", direction, image)
        length = np.divide(norm, curvature, out=np.zeros_like(norm), where=active & (curvature > 0))
        solution += length[:, None] * direction
        residual -= length[:, None] * image
        previous, norm = norm, np.einsum("ij,ij->i", residual, residual)
        turn = np.divide(norm, previous, out=np.zeros_like(norm), where=previous > 0)
        direction = residual + turn[:, None] * direction
    fitted: Matrix = solution * scale
    return fitted
