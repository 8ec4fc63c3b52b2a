"""Sparse constants of a model file as sparse tensors, and as sites on their way to a sparse operator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsecc.errors import ModelError, UnsupportedModelError
from sparsecc.ir import Model, sparse_tensors
from sparsecc.ir.packed import packed_sites
from sparsecc.pm import PassContext, Pipeline


def stored(dense, name, linear):
    places = np.argwhere(dense)
    indices = np.ravel_multi_index(places.T, dense.shape) if linear else places
    values = numpy_helper.from_array(dense[tuple(places.T)], name)
    return onnx.helper.make_sparse_tensor(
        values, numpy_helper.from_array(indices.astype(np.int64)), dense.shape
    )


def written(tmp_path, changed, *tensors):
    changed.graph.sparse_initializer.extend(tensors)
    path = tmp_path / "m.onnx"
    path.write_bytes(changed.SerializeToString())
    return path


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 1, 6), (0, 4), (4, 0)])
def test_any_order(proto, tmp_path, linear, shape):
    rng = np.random.default_rng(0)
    dense = (rng.integers(1, 9, shape) * (rng.random(shape) < 0.4)).astype(np.float32)
    changed = proto("g (float[2] x) => (float[2] y) { y = Identity(x) }")
    ((name, tensor),) = sparse_tensors(written(tmp_path, changed, stored(dense, "w", linear)))
    assert name == "w"
    assert tensor.formats == (("dense", "compressed") if len(shape) == 2 else ("compressed",) * len(shape))
    assert tensor.values.dtype == np.float32
    assert len(tensor.values) == np.count_nonzero(dense)
    np.testing.assert_array_equal(tensor.to_dense(), dense)


def test_constants_bodies_and_what_no_memory_holds(proto, tmp_path):
    text = """g (bool c, float[2,4] x) => (float[2,4] y) {
      k = Identity(x)
      y = If (c) <then_branch = t () => (float[2,4] a) { a = Add(x, w) },
                  else_branch = e () => (float[2,4] b) { b = Identity(x) }> }"""
    changed = proto(text)
    dense = np.eye(2, 4, dtype=np.float32)
    changed.graph.node[1].attribute[0].g.sparse_initializer.append(stored(dense, "w", True))
    node = changed.graph.node[0]
    node.op_type = "Constant"
    node.ClearField("input")
    node.attribute.append(onnx.helper.make_attribute("sparse_value", stored(2 * dense, "", False)))
    huge = stored(dense, "huge", False)
    huge.dims[:] = [1 << 30, 1 << 30, 4]
    huge.indices.CopyFrom(numpy_helper.from_array(np.array([[0, 1, 2], [1 << 29, 0, 3]])))
    path = written(tmp_path, changed)
    found = dict(sparse_tensors(path))
    np.testing.assert_array_equal(found["w"].to_dense(), dense)
    np.testing.assert_array_equal(found["k"].to_dense(), 2 * dense)
    found = dict(sparse_tensors(written(tmp_path, changed, huge)))
    assert found["huge"].shape == (1 << 30, 1 << 30, 4)
    np.testing.assert_array_equal(found["huge"].coordinates(), [[0, 1, 2], [1 << 29, 0, 3]])


def test_wrong_ones_are_refused(proto, tmp_path):
    changed = proto("g (float[2] x) => (float[2] y) { y = Identity(x) }")
    wrong = stored(np.eye(3, dtype=np.float32), "w", True)
    wrong.indices.CopyFrom(numpy_helper.from_array(np.array([0, 4, 9])))
    path = written(tmp_path, changed, wrong)
    with pytest.raises(ModelError, match="outside the shape"):
        sparse_tensors(path)
    changed.graph.sparse_initializer[0].dims[:] = [1 << 40, 1 << 40]
    with pytest.raises(UnsupportedModelError, match="more than 64 bits"):
        sparse_tensors(written(tmp_path, changed))
    with pytest.raises(UnsupportedModelError, match="more than 64 bits"):
        Model.from_proto(changed)


def test_a_sparse_initializer_becomes_a_sparse_operator(proto, tmp_path, run):
    rng = np.random.default_rng(1)
    dense = (rng.standard_normal((24, 32)) * (rng.random((24, 32)) < 0.15)).astype(np.float32)
    changed = proto("g (float[B,24] x) => (float[B,32] y) { [fc] y = MatMul(x, w) }")
    model = Model.load(written(tmp_path, changed, stored(dense, "w", False)))
    Pipeline.parse("tidy,choose-layout{layout=unstructured},lower-sparse").run(model, PassContext())
    (site,) = packed_sites(model)
    assert (site.op, site.tensor.nnz) == ("SparseMatMul", np.count_nonzero(dense))
    np.testing.assert_array_equal(site.tensor.decode(), dense.T)
