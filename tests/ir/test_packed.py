"""Packed weights read back from a file, which may hold anything."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsecc import emit
from sparsecc.errors import ModelError
from sparsecc.ir import Model
from sparsecc.ir.packed import packed_sites
from sparsecc.sparse import Pattern, SparseTensor

RNG = np.random.default_rng(0)
DENSE = (RNG.standard_normal((8, 12)) * (RNG.random((8, 12)) < 0.5)).astype(np.float32)


@pytest.fixture
def packed():
    weight = SparseTensor.encode(DENSE, Pattern.parse("unstructured"))
    return emit.single_op_model(weight, ("B", 12)).to_proto()


def with_constant(proto, name, array):
    for tensor in proto.graph.initializer:
        if tensor.name == f"op.{name}":
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def test_read_back(packed):
    model = Model.from_proto(packed)
    (site,) = packed_sites(model)
    assert (site.name, site.op, site.tensor.shape) == ("op", "SparseMatMul", (8, 12))
    np.testing.assert_array_equal(site.tensor.decode(), DENSE)
    assert model.sites() == []
    assert model.unsupported_sites() == []  # the body of our own operator is no site


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (np.array([1 << 40, 1 << 40]), "out of range"),
        (np.array([1 << 20, 1 << 13]), "out of range"),
        (np.array([-8, 12]), "out of range"),
        (np.array([2, 1 << 62, 4]), "out of range"),
        (np.array([8]), r"int64 \[2\] or more"),
        (np.array(8), r"int64 \[2\] or more"),
        (np.array([8.0, 12.0]), "float64"),
    ],
)
def test_shapes_that_cannot_be(packed, shape, words):
    with pytest.raises(ModelError, match=f"'op': malformed packed weight: .*{words}"):
        packed_sites(Model.from_proto(with_constant(packed, "shape", shape)))


def test_too_few_inputs(packed):
    node = packed.graph.node[0]
    del node.input[3:]
    function = onnx.helper.make_function(
        "ai.sparsecc", "SparseMatMul", ["a", "b", "c"], ["y"],
        [onnx.helper.make_node("Identity", ["a"], ["y"])], [onnx.helper.make_opsetid("", 17)],
        attributes=["layout", "layout_version"],
    )  # fmt: skip
    packed.functions[0].CopyFrom(function)
    with pytest.raises(ModelError, match="3 inputs are too few"):
        packed_sites(Model.from_proto(packed))
