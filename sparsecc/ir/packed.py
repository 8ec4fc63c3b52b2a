"""Reading back the sparse operators of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SparseccError
from sparsecc.ir.model import Model
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor

__all__ = ["PackedSite", "packed_sites"]

_LAST_PACKED_INPUT = 3  # x, then values, indices, shape; with int8 values also scales

# What the operator library takes (``weight.cc``): outputs and inputs, and their product.
_MAX_SIDE = 1 << 24
_MAX_GRID = 1 << 31


@dataclass(frozen=True)
class PackedSite:
    """A sparse operator of a model: node name, operator name and its packed weight [N, K]."""

    name: str
    op: str
    tensor: SparseTensor | QuantizedTensor


def packed_sites(model: Model) -> list[PackedSite]:
    """The sparse operators of ``model`` in graph order, subgraphs included.

    Raises:
        ModelError: a packed weight is malformed or not constant.
    """
    return [_packed(node) for graph in model.graphs() for node in graph if node.domain == DOMAIN]


def _packed(node: onnx_ir.Node) -> PackedSite:
    arrays = []
    int8 = "Int8" in node.op_type
    last = _LAST_PACKED_INPUT + int8
    if len(node.inputs) < last + 1:
        raise ModelError(f"node '{node.name}': {len(node.inputs)} inputs are too few; write the model again")
    for value in node.inputs[1 : last + 1]:
        if value is None or value.const_value is None:
            raise ModelError(f"node '{node.name}': its packed weight is not constant; write the model again")
        arrays.append(np.asarray(value.const_value.numpy()))
    values, indices, shape, *scales = arrays
    layout = node.attributes.get("layout")
    try:
        pattern = Pattern.parse("" if layout is None else layout.as_string())
        sides = _matrix_shape(shape)
        tensor: SparseTensor | QuantizedTensor = (
            QuantizedTensor(pattern, sides, values, indices, *scales)
            if int8
            else SparseTensor(pattern, sides, values, indices)
        )
        tensor.validate()
    except (SparseccError, TypeError, ValueError) as error:
        text = str(error).removeprefix("packed weight: ")
        raise ModelError(f"node '{node.name}': malformed packed weight: {text}") from error
    return PackedSite(str(node.name), node.op_type, tensor)


def _matrix_shape(shape: NDArray[Any]) -> tuple[int, int]:
    """Return (N, K) of the dense shape that is stored beside a packed weight."""
    if shape.ndim != 1 or shape.size < 2 or shape.dtype != np.int64:
        raise ModelError(f"its shape is {shape.dtype} {list(shape.shape)}, expected int64 [2] or more")
    sides = [int(side) for side in shape]
    rows, cols = sides[0], math.prod(sides[1:])
    if min(sides) < 0 or max(rows, cols) > _MAX_SIDE or rows * cols > _MAX_GRID:
        raise ModelError(f"a shape of {sides} is out of range; the file is damaged")
    return rows, cols
