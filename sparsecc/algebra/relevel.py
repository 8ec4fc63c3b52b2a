"""Upper levels of a tensor in other formats, over the same entries. NumPy only.

What the last level stores and the values are kept as they are, so that this takes time by the nodes above them only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.algebra.levels import (
    MOST_PARENTS,
    Compressed,
    Dense,
    Ints,
    Level,
    LevelFormat,
    Singleton,
    Tensor,
)

__all__ = ["alike", "releveled"]


def _suits(formats: Sequence[LevelFormat]) -> bool:
    """Whether levels are dense ones, then compressed ones: those whose trees can be merged as they are."""
    compressed = sum(form == "compressed" for form in formats)
    return compressed > 0 and tuple(formats) == _dense_above(len(formats) - compressed, len(formats))


def _dense_above(dense: int, modes: int) -> tuple[LevelFormat, ...]:
    return tuple("dense" if at < dense else "compressed" for at in range(modes))


def alike(tensors: Sequence[Tensor], wanted: Sequence[LevelFormat] | None = None) -> tuple[Tensor, ...]:
    """Return tensors whose levels are alike and suit joins; as they are if they are so, or cannot be.

    Args:
        tensors: with modes in the same order.
        wanted: formats to choose where they are not alike; None: no more dense levels than all of them have.
    """
    forms = {tensor.formats for tensor in tensors}
    if len(forms) == 1 and _suits(tensors[0].formats):
        return tuple(tensors)
    if wanted is None or not _suits(wanted):
        modes = len(tensors[0].levels)
        dense = min((*form, "compressed").index("compressed") for form in forms)
        wanted = _dense_above(dense, modes)
    found = [releveled(tensor, wanted) for tensor in tensors]
    return tuple(tensors) if None in found else tuple(tensor for tensor in found if tensor is not None)


def releveled(tensor: Tensor, formats: Sequence[LevelFormat]) -> Tensor | None:
    """Return the tensor with levels in these formats; it shares its entries.

    None if that cannot be: the last levels are not both compressed, there are singleton levels or repeated coordinates,
    or dense levels would have many more nodes than there are entries.
    """
    last = tensor.levels[-1] if tensor.levels else None
    trees = all(
        not isinstance(level, Singleton) and (isinstance(level, Dense) or level.unique)
        for level in tensor.levels
    )
    if not isinstance(last, Compressed) or not trees or not formats or formats[-1] != "compressed":
        return None
    if "singleton" in formats:
        return None
    # From the bottom: nodes of each level that have entries, by the coordinate and the parent of each.
    used = np.flatnonzero(last.pos[1:] > last.pos[:-1])
    counts = np.diff(last.pos)[used]
    coordinates, parents = [], []
    for level in tensor.levels[-2::-1]:
        if isinstance(level, Dense):
            above, column = np.divmod(used, level.size)
        else:
            assert isinstance(level, Compressed)  # as was seen above
            above, column = np.searchsorted(level.pos, used, side="right") - 1, level.crd[used]
        first = np.ones(len(above), bool)
        first[1:] = above[1:] != above[:-1]
        coordinates.append(column)
        parents.append(np.cumsum(first) - 1)
        used = above[first]
    # From the top: where these nodes are now.
    places, total = np.zeros(len(used), np.int64), 1
    levels: list[Level] = []
    for level, form, column, parent in zip(
        tensor.levels, formats, reversed(coordinates), reversed(parents), strict=False
    ):
        if form == "dense":
            places, total = places[parent] * level.size + column, total * level.size
            if total > max(MOST_PARENTS, 8 * len(last.crd)):
                return None
            levels.append(Dense(level.size))
        else:
            pos = _positions(places, np.bincount(parent, minlength=len(places)), total, last.pos)
            wide = column.astype(last.crd.dtype if level.size <= np.iinfo(last.crd.dtype).max else np.int64)
            levels.append(Compressed(level.size, pos, wide))
            places, total = np.arange(len(column)), len(column)
    levels.append(Compressed(last.size, _positions(places, counts, total, last.pos), last.crd))
    return Tensor(tensor.shape, tensor.order, tuple(levels), tensor.values)


def _positions(places: Ints, counts: Ints, total: int, like: Ints) -> Ints:
    """Positions of the children of ``total`` nodes, of which those at some places have so many, the others none."""
    found = np.zeros(total + 1, like.dtype)
    found[places + 1] = counts
    return np.cumsum(found, dtype=like.dtype)
