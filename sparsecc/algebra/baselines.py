"""Simpler ways to cut the same work, to compare ours with: by rows, by entries of one operand, once for all phases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.algebra.gather import children
from sparsecc.algebra.levels import Dense
from sparsecc.algebra.splitter import Int64, Walk, search_windows, split
from sparsecc.algebra.visit import Phase

__all__ = ["entry_split", "one_split", "row_split"]


def row_split(phase: Phase) -> Int64:
    """Return the work of each part if the coordinates of the outermost loop are cut evenly."""
    walks, parts = list(phase.walks.values()), phase.table.parts
    size = phase.trees[phase.nest.loops[0].walked[0]][0].size
    cuts = np.array([size * part // parts for part in range(parts + 1)], np.int64)
    if phase.survivors is not None:
        cuts = np.searchsorted(phase.survivors.places[:, 0], cuts)
    return np.diff(_work_before(walks, cuts[:, None], np.ones(parts + 1, np.int64)))


def entry_split(phase: Phase) -> Int64:
    """Return the work of each part if the last level of the operand with most entries is cut evenly (as by TACO)."""
    walks, parts = list(phase.walks.values()), phase.table.parts
    largest = max(walks, key=lambda walk: walk.nodes[-1])
    count = largest.nodes[-1]
    cuts = np.array([count * part // parts for part in range(1, parts)], np.int64)
    before = np.zeros(parts - 1, np.int64)
    if count:
        before = _work_before(walks, _paths(largest, cuts), np.full(parts - 1, len(largest.levels)))
    return _shares(before, phase)


def one_split(phases: Sequence[Phase]) -> list[Int64]:
    """Return the work of each part in each phase if all that the first one walks is cut once, with all it has below.

    That is what a cut without phases gives: what an intersection skips, or what the rows of another operand hold, is
    not known to it.
    """
    first, parts = phases[0], phases[0].table.parts
    walks = [_whole(first, phases, operand) for operand in first.walks]
    table = split(walks, parts)
    paths, lengths = table.paths[1:-1].copy(), (table.paths[1:-1] >= 0).sum(axis=1)
    rows, full = np.arange(parts - 1), lengths == table.paths.shape[1]
    paths[rows[full], -1] += 1  # after the last event; after one with others inside is before its first child
    paths[rows[~full], lengths[~full]] = 0
    lengths += ~full
    found = []
    for phase in phases:
        inner = (
            (paths, lengths) if phase.survivors is None else _within(phase.survivors.places, paths, lengths)
        )
        found.append(_shares(_work_before(list(phase.walks.values()), *inner), phase))
    return found


def _whole(first: Phase, phases: Sequence[Phase], operand: int) -> Walk:
    """An operand down to the last of the loops that all index it, with the costs that it has in any phase."""
    order, levels = first.nest.order, first.trees[operand]
    costs: list[int] = []
    for phase in phases:
        walk = phase.walks.get(operand)
        mine = walk.costs[phase.survivors is not None :] if walk is not None else ()
        costs += mine[: len(phase.loops)] if len(costs) == phase.loops[0] else ()
    indices = first.nest.operands[operand].indices
    depth = next((at for at, index in enumerate(indices) if order[at] != index), len(indices))
    depth = min(depth, len(costs))
    return Walk(levels[:depth], tuple(costs[:depth]))


def _within(places: Int64, paths: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """Paths through all loops as paths through a list of survivors and the loops inside."""
    low, high = np.zeros(len(paths), np.int64), np.full(len(paths), len(places), np.int64)
    loops = places.shape[1]
    for at, column in enumerate(places.T[: paths.shape[1]]):
        rows = np.flatnonzero(at < lengths)
        wanted = paths[rows, at]
        start = search_windows(column, low[rows], high[rows], wanted)
        high[rows] = search_windows(column, start, high[rows], wanted + 1)
        low[rows] = start
    inside = (lengths > loops) & (low < high)
    return np.concatenate([low[:, None], paths[:, loops:]], axis=1), np.where(inside, 1 + lengths - loops, 1)


def _shares(before: Int64, phase: Phase) -> Int64:
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


def _work_before(walks: Sequence[Walk], paths: Int64, lengths: Int64) -> Int64:
    """Work before coordinate paths ``[n, loops]`` of these lengths, lexicographically, with what they are inside of."""
    total = np.zeros(len(paths), np.int64)
    for walk in walks:
        cursors = np.zeros((len(walk.levels), len(paths)), np.int64)
        nodes, depth = np.zeros(len(paths), np.int64), min(len(walk.levels), paths.shape[1])
        for at in range(depth):
            level, rows = walk.levels[at], np.flatnonzero(nodes >= 0)
            ends = at + 1 >= lengths[rows]
            coordinate, (low, high) = paths[rows, at], children(walk.levels[at], nodes[rows])
            if isinstance(level, Dense):
                position = low + coordinate
                stored = position < high
            else:
                position = search_windows(level.crd, low, high, coordinate)
                stored = position < high
                stored[stored] = level.crd[position[stored]] == coordinate[stored]
            inside = stored & ~ends
            cursors[at, rows] = position + inside
            for below, start in enumerate(walk.descend(at, position), at + 1):
                cursors[below, rows] = start
            nodes[rows] = np.where(inside, position, -1)
        total += np.asarray(walk.costs, np.int64) @ cursors
    return total
