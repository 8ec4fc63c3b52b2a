"""Packed weights that read the same input, stacked to one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.errors import ModelError
from sparsecc.sparse.gaps import pack_gaps
from sparsecc.sparse.quantized import QuantizedTensor
from sparsecc.sparse.tensor import SparseTensor

__all__ = ["stack_outputs"]


def stack_outputs(
    weights: Sequence[SparseTensor] | Sequence[QuantizedTensor],
) -> SparseTensor | QuantizedTensor:
    """Return the weight ``[N1 + N2 + ..., K]`` whose outputs are those of ``weights``, one after the other.

    Args:
        weights: of one pattern and one K; the outputs of all but the last fill whole blocks.

    Raises:
        ModelError: they do not fit together, or one is malformed.
    """
    first = weights[0]
    rows = first.pattern.rows if first.pattern.kind == "block" else 1
    if any(w.pattern != first.pattern or w.shape[1] != first.shape[1] for w in weights):
        raise ModelError("packed weights of different patterns or inputs cannot be stacked")
    if any(w.values.dtype != first.values.dtype for w in weights):
        raise ModelError("packed weights whose values are of different types cannot be stacked")
    if any(w.shape[0] % rows for w in weights[:-1]):
        raise ModelError(f"packed weights whose outputs do not fill blocks of {rows} cannot be stacked")
    positions, cells = [], 0
    for weight in weights:
        positions.append(weight.validate() + cells)
        grid = weight.pattern.grid(weight.shape)
        cells += grid[0] * grid[1]
    shape = (sum(w.shape[0] for w in weights), first.shape[1])
    indices = pack_gaps(np.concatenate(positions))
    values = np.concatenate([w.values for w in weights])
    scales = [w.scales for w in weights if isinstance(w, QuantizedTensor)]
    if scales:
        return QuantizedTensor(first.pattern, shape, values, indices, np.concatenate(scales))
    return SparseTensor(first.pattern, shape, values, indices)
