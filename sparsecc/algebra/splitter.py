"""Cutting the work of co-iterated sparse tensors into equal parts, with a proof. NumPy only.

Several trees of coordinates are walked together in lexicographic order, parents before children. A coordinate prefix is
one event: all operands that have it are visited together and never separated. Its weight is the sum of their costs. A
cut is a place between two events; the work before it is the sum of all weights before it.

For every target ``q`` the cut that ``find_splits`` gives has ``q <= work before it <= q + H - 1``, H the largest weight
of an event. So a part of ``P`` equal ones has at most ``ceil(W / P) + H - 1`` work, and at least
``floor(W / P) - (H - 1)``. Nothing is merged on the way: positions of compressed levels are prefix sums already, and
each cut is a few binary searches.

This generalises merge path (Odeh et al. 2012; Merrill and Garland 2016) to any number of operands and to trees, as
Chougule et al. (2026, arXiv 2604.17198) do; costs of upper levels, exact targets and the bound are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Compressed, Dense, Ints, Singleton, Tensor, node_counts
from sparsecc.errors import SpecError

__all__ = ["SplitTable", "Walk", "even_targets", "find_splits", "split", "weighted_targets"]

Int64 = NDArray[np.int64]

#: Above this, sums of work and a cost could leave 64 bits.
_MOST_WORK = 1 << 62


@dataclass(frozen=True, eq=False)
class Walk:
    """One operand as a kernel walks it.

    Attributes:
        levels: in the order of the loops from the first on; fewer than there are loops if inner ones do not index it.
        costs: of visiting one coordinate of each level, 0 or more.
    """

    levels: tuple[Dense | Compressed, ...]
    costs: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.costs) or any(cost < 0 for cost in self.costs):
            raise SpecError(f"{len(self.levels)} levels need as many costs of 0 or more, got {self.costs}")
        for level in self.levels:
            if isinstance(level, Singleton) or (isinstance(level, Compressed) and not level.unique):
                raise SpecError("levels of a walk have unique coordinates: use tree() of a COO tensor")

    @classmethod
    def of(cls, tensor: Tensor, costs: Sequence[int] | None = None) -> Walk:
        """Return the walk over a tensor; by default each stored coordinate of each level costs 1."""
        levels = tensor.tree().levels
        return cls(levels, tuple(costs) if costs is not None else (1,) * len(levels))  # type: ignore[arg-type]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Stored coordinates of each level."""
        return node_counts(self.levels)

    @property
    def work(self) -> int:
        """Of all its coordinates."""
        return sum(cost * count for cost, count in zip(self.costs, self.nodes, strict=True))

    def descend(self, level: int, position: Int64) -> list[Int64]:
        """Where the children, grandchildren, … of the nodes of ``level`` from ``position`` on begin."""
        found = []
        for below in self.levels[level + 1 :]:
            position = (
                position * below.size if isinstance(below, Dense) else below.pos[position].astype(np.int64)
            )
            found.append(position)
        return found

    def before(self, level: int, position: Int64) -> Int64:
        """Work of all subtrees of the nodes of ``level`` before ``position``."""
        total = self.costs[level] * position
        for cost, below in zip(self.costs[level + 1 :], self.descend(level, position), strict=True):
            if cost:
                total = total + cost * below
        return np.asarray(total, np.int64)


@dataclass(frozen=True, eq=False)
class SplitTable:
    """Where the parts of a walk begin and end.

    Attributes:
        work: of the whole walk, W.
        header: H, the most that one event can weigh.
        targets: ``[parts + 1]``, the work that was asked for before each cut.
        cursors: per operand ``[levels, parts + 1]``: coordinates of each level that lie before each cut.
        paths: ``[parts + 1, loops]``: coordinates of the event just before the cut; -1 below it, and at both ends.
        costs: per operand, of its levels.
    """

    work: int
    header: int
    targets: Int64
    cursors: tuple[Int64, ...]
    paths: Int64
    costs: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self.targets) - 1

    def part_work(self) -> Int64:
        """Work of each part."""
        before = sum(
            (
                np.asarray(cost, np.int64) @ cursor
                for cost, cursor in zip(self.costs, self.cursors, strict=True)
            ),
            np.zeros(len(self.targets), np.int64),
        )
        return np.diff(before)

    @property
    def bound(self) -> int:
        """The most work that a part can have: the largest share asked for and H - 1."""
        shares = np.diff(self.targets)
        return (int(shares.max()) if len(shares) else 0) + max(self.header - 1, 0)

    @property
    def balance(self) -> float:
        """Largest work of a part / mean; 1 where there is no work."""
        return float(self.part_work().max()) * self.parts / self.work if self.work else 1.0


