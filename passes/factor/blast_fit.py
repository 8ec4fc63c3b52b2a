"""Blocks that share their bases, each with a diagonal of its own (BLAST). Arrays in, arrays out; float64, no ONNX.

Block ``(i, j)`` of a weight ``[k p, r s]`` is ``U_i diag(s_ij) V_j`` (Lee et al. 2024): all blocks of a row share
``U_i [p, t]``, all of a column ``V_j [t, s]``. With diagonals of 1 it is a weight of rank ``t``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.btt_fit import solve_stack
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["SharedBlocks", "fit", "left_step", "panel_step", "start"]

Stack = NDArray[np.float64]

#: Sweeps stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class SharedBlocks:
    """A matrix as blocks with shared bases.

    Attributes:
        left: ``[k, p, t]``.
        mix: ``[k, r, t]``, the diagonals.
        right: ``[r, t, s]``.
    """

    left: Stack
    mix: Stack
    right: Stack

    def panel(self, at: int) -> Matrix:
        """Return the columns ``[k p, s]`` of a panel of inputs."""
        blocks = (self.left * self.mix[:, at, None]) @ self.right[at]
        return np.asarray(blocks.reshape(-1, blocks.shape[2]))

    def total(self) -> Matrix:
        """Return the matrix ``[k p, r s]``."""
        return np.concatenate([self.panel(at) for at in range(len(self.right))], axis=1)

    def features(self) -> Stack:
        """Return what each row of blocks multiplies its left factor with, ``[k, t, r s]``."""
        spread = self.mix[..., None] * self.right
        return spread.transpose(0, 2, 1, 3).reshape(len(self.left), self.left.shape[2], -1)

    def balanced(self) -> SharedBlocks:
        """Return the same matrix with every rank of ``left`` and ``right`` of one size and diagonals near 1."""
        sizes = [
            np.sqrt(np.square(part).mean(axes))
            for part, axes in ((self.left, (0, 1)), (self.mix, (0, 1)), (self.right, (0, 2)))
        ]
        left, mix, right = (np.where(size > 0, size, 1.0) for size in sizes)
        each = np.sqrt(left * mix * right)
        return SharedBlocks(
            self.left / left * each, self.mix / mix, self.right / right[:, None] * each[:, None]
        )


def start(weight: Matrix, gram: Matrix, grid: tuple[int, int], rank: int) -> SharedBlocks:
    """Return the best weight of ``rank`` as blocks: all diagonals are 1."""
    down, across = grid
    factors = best_factors(weight, gram, rank)
    return SharedBlocks(
        factors.left.reshape(down, -1, rank),
        np.ones((down, across, rank)),
        np.ascontiguousarray(factors.right.reshape(rank, across, -1).transpose(1, 0, 2)),
    )


def fit(
    target: Matrix, gram: Matrix, grid: tuple[int, int], rank: int, sweeps: int
) -> tuple[SharedBlocks, list[float]]:
    """Return blocks with a small ``Q(target - total)``, and ``Q`` at the start and after each sweep: it never rises.

    Starts with low rank, so that it is never worse than that of the same rank. A sweep solves the diagonals of each
    panel of inputs, then its right factor, and at last all left factors, each exactly with the full Gram matrix; the
    gradient descent of the paper needs a step size and sees no inputs.

    Args:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        grid: ``(k, r)``, divisors of N and K.
        rank: at most ``min(N, K)``.
        sweeps: at most.
    """
    found = start(target, gram, grid, rank)
    total = found.total()
    objectives = [quadratic_error(target - total, gram)]
    width = target.shape[1] // grid[1]
    for _ in range(sweeps):
        step = replace(found, mix=found.mix.copy(), right=found.right.copy())
        for at in range(grid[1]):
            panel = slice(at * width, (at + 1) * width)
            square = gram[panel, panel]
            slope = (target - total) @ gram[:, panel] + total[:, panel] @ square
            panel_step(step, at, slope, square)
            total[:, panel] = step.panel(at)
        step = left_step(target, gram, step)
        total = step.total()
        error = quadratic_error(target - total, gram)
        if error > objectives[-1]:  # normal equations may be close to singular
            break
        found = step
        objectives.append(error)
        if error >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return found, objectives


def panel_step(found: SharedBlocks, at: int, slope: Matrix, square: Matrix) -> None:
    """Solve the diagonals of a panel of inputs and then its right factor, in place.

    Args:
        found: changed.
        at: which panel.
        slope: ``[N, s]``, what the panel shall be beside all others, times ``square``.
        square: ``[s, s]``, second moments of its inputs.
    """
    right, width = found.right[at], len(square)
    turned = found.left.transpose(0, 2, 1)
    inner, pulled = turned @ found.left, turned @ slope.reshape(len(found.left), -1, width)
    wanted = np.einsum("kts,ts->kt", pulled, right)
    mix = solve_stack(inner * (right @ square @ right.T), wanted[..., None])[..., 0]
    found.mix[:, at] = mix
    normal = np.einsum("kt,ktu,ku->tu", mix, inner, mix, optimize=True)
    sums = np.einsum("kt,kts->ts", mix, pulled)
    found.right[at] = np.linalg.solve(square, solve_stack(normal, sums).T).T


def left_step(target: Matrix, gram: Matrix, found: SharedBlocks) -> SharedBlocks:
    """Return ``found`` with the best left factors: least squares on the features of each row of blocks."""
    features = found.features()
    spread = (features.reshape(-1, len(gram)) @ gram).reshape(features.shape)
    wanted = spread @ target.reshape(len(features), -1, len(gram)).transpose(0, 2, 1)
    left = solve_stack(spread @ features.transpose(0, 2, 1), wanted)
    return replace(found, left=left.transpose(0, 2, 1))
