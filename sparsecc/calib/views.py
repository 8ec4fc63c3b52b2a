"""How an operator sees a tensor: the matrix ``X`` of reduction vectors, and its sums without ever building
it.

Each view turns one array into sums over the rows of ``X`` in float64; sums of several arrays add up. NumPy
only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["InBody", "Patches", "RowBlock", "Rows", "States", "Statistic", "Sums", "View", "outer"]

Statistic = Literal["mean", "mean_square", "gram"]

#: Rows of ``X`` in float64, ``[groups, n, K]``: a Conv of several groups has one ``X`` for each.
RowBlock = NDArray[np.float64]

#: Index of all pictures and channels, which those of the spatial axes follow.
_EVERY: tuple[Any, ...] = (slice(None), slice(None))

#: Elements of X converted to float64 at a time: 32 MB.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Sums:
    """A sum over the rows of ``X``, float64, and the number of rows."""

    total: NDArray[np.float64]
    rows: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.total + other.total, self.rows + other.rows)


class View(Protocol):
    """A way to read a tensor as the matrix of reduction vectors."""

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """Return the sum of rows (``mean``), of their squares, or of their outer products (``gram``)."""

    def rows(self, x: NDArray[Any], rng: np.random.Generator) -> Iterator[RowBlock]:
        """Yield the rows that ``gram`` sums over, some at a time.

        Two arrays of one shape and two generators of one state give the same rows, in the same blocks.
        """


@dataclass(frozen=True)
class Rows:
    """``X`` is the tensor ``[..., K]`` with all leading axes taken together.

    So see MatMul and Gemm their input, LSTM and GRU their input and their initial state.
    """

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """Sums of shape ``[K]``, or ``[K, K]`` for the Gram matrix."""
        matrix = x.reshape(-1, x.shape[-1])
        return Sums(_row_sums(matrix, statistic), len(matrix))

    def rows(self, x: NDArray[Any], rng: np.random.Generator) -> Iterator[RowBlock]:
        """All rows, as one group."""
        return (block[None] for block in _chunks(x.reshape(-1, x.shape[-1])))


@dataclass(frozen=True)
class InBody:
    """What a view sees inside a body of If, Loop or Scan, on the tensor as it shows outside.

    Attributes:
        view: of the tensor inside.
        stacked: leading axes that count the rounds of loops.
    """

    view: View
    stacked: int

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """The sums of ``view`` over all rounds; the tensor must not be empty."""
        rounds = x.reshape(-1, *x.shape[self.stacked :])
        total = self.view.sums(rounds[0], statistic, rng)
        for inside in rounds[1:]:
            total = total + self.view.sums(inside, statistic, rng)
        return total

    def rows(self, x: NDArray[Any], rng: np.random.Generator) -> Iterator[RowBlock]:
        """The rows of ``view``, round by round."""
        for inside in x.reshape(-1, *x.shape[self.stacked :]):
            yield from self.view.rows(inside, rng)


@dataclass(frozen=True)
class States:
    """``X`` is the states that a recurrent weight meets: all of a sequence but the last, whatever the
    direction.

    The tensor is the output ``Y`` ``[T, D, B, H]`` of LSTM or GRU. Both directions of a bidirectional layer
    are taken together, although each has a weight of its own.

    Attributes:
        directions: ``forward`` or ``reverse`` for each of the D directions.
        from_zero: the first state is zero; its rows count although they add nothing.
    """

    directions: tuple[str, ...]
    from_zero: bool

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """Sums of shape ``[H]``, or ``[H, H]`` for the Gram matrix."""
        steps, count, batch, _ = x.shape
        total = np.sum([_row_sums(part, statistic) for part in self._met(x)], axis=0)
        return Sums(total, (steps if self.from_zero else steps - 1) * count * batch)

    def rows(self, x: NDArray[Any], rng: np.random.Generator) -> Iterator[RowBlock]:
        """The states of all directions, as one group; zero states that a sequence starts from add nothing."""
        return (block[None] for part in self._met(x) for block in _chunks(part))

    def _met(self, x: NDArray[Any]) -> list[NDArray[Any]]:
        """Per direction the states ``[(T - 1) * B, H]`` that are multiplied."""
        return [
            (x[1:, number] if direction == "reverse" else x[:-1, number]).reshape(-1, x.shape[-1])
            for number, direction in enumerate(self.directions)
        ]


@dataclass(frozen=True)
class Patches:
    """``X`` is the patches that a convolution multiplies, unfolded from ``[B, C, spatial...]``.

    K runs over (C / groups, kernel...). Sums and squares are exact. The Gram matrix takes at most
    ``positions`` output positions of each array, drawn without replacement, the same for all its pictures.

    Attributes:
        kernel: size of the kernel per spatial axis.
        strides: step per spatial axis.
        dilations: distance of kernel entries per spatial axis.
        pads: zeros added, ONNX order: all begins, then all ends; ``None`` pads to ceil(size / stride)
            outputs.
        groups: number of groups.
        odd_first: with ``pads`` ``None``, an odd zero goes before the array (``SAME_LOWER``), else behind it.
        positions: most positions that a Gram matrix takes per picture.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    groups: int = 1
    odd_first: bool = False
    positions: int = 128

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """Sums of shape ``[K]`` or ``[K, K]``, with a leading axis ``groups`` where that is above 1."""
        if statistic == "gram":
            total, rows = _outer_sums(self.rows(x, rng))
        else:
            total, rows = self._moment(self._padded(x), statistic)
        return Sums(total[0] if self.groups == 1 else total, rows)

    def rows(self, x: NDArray[Any], rng: np.random.Generator) -> Iterator[RowBlock]:
        """Patches at the positions drawn, picture by picture, for each group."""
        padded = self._padded(x)
        outputs = self._outputs(padded)
        count = math.prod(outputs)
        chosen = np.arange(count)
        if count > self.positions:
            chosen = np.sort(rng.choice(count, self.positions, replace=False))
        index = self._patch_index(np.unravel_index(chosen, outputs))
        length = padded.shape[1] // self.groups * math.prod(self.kernel)
        step = max(1, _CHUNK // (len(chosen) * self.groups * length))
        for start in range(0, len(padded), step):
            patches = padded[start : start + step][_EVERY + index]
            split = patches.reshape(len(patches), self.groups, -1, *patches.shape[2:])
            by_group = np.moveaxis(split, (1, 3), (0, 2))
            yield by_group.reshape(self.groups, -1, length).astype(np.float64)

    def _padded(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.pad(x, [(0, 0), (0, 0), *self._pads(x.shape[2:])])

    def _pads(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """Zeros before and behind each spatial axis."""
        rank = len(self.kernel)
        if self.pads is not None:
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        pads = []
        for size, kernel, stride, dilation in zip(
            sizes, self.kernel, self.strides, self.dilations, strict=True
        ):
            zeros = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            less, more = zeros // 2, zeros - zeros // 2
            pads.append((more, less) if self.odd_first else (less, more))
        return pads

    def _outputs(self, padded: NDArray[Any]) -> tuple[int, ...]:
        """Number of output positions per spatial axis."""
        return tuple(
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                padded.shape[2:], self.kernel, self.strides, self.dilations, strict=True
            )
        )

    def _moment(self, padded: NDArray[Any], statistic: Statistic) -> tuple[NDArray[np.float64], int]:
        """Per kernel entry, one strided sum over the array already summed over the batch: no unfolding."""
        summed = np.zeros(padded.shape[1:], np.float64)
        for picture in padded:
            wide = picture.astype(np.float64)
            summed += np.square(wide) if statistic == "mean_square" else wide
        outputs = self._outputs(padded)
        channels = padded.shape[1]
        total = np.empty((channels, math.prod(self.kernel)), np.float64)
        for number, entry in enumerate(itertools.product(*map(range, self.kernel))):
            window = tuple(
                slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
                for at, dilation, count, stride in zip(
                    entry, self.dilations, outputs, self.strides, strict=True
                )
            )
            total[:, number] = summed[(slice(None), *window)].reshape(channels, -1).sum(1)
        return total.reshape(self.groups, -1), len(padded) * math.prod(outputs)

    def _patch_index(self, positions: tuple[NDArray[np.intp], ...]) -> tuple[NDArray[np.intp], ...]:
        """Per spatial axis an index that broadcasts to ``[positions, kernel...]``."""
        rank = len(self.kernel)
        index = []
        for axis, position in enumerate(positions):
            shape = [1] * (rank + 1)
            shape[axis + 1] = self.kernel[axis]
            offsets = (np.arange(self.kernel[axis]) * self.dilations[axis]).reshape(shape)
            starts = (position * self.strides[axis]).reshape(-1, *[1] * rank)
            index.append(starts + offsets)
        return tuple(index)


def _outer_sums(blocks: Iterator[RowBlock]) -> tuple[NDArray[np.float64], int]:
    """Sum of outer products ``[groups, K, K]`` and the number of rows; there is at least one block."""
    first = next(blocks)
    total, count = outer(first), first.shape[1]
    for block in blocks:
        total += outer(block)
        count += block.shape[1]
    return total, count


def outer(block: RowBlock) -> NDArray[np.float64]:
    """Return the sum of the outer products of the rows of each group, ``[groups, K, K]``."""
    # Group by group: of a matrix and its own transpose BLAS computes one half only.
    return np.stack([rows.T @ rows for rows in block])


def _row_sums(matrix: NDArray[Any], statistic: Statistic) -> NDArray[np.float64]:
    width = matrix.shape[1]
    total = np.zeros((width, width) if statistic == "gram" else width, np.float64)
    for rows in _chunks(matrix):
        if statistic == "gram":
            total += rows.T @ rows
        elif statistic == "mean_square":
            total += np.square(rows, out=rows).sum(0)
        else:
            total += rows.sum(0)
    return total


def _chunks(matrix: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step].astype(np.float64)
