"""Sparse tensors as trees of coordinates, one storage level per mode. NumPy only.

A tensor is a list of levels from the root to its values. A node of a level is a stored coordinate; its children are
a range of positions of the next level. ``Dense`` levels store every coordinate, ``Compressed`` levels the sorted ones
that are there, and a ``Singleton`` level gives each node of the level above one coordinate (COO).

=======  ==========================================
format   levels
=======  ==========================================
csr      dense, compressed
csc      dense, compressed, modes in order (1, 0)
dcsr     compressed, compressed
csf      compressed, compressed, ...
coo      compressed with repetitions, singleton, ...
=======  ==========================================

The names are those of the level formats of Chou, Kjolstad and Amarasinghe (OOPSLA 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.entries import check_range, checked, ordered, refuse_disorder
from sparsecc.errors import ModelError, SpecError

__all__ = [
    "Compressed",
    "Dense",
    "Ints",
    "Level",
    "LevelFormat",
    "Singleton",
    "Tensor",
    "format_levels",
    "node_counts",
]

Ints = NDArray[np.integer[Any]]
LevelFormat = Literal["dense", "compressed", "singleton"]

#: Values that a tensor with dense levels may have, about 8 GB of float32: more is a mistake in the format.
MOST_VALUES = 1 << 31

#: Nodes of dense levels above a compressed one, 2 GB of positions, unless there are about as many entries.
MOST_PARENTS = 1 << 28


@dataclass(frozen=True, eq=False)
class Dense:
    """A level that has all coordinates: the child ``c`` of node ``p`` is at ``p * size + c``.

    Attributes:
        size: of the mode.
    """

    size: int

    def count(self, parents: int) -> int:
        """Nodes of this level below that many of the one above."""
        return parents * self.size


@dataclass(frozen=True, eq=False)
class Compressed:
    """A level that has some coordinates: the children of node ``p`` are at ``pos[p] .. pos[p + 1]``.

    Attributes:
        size: of the mode.
        pos: ``[parents + 1]``, rising.
        crd: the coordinates, rising among the children of one node.
        unique: no two children of one node are equal; else they are the entries of one coordinate, as COO has them.
    """

    size: int
    pos: Ints
    crd: Ints
    unique: bool = True

    def count(self, parents: int) -> int:
        """Nodes of this level."""
        return len(self.crd)


@dataclass(frozen=True, eq=False)
class Singleton:
    """A level in which each node of the one above has exactly one child, at its own position.

    Attributes:
        size: of the mode.
        crd: the coordinates.
    """

    size: int
    crd: Ints

    def count(self, parents: int) -> int:
        """Nodes of this level, as many as above."""
        return parents


Level = Dense | Compressed | Singleton


def node_counts(levels: Sequence[Level]) -> tuple[int, ...]:
    """Return how many coordinates each level stores, the outermost first."""
    found, count = [], 1
    for level in levels:
        count = level.count(count)
        found.append(count)
    return tuple(found)


def format_levels(name: str, modes: int) -> tuple[LevelFormat, ...]:
    """Return the formats of the levels of a tensor with so many modes, from a name or a list with commas.

    Raises:
        SpecError: an unknown name, or a list of another length.
    """
    known: dict[str, tuple[LevelFormat, ...]] = {
        "dense": _repeated("dense", modes),
        "csr": ("dense", "compressed"),
        "csc": ("dense", "compressed"),
        "dcsr": ("compressed", "compressed"),
        "csf": _repeated("compressed", modes),
        "coo": ("compressed", *_repeated("singleton", modes - 1)),
    }
    given = known.get(name)
    if given is None:
        parts = [part.strip() for part in name.split(",")]
        if not all(part in ("dense", "compressed", "singleton") for part in parts):
            raise SpecError(
                f"unknown format '{name}'; known: {', '.join(known)}, or dense|compressed|singleton for each mode"
            )
        given = tuple(parts)  # type: ignore[arg-type]  # checked above
    if len(given) != modes:
        raise SpecError(f"format {name} has {len(given)} levels; the tensor has {modes} modes")
    if "singleton" in given and given != known["coo"]:
        raise SpecError(f"format {name}: singleton levels follow one compressed level, as in coo")
    return given


def _repeated(form: LevelFormat, count: int) -> tuple[LevelFormat, ...]:
    return (form,) * count


@dataclass(frozen=True, eq=False)
class Tensor:
    """A sparse tensor of any order.

    Attributes:
        shape: sizes of the modes.
        order: mode that each level stores, the outermost first.
        levels: one per mode.
        values: one per node of the last level.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    levels: tuple[Level, ...]
    values: NDArray[Any]

    @classmethod
    def from_coordinates(
        cls,
        coordinates: NDArray[Any],
        values: NDArray[Any],
        shape: Sequence[int],
        format: str = "csf",
        order: Sequence[int] | None = None,
        *,
        sum_duplicates: bool = False,
    ) -> Tensor:
        """Pack entries given in any order.

        Args:
            coordinates: ``[entries, modes]`` integers.
            values: ``[entries]``.
            shape: sizes of the modes.
            format: a name or a list, see ``format_levels``.
            order: of the modes, the outermost first; (1, 0) for ``csc``, else as they are.
            sum_duplicates: add up entries at the same place instead of refusing them.

        Raises:
            ModelError: a coordinate is out of range or there twice, or the dense levels would be too large.
            SpecError: a wrong format or order.
        """
        shape = tuple(int(size) for size in shape)
        modes = len(shape)
        formats = format_levels(format, modes)
        chosen = tuple(order) if order is not None else (1, 0) if format == "csc" else tuple(range(modes))
        if sorted(chosen) != list(range(modes)):
            raise SpecError(f"order {chosen} is no permutation of the {modes} modes")
        entries = checked(coordinates, values, shape)[:, list(chosen)]
        entries, values = ordered(entries, np.asarray(values), None if sum_duplicates else chosen)
        return _packed(entries, values, shape, chosen, formats)

    @classmethod
    def from_scipy(cls, matrix: Any) -> Tensor:
        """Take over the arrays of a scipy sparse matrix or array in CSR, CSC, BSR or COO, the last one copied.

        BSR has four modes: rows and columns of blocks, rows and columns inside of one.

        Raises:
            ModelError: coordinates are unsorted, there twice or out of range.
            SpecError: another format.
        """
        if matrix.format == "coo":
            coordinates = np.stack(
                matrix.coords if hasattr(matrix, "coords") else (matrix.row, matrix.col), axis=1
            )
            return cls.from_coordinates(coordinates, matrix.data, matrix.shape, "coo")
        if matrix.format not in ("csr", "csc", "bsr"):
            raise SpecError(
                f"scipy format {matrix.format} is not taken: convert it with .tocsr(), .tocsc() or .tocoo()"
            )
        blocks = tuple(map(int, matrix.data.shape[1:]))
        shape = tuple(int(a) // b for a, b in zip(matrix.shape, blocks or (1, 1), strict=True))
        order = (1, 0) if matrix.format == "csc" else tuple(range(2 + len(blocks)))
        inside: list[Level] = [Dense(size) for size in blocks]
        levels = (Dense(shape[order[0]]), Compressed(shape[order[1]], matrix.indptr, matrix.indices), *inside)
        values = matrix.data.reshape(-1) if blocks else matrix.data
        return cls(shape + blocks, order, levels, values).validated()

    def to_scipy(self) -> Any:
        """Return a matrix as a scipy sparse array: CSR, CSC and BSR share their arrays, all else is copied to COO.

        Raises:
            SpecError: it has not two modes, and is not BSR.
        """
        import scipy.sparse

        stored, blocks = self.levels[1] if len(self.levels) > 1 else None, self.shape[2:]
        if isinstance(stored, Compressed) and self.formats[0] == "dense":
            if not blocks:
                kind = scipy.sparse.csr_array if self.order == (0, 1) else scipy.sparse.csc_array
                return kind((self.values, stored.crd, stored.pos), shape=self.shape)
            if self.formats[2:] == ("dense", "dense") and self.order == (0, 1, 2, 3) and all(blocks):
                values = self.values.reshape(-1, *blocks)
                shape = (self.shape[0] * blocks[0], self.shape[1] * blocks[1])
                return scipy.sparse.bsr_array((values, stored.crd, stored.pos), shape, blocksize=blocks)
        if len(self.shape) != 2:
            raise SpecError(f"scipy has matrices only, this tensor has {len(self.shape)} modes")
        return scipy.sparse.coo_array((self.values, tuple(self.coordinates().T)), shape=self.shape)

    @property
    def formats(self) -> tuple[LevelFormat, ...]:
        """Of the levels."""
        names: dict[type, LevelFormat] = {Dense: "dense", Compressed: "compressed", Singleton: "singleton"}
        return tuple(names[type(level)] for level in self.levels)

    @property
    def nodes(self) -> tuple[int, ...]:
        """Stored coordinates of each level."""
        return node_counts(self.levels)

    def coordinates(self) -> NDArray[np.int64]:
        """Return where the values are, ``[values, modes]`` in the order of the tensor's own modes."""
        columns = [np.zeros(len(self.values), np.int64) for _ in self.levels]
        nodes = np.arange(len(self.values))
        for at in range(len(self.levels) - 1, -1, -1):
            level = self.levels[at]
            if isinstance(level, Dense):
                nodes, columns[self.order[at]] = nodes // level.size, nodes % level.size
                continue
            columns[self.order[at]] = level.crd[nodes].astype(np.int64)
            if isinstance(level, Compressed):
                nodes = np.searchsorted(level.pos, nodes, side="right") - 1
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.values), 0), np.int64)

    def to_dense(self) -> NDArray[Any]:
        """Return the array of this shape."""
        dense = np.zeros(self.shape, self.values.dtype)
        np.add.at(dense, tuple(self.coordinates().T), self.values)
        return dense

    def converted(self, format: str, order: Sequence[int] | None = None) -> Tensor:
        """Return the same tensor in another format; zeros that dense levels hold are dropped by compressed ones."""
        coordinates, values = self.coordinates(), self.values
        if "dense" in self.formats[-1:]:
            kept = values != 0
            coordinates, values = coordinates[kept], values[kept]
        return Tensor.from_coordinates(coordinates, values, self.shape, format, order)

    def tree(self) -> Tensor:
        """Return it with unique levels: COO becomes CSF over the same values; others are as they are."""
        if "singleton" not in self.formats and all(
            not isinstance(level, Compressed) or level.unique for level in self.levels
        ):
            return self
        entries = self.coordinates()[:, list(self.order)]
        return _packed(
            entries, self.values, self.shape, self.order, _repeated("compressed", len(self.levels))
        )

    def validated(self) -> Tensor:
        """Return it.

        Raises:
            ModelError: positions do not fit, or coordinates are out of range, unsorted or there twice.
        """
        count = 1
        for number, level in enumerate(self.levels):
            where = f"level {number}"
            _check_arrays(level, where)
            if isinstance(level, Compressed):
                _check_positions(level, count, where)
            if not isinstance(level, Dense):
                check_range(level.crd, level.size, where)
            if isinstance(level, Singleton) and len(level.crd) != count:
                raise ModelError(f"{where} has {len(level.crd)} coordinates for {count} entries")
            count = level.count(count)
        if len(self.values) != count:
            raise ModelError(f"{len(self.values)} values for {count} stored coordinates")
        if "singleton" in self.formats:
            entries = self.coordinates()[:, list(self.order)]
            refuse_disorder(entries, self.order)
        return self

    def astype(self, dtype: Any) -> Tensor:
        """Return it with values of another type."""
        return replace(self, values=self.values.astype(dtype))


