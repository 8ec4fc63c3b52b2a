"""Subtrees of chosen nodes seen as one tree, without a copy: what the later phases of a nest of loops walk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Compressed, Dense
from sparsecc.algebra.splitter import Int64

__all__ = ["Gathered", "children"]

WalkLevel = Dense | Compressed


def children(level: WalkLevel, nodes: Int64) -> tuple[Int64, Int64]:
    """Return where the children of nodes of the level above begin and end; nothing for node -1."""
    there = nodes >= 0
    known = np.where(there, nodes, 0)
    if isinstance(level, Dense):
        start, stop = known * level.size, (known + 1) * level.size
    elif len(level.pos) > 1:
        start, stop = level.pos[known].astype(np.int64), level.pos[known + 1].astype(np.int64)
    else:
        start = stop = known
    return np.where(there, start, 0), np.where(there, stop, 0)


class Gathered:
    """The subtrees below some nodes of a tree, side by side.

    A position of a level here is that of a node among all that the chosen ones have, in their order. Positions in the
    tree itself are found when they are asked for, by one binary search.

    Attributes:
        levels: what a walk over the chosen nodes has below them.
    """

    levels: tuple[WalkLevel, ...]

    def __init__(self, levels: Sequence[WalkLevel], nodes: Int64) -> None:
        """``levels`` of the tree below the nodes; ``nodes`` of the level above them, -1: none."""
        self._tree = tuple(levels)
        self._starts: list[Int64] = []
        self._before: list[Int64] = []
        found: list[WalkLevel] = []
        start, stop = children(levels[0], nodes)
        for at, level in enumerate(levels):
            if at:
                start, stop = _first_child(level, start), _first_child(level, stop)
            before = np.concatenate([[0], np.cumsum(stop - start)])
            self._starts.append(start)
            self._before.append(before)
            if isinstance(level, Dense) and (at or (nodes >= 0).all()):
                found.append(level)
            else:
                positions: Any = before if not at else _Positions(self, at)
                found.append(Compressed(level.size, positions, _Coordinates(self, at)))  # type: ignore[arg-type]
        self.levels = tuple(found)

    def real(self, level: int, positions: Int64) -> Int64:
        """Return the positions in the tree of these ones here."""
        return self.located(level, positions)[1]

    def located(self, level: int, positions: Int64) -> tuple[Int64, Int64]:
        """Return whose subtree positions are in, and where they are in the tree."""
        if not len(self._starts[level]):
            return positions, positions
        before = self._before[level]
        owner = np.minimum(np.searchsorted(before, positions, side="right") - 1, len(before) - 2)
        return owner, self._starts[level][owner] + positions - before[owner]

    def tree(self, level: int) -> WalkLevel:
        """Return the level of the tree."""
        return self._tree[level]

    def size(self, level: int) -> int:
        """How many nodes there are."""
        return int(self._before[level][-1])

    def children_before(self, level: int, owner: Int64) -> Int64:
        """Nodes of a level in the subtrees before that of ``owner``."""
        return self._before[level][owner]

    def start(self, level: int, owner: Int64) -> Int64:
        """Where the subtree of ``owner`` begins on a level of the tree."""
        return self._starts[level][owner]


def _first_child(level: WalkLevel, positions: Int64) -> Int64:
    if isinstance(level, Dense):
        return positions * level.size
    return np.asarray(level.pos[positions], np.int64)


class _Positions:
    """``pos`` of a compressed level of subtrees, computed for the places that are asked for."""

    def __init__(self, gathered: Gathered, level: int) -> None:
        self._gathered, self._level = gathered, level

    def __len__(self) -> int:
        return self._gathered.size(self._level - 1) + 1

    def __getitem__(self, positions: Int64) -> NDArray[Any]:
        gathered, level = self._gathered, self._level
        if not gathered.size(level - 1):
            return np.zeros_like(positions)
        owner, real = gathered.located(level - 1, positions)
        inside = _first_child(gathered.tree(level), real) - gathered.start(level, owner)
        return np.asarray(gathered.children_before(level, owner) + inside)


class _Coordinates:
    """``crd`` of a level of subtrees, computed for the places that are asked for."""

    def __init__(self, gathered: Gathered, level: int) -> None:
        self._gathered, self._level = gathered, level

    def __len__(self) -> int:
        return self._gathered.size(self._level)

    def __getitem__(self, positions: Int64) -> NDArray[Any]:
        level = self._gathered.tree(self._level)
        owner, real = self._gathered.located(self._level, positions)
        if isinstance(level, Dense):
            return real - self._gathered.start(self._level, owner)
        return np.asarray(level.crd[real])
