"""Sparse constants of a model file turned into dense ones.

onnx-ir drops ``sparse_initializer`` without a word and refuses ``sparse_value``: both must be gone before it
sees the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import ModelError, UnsupportedModelError
from sparsecc.ir.external import ExternalFiles
from sparsecc.ir.slots import Tensor as SlotTensor

__all__ = ["densify_sparse_constants", "graph_protos", "node_protos", "sparse_entries"]

_MAX_NBYTES = 1 << 30


def densify_sparse_constants(proto: onnx.ModelProto, files: ExternalFiles) -> None:
    """Replace every ``sparse_initializer`` and ``sparse_value`` of ``proto``, in place, by a dense tensor.

    Raises:
        ModelError: a negative dimension; indices out of range, out of order, or of the wrong shape; a name used
            twice.
        UnsupportedModelError: more than 1 GiB when dense, strings, or another sparse attribute.
    """
    for graph in graph_protos(proto):
        names = {tensor.name for tensor in graph.initializer}
        for sparse in graph.sparse_initializer:
            if sparse.values.name in names or not sparse.values.name:
                raise ModelError(f"sparse initializer {sparse.values.name!r} has no name of its own")
            names.add(sparse.values.name)
            graph.initializer.append(_dense(sparse, files))
        graph.ClearField("sparse_initializer")
    for node in node_protos(proto):
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = _dense(attr.sparse_tensor, files)
                attr.ClearField("sparse_tensor")
                attr.name, attr.type = "value", onnx.AttributeProto.TENSOR
                attr.t.CopyFrom(tensor)
            elif attr.type in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS):
                raise UnsupportedModelError(
                    f"node {node.name!r} ({node.op_type}) has the sparse attribute {attr.name!r}, "
                    "which is not supported: export it dense"
                )


def graph_protos(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the main graph and all bodies inside nodes, those of functions' nodes too."""
    yield proto.graph
    for node in node_protos(proto):
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                yield attr.g
            yield from attr.graphs


def node_protos(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node: main graph, functions, and bodies inside nodes."""
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            yield node
            for attr in node.attribute:
                pending += [graph.node for graph in (attr.g, *attr.graphs)]


def sparse_entries(
    sparse: onnx.SparseTensorProto, files: ExternalFiles
) -> tuple[tuple[int, ...], SlotTensor, NDArray[np.int64]]:
    """Return shape, values ``[nnz]`` and rising linear positions ``[nnz]`` of a sparse constant, checked.

    Raises:
        ModelError: as ``densify_sparse_constants``.
        UnsupportedModelError: strings, or positions beyond 64 bits.
    """
    name = sparse.values.name
    values = files.load(sparse.values)
    if values.dtype == onnx_ir.DataType.STRING:
        raise UnsupportedModelError(f"sparse constant {name!r} holds strings: export it dense")
    dims = tuple(sparse.dims)
    if min(dims, default=0) < 0:
        raise ModelError(f"sparse constant {name!r} has the shape {list(dims)}: the file is damaged")
    if math.prod(dims) >= 1 << 63:
        raise UnsupportedModelError(
            f"sparse constant {name!r} has the shape {list(dims)}, whose positions take more than 64 bits"
        )
    positions = _positions(files.load(sparse.indices).numpy(), dims, name)
    if tuple(values.shape.numpy()) != positions.shape:
        raise ModelError(
            f"sparse constant {name!r}: {positions.size} indices for values {list(values.shape.numpy())}"
        )
    return dims, values, positions


def _dense(sparse: onnx.SparseTensorProto, files: ExternalFiles) -> onnx.TensorProto:
    dims, values, positions = sparse_entries(sparse, files)
    name = sparse.values.name
    if math.prod(dims) * values.dtype.itemsize > _MAX_NBYTES:
        raise UnsupportedModelError(
            f"sparse constant {name!r} of shape {list(dims)} is larger than 1 GiB when dense, as models "
            "are loaded; sparsecc.ir.sparse_tensors reads such a constant by itself"
        )
    array = values.numpy()
    dense = np.zeros(math.prod(dims), array.dtype)
    dense[positions] = array
    return onnx_ir.serde.serialize_tensor(
        onnx_ir.Tensor(dense.reshape(dims), dtype=values.dtype, name=name, doc_string=values.doc_string)
    )


def _positions(indices: NDArray[np.int64], dims: tuple[int, ...], name: str) -> NDArray[np.int64]:
    """Return linear positions of the ``[nnz]`` or ``[nnz, rank]`` form, checked."""
    if indices.dtype != np.int64 or indices.ndim not in (1, 2) or indices.shape[1:] not in ((), (len(dims),)):
        raise ModelError(
            f"sparse constant {name!r}: indices must be int64 [nnz] or [nnz, {len(dims)}], "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    limits = np.array(dims if indices.ndim == 2 else (math.prod(dims),), np.int64)
    if ((indices < 0) | (indices >= (limits if indices.ndim == 2 else limits[0]))).any():
        raise ModelError(f"sparse constant {name!r}: an index lies outside the shape {list(dims)}")
    linear = indices
    if indices.ndim == 2:
        linear = np.zeros(len(indices), np.int64)
        for axis, dim in enumerate(dims):
            linear = linear * dim + indices[:, axis]
    if (np.diff(linear) <= 0).any():
        raise ModelError(f"sparse constant {name!r}: indices repeat or are not in ascending order")
    return linear
