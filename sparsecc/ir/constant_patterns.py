"""Sparse operands of nodes whose pattern is constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.algebra import Compressed, Dense, Tensor
from sparsecc.errors import SpecError

__all__ = ["constant_pattern", "csr_pattern"]


def constant_pattern(components: Sequence[onnx_ir.Value | None]) -> Tensor | None:
    """Return positions, coordinates and shape of a node as a CSR matrix of ones, checked; None if not all are constant.

    Raises:
        SpecError: they are no lists of integers of the right length, or the shape is negative.
        ModelError: positions or coordinates are malformed.
    """
    arrays: list[NDArray[np.int64]] = []
    for value in components:
        if value is None or value.const_value is None or value.is_graph_input():
            return None
        arrays.append(value.const_value.numpy())
    positions, coordinates, shape = arrays
    if (
        any(array.ndim != 1 or array.dtype.kind != "i" for array in arrays)
        or len(shape) != 2
        or not len(positions)
    ):
        raise SpecError("they must be lists of integers, and the shape two of them")
    rows, columns = (int(side) for side in shape)
    if min(rows, columns) < 0:
        raise SpecError(f"the shape is {rows} x {columns}")
    return csr_pattern(rows, columns, positions, coordinates).validated()


def csr_pattern(rows: int, columns: int, positions: NDArray[Any], coordinates: NDArray[Any]) -> Tensor:
    """Return a CSR matrix of ones, not checked."""
    levels = (Dense(rows), Compressed(columns, positions, coordinates))
    return Tensor((rows, columns), (0, 1), levels, np.broadcast_to(np.float32(1), len(coordinates)))
