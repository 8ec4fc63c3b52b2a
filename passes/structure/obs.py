"""Group optimal brain surgeon: which groups of inputs a layer misses least, and what the others must become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import damped

__all__ = ["Consumer", "Curve", "compensate", "removal_curve"]

#: Rows of an inverse that are brought up to date at a time.
_ROWS = 512

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the units.

    Attributes:
        weight: ``[N, K]``.
        gram: centred second moments of its inputs, ``[K, K]``.
        columns: ``[units, width]``: its columns that read each unit.
        share: of its layer, where that has several groups of outputs.
    """

    weight: Array
    gram: Array
    columns: Index
    share: float = 1.0


@dataclass(frozen=True)
class Curve:
    """What removing units costs, cheapest first.

    Attributes:
        order: units as indices, in the order of removal.
        error: ``error[k]``: sum over consumers of (output variance lost / output variance) with k units removed and
            the others compensating. Costs inside one step of the greedy are taken as independent.
    """

    order: Index
    error: Array


def removal_curve(consumers: Sequence[Consumer], steps: int, damping: float, *, keep: int = 1) -> Curve:
    """Greedy removal by group-OBS over several layers at once (algorithm of ZipLM, Kurtic et al. 2023).

    Removing group J costs ``tr(W_J inv(inv(G)_JJ) W_J^T)``; weights and inverse are then brought up to date, so that
    later costs include the compensation for earlier removals.

    Args:
        consumers: layers, all with the same units.
        steps: most steps; several units leave per step where there are more.
        damping: ridge relative to the mean diagonal.
        keep: how many units need no order of removal: they come last, and the errors end before them.
    """
    units = len(consumers[0].columns)
    states = [_State(item, damping) for item in consumers]
    alive = np.arange(units)
    order: list[int] = []
    costs = [0.0]
    size = max(1, units // steps)
    while len(alive) > keep:
        cost = np.sum([state.costs(alive) for state in states], axis=0)
        leaving = np.argsort(cost, kind="stable")[: min(size, len(alive) - keep)]
        for index in leaving.tolist():
            order.append(int(alive[index]))
            costs.append(costs[-1] + float(cost[index]))
        for state in states:
            state.remove(alive[leaving])
        alive = np.delete(alive, leaving)
    return Curve(np.array([*order, *alive.tolist()], np.int64), np.array(costs))


class _State:
    """Weights and inverse of one consumer while units leave."""

    def __init__(self, consumer: Consumer, damping: float) -> None:
        gram, _ = damped(consumer.gram, damping)
        self._columns = consumer.columns
        self._weight = consumer.weight.copy()
        self._inverse = np.linalg.inv(gram)
        energy = float(np.einsum("nk,kl,nl->", consumer.weight, gram, consumer.weight, optimize=True))
        self._scale = consumer.share / energy if energy > 0 else 0.0

    def costs(self, units: Index) -> Array:
        """Return the relative cost of each unit."""
        columns = self._columns[units]
        if columns.shape[1] == 1:
            flat = columns[:, 0]
            squares = np.square(self._weight[:, flat]).sum(0)
            return np.asarray(self._scale * squares / self._inverse[flat, flat], np.float64)
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weight[:, columns].transpose(1, 0, 2)
        solved = np.linalg.solve(blocks, weights.transpose(0, 2, 1))
        return np.asarray(self._scale * np.einsum("unw,uwn->u", weights, solved, optimize=True), np.float64)

    def remove(self, units: Index) -> None:
        """Compensate for the loss of ``units`` and forget them."""
        gone = self._columns[units].ravel()
        pivot = np.linalg.solve(self._inverse[np.ix_(gone, gone)], self._inverse[gone])
        self._weight -= self._weight[:, gone] @ pivot
        for start in range(0, len(self._inverse), _ROWS):  # the product is as large as the inverse
            some = slice(start, start + _ROWS)
            self._inverse[some] -= self._inverse[some][:, gone] @ pivot
        self._weight[:, gone] = 0
        # Rows of removed columns are rounding now; a unit diagonal keeps later blocks regular.
        self._inverse[gone, :] = 0
        self._inverse[:, gone] = 0
        self._inverse[gone, gone] = 1


def compensate(weight: Array, kept: NDArray[np.bool_], gram: Array, cross: Array, damping: float) -> Array:
    """Return the weight on the kept columns that comes closest to the outputs of the whole one, zeros elsewhere.

    Least squares ``What_A = (W C_A + d W_A) inv(G_AA + d I)``: the damping d pulls towards the present weights.

    Args:
        weight: ``[N, K]``, of the reference.
        kept: ``[K]``.
        gram: ``Xh^T Xh`` of the inputs as they are, centred or not.
        cross: ``X^T Xh`` with the inputs of the reference; ``gram`` itself where they are the same.
        damping: relative to the mean diagonal of ``gram``.
    """
    system, ridge = damped(gram[np.ix_(kept, kept)], damping)
    right = weight @ cross[:, kept] + ridge * weight[:, kept]
    result = np.zeros_like(weight)
    result[:, kept] = np.linalg.solve(system, right.T).T
    return result
