"""A weight in packed form: kept values plus a gap stream. The C library reads the same bytes (c_api.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse.floats import FLOATS, Floats, floats_of, holds
from sparsecc.sparse.gaps import pack_gaps, unpack_gaps
from sparsecc.sparse.mask import block_view, group_planes, keep_mask
from sparsecc.sparse.pattern import Pattern

__all__ = ["LAYOUT_VERSION", "SparseTensor"]

LAYOUT_VERSION = 1
"""Version of the byte format; a changed layout takes a new number."""


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A packed matrix ``[N outputs, K inputs]``.

    Attributes:
        pattern: ``unstructured``, N:M or blocks; its text is the layout name.
        shape: (N, K).
        values: of a type in ``FLOATS``; 1-D in row-major order, or ``[blocks, R, C]`` with zeros beyond the edge.
        indices: uint8 gap stream over the row-major positions of the values in ``pattern.grid(shape)``.
    """

    pattern: Pattern
    shape: tuple[int, int]
    values: NDArray[Any]
    indices: NDArray[np.uint8]

    @classmethod
    def encode(cls, dense: NDArray[Any], pattern: Pattern) -> SparseTensor:
        """Pack a matrix ``[N, K]`` of any float dtype as float32; its non-zeros must obey the pattern.

        Blocks with any non-zero are stored whole. Where an N:M group has fewer than n non-zeros, zeros of
        lowest index are stored to fill it.

        Raises:
            ModelError: a group holds more than n non-zeros.
            SpecError: the pattern is dense, or the array no matrix.
        """
        if dense.ndim != 2:
            raise SpecError(f"only a matrix [outputs, inputs] can be packed, got shape {dense.shape}")
        if pattern.kind == "dense":
            raise SpecError("a dense weight has no packed form: use unstructured, N:M or RxC")
        shape = (int(dense.shape[0]), int(dense.shape[1]))
        dense = dense.astype(np.float32, copy=False)
        if pattern.kind == "block":
            blocks = block_view(dense, pattern).transpose(0, 2, 1, 3)
            kept = (blocks != 0).any((2, 3))
            values = blocks[kept]
        else:
            kept = _kept_entries(dense, pattern)
            values = dense[kept]
        return cls(pattern, shape, np.ascontiguousarray(values), pack_gaps(np.flatnonzero(kept)))

    @property
    def floats(self) -> Floats:
        """Type of the values; raises ``ModelError`` where it is none that an operator takes."""
        return floats_of(self.values.dtype)

    def stored_as(self, floats: Floats) -> SparseTensor:
        """Return the same weight with its values in another type.

        Raises:
            SpecError: a value is no number of that type.
        """
        if not holds(self.values.astype(np.float32), floats):
            raise SpecError(f"a weight is no {floats} number: round the weights first (round-weights)")
        with np.errstate(invalid="ignore"):  # NaN stays what it is
            values = self.values.astype(FLOATS[floats])
        return SparseTensor(self.pattern, self.shape, values, self.indices)

    def decode(self) -> NDArray[np.float32]:
        """Return the dense float32 matrix ``[N, K]``; validates first.

        Raises:
            ModelError: as ``validate``.
        """
        positions = self.validate()
        grid = self.pattern.grid(self.shape)
        if self.pattern.kind != "block":
            dense = np.zeros(self.shape, np.float32)
            dense.reshape(-1)[positions] = self.values
            return dense
        rows, cols = self.pattern.rows, self.pattern.cols
        blocks = np.zeros((grid[0] * grid[1], rows, cols), np.float32)
        blocks[positions] = self.values
        whole = (
            blocks.reshape(*grid, rows, cols).transpose(0, 2, 1, 3).reshape(grid[0] * rows, grid[1] * cols)
        )
        return np.ascontiguousarray(whole[: self.shape[0], : self.shape[1]])

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices together."""
        return int(self.values.nbytes + self.indices.nbytes)

    @property
    def nnz(self) -> int:
        """Stored values that are not zero."""
        return int(np.count_nonzero(self.values))

    def validate(self) -> NDArray[np.int64]:
        """Return the positions in the grid, once everything a file could have wrong is checked.

        Raises:
            ModelError: wrong dtype or rank, an index out of range, counts that disagree, a broken group.
        """
        self._check_header()
        positions = unpack_gaps(self.indices)
        grid = self.pattern.grid(self.shape)
        if positions.size != len(self.values):
            raise ModelError(
                f"packed weight: {positions.size} positions for {len(self.values)} values; "
                "the file is damaged"
            )
        if positions.size and int(positions[-1]) >= grid[0] * grid[1]:
            raise ModelError(
                f"packed weight: position {positions[-1]} lies outside the grid {grid}; the file is damaged"
            )
        if self.pattern.kind == "nm":
            self._check_groups(positions)
        return positions

    def _check_header(self) -> None:
        if self.pattern.kind == "dense":
            raise ModelError("packed weight: layout 'dense' has no packed form")
        if len(self.shape) != 2 or any(not isinstance(side, int) or side < 0 for side in self.shape):
            raise ModelError(f"packed weight: shape must be two lengths, got {self.shape}")
        tail = (self.pattern.rows, self.pattern.cols) if self.pattern.kind == "block" else ()
        floats_of(self.values.dtype)
        if self.values.ndim != 1 + len(tail) or self.values.shape[1:] != tail:
            expected = f"[blocks, {tail[0]}, {tail[1]}]" if tail else "1-D"
            raise ModelError(
                f"packed weight: layout {self.pattern} wants values {expected}, got {list(self.values.shape)}"
            )

    def _check_groups(self, positions: NDArray[np.int64]) -> None:
        rows, cols = self.shape
        n, m = self.pattern.n, self.pattern.m
        groups = -(-cols // m)
        wanted = np.minimum(n, cols - m * np.arange(groups))
        if positions.size != rows * int(wanted.sum()):  # before anything of the claimed size is allocated
            raise ModelError(
                f"packed weight: {positions.size} values, layout {self.pattern} of {rows}x{cols} wants "
                f"{rows * int(wanted.sum())}"
            )
        row, col = np.divmod(positions, max(cols, 1))
        counts = np.bincount(row * groups + col // m, minlength=rows * groups).reshape(rows, groups)
        if (counts != wanted).any():
            at_row, at_group = np.argwhere(counts != wanted)[0]
            raise ModelError(
                f"packed weight: group {at_group} of row {at_row} keeps {counts[at_row, at_group]} values, "
                f"layout {self.pattern} wants {wanted[at_group]}"
            )


def _kept_entries(dense: NDArray[np.float32], pattern: Pattern) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = dense != 0
    if pattern.kind != "nm":
        return kept
    counts = group_planes(kept, pattern.m, False).sum(0, dtype=np.int8)
    if counts.max(initial=0) > pattern.n:
        row, group = np.argwhere(counts > pattern.n)[0]
        raise ModelError(
            f"group {group} of row {row} has {counts[row, group]} non-zeros, more than {pattern} allows: "
            f"prune to {pattern} first, or pack as unstructured"
        )
    return keep_mask(kept, pattern)
