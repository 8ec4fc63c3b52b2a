"""A weight as a sparse matrix plus one of low rank. Arrays in, arrays out; float64, no ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import Factors, best_factors, subspace_step
from sparsecc.passes.prune.gram import Matrix, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.selection import Mask

__all__ = ["SparseLowRank", "decompose", "refit"]

#: Gives the mask of what stays by what dropping each weight costs.
Choose = Callable[[Matrix], Mask]

#: Vectors beyond the rank that the subspace iteration carries along.
_EXTRA = 10

#: Iterations stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class SparseLowRank:
    """A sum of two matrices.

    Attributes:
        sparse: ``[N, K]``, exactly zero outside the mask.
        mask: ``[N, K]``.
        factors: of the other.
        objectives: what was made smaller, after each step.
    """

    sparse: Matrix
    mask: Mask
    factors: Factors
    objectives: tuple[float, ...]

    def total(self) -> Matrix:
        """Return the sum ``[N, K]``."""
        return self.sparse + self.factors.product()


def decompose(
    weight: Matrix,
    energy: NDArray[np.float64],
    rank: int,
    choose: Choose,
    iterations: int,
    rng: np.random.Generator,
) -> SparseLowRank:
    """Return a sum of a sparse matrix and one of ``rank`` close to ``weight``, each input weighed by its size.

    The alternation of OATS (Zhang and Papyan 2024): low rank for what is left of the sparse part, then the largest
    entries of what is left of that. Here a step of warm-started subspace iteration stands for each SVD, which keeps
    the objective, the squared norm of the scaled rest, from ever rising. Inputs that are always zero get zeros.

    Args:
        weight: ``[N, K]``.
        energy: ``[K]``, mean square of each input.
        rank: of the dense part; 0 gives the mask of Wanda.
        choose: the mask, by squares of the scaled rest.
        iterations: at most.
        rng: for the first guess.
    """
    scale = np.sqrt(energy)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = weight * scale
    mask = choose(np.square(scaled)) if rank == 0 else np.zeros(weight.shape, bool)
    sparse = np.where(mask, scaled, 0.0)
    factors = Factors(np.zeros((len(weight), 0)), np.zeros((0, weight.shape[1])))
    objectives: list[float] = []
    start = rng.standard_normal((min(rank + _EXTRA, *weight.shape), weight.shape[1]))
    for _ in range(iterations if rank else 0):
        factors, start = subspace_step(scaled - sparse, start, rank)
        rest = scaled - factors.product()
        mask = choose(np.square(rest))
        sparse = np.where(mask, rest, 0.0)
        objectives.append(float(np.square(rest - sparse).sum()))
        if len(objectives) > 1 and objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    own = Factors(factors.left, factors.right * inverse)
    return SparseLowRank(sparse * inverse, mask, own, tuple(objectives))


def refit(found: SparseLowRank, target: Matrix, gram: Matrix, rounds: int) -> SparseLowRank:
    """Return the same mask and rank with the values that suit the outputs better.

    Alternates the two exact solutions of ``Q(sum - target)``: the best factors beside the sparse part, then the least
    squares on the mask beside the factors. It never rises; its values are the objectives of the result.

    Args:
        found: to start from.
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite, of ``Q``.
        rounds: at most.
    """
    sparse, factors = found.sparse, found.factors
    objectives = [quadratic_error(found.total() - target, gram)]
    for _ in range(rounds):
        if factors.rank:
            factors = best_factors(target - sparse, gram, factors.rank)
        rest = target - factors.product()
        sparse = refit_rows(rest, found.mask, gram, start=sparse)
        objectives.append(quadratic_error(sparse - rest, gram))
        if objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    return SparseLowRank(sparse, found.mask, factors, tuple(objectives))
