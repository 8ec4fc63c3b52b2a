"""A weight as a tensor train of matrices (MPO) that suits its outputs. Arrays in, arrays out; float64, no ONNX.

A matrix ``[N, K]`` with ``N = n1 .. nd`` and ``K = k1 .. kd`` is a tensor with one axis per pair ``(n_i, k_i)``.
Outputs count with ``n1`` fastest, inputs with ``kd`` fastest: a row of inputs then goes through the cores from the
last to the first with one transposition between two of them and none at the ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import leading
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["Modes", "affordable_ranks", "fit_train", "kronecker_factors", "near_factors", "train_svd"]

#: One core: ``[r, n, k, s]``; the first has ``r = 1``, the last ``s = 1``.
Core = NDArray[np.float64]

#: Rounds of the search for a Kronecker product, and the change of its factors that ends it.
_ROUNDS, _SETTLED = 8, 1e-8

#: Sweeps end where the objective falls by less than this share.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Modes:
    """How outputs and inputs are cut into axes.

    Attributes:
        rows: ``n1 .. nd``.
        columns: ``k1 .. kd``.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each core for ranks of 1, ``n_i k_i``."""
        return tuple(n * k for n, k in zip(self.rows, self.columns, strict=True))

    @property
    def full(self) -> tuple[int, ...]:
        """The ranks between the cores with which every matrix is a tensor train."""
        return tuple(
            min(math.prod(self.sizes[:at]), math.prod(self.sizes[at:])) for at in range(1, len(self.sizes))
        )

    def tensor(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Return ``[n1 k1, .., nd kd]`` for ``[N, K]``."""
        count = len(self.rows)
        axes = [axis for at in range(count) for axis in (count - 1 - at, count + at)]
        return weight.reshape(*self.rows[::-1], *self.columns).transpose(axes).reshape(self.sizes)

    def matrix(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return ``[N, K]`` for ``[n1 k1, .., nd kd]``, the inverse of ``tensor``."""
        count = len(self.rows)
        pairs = [size for pair in zip(self.rows, self.columns, strict=True) for size in pair]
        axes = [*range(2 * count - 2, -1, -2), *range(1, 2 * count, 2)]
        whole = tensor.reshape(pairs).transpose(axes)
        return np.ascontiguousarray(whole).reshape(math.prod(self.rows), math.prod(self.columns))

    def numbers(self, ranks: Sequence[int]) -> int:
        """Return how many numbers cores with these ranks between them hold."""
        ends = [1, *ranks, 1]
        return sum(r * size * s for r, size, s in zip(ends, self.sizes, ends[1:], strict=False))

    def product(self, cores: Sequence[Core]) -> Matrix:
        """Return the matrix ``[N, K]`` that cores stand for."""
        return np.asarray(self.matrix(_joined(cores)))


@functools.cache
def near_factors(size: int, count: int) -> tuple[int, ...] | None:
    """Return ``count`` factors of ``size``, at least 2 and as equal as they can be, ascending; None if there are none.

    As equal as can be: of the smallest sum.
    """
    if count == 1:
        return (size,) if size > 1 else None
    found = []
    for first in range(2, size // 2 + 1):
        if size % first == 0:
            rest = near_factors(size // first, count - 1)
            found += [] if rest is None else [tuple(sorted((first, *rest)))]
    return min(found, key=sum, default=None)


def affordable_ranks(modes: Modes, numbers: int, multiple: int = 1) -> tuple[int, ...] | None:
    """Return the largest equal ranks, multiples of ``multiple``, whose cores hold ``numbers``; None if 1 is too much.

    No rank is above what every matrix can be written with.
    """
    best = None
    for rank in range(multiple, max(modes.full) + multiple, multiple):
        ranks = tuple(min(rank, most) for most in modes.full)
        if modes.numbers(ranks) > numbers:
            break
        best = ranks
    return best


def train_svd(weight: Matrix, modes: Modes, ranks: Sequence[int]) -> tuple[list[Core], list[float]]:
    """Return cores of these ranks near ``weight`` and the squares that each cut drops (TT-SVD, Oseledets 2011).

    All cores but the last are orthonormal, so the squared error is at most the sum of what is dropped: at most
    ``d - 1`` times that of the best cores. With two cores they are the best.

    Args:
        weight: ``[N, K]``.
        modes: of it.
        ranks: ``d - 1`` of them, at most ``modes.full``.
    """
    cores, dropped = [], []
    rest, rank = modes.tensor(weight).reshape(1, -1), 1
    for at, wanted in enumerate(ranks):
        rest = rest.reshape(rank * modes.sizes[at], -1)
        basis = _columns(rest, wanted)
        cores.append(basis.reshape(rank, modes.rows[at], modes.columns[at], wanted))
        whole, rest = float(np.square(rest).sum()), basis.T @ rest
        dropped.append(max(0.0, whole - float(np.square(rest).sum())))
        rank = wanted
    cores.append(rest.reshape(rank, modes.rows[-1], modes.columns[-1], 1))
    return cores, dropped


def kronecker_factors(gram: Matrix, sizes: Sequence[int]) -> list[Matrix]:
    """Return positive definite matrices of ``sizes`` whose Kronecker product is near ``gram``.

    As a covariance of normal inputs: the product of the greatest likelihood, by turns (Dutilleul 1999). That weighs
    relative differences, so that the largest directions do not decide alone, as in the Frobenius norm; a ``gram`` that
    is a product comes back.

    Args:
        gram: ``[K, K]``, positive definite.
        sizes: their product is K.
    """
    count = len(sizes)
    whole = gram.reshape(*sizes, *sizes)
    factors = [np.eye(size) for size in sizes]
    for _ in range(_ROUNDS):
        change = 0.0
        for at in range(count):
            partial = whole
            for other in reversed(range(count)):
                if other != at:
                    axes = [other, partial.ndim // 2 + other]
                    inverse = np.linalg.inv(factors[other]) / sizes[other]
                    partial = np.tensordot(partial, inverse, (axes, [0, 1]))
            moved = float(np.linalg.norm(partial - factors[at]) / np.linalg.norm(partial))
            factors[at], change = (partial + partial.T) / 2, max(change, moved)
        if change < _SETTLED:
            break
    return factors


def fit_train(
    target: Matrix, gram: Matrix, modes: Modes, ranks: Sequence[int], sweeps: int, steps: int
) -> tuple[list[Core], list[float]]:
    """Return cores with a small ``Q(product - target)``, and that after the start and after each sweep.

    The start is the TT-SVD of the weight whitened with ``kronecker_factors`` of ``gram``, whose Cholesky factors go
    into the cores: with two cores and a ``gram`` that is such a product it is the best. Then one core after another,
    there and back, takes conjugate gradient steps towards its least squares solution with the whole
    ``gram``. Whitened, and with all other cores orthonormal, that problem is nearly the identity, so few steps do;
    each lowers Q.

    Args:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        modes: of the target.
        ranks: as for ``train_svd``.
        sweeps: at most.
        steps: of conjugate gradients for one core.
    """
    roots = [
        np.asarray(np.linalg.cholesky(factor), np.float64)
        for factor in kronecker_factors(gram, modes.columns)
    ]
    inverses = [np.asarray(np.linalg.inv(root), np.float64) for root in roots]
    whitened = _along(target, roots)
    flipped = [np.asarray(inverse.T) for inverse in inverses]
    even = _along(_along(gram, flipped).T, flipped)
    cores, _ = train_svd(whitened, modes, ranks)
    problem = _Problem(modes, whitened @ even, even)
    objectives = [quadratic_error(modes.product(cores) - whitened, even)]
    for _ in range(sweeps):
        for at in _there_and_back(len(cores)):
            _centre(cores, at)
            problem.improve(cores, at, steps)
        objectives.append(quadratic_error(modes.product(cores) - whitened, even))
        if objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    own = [np.einsum("rnks,kl->rnls", core, inverse) for core, inverse in zip(cores, inverses, strict=True)]
    return own, objectives


@dataclass(frozen=True)
class _Problem:
    """``Q(product - weight)`` up to a constant.

    Attributes:
        modes: of the weight.
        wanted: ``weight @ gram``.
        gram: ``[K, K]``.
    """

    modes: Modes
    wanted: Matrix
    gram: Matrix

    def improve(self, cores: list[Core], at: int, steps: int) -> None:
        """Let one core take conjugate gradient steps; those before and behind it are orthonormal."""
        left, right = _joined(cores[:at]), _joined(cores[at + 1 :])
        left = left.reshape(-1, cores[at].shape[0])
        right = right.reshape(cores[at].shape[3], -1)
        shape = cores[at].shape

        def spread(core: Core) -> Matrix:
            inner = left @ core.reshape(shape[0], -1)
            return self.modes.matrix(inner.reshape(-1, shape[3]) @ right)

        def gathered(matrix: Matrix) -> Core:
            outer = left.T @ self.modes.tensor(matrix).reshape(len(left), -1)
            return np.asarray(outer.reshape(-1, right.shape[1]) @ right.T).reshape(shape)

        core = cores[at]
        rest = gathered(self.wanted - spread(core) @ self.gram)
        direction, length = rest, float(np.vdot(rest, rest))
        for _ in range(steps):
            curved = gathered(spread(direction) @ self.gram)
            bend = float(np.vdot(direction, curved))
            if bend <= 0:  # the solution is reached
                break
            core = core + length / bend * direction
            rest = rest - length / bend * curved
            before, length = length, float(np.vdot(rest, rest))
            direction = rest + length / before * direction
        cores[at] = core


def _there_and_back(count: int) -> Iterator[int]:
    yield from reversed(range(count))
    yield from range(1, count)


def _centre(cores: list[Core], at: int) -> None:
    """Make all cores but one orthonormal, those before it by their columns, those behind by their rows, in place."""
    for left in range(at):
        core = cores[left]
        columns, rest = np.linalg.qr(core.reshape(-1, core.shape[3]))
        cores[left] = columns.reshape(*core.shape[:3], -1)
        cores[left + 1] = np.tensordot(rest, cores[left + 1], 1)
    for right in range(len(cores) - 1, at, -1):
        core = cores[right]
        rows, rest = np.linalg.qr(core.reshape(core.shape[0], -1).T)
        cores[right] = rows.T.reshape(-1, *core.shape[1:])
        cores[right - 1] = np.tensordot(cores[right - 1], rest.T, 1)


def _joined(cores: Sequence[Core]) -> Matrix:
    """Return the product of neighbouring cores, ``[r, n k .., s]`` as one column of numbers; 1 for none."""
    whole = np.eye(cores[0].shape[0]) if cores else np.ones((1, 1))
    for core in cores:
        whole = whole.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)
    return whole


def _columns(matrix: Matrix, rank: int) -> Matrix:
    """Return ``rank`` orthonormal columns of which the best approximation of ``matrix`` is made."""
    if len(matrix) <= matrix.shape[1]:
        return leading(matrix @ matrix.T, rank)
    return np.asarray(np.linalg.qr(matrix @ leading(matrix.T @ matrix, rank))[0])


def _along(matrix: Matrix, factors: Sequence[Matrix]) -> Matrix:
    """Return ``matrix [M, K]`` times the Kronecker product of ``factors``, one after another."""
    whole = matrix.reshape(len(matrix), *[len(factor) for factor in factors])
    for axis, factor in enumerate(factors, 1):
        whole = np.moveaxis(np.tensordot(whole, factor, (axis, 0)), -1, axis)
    return np.ascontiguousarray(whole).reshape(matrix.shape)
