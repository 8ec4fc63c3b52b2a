"""Matrices whose blocks have low rank: Monarch and block tensor-train. Arrays in, arrays out; float64, no ONNX.

A weight ``[k p, r s]`` is ``k x r`` blocks ``[p, s]``, each a product of rank ``t`` of its own. Rank 1 is Monarch (Dao
et al. 2022), any rank block tensor-train (BTT, Qiu et al. 2024), both with the outputs of a block side by side instead
of ``k`` apart; rank ``min(p, s)`` holds any matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import Factors, best_factors
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["BlockFactors", "blocks_of", "fit", "project", "refit_left", "solve_stack"]

Stack = NDArray[np.float64]

#: Sweeps stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-3

#: Added to the diagonal of the normal equations, as a share of its mean.
_RIDGE = 1e-12

#: Numbers that least squares for left factors hold at a time.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class BlockFactors:
    """A matrix as a grid of blocks of low rank.

    Attributes:
        left: ``[k, r, p, t]``.
        right: ``[k, r, t, s]``.
    """

    left: Stack
    right: Stack

    def total(self) -> Matrix:
        """Return the matrix ``[k p, r s]``."""
        blocks = self.left @ self.right
        down, across, rows, columns = blocks.shape
        return np.asarray(blocks.transpose(0, 2, 1, 3).reshape(down * rows, across * columns))

    def balanced(self) -> BlockFactors:
        """Return the same matrix with columns of ``left`` as long as the rows of ``right``: what narrow types want."""
        even = Factors(self.left, self.right).balanced()
        return BlockFactors(even.left, even.right)


def blocks_of(weight: Matrix, grid: tuple[int, int]) -> Stack:
    """Return the blocks ``[k, r, p, s]`` of a weight ``[k p, r s]`` for a grid ``(k, r)``."""
    down, across = grid
    rows, columns = weight.shape
    return weight.reshape(down, rows // down, across, columns // across).transpose(0, 2, 1, 3)


def project(weight: Matrix, grid: tuple[int, int], rank: int) -> BlockFactors:
    """Return the nearest matrix of the form in Frobenius norm: a truncated SVD of every block.

    Args:
        weight: ``[k p, r s]``.
        grid: ``(k, r)``.
        rank: at most ``min(p, s)``.
    """
    left, values, right = np.linalg.svd(blocks_of(weight, grid), full_matrices=False)
    return BlockFactors(left[..., :rank] * values[..., None, :rank], right[..., :rank, :])


def fit(
    target: Matrix, gram: Matrix, grid: tuple[int, int], rank: int, sweeps: int
) -> tuple[BlockFactors, list[float]]:
    """Return a matrix of the form with a small ``Q(target - total)``, and ``Q`` after each sweep: it never rises.

    Starts with every panel of inputs as if it did not correlate with the others. A sweep gives each panel in turn the
    best factors beside the others, which is reduced-rank regression on its inputs, a problem per block; then the left
    factors of all blocks of a row are solved together.

    Args:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        grid: ``(k, r)``, divisors of N and K.
        rank: at most the smaller side of a block.
        sweeps: at most; 0 leaves the start.
    """
    down, across = grid
    height, width = len(target) // down, target.shape[1] // across
    panels = [slice(at, at + width) for at in range(0, target.shape[1], width)]
    found = BlockFactors(np.zeros((down, across, height, rank)), np.zeros((down, across, rank, width)))
    total = np.zeros_like(target)
    for at, panel in enumerate(panels):
        total[:, panel] = _set_panel(found, at, target[:, panel], gram[panel, panel])
    objectives = [quadratic_error(target - total, gram)]
    for _ in range(sweeps):
        for at, panel in enumerate(panels):
            square = gram[panel, panel]
            slope = (target - total) @ gram[:, panel]
            wanted = total[:, panel] + np.linalg.solve(square, slope.T).T
            total[:, panel] = _set_panel(found, at, wanted, square)
        objectives.append(quadratic_error(target - total, gram))
        refitted = refit_left(target, gram, found)
        error = quadratic_error(target - refitted.total(), gram)
        if error <= objectives[-1]:  # normal equations may be close to singular
            found, total, objectives[-1] = refitted, refitted.total(), error
        if objectives[-1] >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return found, objectives


def refit_left(target: Matrix, gram: Matrix, found: BlockFactors) -> BlockFactors:
    """Return ``found`` with the left factors of the smallest ``Q(target - total)``: least squares per row of blocks."""
    down, across, height, rank = found.left.shape
    rows = target.reshape(down, height, -1)
    step = max(1, _AT_ONCE // (across * rank * len(gram)))
    parts = [_left_of(rows[at : at + step], gram, found.right[at : at + step]) for at in range(0, down, step)]
    return BlockFactors(np.concatenate(parts), found.right)


def _left_of(rows: Stack, gram: Matrix, right: Stack) -> Stack:
    """Return the left factors ``[k, r, p, t]`` of some rows of blocks ``[k, p, K]`` beside ``right [k, r, t, s]``."""
    down, across, rank, width = right.shape
    size, inputs = across * rank, len(gram)
    panels = right.transpose(1, 0, 2, 3).reshape(across, -1, width) @ gram.reshape(across, width, inputs)
    spread = panels.reshape(across, down, rank, inputs).transpose(1, 0, 2, 3).reshape(down, size, inputs)
    seen = spread.reshape(down, size, across, width).transpose(0, 2, 1, 3) @ right.swapaxes(-1, -2)
    normal = seen.transpose(0, 2, 1, 3).reshape(down, size, size)
    left = solve_stack(normal, spread @ rows.swapaxes(-1, -2))
    return np.asarray(left.reshape(down, across, rank, -1).swapaxes(-1, -2))


def solve_stack(normal: Stack, wanted: Stack) -> Stack:
    """Return the solutions of normal equations ``[..., n, n]``; parts that do not count at all become 0."""
    size = normal.shape[-1]
    mean = np.trace(normal, axis1=-2, axis2=-1) / size
    ridge = np.where(mean > 0, _RIDGE * mean, 1.0)[..., None, None]
    return np.asarray(np.linalg.solve(normal + ridge * np.eye(size), wanted))


def _set_panel(found: BlockFactors, at: int, wanted: Matrix, gram: Matrix) -> Matrix:
    """Write the best factors of the blocks of a panel ``[N, s]`` into ``found``; return what they stand for."""
    down, _, height, rank = found.left.shape
    factors = best_factors(wanted.reshape(down, height, -1), gram, rank)
    found.left[:, at], found.right[:, at] = factors.left, factors.right
    return factors.product().reshape(wanted.shape)
