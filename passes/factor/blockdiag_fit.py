"""A block-diagonal matrix plus one of low rank, fitted to the outputs. Arrays in, arrays out; float64, no ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import Factors, best_factors
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["DiagonalPlusRank", "diagonal_step", "fit", "spread"]

Stack = NDArray[np.float64]

#: Sweeps stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class DiagonalPlusRank:
    """A sum of two matrices.

    Attributes:
        blocks: ``[b, p, s]``, on the diagonal of the first.
        factors: ``[b p, t]`` and ``[t, b s]`` of the second.
    """

    blocks: Stack
    factors: Factors

    def total(self) -> Matrix:
        """Return the sum ``[b p, b s]``."""
        return spread(self.blocks) + self.factors.product()


def spread(blocks: Stack) -> Matrix:
    """Return the matrix ``[b p, b s]`` with ``blocks [b, p, s]`` on its diagonal."""
    count, rows, columns = blocks.shape
    whole = np.zeros((count, rows, count, columns))
    at = np.arange(count)
    whole[at, :, at] = blocks
    return whole.reshape(count * rows, count * columns)


def diagonal_step(rest: Matrix, gram: Matrix, count: int) -> Stack:
    """Return the blocks ``[count, p, s]`` with the smallest ``Q(rest - spread)``: least squares on their inputs."""
    rows, columns = (size // count for size in rest.shape)
    at = np.arange(count)
    squares = gram.reshape(count, columns, count, columns)[at, :, at]
    slope = (rest @ gram).reshape(count, rows, count, columns)[at, :, at]
    return np.asarray(np.linalg.solve(squares, slope.transpose(0, 2, 1)).transpose(0, 2, 1))


def fit(
    target: Matrix, gram: Matrix, count: int, rank: int, sweeps: int
) -> tuple[DiagonalPlusRank, list[float]]:
    """Return a sum with a small ``Q(target - total)``, and ``Q`` after each sweep: it never rises.

    A sweep gives the blocks what the factors lack, then the factors what the blocks lack; each is the best beside the
    other. It starts as low rank alone.

    Args:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        count: of blocks, a divisor of N and K.
        rank: of the factors; 0 leaves the blocks alone.
        sweeps: at least 1.
    """
    factors = best_factors(target, gram, rank)
    objectives = [quadratic_error(target - factors.product(), gram)]
    for _ in range(sweeps):
        blocks = diagonal_step(target - factors.product(), gram, count)
        rest = target - spread(blocks)
        factors = best_factors(rest, gram, rank)
        objectives.append(quadratic_error(rest - factors.product(), gram))
        if objectives[-1] >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return DiagonalPlusRank(blocks, factors), objectives
