"""onnx-ir drops ``sparse_initializer``: nothing may be lost before it sees the model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.errors import ModelError, UnsupportedModelError
from sparsecc.ir import Model

DENSE = np.array([[0, 1, 0, 2], [0, 0, 3, 0]])


def sparse(dtype=np.float32, linear=True, name="w", dims=DENSE.shape):
    places = np.argwhere(DENSE)
    indices = np.ravel_multi_index(places.T, DENSE.shape) if linear else places
    values = onnx.numpy_helper.from_array(DENSE[tuple(places.T)].astype(dtype), name)
    return onnx.helper.make_sparse_tensor(
        values, onnx.numpy_helper.from_array(indices.astype(np.int64)), dims
    )


def held(model, name="w"):
    return next(g.initializers[name].const_value.numpy() for g in model.graphs() if name in g.initializers)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.int64, np.uint16])
@pytest.mark.parametrize("linear", [True, False])
def test_main_graph(proto, dtype, linear):
    changed = proto("g (float[2,4] x) => (float[2,4] y) { v = CastLike(w, x) y = Add(x, v) }")
    changed.graph.sparse_initializer.append(sparse(dtype, linear))
    weight = held(Model.from_proto(changed))
    assert weight.dtype == dtype
    assert np.array_equal(weight, DENSE)
    assert len(changed.graph.sparse_initializer) == 1


def test_it_is_a_site_like_any_other(proto, tmp_path, run):
    changed = proto("g (float[B,2] x) => (float[B,4] y) { y = MatMul(x, w) }")
    changed.graph.sparse_initializer.append(sparse())
    path = tmp_path / "m.onnx"
    path.write_bytes(changed.SerializeToString())
    model = Model.load(path)
    assert np.array_equal(model.sites()[0].numpy(), DENSE.T)
    model.save(path)
    x = np.random.default_rng(0).random((3, 2), np.float32)
    assert np.allclose(run(path, {"x": x})[0], x @ DENSE)


@pytest.mark.parametrize("linear", [True, False])
def test_inside_a_subgraph(proto, linear):
    text = """g (bool c, float[2,4] x) => (float[2,4] y) {
      y = If (c) <then_branch = t () => (float[2,4] a) { a = Add(x, w) },
                  else_branch = e () => (float[2,4] b) { b = Identity(x) }> }"""
    changed = proto(text)
    changed.graph.node[0].attribute[0].g.sparse_initializer.append(sparse(linear=linear))
    assert np.array_equal(held(Model.from_proto(changed)), DENSE)


@pytest.mark.parametrize("place", ["graph", "function"])
def test_sparse_value_of_a_constant(proto, place):
    header = '<ir_version: 10, opset_import: ["": 17, "local": 1]>'
    text = """g (float[2,4] x) => (float[2,4] y) { w = Identity(x) y = local.f(x) }
      <domain: "local", opset_import: ["": 17]> f (a) => (b) { w = Identity(a) b = Add(a, w) }"""
    changed = proto(text, header)
    node = (changed.graph if place == "graph" else changed.functions[0]).node[0]
    node.op_type = "Constant"
    node.ClearField("input")
    node.attribute.append(onnx.helper.make_attribute("sparse_value", sparse()))
    model = Model.from_proto(changed)
    constants = [n for g in model.graphs() for n in g if n.op_type == "Constant"]
    assert np.array_equal(constants[0].attributes["value"].as_tensor().numpy(), DENSE)


def test_external_planes(proto, tmp_path):
    changed = proto("g (float[2,4] x) => (float[2,4] y) { y = Add(x, w) }")
    tensor = sparse()
    (tmp_path / "v.bin").write_bytes(tensor.values.raw_data)
    tensor.values.ClearField("raw_data")
    tensor.values.data_location = onnx.TensorProto.EXTERNAL
    tensor.values.external_data.add(key="location", value="v.bin")
    changed.graph.sparse_initializer.append(tensor)
    assert np.array_equal(held(Model.from_proto(changed, base_dir=tmp_path)), DENSE)


def change_indices(values):
    array = np.array(values)
    return lambda t: t.indices.CopyFrom(onnx.numpy_helper.from_array(array))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_indices([0, 1, 8]), "outside"),
        (change_indices([-1, 1, 2]), "outside"),
        (change_indices([0, 2, 1]), "ascending"),
        (change_indices([0, 1, 1]), "ascending"),
        (change_indices([0, 1]), "2 indices"),
        (change_indices([[0, 1], [0, 4], [1, 0]]), "outside"),
        (change_indices([[0], [1], [2]]), "must be int64"),
        (change_indices(np.array([0, 1, 2], np.int32)), "must be int64"),
        (lambda t: setattr(t.values, "name", ""), "name"),
    ],
)
def test_malformed(proto, change, message):
    changed = proto("g (float[2,4] x) => (float[2,4] y) { y = Add(x, w) }")
    tensor = sparse()
    change(tensor)
    changed.graph.sparse_initializer.append(tensor)
    with pytest.raises(ModelError, match=message):
        Model.from_proto(changed)


def test_bombs_and_other_attributes_are_refused(proto):
    changed = proto("g (float[2,4] x) => (float[2,4] y) { y = Add(x, w) }")
    changed.graph.sparse_initializer.append(sparse(dims=(1 << 40, 4)))
    with pytest.raises(UnsupportedModelError, match="1 GiB"):
        Model.from_proto(changed)
    header = '<ir_version: 10, opset_import: ["": 17, "other": 1]>'
    changed = proto("g (float[2,4] x) => (float[2,4] y) { y = other.Op(x) }", header)
    changed.graph.node[0].attribute.append(onnx.helper.make_attribute("table", sparse()))
    with pytest.raises(UnsupportedModelError, match="table"):
        Model.from_proto(changed)


def test_negative_dimensions(proto):
    changed = proto("g (float[2,4] x) => (float[2,4] y) { y = Add(x, w) }")
    changed.graph.sparse_initializer.append(sparse(dims=(-2, 4)))
    with pytest.raises(ModelError, match=r"shape \[-2, 4\]: the file is damaged"):
        Model.from_proto(changed)
