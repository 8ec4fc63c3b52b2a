"""Which tiles of a weight become N:M and which stay dense. Arrays in, arrays out; no ONNX."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.sparse import keep_mask

__all__ = ["Tile", "TileSelection", "cheapest"]

_MAX_SIDE = 4096


@dataclass(frozen=True)
class Tile:
    """A tile of ``rows`` outputs by ``cols`` inputs; text form ``RxC``."""

    rows: int
    cols: int

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Return the tile written as ``RxC``.

        Raises:
            SpecError: another form, or a side out of range.
        """
        found = re.fullmatch(r"\s*([0-9]{1,4})x([0-9]{1,4})\s*", text)
        if found is None or not all(1 <= int(side) <= _MAX_SIDE for side in found.groups()):
            raise SpecError(f"unknown tile {text!r}: write RxC, outputs x inputs, each 1..{_MAX_SIDE}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def sums(self, matrix: NDArray[Any]) -> NDArray[np.float64]:
        """Return the sum over each tile of ``matrix [N, K]``; those at the edges may be smaller."""
        rows = np.add.reduceat(matrix, np.arange(0, matrix.shape[0], self.rows), axis=0, dtype=np.float64)
        return np.asarray(np.add.reduceat(rows, np.arange(0, matrix.shape[1], self.cols), axis=1))


@dataclass(frozen=True)
class TileSelection(Selection):
    """N:M in some tiles, everything in the others.

    ``sparsity`` is that of the whole weight, from 0 to what N:M everywhere gives. Tiles at the edges may be smaller
    than the others and count by the weights that they drop.

    Attributes:
        tile: size of a tile.
        ends: the sparse tiles are whole rows of tiles at the first or the last outputs.
    """

    tile: Tile = Tile(16, 64)
    ends: bool = False

    def describe(self) -> str:
        """Pattern, tiles and sparsity."""
        where = f"the first or last outputs, by {self.tile.rows}" if self.ends else f"tiles of {self.tile}"
        return f"{self.pattern} in {where} at sparsity {self.sparsity:g}"

    def part(self, squares: NDArray[Any], start: int, columns: int) -> Mask:
        """Return the mask ``[N, K]``: the sparse tiles are those whose dropped ``squares`` cost least.

        Raises:
            SpecError: asked about some of the columns only.
        """
        if start or squares.shape[1] != columns:
            raise SpecError("tiles are chosen by all columns at once")
        keep = keep_mask(squares, self.pattern)
        sparse = self._sparse_tiles(squares, keep)
        wide = sparse.repeat(self.tile.rows, 0)[: len(keep)].repeat(self.tile.cols, 1)[:, : keep.shape[1]]
        return np.asarray(keep | ~wide)

    def sparse_rows(self, squares: NDArray[Any]) -> slice:
        """Return which outputs are N:M; only where these are ``ends``."""
        sparse = self._sparse_tiles(squares, keep_mask(squares, self.pattern))[:, 0]
        rows = np.flatnonzero(sparse.repeat(self.tile.rows)[: len(squares)])
        return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)

    def _sparse_tiles(self, squares: NDArray[Any], keep: Mask) -> Mask:
        """Return which tiles are N:M."""
        assert self.sparsity is not None, "the pass gives it"
        share = self.sparsity / (1 - self.pattern.n / self.pattern.m)
        costs, freed = self.tile.sums(np.where(keep, 0.0, squares)), self.tile.sums(~keep)
        if self.ends:
            return np.repeat(_cheaper_end(costs.sum(1), freed.sum(1), share)[:, None], costs.shape[1], 1)
        if self.scope == "row":
            return np.stack([cheapest(*row, share) for row in zip(costs, freed, strict=True)])
        return cheapest(costs.ravel(), freed.ravel(), share).reshape(costs.shape)


def cheapest(costs: NDArray[np.float64], freed: NDArray[np.float64], share: float) -> Mask:
    """Return which units to drop weights in, so that ``share`` of all that can be freed is.

    In the order of cost per freed weight, ties by index, the fewest that reach the share. No other choice that frees
    as much costs less, and what is chosen for a share is chosen for every larger one.

    Args:
        costs: ``[units]``, what it costs to make one sparse.
        freed: ``[units]``, how many weights it drops; units that drop none are never chosen.
        share: in [0, 1].
    """
    rate = np.divide(costs, freed, out=np.full(len(costs), np.inf), where=freed > 0)
    order = np.lexsort((np.arange(len(costs)), rate, freed == 0))
    order = order[: np.count_nonzero(freed)]
    chosen = np.zeros(len(costs), bool)
    chosen[order[: _fewest(freed[order], share)]] = True
    return chosen


def _cheaper_end(costs: NDArray[np.float64], freed: NDArray[np.float64], share: float) -> Mask:
    """Return which rows of tiles are sparse, all of them first or all last."""
    first, last = (np.zeros(len(costs), bool) for _ in range(2))
    first[: _fewest(freed, share)] = True
    last[len(costs) - _fewest(freed[::-1], share) :] = True
    return first if costs[first].sum() <= costs[last].sum() else last


def _fewest(freed: NDArray[np.float64], share: float) -> int:
    """Return how many of the first units free ``share`` of what all of them do."""
    reached = np.concatenate([[0.0], np.cumsum(freed)])
    return int(np.searchsorted(reached, (share - 1e-9) * reached[-1]))
