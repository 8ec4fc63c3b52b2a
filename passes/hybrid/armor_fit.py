"""An N:M matrix between two block-diagonal ones, fitted by exact steps. Arrays in, arrays out; float64, no ONNX.

``W ~ A S B`` with ``A [N, N]`` and ``B [K, K]`` of blocks ``[b, b]`` on the diagonal, kept as stacks ``[N/b, b, b]``
and ``[K/b, b, b]``. With inputs that count one by one (``energy``) the blocks of the product are problems of their own,
``A_i S_ij B_j ~ W_ij``; with a full Gram matrix they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["Wrapped", "core_step", "fit_diagonal", "fit_full", "inner_step", "outer_step", "plain"]

Stack = NDArray[np.float64]

#: Sweeps stop where the objective falls by less than this share.
_LEAST_GAIN = 1e-3

#: Added to the diagonal of the normal equations, as a share of its mean.
_RIDGE = 1e-10

#: Conjugate gradients stop at this share of the norm they began with.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Wrapped:
    """A product of three.

    Attributes:
        outer: ``[N/b, b, b]``, the diagonal blocks of A.
        core: ``[N, K]``, N:M.
        inner: ``[K/b, b, b]``, the diagonal blocks of B.
    """

    outer: Stack
    core: Matrix
    inner: Stack

    def after_inner(self) -> Matrix:
        """Return ``S B``."""
        return _times_right(self.core, self.inner)

    def before_inner(self) -> Matrix:
        """Return ``A S``."""
        return _times_left(self.outer, self.core)

    def total(self) -> Matrix:
        """Return ``A S B``."""
        return _times_left(self.outer, self.after_inner())

    def scaled(self, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Wrapped:
        """Return the form of ``rows[:, None] * total * columns``, which has the same core."""
        outer = self.outer * rows.reshape(len(self.outer), -1, 1)
        return replace(self, outer=outer, inner=self.inner * columns.reshape(len(self.inner), 1, -1))


def plain(core: Matrix, block: int) -> Wrapped:
    """Return ``core [N, K]`` between identities; ``block`` divides both sides."""
    unit = np.eye(block)
    outer, inner = (np.repeat(unit[None], size // block, 0) for size in core.shape)
    return Wrapped(outer, core, inner)


def fit_diagonal(
    weight: Matrix, energy: NDArray[np.float64], start: Wrapped, groups: tuple[int, int], sweeps: int
) -> tuple[Wrapped, list[float]]:
    """Return a form with a small ``sum_ij energy_j (weight - total)_ij**2``, and that sum after each sweep.

    It never rises. ARMOR (2025) by exact steps instead of gradients: both outer factors by least squares, then the
    best mask and values of every group of the core in turn.

    Args:
        weight: ``[N, K]``.
        energy: ``[K]``, positive.
        start: to begin with.
        groups: (N, M) of the core.
        sweeps: at most.
    """
    found, objectives = start, [_loss(weight, energy, start)]
    for _ in range(sweeps):
        for step in (outer_step, inner_step):
            found = _better(found, step(weight, energy, found), lambda form: _loss(weight, energy, form))
        found = core_step(weight, energy, found, groups)
        objectives.append(_loss(weight, energy, found))
        if objectives[-1] >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return found, objectives


def outer_step(weight: Matrix, energy: NDArray[np.float64] | Matrix, found: Wrapped) -> Wrapped:
    """Return ``found`` with the best ``A``; ``energy`` may be a whole Gram matrix ``[K, K]``."""
    block = found.outer.shape[1]
    rows = found.after_inner()
    scaled = rows * energy if energy.ndim == 1 else rows @ energy
    rows, scaled, wanted = (item.reshape(len(found.outer), block, -1) for item in (rows, scaled, weight))
    normal = scaled @ rows.transpose(0, 2, 1)
    outer = _solve(normal, scaled @ wanted.transpose(0, 2, 1)).transpose(0, 2, 1)
    return replace(found, outer=outer)


def inner_step(weight: Matrix, energy: NDArray[np.float64], found: Wrapped) -> Wrapped:
    """Return ``found`` with the best ``B``, the same for any positive ``energy [K]``."""
    block = found.inner.shape[1]
    left, wanted = (_stacked(item, block) for item in (found.before_inner(), weight))
    turned = left.transpose(0, 2, 1)
    return replace(found, inner=_solve(turned @ left, turned @ wanted))


def core_step(
    weight: Matrix, energy: NDArray[np.float64], found: Wrapped, groups: tuple[int, int]
) -> Wrapped:
    """Return ``found`` with the best mask and values of every group of M inputs of the core, each in turn.

    Groups of one place in all pairs of blocks are solved at once: they do not touch one another.
    """
    kept, size = groups
    block = found.outer.shape[1]
    core = _tiles(found.core, block)
    outer = found.outer.transpose(0, 2, 1) @ found.outer
    weighed = found.inner * energy.reshape(len(found.inner), 1, -1)
    inner = weighed @ found.inner.transpose(0, 2, 1)
    linear = found.outer.transpose(0, 2, 1)[:, None] @ _tiles(weight * energy, block)
    linear = linear @ found.inner.transpose(0, 2, 1)[None]
    choices = np.array(list(itertools.combinations(range(size), kept)))
    starts = range(0, block, size)
    squares = [inner[:, at : at + size, at : at + size] for at in starts]
    inverses = [_inverses(square, choices) for square in squares]
    for row in range(block):
        curvature = outer[:, row, row][:, None, None]
        alive = curvature > 0
        safe = np.where(alive, curvature, 1.0)
        effect = np.einsum("np,nkpj->nkj", outer[:, row], core)
        slope = linear[:, :, row] - (effect[:, :, None] @ inner[None])[:, :, 0]
        for at, square, inverse in zip(starts, squares, inverses, strict=True):
            here = slice(at, at + size)
            before = core[:, :, row, here].copy()
            wanted = slope[..., here] + curvature * (before[:, :, None] @ square[None])[:, :, 0]
            picked = wanted[..., choices]
            values = (inverse @ picked[..., None])[..., 0]
            best = (picked * values).sum(-1).argmax(-1)[..., None]
            after = np.zeros_like(before)
            np.put_along_axis(
                after, choices[best[..., 0]], np.take_along_axis(values, best[..., None], 2)[:, :, 0], 2
            )
            after = np.where(alive, after / safe, before)
            core[:, :, row, here] = after
            slope -= curvature * ((after - before)[:, :, None] @ inner[None, :, here])[:, :, 0]
    return replace(found, core=_untiled(core))


def fit_full(
    weight: Matrix, gram: Matrix, start: Wrapped, rounds: int, steps: int = 10
) -> tuple[Wrapped, list[float]]:
    """Return a form with a small ``Q(weight - total)`` on the same mask, and ``Q`` after each round: it never rises.

    The core and B by conjugate gradients, A exactly.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        start: to begin with.
        rounds: at most.
        steps: most steps of conjugate gradients.
    """

    def missed(form: Wrapped) -> float:
        return quadratic_error(weight - form.total(), gram)

    found, objectives = start, [missed(start)]
    for _ in range(rounds):
        found = _better(found, _core_on_mask(weight, gram, found, steps), missed)
        found = _better(found, outer_step(weight, gram, found), missed)
        found = _better(found, _inner_full(weight, gram, found, steps), missed)
        objectives.append(missed(found))
        if objectives[-1] >= objectives[-2] * (1 - _LEAST_GAIN):
            break
    return found, objectives


def _core_on_mask(weight: Matrix, gram: Matrix, found: Wrapped, steps: int) -> Wrapped:
    mask = found.core != 0
    outer = found.outer.transpose(0, 2, 1) @ found.outer
    inner = _times_right(_times_right(gram, found.inner.transpose(0, 2, 1)).T, found.inner.transpose(0, 2, 1))
    wanted = _times_left(
        found.outer.transpose(0, 2, 1), _times_right(weight @ gram, found.inner.transpose(0, 2, 1))
    )
    diagonal = np.einsum("nii->ni", outer).reshape(-1, 1) * np.diag(inner)

    def image(core: Matrix) -> Matrix:
        return np.asarray(mask * (_times_left(outer, core) @ inner))

    core = _conjugate(found.core, image, mask * wanted, np.where(mask, diagonal, 0.0), steps)
    return replace(found, core=core)


def _inner_full(weight: Matrix, gram: Matrix, found: Wrapped, steps: int) -> Wrapped:
    block = found.inner.shape[1]
    left = found.before_inner()
    normal, wanted = left.T @ left, left.T @ (weight @ gram)
    diagonal = _diagonal_blocks(np.outer(np.diag(normal), np.diag(gram)), block)

    def image(inner: Stack) -> Stack:
        spread = inner @ gram.reshape(-1, block, len(gram))
        return np.asarray(normal.reshape(spread.shape) @ _stacked(spread.reshape(gram.shape), block))

    inner = _conjugate(found.inner, image, _diagonal_blocks(wanted, block), diagonal, steps)
    return replace(found, inner=inner)


def _conjugate(
    start: Stack, image: Callable[[Stack], Stack], wanted: Stack, diagonal: Stack, steps: int
) -> Stack:
    """Return what minimises ``<x, image(x)> / 2 - <x, wanted>``, better with every step; ``diagonal`` scales it."""
    scale = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    solution, residual = start, wanted - image(start)
    scaled = scale * residual
    direction, norm = scaled, float((residual * scaled).sum())
    goal = _TOLERANCE**2 * norm
    for _ in range(steps):
        moved = image(direction)
        curvature = float((direction * moved).sum())
        if norm <= goal or curvature <= 0:
            break
        solution = solution + norm / curvature * direction
        residual = residual - norm / curvature * moved
        scaled = scale * residual
        previous, norm = norm, float((residual * scaled).sum())
        direction = scaled + norm / previous * direction
    return solution


def _better(found: Wrapped, other: Wrapped, loss: Callable[[Wrapped], float]) -> Wrapped:
    """Return the one with the lower loss: the normal equations of blocks can be close to singular."""
    return other if loss(other) <= loss(found) else found


def _loss(weight: Matrix, energy: NDArray[np.float64], found: Wrapped) -> float:
    return float(np.square(weight - found.total()).sum(0) @ energy)


def _solve(normal: Stack, wanted: Stack) -> Stack:
    size = normal.shape[-1]
    mean = np.trace(normal, axis1=-2, axis2=-1) / size
    ridge = np.where(mean > 0, _RIDGE * mean, 1.0)[..., None, None]
    return np.asarray(np.linalg.solve(normal + ridge * np.eye(size), wanted))


def _inverses(square: Stack, choices: NDArray[np.intp]) -> Stack:
    """Return ``[stack, choices, n, n]``, the inverses of the chosen rows and columns of each matrix."""
    parts = square[:, choices[:, :, None], choices[:, None, :]]
    return _solve(parts, np.broadcast_to(np.eye(choices.shape[1]), parts.shape))


def _times_left(stack: Stack, matrix: Matrix) -> Matrix:
    """Return the block-diagonal matrix of ``stack`` times ``matrix``."""
    return np.asarray((stack @ matrix.reshape(len(stack), stack.shape[1], -1)).reshape(matrix.shape))


def _times_right(matrix: Matrix, stack: Stack) -> Matrix:
    """Return ``matrix`` times the block-diagonal matrix of ``stack``."""
    return np.asarray((_stacked(matrix, stack.shape[1]) @ stack).transpose(1, 0, 2).reshape(matrix.shape))


def _stacked(matrix: Matrix, block: int) -> Stack:
    """Return the panels of ``block`` columns of a matrix, ``[panels, N, block]``."""
    return matrix.reshape(len(matrix), -1, block).transpose(1, 0, 2)


def _tiles(matrix: Matrix, block: int) -> Stack:
    """Return ``[N/b, K/b, b, b]``, a copy."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // block, block, columns // block, block).transpose(0, 2, 1, 3).copy()


def _untiled(tiles: Stack) -> Matrix:
    rows, columns, block, _ = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(rows * block, columns * block)


def _diagonal_blocks(matrix: Matrix, block: int) -> Stack:
    tiles = matrix.reshape(len(matrix) // block, block, -1, block)
    return np.asarray(np.einsum("ibic->ibc", tiles)).copy()
