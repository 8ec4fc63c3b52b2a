"""A weight as some of its columns, a small link and some of its rows. Arrays in, arrays out; float64, no ONNX."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from sparsecc.passes.prune.gram import Matrix

__all__ = ["Link", "affordable_link_rank", "link"]

Link = Literal["output", "frobenius"]

#: Singular values of C and of R below this many times what rounding leaves of the largest count as zero: columns that
#: repeat each other. A link that tells them apart has huge entries, and products in the weight's type lose all digits.
_REPEATED = 32


def affordable_link_rank(rows: int, columns: int, numbers: int, multiple: int = 1) -> int:
    """Return the largest r, a multiple of ``multiple``, at which C, U and R hold at most ``numbers``.

    Those are ``r (N + K) + r^2``; with ``numbers = N K`` this is the r up to which the three are the smaller ones.
    """
    total = rows + columns
    rank = (math.isqrt(total * total + 4 * max(0, numbers)) - total) // 2
    return min(rank, rows, columns) // multiple * multiple


def link(
    weight: Matrix, left: Matrix, right: Matrix, root: Matrix | None, precision: float = 1e-12
) -> Matrix:
    """Return the ``U [r, r]`` with which ``C U R`` comes closest to ``weight [N, K]``.

    With ``root``, ``U = C^+ (W L) (R L)^+`` has the smallest output error ``||(W - C U R) L||``; without, the smallest
    Frobenius distance, as CURing does. Columns or rows that repeat each other share what they carry.

    Args:
        weight: ``[N, K]``.
        left: C, ``[N, r]``.
        right: R, ``[r, K]``.
        root: L, ``[K, K]`` with ``L L^T`` the Gram matrix of the inputs; None for the identity.
        precision: relative rounding of what the three are stored in.
    """
    least = _REPEATED * precision
    seen, rows = (weight, right) if root is None else (weight @ root, right @ root)
    first = np.linalg.pinv(left, rcond=least) @ seen
    return np.asarray(first @ np.linalg.pinv(rows, rcond=least), np.float64)
