"""Simpler ways to cut the same work, to compare ours with: by rows, and by the entries of one operand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.algebra.gather import children
from sparsecc.algebra.levels import Dense
from sparsecc.algebra.splitter import Int64, Walk, search_windows
from sparsecc.algebra.visit import Phase

__all__ = ["entry_split", "row_split"]


def row_split(phase: Phase) -> Int64:
    """Return the work of each part if the coordinates of the outermost loop are cut evenly."""
    walks, parts = list(phase.walks.values()), phase.table.parts
    size = phase.trees[phase.nest.loops[0].walked[0]][0].size
    cuts = np.array([size * part // parts for part in range(parts + 1)], np.int64)
    if phase.survivors is not None:
        cuts = np.searchsorted(phase.survivors.places[:, 0], cuts)
    return np.diff(_work_before(walks, cuts[:, None]))


def entry_split(phase: Phase) -> Int64:
    """Return the work of each part if the last level of the operand with most entries is cut evenly (as by TACO)."""
    walks, parts = list(phase.walks.values()), phase.table.parts
    largest = max(walks, key=lambda walk: walk.nodes[-1])
    count = largest.nodes[-1]
    cuts = np.array([count * part // parts for part in range(1, parts)], np.int64)
    before = _work_before(walks, _paths(largest, cuts)) if count else np.zeros(parts - 1, np.int64)
    return np.diff(np.concatenate([[0], before, [phase.table.work]]))


def _paths(walk: Walk, leaves: Int64) -> Int64:
    """Coordinates ``[n, levels]`` of nodes of the last level."""
    columns, nodes = [], leaves
    for at in range(len(walk.levels) - 1, -1, -1):
        level = walk.levels[at]
        if isinstance(level, Dense):
            columns.append(nodes % level.size)
            nodes = nodes // level.size
            continue
        columns.append(np.asarray(level.crd[nodes], np.int64))
        parents = walk.nodes[at - 1] if at else 1
        low = np.zeros(len(nodes), np.int64)
        nodes = search_windows(level.pos, low, low + parents + 1, nodes + 1) - 1
    return np.stack(columns[::-1], axis=1)


def _work_before(walks: Sequence[Walk], paths: Int64) -> Int64:
    """Work before coordinate paths ``[n, loops]``, lexicographically; what the paths are inside of counts."""
    total = np.zeros(len(paths), np.int64)
    for walk in walks:
        cursors = np.zeros((len(walk.levels), len(paths)), np.int64)
        nodes, depth = np.zeros(len(paths), np.int64), min(len(walk.levels), paths.shape[1])
        for at in range(depth):
            level, rows = walk.levels[at], np.flatnonzero(nodes >= 0)
            coordinate, (low, high) = paths[rows, at], children(walk.levels[at], nodes[rows])
            if isinstance(level, Dense):
                position = low + coordinate
                stored = position < high
            else:
                position = search_windows(level.crd, low, high, coordinate)
                stored = position < high
                stored[stored] = level.crd[position[stored]] == coordinate[stored]
            inside = stored & (at + 1 < paths.shape[1])
            cursors[at, rows] = position + inside
            for below, start in enumerate(walk.descend(at, position), at + 1):
                cursors[below, rows] = start
            nodes[rows] = np.where(inside, position, -1)
        total += np.asarray(walk.costs, np.int64) @ cursors
    return total
