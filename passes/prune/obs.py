"""SparseGPT: one sweep over the columns that drops weights and lets later ones make up for them. float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.selection import Mask

__all__ = ["Swept", "sweep"]

#: Gives the mask of the columns from one on for what dropping each of their weights costs.
Choose = Callable[[Matrix, int], Mask]


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves.

    Attributes:
        weight: ``[N, K]``, exactly zero outside the mask.
        mask: ``[N, K]``, True where weights were kept.
        error: ``Q(weight - start)``, known without another product.
    """

    weight: Matrix
    mask: Mask
    error: float


def sweep(weight: Matrix, factor: Matrix, choose: Choose, choose_every: int, block: int = 128) -> Swept:
    """Drop weights from left to right (SparseGPT, Frantar and Alistarh 2023).

    With ``R`` upper triangular and ``R^T R`` the inverse of the Gram matrix of the inputs, a dropped ``w_ij`` costs
    ``(w_ij / R_jj)**2`` once the columns after ``j`` have made up for it as well as they can, which they do at once.

    Args:
        weight: ``[N, K]``, what to come close to.
        factor: ``R``, ``[K, K]``; see ``inverse_factor``.
        choose: the mask of some columns, by the cost of dropping each weight as it is by then.
        choose_every: how many columns are chosen at a time.
        block: columns whose effect on those behind them is gathered before it is applied; it changes no result.
    """
    diagonal = np.diag(factor)
    columns = weight.shape[1]
    # Columns are chosen when all before them are dealt with: a block is whole choices or a choice whole blocks.
    if choose_every < block:
        block -= block % choose_every
    else:
        choose_every = -(-choose_every // block) * block
    left, mask = weight.copy(), np.ones(weight.shape, bool)
    total = 0.0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.zeros((len(left), stop - start))
        for at in range(start, stop):
            if at % choose_every == 0:
                end = min(at + choose_every, columns)
                mask[:, at:end] = choose(np.square(left[:, at:end] / diagonal[at:end]), at)
            error = np.where(mask[:, at], 0.0, left[:, at]) / diagonal[at]
            left[:, at:stop] -= np.outer(error, factor[at, at:stop])
            errors[:, at - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
        total += float(np.square(errors).sum())
    return Swept(np.where(mask, left, 0.0), mask, total)
