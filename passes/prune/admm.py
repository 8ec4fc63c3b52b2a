"""ALPS: mask and weights together, by the alternating direction method of multipliers. float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.selection import Mask

__all__ = ["alternate"]

#: Steps between two looks at how far the mask still moves.
_EVERY = 3

#: After so many steps a smaller share of changes is as good as none.
_SETTLED_AFTER, _SETTLED = 30, 0.0003

#: Growth of the penalty by the share of kept weights that changed since the last look, largest first.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alternate(
    weight: Matrix, gram: Matrix, choose: Callable[[NDArray[np.float32]], Mask], start: Mask, steps: int = 300
) -> tuple[Matrix, Mask]:
    """Return weights and mask that minimise ``Q(weights - weight)`` (ALPS, Meng et al. 2024).

    The split ``W = Z``, ``Z`` in the pattern, with a penalty that grows while the mask settles; then least squares
    on the last mask. Never worse than least squares on ``start``, which is what comes back if nothing was gained.

    Args:
        weight: ``[N, K]``, what to come close to.
        gram: ``[K, K]``, positive definite.
        choose: the mask that keeps the largest sum of squares.
        start: the mask to begin with.
        steps: most steps; each costs ``4 N K**2`` operations, after one eigendecomposition.
    """
    scale = np.sqrt(np.diag(gram))  # to a unit diagonal, so that one penalty suits all columns
    matrix = gram / scale[:, None] / scale
    values, vectors = (part.astype(np.float32) for part in np.linalg.eigh(matrix))
    # Single precision until the mask is found; the weights on it are fitted in double precision.
    whole = (weight * scale).astype(np.float32)
    pulled = whole @ matrix.astype(np.float32)
    penalty = 0.1
    kept = np.where(start, whole, 0)
    dual = np.zeros_like(whole)
    mask, seen = start, start
    for step in range(1, steps + 1):
        free = ((pulled - dual + penalty * kept) @ vectors / (values + penalty)) @ vectors.T
        moved = free + dual / penalty
        mask = choose(np.square(moved))
        kept = np.where(mask, moved, 0)
        dual += penalty * (free - kept)
        if step % _EVERY == 0:
            changed = float((mask & ~seen).sum()) / max(1, int(mask.sum()))
            if changed == 0 or (step >= _SETTLED_AFTER and changed < _SETTLED):
                break
            penalty *= next(factor for share, factor in _GROWTH if changed > share)
            seen = mask
    best = [(refit_rows(weight, found, gram), found) for found in (start, mask)]
    return min(best, key=lambda pair: quadratic_error(pair[0] - weight, gram))
