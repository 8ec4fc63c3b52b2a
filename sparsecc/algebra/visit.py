"""What one part of a phase of a nest of loops visits, loop by loop, from its row of the split table alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.gather import Gathered, WalkLevel, children
from sparsecc.algebra.levels import Dense
from sparsecc.algebra.nest import Nest, Term
from sparsecc.algebra.splitter import Int64, SplitTable, Walk, search_windows

__all__ = ["Frontier", "Phase", "Survivors", "alive", "places", "survivors", "visit"]

#: Above this, pairs of a number and a coordinate would not fit into 64 bits.
_MOST_KEYS = 1 << 62


@dataclass(frozen=True, eq=False)
class Survivors:
    """What is left of the loops of the phases before.

    Attributes:
        places: ``[n, loops]`` coordinates, in the order of the loops.
        nodes: of each operand ``[n]``: the node of its last level so far, 0 before its first one; -1: has nothing here.
    """

    places: Int64
    nodes: tuple[Int64, ...]


@dataclass(frozen=True, eq=False)
class Phase:
    """Loops that are cut into parts together.

    Attributes:
        nest: of which they are some.
        loops: their numbers.
        trees: levels of each operand.
        survivors: of the loops outside, which the walks begin with as a dense level; None in the first phase.
        views: of the operands that are walked, what they have below the survivors.
        walks: by operand.
        table: the parts.
    """

    nest: Nest
    loops: range
    trees: tuple[tuple[WalkLevel, ...], ...]
    survivors: Survivors | None
    views: Mapping[int, Gathered]
    walks: Mapping[int, Walk]
    table: SplitTable

    def path(self, part: int) -> Int64:
        """Coordinates of all loops of the event just before a part; fewer where it is an outer one."""
        inner: Int64 = self.table.paths[part]
        inner = inner[inner >= 0]
        if self.survivors is None or not len(inner):
            return inner
        return np.concatenate([self.survivors.places[inner[0]], inner[1:]])


@dataclass(frozen=True, eq=False)
class Frontier:
    """Coordinates of one loop that a part visits, in order.

    Attributes:
        above: ``[n]`` which coordinate of the loop outside each belongs to.
        coordinates: ``[n]``; numbers of survivors in the level that stands for the loops of earlier phases.
        nodes: of each operand ``[n]``, see ``Survivors``.
        walked: of each walked operand ``[n]`` the position in its walk.
        opened: how many of the first belong to the part before, 0 or 1: only their inner loops are visited here.
        steps: coordinates of each walked operand that are visited: what the work of the part is made of.
    """

    above: Int64
    coordinates: Int64
    nodes: tuple[Int64, ...]
    walked: Mapping[int, Int64]
    opened: int
    steps: Mapping[int, int]


def visit(phase: Phase, part: int) -> list[Frontier]:
    """Return what a part visits: one frontier for each level of the walks; none if it is empty."""
    ranges = {
        operand: (cursor[:, part], cursor[:, part + 1])
        for operand, cursor in zip(phase.walks, phase.table.cursors, strict=True)
    }
    if all((low == high).all() for low, high in ranges.values()):
        return []
    zero = np.zeros(1, np.int64)
    last = Frontier(
        zero,
        zero,
        tuple(zero for _ in phase.nest.operands),
        {operand: zero for operand in phase.walks},
        1,
        {},
    )
    found = []
    for level in range(max(len(walk.levels) for walk in phase.walks.values())):
        last = _next(phase, part, level, last, ranges)
        found.append(last)
    return found


def _next(
    phase: Phase, part: int, level: int, outside: Frontier, ranges: Mapping[int, tuple[Int64, Int64]]
) -> Frontier:
    visited = {}
    for operand, (low, high) in ranges.items():
        walk = phase.walks[operand]
        if level < len(walk.levels):
            visited[operand] = _children_within(
                walk.levels[level], outside.walked[operand], int(low[level]), int(high[level])
            )
    size = next(walk.levels[level].size for walk in phase.walks.values() if level < len(walk.levels))
    above, coordinates, rows = _together(
        [(mine[0], mine[2]) for mine in visited.values()], size, len(outside.above)
    )
    walked = {
        operand: np.full(len(above), -1, np.int64) if operand in visited else outside.walked[operand][above]
        for operand in phase.walks
    }
    for row, (operand, mine) in zip(rows, visited.items(), strict=True):
        walked[operand][row] = mine[1]
    opened = int(outside.opened > 0 and phase.table.paths[part, level] >= 0)
    if opened:
        coordinate = phase.table.paths[part, level]
        above = np.concatenate([[0], above])
        coordinates = np.concatenate([[coordinate], coordinates])
        for operand, walk in phase.walks.items():
            before = outside.walked[operand][:1]
            if level < len(walk.levels):
                before = _child(walk.levels[level], before, np.array([coordinate]))
            walked[operand] = np.concatenate([before, walked[operand]])
    steps = {operand: len(mine[0]) for operand, mine in visited.items()}
    return _with_nodes(phase, level, outside, Frontier(above, coordinates, (), walked, opened, steps))


def _with_nodes(phase: Phase, level: int, outside: Frontier, frontier: Frontier) -> Frontier:
    """Add the nodes of all operands: of those that are walked, that are looked up, and the others."""
    above, coordinates, later = frontier.above, frontier.coordinates, phase.survivors is not None
    walked = dict(frontier.walked)
    if later and level == 0:
        assert phase.survivors is not None
        nodes = tuple(every[coordinates] for every in phase.survivors.nodes)
        for operand in walked:
            walked[operand] = np.where(nodes[operand] >= 0, walked[operand], -1)
        return replace(frontier, nodes=nodes, walked=walked)
    loop = phase.nest.loops[phase.loops[level - later]]
    found = []
    for operand, before in enumerate(outside.nodes):
        mine = before[above]
        if operand in walked and level < len(phase.walks[operand].levels):
            there = walked[operand] >= 0
            mine = walked[operand].copy()
            if later:
                mine[there] = phase.views[operand].real(level - 1, mine[there])
        elif operand in loop.located:
            depth = phase.nest.operands[operand].indices.index(loop.index)
            mine = _child(phase.trees[operand][depth], mine, coordinates)
        found.append(mine)
    return replace(frontier, nodes=tuple(found))


def _children_within(level: WalkLevel, nodes: Int64, low: int, high: int) -> tuple[Int64, Int64, Int64]:
    """Children of nodes between two positions: whose each is, its position and its coordinate."""
    start, stop = children(level, nodes)
    start = np.maximum(start, low)
    lengths = np.maximum(np.minimum(stop, high) - start, 0)
    above = np.repeat(np.arange(len(nodes)), lengths)
    positions = np.repeat(start - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(above))
    if isinstance(level, Dense):
        return above, positions, positions - nodes[above] * level.size
    return above, positions, np.asarray(level.crd[positions], np.int64)


def _together(
    lists: Sequence[tuple[Int64, Int64]], size: int, groups: int
) -> tuple[Int64, Int64, list[Int64]]:
    """Merge sorted lists of (number, coordinate), each pair once; and where each list's entries are in the result."""
    first = lists[0]
    same = all(
        np.array_equal(first[0], other[0]) and np.array_equal(first[1], other[1]) for other in lists[1:]
    )
    if same:
        return first[0], first[1], [np.arange(len(first[0]))] * len(lists)
    above = np.concatenate([one for one, _ in lists])
    coordinates = np.concatenate([other for _, other in lists])
    names = None
    if groups * size >= _MOST_KEYS:
        names, coordinates = np.unique(coordinates, return_inverse=True)
        size = len(names)
    keys, rows = np.unique(above * size + coordinates, return_inverse=True)
    found = keys % size
    ends = np.cumsum([len(one) for one, _ in lists])[:-1]
    return keys // size, found if names is None else names[found], np.split(rows, ends)


