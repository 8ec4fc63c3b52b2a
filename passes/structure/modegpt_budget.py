"""How a budget of weights is dealt over the sizes of modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.structure.modegpt_modules import Heads, Module

__all__ = ["Dial", "cheapest", "dials_of", "shared", "spread"]

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Dial:
    """A size of a module.

    Attributes:
        module: its name.
        coarse: a size of heads, which has few steps.
        now: what it is.
        before: what it was before the first run.
        step: what it becomes a multiple of.
        weights: numbers that leave with one.
    """

    module: str
    coarse: bool
    now: int
    before: int
    step: int
    weights: int

    def least(self, most: float) -> int:
        """The smallest size if no more than the share ``most`` may go."""
        return min(self.now, max(self.step, int(np.ceil(self.before * (1 - most) / self.step)) * self.step))


def dials_of(modules: Sequence[Module], multiple: int) -> list[Dial]:
    """Return all sizes of the modules, those of one module in its order."""
    return [
        Dial(item.name, isinstance(item, Heads), *numbers)
        for item in modules
        for numbers in zip(item.now, item.before, item.steps(multiple), item.weights, strict=True)
    ]


def shared(dials: Sequence[Dial], removed: Sequence[float], most: float) -> list[int]:
    """Return sizes with the given share ``removed`` of each.

    Sizes of heads become the nearest multiples; what they keep beyond their share, or do without, goes to the others.
    """
    wanted = [dial.before * (1 - share) for dial, share in zip(dials, removed, strict=True)]
    sizes, excess = [0] * len(dials), 0.0
    for at, dial in enumerate(dials):
        if dial.coarse:
            sizes[at] = max(dial.least(most), round(wanted[at] / dial.step) * dial.step)
            excess += (sizes[at] - wanted[at]) * dial.weights
    fine = sum(dial.before * dial.weights for dial in dials if not dial.coarse)
    for at, dial in enumerate(dials):
        if not dial.coarse:
            size = int(wanted[at] - excess / fine * dial.before) // dial.step * dial.step
            sizes[at] = max(dial.least(most), size)
    return [min(size, dial.now) for size, dial in zip(sizes, dials, strict=True)]


def cheapest(dials: Sequence[Dial], curves: Sequence[Vector], ratio: float, most: float) -> list[int]:
    """Return sizes that leave ``ratio`` of all numbers at the least error: greedy by error per number saved.

    Args:
        dials: the sizes.
        curves: of each the error by the size that is left, ``[now + 1]``.
        ratio: share of the numbers before the first run to keep.
        most: largest share of one size to remove.
    """
    sizes = [dial.now for dial in dials]
    left = sum(dial.now * dial.weights for dial in dials)
    budget = ratio * sum(dial.before * dial.weights for dial in dials)
    while left > budget:
        best: tuple[float, int, int] | None = None
        for at, dial in enumerate(dials):
            size = (sizes[at] - 1) // dial.step * dial.step
            if size >= dial.least(most):
                cost = float(curves[at][size] - curves[at][sizes[at]])
                rate = cost / ((sizes[at] - size) * dial.weights)
                if best is None or rate < best[0]:
                    best = rate, at, size
        if best is None:
            break
        _, at, size = best
        left -= (sizes[at] - size) * dials[at].weights
        sizes[at] = size
    return sizes


def spread(
    numbers: Sequence[float], influence: Sequence[float], removed: float, temperature: float, most: float
) -> list[float]:
    """Return the share to remove of each module, so that ``removed`` of all numbers goes.

    Shares are proportional to ``softmax(-influence / temperature)``: what turns the stream more loses less. What one
    would lose beyond ``most`` is spread over the others.

    Args:
        numbers: weights of each module.
        influence: of each.
        removed: share of all numbers to remove.
        temperature: high is uniform.
        most: largest share of one module.
    """
    scaled = -np.asarray(influence, np.float64) / temperature
    wish = np.exp(scaled - scaled.max())
    sizes = np.asarray(numbers, np.float64)
    shares, free = np.zeros(len(sizes)), np.ones(len(sizes), bool)
    budget = removed * float(sizes.sum())
    while free.any():
        left = budget - float((shares * sizes)[~free].sum())
        shares[free] = wish[free] * left / max(float((wish * sizes)[free].sum()), np.finfo(float).tiny)
        over = free & (shares > most)
        if not over.any():
            break
        shares[over] = most
        free &= ~over
    return [float(share) for share in shares]