def _check_arrays(level: Level, where: str) -> None:
    for name in ("pos", "crd"):
        array = getattr(level, name, None)
        if array is not None and (np.ndim(array) != 1 or np.asarray(array).dtype.kind not in "iu"):
            raise ModelError(f"{where}: {name} must be a list of integers")


def _check_positions(level: Compressed, parents: int, where: str) -> None:
    pos, crd = level.pos, level.crd
    if len(pos) != parents + 1:
        raise ModelError(
            f"{where} has {len(pos)} positions for {parents} nodes above: there must be one more"
        )
    if int(pos[0]) != 0 or int(pos[-1]) != len(crd) or (pos[1:] < pos[:-1]).any():
        raise ModelError(f"{where}: positions must rise from 0 to {len(crd)}, the number of coordinates")
    falls = crd[1:] <= crd[:-1] if level.unique else crd[1:] < crd[:-1]
    starts = pos[1:-1][(pos[1:-1] > 0) & (pos[1:-1] < len(crd))]
    falls[starts - 1] = False  # the next node starts anew
    if falls.any():
        at = int(np.flatnonzero(falls)[0])
        what = "there twice" if crd[at] == crd[at + 1] else "unsorted"
        raise ModelError(
            f"{where}: coordinate {int(crd[at + 1])} is {what}; sort the entries, sum_duplicates adds them up"
        )


