"""Planes of signs with magnitudes of low rank, alone and beside a sparse weight. Arrays in, arrays out; no ONNX.

A plane is ``B * (U V)``, entry by entry: one bit per weight and two thin factors. SLaB puts one beside a sparse weight;
BitStack (Wang et al. 2024) adds one after the other, each for what those before it left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import Factors, subspace_step
from sparsecc.passes.prune.gram import Matrix, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.selection import Mask

__all__ = ["SignPlane", "SparseSigns", "decompose", "fit_plane", "refit", "refit_plane"]

#: Vectors beyond the rank that the subspace iteration carries along.
_EXTRA = 10

#: Iterations stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-4

#: Subspace steps for the magnitudes of a plane.
_STEPS = 3


@dataclass(frozen=True)
class SignPlane:
    """A matrix as signs times magnitudes of low rank.

    Attributes:
        positive: ``[N, K]``, True for +1, False for -1.
        factors: of the magnitudes; their product may have entries below zero too.
    """

    positive: Mask
    factors: Factors

    def signs(self) -> Matrix:
        """Return ``[N, K]`` of +1 and -1."""
        return np.where(self.positive, 1.0, -1.0)

    def dense(self) -> Matrix:
        """Return the matrix ``[N, K]``."""
        return self.signs() * self.factors.product()

    def astype(self, dtype: np.dtype[Any]) -> SignPlane:
        """Return it with balanced factors rounded to ``dtype``, as float64 again."""
        even = self.factors.balanced()
        rounded = (part.astype(dtype).astype(np.float64) for part in (even.left, even.right))
        return replace(self, factors=Factors(*rounded))


def fit_plane(weight: Matrix, scale: NDArray[np.float64], rank: int, rng: np.random.Generator) -> SignPlane:
    """Return the signs of ``weight`` with the nearly best magnitudes of ``rank``, each input weighed.

    What is left, ``||(weight - plane) * scale||``, is less than before: the magnitudes ``|weight|`` have a part of any
    rank. Zeros count as positive.

    Args:
        weight: ``[N, K]``.
        scale: ``[K]``, at least 0: the size of each input.
        rank: at least 1.
        rng: for the first guess.
    """
    magnitudes = np.abs(weight * scale)
    start = rng.random((min(rank + _EXTRA, *weight.shape), weight.shape[1]))
    for _ in range(_STEPS):
        factors, start = subspace_step(magnitudes, start, rank)
    return SignPlane(weight >= 0, Factors(factors.left, factors.right * _inverse(scale)))


def refit_plane(plane: SignPlane, target: Matrix, gram: Matrix, steps: int) -> SignPlane:
    """Return the same signs with factors that make ``Q(plane - target)`` smaller, never larger.

    Conjugate gradients on one factor, then on the other; the inputs are scaled to a unit diagonal of the Gram
    matrix and the factor that rests has orthonormal rows, which is what makes few steps enough. A step costs
    ``2 N K**2`` operations. At the end ``Q(target - plane)`` is at most ``Q(target)``: the first step starts from the
    best multiple.

    Args:
        plane: to start from.
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        steps: of each factor.
    """
    scale = np.sqrt(np.diag(gram))
    matrix = gram / scale / scale[:, None]
    signs, wanted = plane.signs(), (target * scale) @ matrix
    left, right = _orthonormal_rows(plane.factors.left, plane.factors.right * scale)

    def image(product: Matrix) -> Matrix:
        return np.asarray(signs * ((signs * product) @ matrix))

    aim = signs * wanted
    left = _descend(left, lambda part: image(part @ right) @ right.T, aim @ right.T, steps)
    turned = _orthonormal_rows(right.T, left.T)
    right, left = turned[0].T, turned[1].T
    right = _descend(right, lambda part: left.T @ image(left @ part), left.T @ aim, steps)
    return replace(plane, factors=Factors(left, right / scale).balanced())


@dataclass(frozen=True)
class SparseSigns:
    """A sparse matrix plus a plane.

    Attributes:
        sparse: ``[N, K]``, exactly zero outside the mask.
        mask: ``[N, K]``.
        plane: beside it.
        objectives: what was made smaller, after each step.
    """

    sparse: Matrix
    mask: Mask
    plane: SignPlane
    objectives: tuple[float, ...]

    def dense(self) -> Matrix:
        """Return the sum ``[N, K]``."""
        return self.sparse + self.plane.dense()


def decompose(
    weight: Matrix,
    energy: NDArray[np.float64],
    rank: int,
    choose: Callable[[Matrix], Mask],
    iterations: int,
    rng: np.random.Generator,
) -> SparseSigns:
    """Return a sparse matrix plus a plane close to ``weight``, each input weighed by its size (SLaB).

    In turns: the best signs beside the magnitudes, the magnitudes by a warm-started subspace step for the signs, the
    largest entries of what the plane leaves. Each solves its part exactly, so that the squared norm of the scaled rest
    never rises. Inputs that are always zero get zeros.

    Args:
        weight: ``[N, K]``.
        energy: ``[K]``, mean square of each input.
        rank: of the magnitudes, at least 1.
        choose: the mask of the sparse part, by squares of the scaled rest.
        iterations: at most.
        rng: for the first guess.
    """
    scale = np.sqrt(energy)
    scaled = weight * scale
    sparse, product = np.zeros_like(scaled), np.ones_like(scaled)
    start = rng.random((min(rank + _EXTRA, *weight.shape), weight.shape[1]))
    objectives: list[float] = []
    for _ in range(iterations):
        rest = scaled - sparse
        positive = (rest >= 0) == (product >= 0)
        signs = np.where(positive, 1.0, -1.0)
        factors, start = subspace_step(rest * signs, start, rank)
        product = factors.product()
        rest = scaled - signs * product
        mask = choose(np.square(rest))
        sparse = np.where(mask, rest, 0.0)
        objectives.append(float(np.square(rest - sparse).sum()))
        if len(objectives) > 1 and objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    inverse = _inverse(scale)
    plane = SignPlane(positive, Factors(factors.left, factors.right * inverse))
    return SparseSigns(sparse * inverse, mask, plane, tuple(objectives))


def refit(found: SparseSigns, target: Matrix, gram: Matrix, rounds: int, steps: int) -> SparseSigns:
    """Return the same mask and signs with values that suit the outputs better: ``Q(sum - target)`` never rises.

    Args:
        found: to start from.
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite, of ``Q``.
        rounds: at most, of the sparse weights by least squares and the factors by ``refit_plane``.
        steps: of each factor.
    """
    sparse, plane = found.sparse, found.plane
    objectives = [quadratic_error(found.dense() - target, gram)]
    for _ in range(rounds):
        sparse = refit_rows(target - plane.dense(), found.mask, gram, start=sparse)
        plane = refit_plane(plane, target - sparse, gram, steps)
        objectives.append(quadratic_error(sparse + plane.dense() - target, gram))
        if objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    return SparseSigns(sparse, found.mask, plane, tuple(objectives))


def _inverse(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)


def _orthonormal_rows(left: Matrix, right: Matrix) -> tuple[Matrix, Matrix]:
    """Return the same product with a right factor of orthonormal rows."""
    basis, mixed = np.linalg.qr(right.T)
    return left @ mixed.T, basis.T


def _descend(start: Matrix, image: Callable[[Matrix], Matrix], aim: Matrix, steps: int) -> Matrix:
    """Return a better solution of ``image(x) = aim`` by conjugate gradients from the best multiple of ``start``.

    ``image`` is symmetric and positive semi-definite: ``<x, image(x)> - 2 <x, aim>`` never rises, nor is it above 0.
    """
    solution, reached = start, image(start)
    curvature = float(np.vdot(solution, reached))
    if curvature > 0:
        factor = float(np.vdot(solution, aim)) / curvature
        solution, reached = factor * solution, factor * reached
    residual = aim - reached
    direction, norm = residual, float(np.vdot(residual, residual))
    for _ in range(steps):
        reached = image(direction)
        curvature = float(np.vdot(direction, reached))
        if not curvature > 0:
            break
        length = norm / curvature
        solution = solution + length * direction
        residual = residual - length * reached
        previous, norm = norm, float(np.vdot(residual, residual))
        direction = residual + (norm / previous) * direction
    return solution