def even_targets(work: int, parts: int) -> Int64:
    """Return ``floor(part * work / parts)`` for part 0 to ``parts``: tables for divisors of ``parts`` nest."""
    return np.array([part * work // parts for part in range(parts + 1)], np.int64)


def weighted_targets(work: int, speeds: Sequence[float]) -> Int64:
    """Return targets that give each worker work in proportion to its speed.

    Raises:
        SpecError: no speed, or one that is not above 0 and finite.
    """
    if not len(speeds) or not all(0 < speed < float("inf") for speed in speeds):
        raise SpecError(f"speeds must be above 0 and finite, got {list(speeds)}")
    exact = [Fraction(speed) for speed in speeds]
    total, done, found = sum(exact), Fraction(0), [0]
    for speed in exact:
        done += speed
        found.append(int(done * work / total))
    return np.array(found, np.int64)


def split(
    walks: Sequence[Walk], parts: int | None = None, speeds: Sequence[float] | None = None
) -> SplitTable:
    """Cut the union of ``walks`` into equal parts, or into parts in proportion to the speeds of unequal workers.

    Args:
        walks: of the operands that are walked; those that are only looked up do not count.
        parts: how many, 1 or more; instead of ``speeds``.
        speeds: of the workers.

    Raises:
        SpecError: walks of different sizes, too much work for 64 bits, or wrong parts or speeds.
    """
    work = _total(walks)
    if (parts is None) == (speeds is None):
        raise SpecError("give either parts or speeds")
    if parts is not None and parts < 1:
        raise SpecError(f"parts must be 1 or more, got {parts}")
    targets = even_targets(work, parts) if parts is not None else weighted_targets(work, speeds or ())
    cursors, paths = find_splits(walks, targets)
    for walk, cursor in zip(walks, cursors, strict=True):
        cursor[:, -1] = walk.nodes  # coordinates of cost 0 behind the last event that counts
    paths[-1] = -1
    return SplitTable(
        work, _header(walks), targets, tuple(cursors), paths, tuple(walk.costs for walk in walks)
    )


def _loops(walks: Sequence[Walk]) -> list[int]:
    """Sizes of the loops that the walks share."""
    depth = max((len(walk.levels) for walk in walks), default=0)
    sizes = []
    for loop in range(depth):
        found = {walk.levels[loop].size for walk in walks if loop < len(walk.levels)}
        if len(found) > 1:
            raise SpecError(f"loop {loop} has different sizes: {', '.join(map(str, sorted(found)))}")
        sizes.append(found.pop())
    return sizes


def _total(walks: Sequence[Walk]) -> int:
    work = sum(walk.work for walk in walks)
    if work > _MOST_WORK:
        raise SpecError(f"work of {work} steps does not fit into 64 bits")
    return work


def _header(walks: Sequence[Walk]) -> int:
    depth = max((len(walk.levels) for walk in walks), default=0)
    return max(
        (sum(walk.costs[loop] for walk in walks if loop < len(walk.levels)) for loop in range(depth)),
        default=0,
    )


def find_splits(walks: Sequence[Walk], targets: Int64) -> tuple[list[Int64], Int64]:
    """Return, for all targets at once, what lies before the cut, and the path to the event just before it.

    Args:
        walks: the operands.
        targets: ``[n]``, each from 0 to the whole work.

    Returns:
        Per operand ``[levels, n]`` coordinates before the cut, and paths ``[n, loops]`` (see ``SplitTable``).
    """
    sizes, count = _loops(walks), len(targets)
    left = targets.astype(np.int64)
    cursors = [np.zeros((len(walk.levels), count), np.int64) for walk in walks]
    paths = np.full((count, len(sizes)), -1, np.int64)
    searching = left > 0
    active = [searching.copy() for _ in walks]
    windows = [_root(walk, count) for walk in walks]
    for loop, size in enumerate(sizes):
        some = np.flatnonzero(searching)
        if not len(some):
            break
        present = [at for at, walk in enumerate(walks) if loop < len(walk.levels)]
        chosen, found, passed = _largest_before(walks, loop, size, left, active, windows, present, some)
        left[some] -= passed
        paths[some, loop] = chosen
        for at in present:
            walk, mine = walks[at], active[at][some]
            position = found[at]
            stored = mine & _stores(walk.levels[loop], position, windows[at][1][some], chosen)
            own, rows = position[mine], some[mine]
            cursors[at][loop, rows] = own + stored[mine]
            for below, start in enumerate(walk.descend(loop, own), loop + 1):
                cursors[at][below, rows] = start
            left[some[stored]] -= walk.costs[loop]
            active[at][some[mine & ~stored]] = False
            for border in windows[at]:  # an empty window: no more of this operand
                border[some[~stored]] = 0
            if loop + 1 < len(walk.levels):
                windows[at][0][some[stored]], windows[at][1][some[stored]] = _children(
                    walk.levels[loop + 1], position[stored]
                )
        for at, walk in enumerate(walks):
            if loop + 1 >= len(walk.levels):
                active[at][:] = False
        searching &= left > 0
        for mask in active:
            mask &= searching
    return cursors, paths


def _root(walk: Walk, count: int) -> tuple[Int64, Int64]:
    zero = np.zeros(count, np.int64)
    return _children(walk.levels[0], zero) if walk.levels else (zero, zero.copy())


def _children(level: Dense | Compressed, position: Int64) -> tuple[Int64, Int64]:
    if isinstance(level, Dense):
        return position * level.size, (position + 1) * level.size
    return level.pos[position].astype(np.int64), level.pos[position + 1].astype(np.int64)


def _largest_before(
    walks: Sequence[Walk],
    loop: int,
    size: int,
    left: Int64,
    active: Sequence[NDArray[np.bool_]],
    windows: Sequence[tuple[Int64, Int64]],
    present: Sequence[int],
    some: Int64,
) -> tuple[Int64, dict[int, Int64], Int64]:
    """Bisect the coordinates of one loop for the targets ``some``.

    Returns the largest coordinate before which there is less work than what is left, the position of it in each
    operand, and the work before it.
    """
    wanted = left[some]
    low, high = np.zeros(len(some), np.int64), np.full(len(some), size, np.int64)
    start = {at: walks[at].before(loop, windows[at][0][some]) * active[at][some] for at in present}
    lower = {at: windows[at][0][some] for at in present}
    upper = {at: windows[at][1][some] for at in present}
    passed = np.zeros(len(some), np.int64)
    while (high - low > 1).any():
        middle = low + ((high - low) >> 1)  # the sum might not fit
        found, work = {}, np.zeros(len(some), np.int64)
        for at in present:
            walk = walks[at]
            window = (windows[at][0][some], windows[at][1][some])
            found[at] = _lower_bound(walk.levels[loop], lower[at], upper[at], window, middle)
            work += walk.before(loop, found[at]) * active[at][some] - start[at]
        less = (work < wanted) & (high - low > 1)
        for at in present:
            lower[at] = np.where(less, found[at], lower[at])
            upper[at] = np.where(less, upper[at], found[at])
        passed = np.where(less, work, passed)
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return low, lower, passed


def _lower_bound(
    level: Dense | Compressed, low: Int64, high: Int64, window: tuple[Int64, Int64], coordinate: Int64
) -> Int64:
    """First position from ``low`` to ``high``, inside the window, whose coordinate is not before ``coordinate``."""
    if isinstance(level, Dense):
        return np.asarray(np.minimum(window[0] + coordinate, window[1]))
    return search_windows(level.crd, low, high, coordinate)


def search_windows(values: Ints, low: Int64, high: Int64, wanted: Int64) -> Int64:
    """Return, for each window ``[low, high)`` of rising ``values``, the first position not below ``wanted``."""
    low, high = low.copy(), high.copy()
    while True:
        open_ = np.flatnonzero(low < high)
        if not len(open_):
            return low
        middle = (low[open_] + high[open_]) >> 1
        less = values[middle] < wanted[open_]
        low[open_[less]] = middle[less] + 1
        high[open_[~less]] = middle[~less]


def _stores(level: Dense | Compressed, position: Int64, end: Int64, coordinate: Int64) -> NDArray[np.bool_]:
    """Whether ``position`` is a node of this coordinate in a window that ends at ``end``."""
    if isinstance(level, Dense):
        return np.ones(len(position), bool)
    inside = position < end
    found = np.zeros(len(position), bool)
    found[inside] = level.crd[position[inside]] == coordinate[inside]
    return found
