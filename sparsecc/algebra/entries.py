"""Lists of coordinates: checked, sorted, without repetitions. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError

__all__ = ["check_range", "checked", "ordered", "refuse_disorder"]


def checked(coordinates: NDArray[Any], values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return coordinates ``[entries, modes]`` as int64.

    Raises:
        ModelError: they are no integers, not as many as values, or out of range.
    """
    found = np.asarray(coordinates)
    if found.ndim != 2 or found.shape[1] != len(shape) or found.dtype.kind not in "iu":
        raise ModelError(
            f"coordinates must be integers [entries, {len(shape)}], got {found.dtype} {found.shape}"
        )
    if np.shape(values) != found.shape[:1]:
        raise ModelError(f"{np.shape(values)} values for {len(found)} coordinates")
    for mode, size in enumerate(shape):
        check_range(found[:, mode], size, f"mode {mode}")
    return found.astype(np.int64, copy=False)


def check_range(crd: NDArray[Any], size: int, where: str) -> None:
    """Refuse coordinates outside of ``0 .. size``.

    Raises:
        ModelError: there is one; ``where`` is how its message begins.
    """
    if len(crd) and (int(crd.min()) < 0 or int(crd.max()) >= size):
        wrong = int(crd.min()) if int(crd.min()) < 0 else int(crd.max())
        raise ModelError(f"{where}: coordinate {wrong} is outside of 0..{size - 1}")


def _rises(entries: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each entry is (after, equal to) the one before, lexicographically."""
    after, equal = np.zeros(max(len(entries) - 1, 0), bool), np.ones(max(len(entries) - 1, 0), bool)
    for column in entries.T:
        after |= equal & (column[1:] > column[:-1])
        equal &= column[1:] == column[:-1]
    return after, equal


def refuse_disorder(entries: NDArray[np.int64], order: Sequence[int]) -> None:
    """Refuse entries that do not rise; ``order`` says which modes the columns are.

    Raises:
        ModelError: one is not after the one before.
    """
    after, equal = _rises(entries)
    if not after.all():
        at = int(np.flatnonzero(~after)[0])
        place = np.empty(len(order), np.int64)
        place[list(order)] = entries[at + 1]
        what = "there twice" if equal[at] else "unsorted"
        raise ModelError(
            f"coordinate {tuple(place.tolist())} is {what}; sort the entries, sum_duplicates adds them up"
        )


def ordered(
    entries: NDArray[np.int64], values: NDArray[Any], order: Sequence[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return entries ``[n, columns]`` sorted, each once, and their values.

    Values at the same place are added up along the first axis, in the order they came in and in their type.

    Args:
        entries: in any order.
        values: ``[n, ...]``.
        order: refuse entries that are there twice; which modes the columns are. None: add them up.

    Raises:
        ModelError: an entry is there twice, and ``order`` is given.
    """
    after, equal = _rises(entries)
    if not (after | equal).all():
        chosen = np.lexsort(entries.T[::-1])
        entries, values = entries[chosen], values[chosen]
        _, equal = _rises(entries)
    if not equal.any():
        return entries, values
    if order is not None:
        refuse_disorder(entries, order)
    first = np.concatenate([[True], ~equal])
    return entries[first], np.add.reduceat(values, np.flatnonzero(first), dtype=values.dtype)
