"""The sparse constants of a model file as sparse tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from sparsecc.algebra import Tensor
from sparsecc.ir.densify import graph_protos, node_protos, sparse_entries
from sparsecc.ir.external import ExternalFiles
from sparsecc.ir.read import read_proto

__all__ = ["sparse_tensors"]


def sparse_tensors(path: str | os.PathLike[str]) -> list[tuple[str, Tensor]]:
    """Return name and tensor of every ``SparseTensor`` of a model file: matrices as CSR, others as CSF.

    ``Model.load`` makes them dense, up to 1 GiB each. Here they stay as they are stored, whatever their shape. A
    ``Constant`` goes by the name of its output; bodies of If, Loop and Scan are included, so names may be there twice.

    Raises:
        ModelError: the file is no model, or a sparse constant is malformed.
        UnsafeModelError: external data outside the model's folder, or shorter than claimed.
        UnsupportedModelError: values are strings, or positions take more than 64 bits.
    """
    files = ExternalFiles(Path(path).parent)
    found = []
    for name, sparse in _constants(read_proto(Path(path))):
        shape, values, positions = sparse_entries(sparse, files)
        places = (
            np.stack(np.unravel_index(positions, shape), 1)
            if shape
            else np.zeros((len(positions), 0), np.int64)
        )
        form = "csr" if len(shape) == 2 else "csf"
        found.append((name, Tensor.from_coordinates(places, values.numpy(), shape, form)))
    return found


def _constants(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.SparseTensorProto]]:
    for graph in graph_protos(proto):
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse
    for node in node_protos(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                yield node.output[0] if node.output else "", attribute.sparse_tensor