def _packed(
    entries: NDArray[np.int64],
    values: NDArray[Any],
    shape: tuple[int, ...],
    order: tuple[int, ...],
    formats: Sequence[LevelFormat],
) -> Tensor:
    """Build the levels of sorted, unique entries, whose columns are in the order of the levels."""
    levels: list[Level] = []
    nodes, count = np.zeros(len(entries), np.int64), 1
    for at, form in enumerate(formats):
        size, column = shape[order[at]], entries[:, at]
        if form == "singleton":
            levels.append(Singleton(size, column.copy()))
        elif form == "dense":
            nodes, count = nodes * size + column, count * size
            if count > MOST_VALUES:
                raise ModelError(
                    f"dense levels of {math.prod(shape)} values: choose compressed ones (csf, dcsr, coo)"
                )
            levels.append(Dense(size))
        else:
            if count > max(MOST_PARENTS, 8 * len(entries)):
                raise ModelError(
                    f"dense levels of {count} nodes over {len(entries)} entries: choose compressed ones "
                    "(csf, dcsr, coo)"
                )
            repeats = "singleton" in formats
            if repeats or at == len(formats) - 1:  # each entry has a node
                pos = np.searchsorted(nodes, np.arange(count + 1))
                levels.append(Compressed(size, pos, column.copy(), unique=not repeats))
                nodes, count = np.arange(len(entries)), len(entries)
                continue
            new = np.ones(len(entries), bool)
            new[1:] = (nodes[1:] != nodes[:-1]) | (column[1:] != column[:-1])
            pos = np.searchsorted(nodes[new], np.arange(count + 1))
            levels.append(Compressed(size, pos, column[new]))
            nodes = np.cumsum(new) - 1
            count = int(new.sum())
    stored = values
    if formats and formats[-1] == "dense":
        stored = np.zeros(count, values.dtype)
        stored[nodes] = values
    return Tensor(shape, order, tuple(levels), stored)
