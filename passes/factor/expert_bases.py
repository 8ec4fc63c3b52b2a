"""Weights of all experts of a mixture from a few shared bases. Arrays in, arrays out; float64, no ONNX.

``W_e = A_e sum_m alpha_em B_m`` (MoBE, Chen et al. 2025, without its activation between): the bases read what all
experts read, so that a token meets them once. Without training: an initial guess by clusters of experts, then exact
least squares for A, B and alpha in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.structure.clusters import after, merges

__all__ = ["Bases", "affordable_width", "fitted_bases"]

Array = NDArray[np.float64]

#: Turns stop where the error falls by less than this share.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class Bases:
    """Weights ``[E, N, K]`` of experts.

    Attributes:
        shared: ``[M, r, K]``, what is multiplied with the input.
        mixing: ``[E, M]``.
        own: ``[E, N, r]``, what each expert does with its mixture.
        errors: squared errors on the outputs, before and after each turn.
    """

    shared: Array
    mixing: Array
    own: Array
    errors: tuple[float, ...] = ()

    @property
    def numbers(self) -> int:
        """Values that are stored; one basis needs no mixing."""
        return self.shared.size + self.own.size + (self.mixing.size if len(self.shared) > 1 else 0)

    def dense(self) -> Array:
        """Return the weights that they stand for."""
        return np.asarray(self.own @ _mixed(self.mixing, self.shared), np.float64)


def affordable_width(experts: int, rows: int, columns: int, bases: int, share: float, multiple: int) -> int:
    """Return the largest r, a multiple, for which ``bases`` hold ``share`` of the weights of all experts; 0 if none."""
    mixing = experts * bases if bases > 1 else 0
    budget = share * experts * rows * columns - mixing
    width = int(budget / (experts * rows + bases * columns) + 1e-9)
    most = columns if bases == 1 else min(rows, columns)
    return max(0, min(width, most) // multiple * multiple)


def fitted_bases(weights: Array, gram: Matrix, bases: int, width: int, turns: int) -> Bases:
    """Return the bases that come closest to the outputs of all experts.

    Args:
        weights: ``[E, N, K]``.
        gram: second moments of the input that they share, ``[K, K]``, positive definite.
        bases: M; as many as experts give the best matrix of rank r for each.
        width: r.
        turns: most rounds of least squares; their errors never rise.
    """
    root = np.linalg.cholesky(gram)
    targets = weights @ root
    shared, mixing = _first_guess(targets, bases, width)
    own = _own(targets, shared, mixing)
    errors = [_error(targets, shared, mixing, own)]
    energy = float(np.square(targets).sum())
    for _ in range(turns if 1 < bases < len(weights) else 0):
        mixing = _mixing(targets, shared, own)
        shared = _shared(targets, mixing, own, bases)
        own = _own(targets, shared, mixing)
        errors.append(_error(targets, shared, mixing, own))
        if errors[-1] > errors[-2] * (1 - _LEAST_GAIN) or errors[-1] <= 1e-14 * energy:
            break
    back = np.linalg.solve(root.T, shared.transpose(0, 2, 1)).transpose(0, 2, 1)
    if bases == 1:  # its factors go into what each expert does
        own, mixing = own * mixing[:, :, None], np.ones_like(mixing)
    return Bases(back, mixing, own, tuple(errors))


def _first_guess(targets: Array, bases: int, width: int) -> tuple[Array, Array]:
    """One basis for each cluster of experts whose leading inputs span nearly the same space."""
    count = len(targets)
    leading = [np.linalg.svd(item, full_matrices=False)[2][:width] for item in targets]
    apart = np.full((count, count), np.inf)
    for i in range(count):
        for j in range(i):
            apart[i, j] = apart[j, i] = -float(np.square(leading[i] @ leading[j].T).sum())
    clusters = after(merges(apart)[: count - bases], count)
    shared = np.zeros((bases, width, targets.shape[2]))
    mixing = np.zeros((count, bases))
    for number, members in enumerate(clusters):
        stacked = targets[members].reshape(-1, targets.shape[2])
        found = np.linalg.svd(stacked, full_matrices=False)[2][:width]
        shared[number, : len(found)] = found
        mixing[members, number] = 1.0
    return shared, mixing


def _mixed(mixing: Array, shared: Array) -> Array:
    """``[E, r, K]``: the basis of each expert."""
    return np.asarray(np.einsum("em,mrk->erk", mixing, shared, optimize=True), np.float64)


def _own(targets: Array, shared: Array, mixing: Array) -> Array:
    pairs = zip(targets, _mixed(mixing, shared), strict=True)
    return np.stack([np.linalg.lstsq(basis.T, target.T, rcond=None)[0].T for target, basis in pairs])


def _mixing(targets: Array, shared: Array, own: Array) -> Array:
    rows = []
    for target, left in zip(targets, own, strict=True):
        square, wanted = left.T @ left, left.T @ target
        system = np.einsum("mrk,nrk->mn", shared, square @ shared, optimize=True)
        rows.append(np.linalg.lstsq(system, np.einsum("mrk,rk->m", shared, wanted), rcond=None)[0])
    return np.stack(rows)


def _shared(targets: Array, mixing: Array, own: Array, bases: int) -> Array:
    width = own.shape[2]
    squares = own.transpose(0, 2, 1) @ own
    system = np.einsum("em,en,ers->mrns", mixing, mixing, squares, optimize=True)
    wanted = np.einsum("em,erk->mrk", mixing, own.transpose(0, 2, 1) @ targets, optimize=True)
    size = bases * width
    found = np.linalg.lstsq(system.reshape(size, size), wanted.reshape(size, -1), rcond=None)[0]
    return np.asarray(found.reshape(bases, width, -1), np.float64)


def _error(targets: Array, shared: Array, mixing: Array, own: Array) -> float:
    return float(np.square(targets - own @ _mixed(mixing, shared)).sum())
