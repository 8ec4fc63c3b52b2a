"""A packed weight in bytes: int8 values with one scale per output, and the same stream of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse.gaps import pack_gaps
from sparsecc.sparse.pattern import Pattern
from sparsecc.sparse.tensor import SparseTensor

__all__ = ["QuantizedTensor", "ScaleMethod", "quantize_rows"]

ScaleMethod = Literal["absmax", "mse"]
"""How the scale of an output is chosen: its largest weight at 127, or the least squared error."""

_LEVELS = 127  # symmetric: -128 is never written
_SMALLEST = float(np.finfo(np.float32).tiny)
_SHRINK = np.linspace(0.35, 1.0, 27)  # candidates of "mse", as fractions of the absmax scale
_REFITS = 3


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A packed matrix ``[N outputs, K inputs]``: entry (n, k) is ``scales[n]`` times an int8 value.

    Attributes:
        pattern: ``unstructured``, N:M or blocks; its text is the layout name.
        shape: (N, K).
        values: int8; 1-D in row-major order, or ``[blocks, R, C]`` with zeros beyond the edge.
        indices: uint8 gap stream over the row-major positions of the values in ``pattern.grid(shape)``.
        scales: float32 ``[N]``, finite and positive.
    """

    pattern: Pattern
    shape: tuple[int, int]
    values: NDArray[np.int8]
    indices: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @classmethod
    def encode(cls, dense: NDArray[Any], pattern: Pattern, method: ScaleMethod = "absmax") -> QuantizedTensor:
        """Pack a matrix ``[N, K]`` of any float dtype; its non-zeros must obey the pattern.

        What is zero once it is rounded is dropped: blocks of nothing else, and weights of ``unstructured``.

        Raises:
            ModelError: a weight is NaN or infinite, or a group holds more than n non-zeros.
            SpecError: the pattern is dense, or the array no matrix.
        """
        if not np.isfinite(dense).all():
            raise ModelError("a weight is NaN or infinite: it has no int8 form")
        packed = SparseTensor.encode(dense, pattern)
        positions = packed.validate()
        height, width = (pattern.rows, pattern.cols) if pattern.kind == "block" else (1, 1)
        first = positions // max(pattern.grid(packed.shape)[1], 1) * height
        rows = (first[:, None] + np.arange(height)).ravel()
        codes, scales = quantize_rows(packed.values.reshape(-1, width), rows, packed.shape[0], method)
        stored = codes.reshape(packed.values.shape)
        if pattern.kind == "nm":  # the count of every group is part of the layout
            return cls(pattern, packed.shape, stored, packed.indices, scales)
        kept = stored.any(tuple(range(1, stored.ndim)))
        return cls(
            pattern, packed.shape, np.ascontiguousarray(stored[kept]), pack_gaps(positions[kept]), scales
        )

    @classmethod
    def from_codes(
        cls, codes: NDArray[np.int8], scales: NDArray[np.float32], pattern: Pattern
    ) -> QuantizedTensor:
        """Pack int8 ``codes [N, K]`` of ``scales [N]`` as they are; their non-zeros must obey the pattern.

        Raises:
            ModelError: a group holds more than n non-zeros.
            SpecError: the pattern is dense, or the array no matrix.
        """
        packed = SparseTensor.encode(codes.astype(np.float32), pattern)
        return cls(pattern, packed.shape, packed.values.astype(np.int8), packed.indices, scales)

    def decode(self) -> NDArray[np.float32]:
        """Return the dense float32 matrix ``[N, K]``; validates first.

        Raises:
            ModelError: as ``validate``.
        """
        return self.decode_codes().astype(np.float32) * self.scales[:, None]

    def decode_codes(self) -> NDArray[np.int8]:
        """Return the dense int8 matrix ``[N, K]``, without the scales; validates first.

        Raises:
            ModelError: as ``validate``.
        """
        self.validate()
        return self._as_floats().decode().astype(np.int8)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scales together."""
        return int(self.values.nbytes + self.indices.nbytes + self.scales.nbytes)

    @property
    def nnz(self) -> int:
        """Stored values that are not zero."""
        return int(np.count_nonzero(self.values))

    def validate(self) -> NDArray[np.int64]:
        """Return the positions in the grid, once everything a file could have wrong is checked.

        Raises:
            ModelError: wrong dtype or rank, an index out of range, counts that disagree, a scale that is not
                finite and positive.
        """
        if self.values.dtype != np.int8:
            raise ModelError(f"packed weight: values must be int8, got {self.values.dtype}")
        positions = self._as_floats().validate()
        if self.scales.dtype != np.float32 or self.scales.shape != self.shape[:1]:
            raise ModelError(
                f"packed weight: scales must be float32 [{self.shape[0]}], "
                f"got {self.scales.dtype} {list(self.scales.shape)}"
            )
        if not (np.isfinite(self.scales) & (self.scales > 0)).all():
            raise ModelError("packed weight: a scale is not a finite positive number; the file is damaged")
        return positions

    def _as_floats(self) -> SparseTensor:
        return SparseTensor(self.pattern, self.shape, self.values.astype(np.float32), self.indices)


def quantize_rows(
    values: NDArray[np.float32], rows: NDArray[np.int64], outputs: int, method: ScaleMethod = "absmax"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 codes in -127..127, shaped like ``values``, and one float32 scale per output.

    ``mse`` tries smaller scales, which clip the largest weights, refits each to its codes by least squares,
    and keeps the best for every output; it is never worse than ``absmax`` by more than float32 rounding.

    Args:
        values: ``[pieces, C]`` weights.
        rows: ``[pieces]``: the output each piece belongs to; those of blocks at the edge reach beyond N.
        outputs: N. An output without a weight gets the scale 1.
        method: ``absmax`` or ``mse``.

    Raises:
        SpecError: an unknown method.
    """
    if method not in get_args(ScaleMethod):
        raise SpecError(f"unknown method {method!r} for int8 scales: {', '.join(get_args(ScaleMethod))}")
    weights = values.astype(np.float64)
    count = max(outputs, int(rows.max(initial=-1)) + 1)
    largest = np.zeros(count)
    np.maximum.at(largest, rows, np.abs(weights).max(1, initial=0.0))
    absmax = _stored_scales(np.where(largest > 0, largest / _LEVELS, 1.0))
    best = absmax
    if method == "mse":
        error = _row_error(weights, rows, absmax)
        for fraction in _SHRINK:
            scales = absmax * fraction
            for _ in range(_REFITS):
                scales = _refit(weights, rows, scales)
            scales = _stored_scales(scales)
            now = _row_error(weights, rows, scales)
            best, error = np.where(now < error, scales, best), np.minimum(now, error)
    return _codes(weights, rows, best).astype(np.int8), best[:outputs].astype(np.float32)


def _stored_scales(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is left of scales in float32, none of them zero."""
    return np.maximum(scales.astype(np.float32), _SMALLEST).astype(np.float64)


def _codes(values: NDArray[np.float64], rows: NDArray[np.int64], scales: NDArray[np.float64]) -> NDArray[Any]:
    codes = values / scales[rows][:, None]
    np.clip(np.rint(codes, out=codes), -_LEVELS, _LEVELS, out=codes)
    return codes


def _row_sums(terms: NDArray[np.float64], rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.bincount(rows, terms.sum(1), minlength=count).astype(np.float64, copy=False)


def _row_error(
    values: NDArray[np.float64], rows: NDArray[np.int64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    error = values - _codes(values, rows, scales) * scales[rows][:, None]
    return _row_sums(error * error, rows, scales.size)


def _refit(
    values: NDArray[np.float64], rows: NDArray[np.int64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The scales that fit the codes best."""
    codes = _codes(values, rows, scales)
    above, below = (_row_sums(terms, rows, scales.size) for terms in (values * codes, codes * codes))
    return np.where((below > 0) & (above > 0), above / np.where(below > 0, below, 1.0), scales)
