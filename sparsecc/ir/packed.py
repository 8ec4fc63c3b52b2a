"""Reading back the sparse operators of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SparseccError
from sparsecc.ir.model import Model
from sparsecc.ir.ops_algebra import algebra_names
from sparsecc.ir.ops_transformer import transformer_names
from sparsecc.ir.sparse_ops import DOMAIN, FAMILIES, MEMBERS_KEY
from sparsecc.sparse import Layout, Pattern, QuantizedTensor, SparseTensor, Values

__all__ = ["PackedSite", "is_linear", "packed_sites", "packed_weight"]

_BLOCK_RANK = 3  # of values [blocks, R, C]

# What the operator library takes (``weight.cc``): outputs and inputs, and their product.
_MAX_SIDE = 1 << 24
_MAX_GRID = 1 << 31


@dataclass(frozen=True)
class PackedSite:
    """A packed weight [N, K] of a sparse operator: the site's name, the operator's, and the weight.

    ``members`` are the names of the sites that were stacked to it, if there were several.
    """

    name: str
    op: str
    tensor: SparseTensor | QuantizedTensor
    members: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """How the weight is stored: its pattern, after the type of its values where that is not float32."""
        values: Values = "int8" if isinstance(self.tensor, QuantizedTensor) else self.tensor.floats
        return str(Layout(self.tensor.pattern, values))


def packed_sites(model: Model) -> list[PackedSite]:
    """The packed weights of the sparse operators of ``model`` in graph order, subgraphs included.

    Raises:
        ModelError: a packed weight is malformed or not constant.
    """
    nodes = (node for graph in model.graphs() for node in graph if node.domain == DOMAIN)
    return [site for node in nodes for site in _weights(node)]


def _weights(node: onnx_ir.Node) -> Iterator[PackedSite]:
    """Yield the packed weights of a node; the two of an LSTM or GRU are named as its sites are."""
    if node.op_type in transformer_names() or node.op_type in algebra_names():
        return
    if node.op_type.endswith("Quads"):
        if "Conv" in node.op_type:  # the residual comes before the weight
            yield PackedSite(
                str(node.name), node.op_type, _tensor(node, 1 + ("Add" in node.op_type), 4, "layout")
            )
        return
    if not node.op_type.startswith(("SparseLSTM", "SparseGRU")):
        yield PackedSite(str(node.name), node.op_type, packed_weight(node), _members(node))
        return
    for operand, first in (("w", 1), ("r", 4)):
        tensor = _tensor(node, first, 3, f"layout_{operand}")
        yield PackedSite(f"{node.name}.{operand.upper()}", node.op_type, tensor)


def _members(node: onnx_ir.Node) -> tuple[str, ...]:
    try:
        names = json.loads(node.metadata_props.get(MEMBERS_KEY, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list):
        raise ModelError(f"node '{node.name}': its {MEMBERS_KEY} is no list; write the model again")
    return tuple(map(str, names))


def is_linear(node: onnx_ir.Node) -> bool:
    """Whether the node is one of the linear families, which hold one packed weight."""
    return node.domain == DOMAIN and node.op_type.startswith(FAMILIES)


def packed_weight(node: onnx_ir.Node) -> SparseTensor | QuantizedTensor:
    """The weight of a linear sparse operator; errors as for ``packed_sites``."""
    count = 4 if "Int8" in node.op_type else 3  # values, indices, shape; with int8 values also scales
    return _tensor(node, 1, count, "layout")


def _tensor(node: onnx_ir.Node, first: int, count: int, layout_name: str) -> SparseTensor | QuantizedTensor:
    arrays = []
    if len(node.inputs) < first + count:
        raise ModelError(f"node '{node.name}': {len(node.inputs)} inputs are too few; write the model again")
    for value in node.inputs[first : first + count]:
        if value is None or value.const_value is None:
            raise ModelError(f"node '{node.name}': its packed weight is not constant; write the model again")
        arrays.append(np.asarray(value.const_value.numpy()))
    values, indices, shape, *scales = arrays
    layout = node.attributes.get(layout_name)
    try:
        pattern = Pattern.parse("" if layout is None else layout.as_string())
        if values.ndim == _BLOCK_RANK and pattern.kind != "block":
            values = values.reshape(-1)  # written as blocks of 1 by 1
        sides = _matrix_shape(shape)
        tensor: SparseTensor | QuantizedTensor = (
            QuantizedTensor(pattern, sides, values, indices, *scales)
            if scales
            else SparseTensor(pattern, sides, values, indices)
        )
        tensor.validate()
    except (SparseccError, TypeError, ValueError) as error:
        text = str(error).removeprefix("packed weight: ")
        raise ModelError(f"node '{node.name}': malformed packed weight: {text}") from error
    return tensor


def _matrix_shape(shape: NDArray[Any]) -> tuple[int, int]:
    """Return (N, K) of the dense shape that is stored beside a packed weight."""
    if shape.ndim != 1 or shape.size < 2 or shape.dtype != np.int64:
        raise ModelError(f"its shape is {shape.dtype} {list(shape.shape)}, expected int64 [2] or more")
    sides = [int(side) for side in shape]
    rows, cols = sides[0], math.prod(sides[1:])
    if min(sides) < 0 or max(rows, cols) > _MAX_SIDE or rows * cols > _MAX_GRID:
        raise ModelError(f"a shape of {sides} is out of range; the file is damaged")
    return rows, cols
