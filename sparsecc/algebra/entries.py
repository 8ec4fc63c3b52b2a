"""Lists of coordinates: checked, sorted, without repetitions. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError

__all__ = ["check_range", "checked", "in_order", "refuse_disorder", "without_repeats"]


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
        step = np.diff(column)
        after |= equal & (step > 0)
        equal &= step == 0
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


def in_order(entries: NDArray[np.int64], values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return entries ``[n, columns]`` and their values sorted, those at the same place in the order they came in."""
    after, equal = _rises(entries)
    if (after | equal).all():
        return entries, values
    chosen = np.lexsort(entries.T[::-1])
    return entries[chosen], values[chosen]


def without_repeats(
    entries: NDArray[np.int64], values: NDArray[Any], order: Sequence[int], add: bool
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return sorted entries without repetitions, which are added up along the first axis of ``values`` in their type.

    Raises:
        ModelError: ``add`` is false and there are repetitions; ``order`` says which modes the columns are.
    """
    _, equal = _rises(entries)
    if not equal.any():
        return entries, values
    if not add:
        refuse_disorder(entries, order)
    first = np.concatenate([[True], ~equal])
    return entries[first], np.add.reduceat(values, np.flatnonzero(first), dtype=values.dtype)