def _child(level: WalkLevel, nodes: Int64, coordinates: Int64) -> Int64:
    """The child of each node at a coordinate, -1 if it has none."""
    if isinstance(level, Dense):
        return np.where(nodes >= 0, nodes * level.size + coordinates, -1)
    start, stop = children(level, nodes)
    position = search_windows(level.crd, start, stop, coordinates)
    there = position < stop
    there[there] = level.crd[position[there]] == coordinates[there]
    return np.where(there, position, -1)


def alive(frontier: Frontier, term: Term) -> NDArray[np.bool_]:
    """Return where all operands of a product have something."""
    found = np.ones(len(frontier.above), bool)
    for operand in term.operands:
        found &= frontier.nodes[operand] >= 0
    return found


def places(phase: Phase, frontiers: Sequence[Frontier], chosen: Int64) -> Int64:
    """Return the coordinates ``[n, loops]`` of chosen entries of the last frontier, in all loops up to its own."""
    columns = []
    for frontier in reversed(frontiers):
        columns.append(frontier.coordinates[chosen])
        chosen = frontier.above[chosen]
    found = np.stack(columns[::-1], axis=1)
    if phase.survivors is None:
        return found
    return np.concatenate([phase.survivors.places[found[:, 0]], found[:, 1:]], axis=1)


def survivors(phase: Phase, frontiers: Sequence[Frontier]) -> Survivors:
    """Return what a part leaves for the next phase; operands that no product needs any more are dropped."""
    terms = [term for term in phase.nest.terms if len(term.indices) > phase.loops[-1] + 1]
    if not frontiers:
        empty = np.zeros(0, np.int64)
        return Survivors(
            np.zeros((0, phase.loops[-1] + 1), np.int64), tuple(empty for _ in phase.nest.operands)
        )
    last = frontiers[-1]
    needed = [np.zeros(len(last.above), bool) for _ in last.nodes]
    for term in terms:
        mask = alive(last, term)
        for operand in term.operands:
            needed[operand] |= mask
    kept = np.logical_or.reduce([alive(last, term) for term in terms])
    kept[: last.opened] = False
    chosen = np.flatnonzero(kept)
    nodes = (
        np.where(need[chosen], every[chosen], -1) for need, every in zip(needed, last.nodes, strict=True)
    )
    return Survivors(places(phase, frontiers, chosen), tuple(nodes))
