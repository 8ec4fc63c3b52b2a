"""Reading back the sparse operators of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir

from sparsecc.errors import ModelError, SparseccError
from sparsecc.ir.model import Model
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.sparse import Pattern, SparseTensor

__all__ = ["PackedSite", "packed_sites"]


@dataclass(frozen=True)
class PackedSite:
    """A sparse operator of a model: node name, operator name and its packed weight [N, K]."""

    name: str
    op: str
    tensor: SparseTensor


def packed_sites(model: Model) -> list[PackedSite]:
    """The sparse operators of ``model`` in graph order, subgraphs included.

    Raises:
        ModelError: a packed weight is malformed or not constant.
    """
    return [_packed(node) for graph in model.graphs() for node in graph if node.domain == DOMAIN]


def _packed(node: onnx_ir.Node) -> PackedSite:
    arrays = []
    for value in node.inputs[1:4]:
        if value is None or value.const_value is None:
            raise ModelError(f"node '{node.name}': its packed weight is not constant; write the model again")
        arrays.append(np.asarray(value.const_value.numpy()))
    values, indices, shape = arrays
    layout = node.attributes.get("layout")
    try:
        pattern = Pattern.parse("" if layout is None else layout.as_string())
        tensor = SparseTensor(pattern, (int(shape[0]), int(np.prod(shape[1:]))), values, indices)
        tensor.validate()
    except (SparseccError, IndexError, ValueError) as error:
        raise ModelError(f"node '{node.name}': malformed packed weight: {error}") from error
    return PackedSite(str(node.name), node.op_type, tensor)
