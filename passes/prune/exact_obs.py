"""Exact optimal brain surgeon, one removal at a time: the order, and what every step costs. Arrays; float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix, inverse_factor
from sparsecc.passes.prune.selection import Mask
from sparsecc.sparse import Pattern
from sparsecc.sparse.mask import block_view, group_planes

__all__ = ["Curves", "counts_by_merging", "inverse_of", "kept", "removal_curves", "without"]

#: Bytes of pivots that are worked on at a time, about what a cache holds; further lines are treated later.
_PIVOT_BYTES = 16 << 20

#: What removing a protected unit is taken to cost: more than any other.
_LAST = 1e300


@dataclass(frozen=True)
class Curves:
    """What removing units from each line costs: a line is a row, or a row of blocks.

    Attributes:
        order: ``[lines, steps]``, which unit leaves at each step.
        losses: ``[lines, steps]``, by how much ``Q(weight - start)`` rises then; the sum of the first is the error.
        last: ``[lines, steps]``, whether that unit is protected.
    """

    order: NDArray[np.intp]
    losses: Matrix
    last: Mask


def inverse_of(gram: Matrix) -> Matrix:
    """Return the inverse of a Gram matrix ``[K, K]``, which is damped first if it is not definite.

    Raises:
        ModelError: it holds NaN or infinities, or cannot be made definite.
    """
    factor = inverse_factor(gram)
    return factor.T @ factor


def removal_curves(
    weight: Matrix,
    inverse: Matrix,
    pattern: Pattern,
    steps: int,
    caps: Sequence[tuple[int, int]] = (),
    protected: Mask | None = None,
) -> Curves:
    """Remove the cheapest unit of each line, let the others make up for it, and so on (ExactOBS, OBC).

    Optimal Brain Compression (Frantar, Singh and Alistarh 2022). Removing the weights ``J`` of a line raises ``Q`` by
    ``w_J ([G^-1]_JJ)^-1 w_J^T``. The inverse is not brought up to date as a whole: a step needs the rows of its unit
    and the diagonal blocks, which the pivots so far give (a Cholesky factorisation of ``G^-1`` that chooses its
    pivots). ``steps**2 K / 2`` operations per line.

    Args:
        weight: ``[N, K]``.
        inverse: of the Gram matrix ``G``, ``[K, K]``.
        pattern: ``unstructured`` or blocks ``RxC``; the rows of a block leave its columns together.
        steps: how many units leave each line.
        caps: nested limits ``(n, m)``: what is left after all steps has at most n of every m units.
        protected: entries that leave last.
    """
    width, lines = _width(pattern), _lines(weight, pattern)
    inverse = _in_units(inverse, width)
    marks = np.zeros(weight.shape) if protected is None else protected.astype(np.float64)
    last = _lines(marks, pattern).max((1, 3)) > 0
    size = max(1, _PIVOT_BYTES // (8 * max(1, steps * width) * len(inverse)))
    parts = []
    for start in range(0, len(lines), size):
        part = slice(start, start + size)
        parts.append(_State(lines[part], inverse, steps, caps, last[part]).run())
    order, losses = (np.concatenate(item) for item in zip(*parts, strict=True))
    return Curves(order, losses, np.take_along_axis(last, order, 1))


def counts_by_merging(curves: Curves, total: int) -> NDArray[np.intp]:
    """Return how many units leave each line if ``total`` leave in all, the line of the cheapest next step first.

    Steps of a line keep their order: each counts as its dearest so far.
    """
    ranked = np.maximum.accumulate(np.where(curves.last, _LAST, curves.losses), axis=1)
    chosen = np.argsort(ranked.reshape(-1), kind="stable")[:total]
    return np.bincount(chosen // ranked.shape[1], minlength=len(ranked))


def kept(curves: Curves, counts: NDArray[np.intp] | int, pattern: Pattern, shape: tuple[int, int]) -> Mask:
    """Return the mask of a weight of ``shape`` whose lines have taken the first ``counts`` steps of their curves."""
    units = -(-shape[1] // _width(pattern))
    stays = np.ones((len(curves.order), units), bool)
    gone = np.arange(curves.order.shape[1]) < np.reshape(counts, (-1, 1))
    lines, steps = np.nonzero(np.broadcast_to(gone, curves.order.shape))
    stays[lines, curves.order[lines, steps]] = False
    if pattern.kind == "block":
        stays = stays.repeat(pattern.rows, 0)[: shape[0]].repeat(pattern.cols, 1)[:, : shape[1]]
    return stays


def without(weight: Matrix, inverse: Matrix, mask: Mask) -> Matrix:
    """Return ``weight`` with zeros outside ``mask``, each row as close to the whole one in ``Q`` as it can be.

    ``w - w_J ([G^-1]_JJ)^-1 [G^-1]_J`` for the removed weights ``J``: exact, rows of one mask solved together.

    Args:
        weight: ``[N, K]``.
        inverse: of the Gram matrix ``G``, ``[K, K]``.
        mask: ``[N, K]``, True where a weight stays.
    """
    result = weight.copy()
    kinds, kind_of = np.unique(mask, axis=0, return_inverse=True)
    for kind, kept in enumerate(kinds):
        rows, gone = kind_of.reshape(-1) == kind, ~kept
        pull = np.linalg.solve(inverse[np.ix_(gone, gone)], weight[np.ix_(rows, gone)].T)
        result[rows] -= pull.T @ inverse[gone]
    return np.where(mask, result, 0.0)


def _width(pattern: Pattern) -> int:
    """Columns of a unit."""
    return pattern.cols if pattern.kind == "block" else 1


def _lines(matrix: Matrix, pattern: Pattern) -> Matrix:
    """Return ``[lines, rows of a line, units, columns of a unit]``, zeros beyond the edge."""
    if pattern.kind == "block":
        return np.ascontiguousarray(block_view(matrix, pattern))
    return matrix[:, None, :, None]


def _in_units(inverse: Matrix, width: int) -> Matrix:
    """Return the inverse with as many columns as whole units have; those beyond the edge count for themselves."""
    missing = -len(inverse) % width
    padded = np.eye(len(inverse) + missing)
    padded[: len(inverse), : len(inverse)] = inverse
    return padded


class _State:
    """Some lines while units leave them."""

    def __init__(
        self, lines: Matrix, inverse: Matrix, steps: int, caps: Sequence[tuple[int, int]], last: Mask
    ) -> None:
        count, rows, units, width = lines.shape
        self._weight = lines.reshape(count, rows, units * width).copy()
        self._inverse, self._steps, self._width = inverse, steps, width
        blocks = inverse.reshape(units, width, units, width)[np.arange(units), :, np.arange(units)]
        self._diagonal = np.repeat(blocks[None], count, axis=0)
        self._pivots = np.zeros((count, steps * width, units * width))
        self._alive = np.ones((count, units), bool)
        self._caps, self._last = caps, last

    def run(self) -> tuple[NDArray[np.intp], Matrix]:
        """Return the units that left each line, in order, and what each cost."""
        lines = np.arange(len(self._weight))
        order = np.empty((len(lines), self._steps), np.intp)
        losses = np.empty((len(lines), self._steps))
        for step in range(self._steps):
            cost = self._costs()
            free = self._alive & _removable(self._alive, self._caps, self._alive.shape[1] - self._steps)
            ranked = np.where(free, np.where(self._last, _LAST, cost), np.inf)
            unit = np.argmin(ranked, axis=1)
            order[:, step], losses[:, step] = unit, cost[lines, unit]
            self._remove(unit, step)
        return order, losses

    def _costs(self) -> Matrix:
        """Return ``[lines, units]``: what each unit costs now; those that left are not meant."""
        count, units = self._alive.shape
        if self._width == 1:
            squares = np.einsum("grk,grk->gk", self._weight, self._weight)
            return np.asarray(squares / self._diagonal[:, :, 0, 0])
        weight = self._weight.reshape(count, -1, units, self._width).transpose(0, 2, 3, 1)
        return np.asarray(np.einsum("guwr,guwr->gu", weight, np.linalg.solve(self._diagonal, weight)))

    def _remove(self, unit: NDArray[np.intp], step: int) -> None:
        count, units = self._alive.shape
        lines, width, done = np.arange(count), self._width, step * self._width
        columns = unit[:, None] * width + np.arange(width)
        # The rows of the inverse as it is by now, over a square root of its block: the next pivots.
        known = self._pivots[:, :done]
        rows = (
            self._inverse[columns]
            - np.take_along_axis(known, columns[:, None, :], 2).transpose(0, 2, 1) @ known
        )
        root = np.linalg.cholesky(np.take_along_axis(rows, columns[:, None, :], 2))
        pivots = np.linalg.solve(root, rows)
        gone = np.take_along_axis(self._weight, columns[:, None, :], 2)
        self._weight -= np.linalg.solve(root, gone.transpose(0, 2, 1)).transpose(0, 2, 1) @ pivots
        in_units = pivots.reshape(count, width, units, width)
        self._diagonal -= np.einsum("gtua,gtub->guab", in_units, in_units)
        self._pivots[:, done : done + width] = pivots
        self._alive[lines, unit] = False
        # What is left of units that are gone is rounding; ones keep their blocks regular.
        self._diagonal[lines, unit] = np.eye(width)
        np.put_along_axis(self._weight, columns[:, None, :], 0.0, 2)


def _removable(alive: Mask, caps: Sequence[tuple[int, int]], left: int) -> Mask:
    """Return which units may leave a line so that ``left`` can stay in the end, no group above its cap.

    The sets that caps allow are the independent ones of a matroid, whose rank says how many of what is there could
    stay: a unit may leave if a group around it holds too many, or if the rank allows for it.
    """
    if not caps:
        return np.ones_like(alive)
    ranks, inner = alive.astype(np.int64), 1
    crowded = np.zeros_like(alive)
    for n, m in sorted(caps, key=lambda cap: cap[1]):
        sums = group_planes(ranks, m // inner, 0).sum(0)
        crowded |= (sums > n).repeat(m, axis=1)[:, : alive.shape[1]]
        ranks, inner = np.minimum(sums, n), m
    return np.asarray(crowded | (ranks.sum(1, keepdims=True) > left))
