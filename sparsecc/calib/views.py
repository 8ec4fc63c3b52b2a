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

__all__ = ["InBody", "Patches", "Rows", "States", "Statistic", "Sums", "View"]

Statistic = Literal["mean", "mean_square", "gram"]

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


@dataclass(frozen=True)
class Rows:
    """``X`` is the tensor ``[..., K]`` with all leading axes taken together.

    So see MatMul and Gemm their input, LSTM and GRU their input and their initial state.
    """

    def sums(self, x: NDArray[Any], statistic: Statistic, rng: np.random.Generator) -> Sums:
        """Sums of shape ``[K]``, or ``[K, K]`` for the Gram matrix."""
        matrix = x.reshape(-1, x.shape[-1])
        return Sums(_row_sums(matrix, statistic), len(matrix))


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
        steps, count, batch, width = x.shape
        kept = [
            x[1:, number] if direction == "reverse" else x[:-1, number]
            for number, direction in enumerate(self.directions)
        ]
        total = np.sum([_row_sums(part.reshape(-1, width), statistic) for part in kept], axis=0)
        return Sums(total, (steps if self.from_zero else steps - 1) * count * batch)


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
        padded = np.pad(x, [(0, 0), (0, 0), *self._pads(x.shape[2:])])
        total, rows = self._gram(padded, rng) if statistic == "gram" else self._moment(padded, statistic)
        return Sums(total[0] if self.groups == 1 else total, rows)

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

    def _gram(self, padded: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[np.float64], int]:
        outputs = self._outputs(padded)
        count = math.prod(outputs)
        chosen = np.arange(count)
        if count > self.positions:
            chosen = np.sort(rng.choice(count, self.positions, replace=False))
        index = self._patch_index(np.unravel_index(chosen, outputs))
        length = padded.shape[1] // self.groups * math.prod(self.kernel)
        total = np.zeros((self.groups, length, length), np.float64)
        step = max(1, _CHUNK // (len(chosen) * self.groups * length))
        for start in range(0, len(padded), step):
            patches = padded[start : start + step][_EVERY + index]
            for group, block in enumerate(np.split(patches, self.groups, axis=1)):
                rows = np.moveaxis(block, 2, 1).reshape(-1, length).astype(np.float64)
                total[group] += rows.T @ rows
        return total, len(padded) * len(chosen)

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
