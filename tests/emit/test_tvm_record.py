"""What a module of TVM stores of the nodes that run on our kernels."""

from __future__ import annotations

import io
import struct

import numpy as np
import onnx_ir as ir
import pytest

from sparsecc.errors import UnsupportedModelError
from sparsecc.tvm.record import NodeRecord, write_record


def _tensor(array):
    return ir.tensor(array, name="w")


def _written(*nodes):
    file = io.BytesIO()
    write_record("{}", nodes, file)
    return file.getvalue()


def test_tensors_lie_aligned_behind_the_nodes_and_are_stored_once():
    weight = _tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    node = NodeRecord(
        "fc", "SparseMatMul", {"layout": "16x1", "layout_version": 1, "alpha": 0.5}, (None, weight)
    )
    data = _written(node, node)
    assert data.startswith(b"SPARSECC-TVM-1\n\0" + struct.pack("<I", 2) + b"{}" + struct.pack("<I", 2))
    assert data.count(weight.tobytes()) == 1
    (offset,) = struct.unpack("<Q", data[(at := data.index(struct.pack("<Iqq", 2, 2, 3)) + 20) : at + 8])
    assert offset % 64 == 0
    assert data[offset:] == weight.tobytes()


def test_equal_nodes_give_equal_bytes():
    def node():
        return NodeRecord("c", "SparseConv", {"pads": (1, 1)}, (_tensor(np.ones(3, np.int64)), None))

    assert _written(node()) == _written(node())


def test_a_type_that_no_kernel_takes_is_refused():
    node = NodeRecord("c", "SparseConv", {}, (_tensor(np.ones(3, np.float64)),))
    with pytest.raises(UnsupportedModelError, match="DOUBLE"):
        _written(node)
