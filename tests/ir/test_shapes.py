from __future__ import annotations

import numpy as np

from sparsecc.ir import Model, TensorSpec


def shape_of(model, name):
    value = next(v for g in model.graphs() for node in g for v in node.outputs if v.name == name)
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def test_specs(model):
    m = model(
        """g (float16[B,?,3] x, int64 n, string[2] s, bfloat16 b, seq(float[2]) q) => (float16[B,?,3] y)
           { y = Identity(x) }"""
    )
    assert m.input_specs() == [
        TensorSpec("x", "float16", ("B", None, 3)),
        TensorSpec("n", "int64", ()),
        TensorSpec("s", "string", (2,)),
        TensorSpec("b", "bfloat16", ()),
        TensorSpec("q", "sequence", (2,)),
    ]
    assert m.output_specs() == [TensorSpec("y", "float16", ("B", None, 3))]


def test_unknown_rank(proto):
    changed = proto("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    changed.graph.input[0].type.tensor_type.ClearField("shape")
    assert Model.from_proto(changed).input_specs() == [TensorSpec("x", "float32", None)]


def test_inference_fills_in_what_is_missing(model):
    """Weights are cut short for it, small shape constants are not."""
    text = """g (bool c, float[B,64] x) => (float[?,?] y) {
      h = MatMul(x, w) r = Reshape(h, s)
      y = If (c) <then_branch = t () => (float[?,?] a) { k = MatMul(x, w) a = Relu(k) },
                  else_branch = e () => (float[?,?] b) { b = Identity(h) }> }"""
    m = model(text, w=np.zeros((64, 32), np.float32), s=np.array([-1, 4, 8]))
    before = m.fingerprint()
    assert shape_of(m, "h") is None
    assert m.infer_shapes() is None
    assert shape_of(m, "h") == ["B", 32]
    assert shape_of(m, "r")[1:] == [4, 8]
    assert shape_of(m, "k") == ["B", 32]
    assert m.onnx.graph.initializers["w"].const_value.numpy().shape == (64, 32)
    m.check()
    assert m.fingerprint() != before  # value_info is part of the graph


def test_shapes_computed_from_a_long_table(model):
    text = "g (float[4,6] x) => (float[?,?] y) { i = Gather(a, k) h = Reshape(x, i) y = Relu(h) }"
    m = model(text, a=np.full(1000, 3), k=np.array([999]))
    assert m.infer_shapes() is None
    assert shape_of(m, "h") in (None, [3])


def test_inference_that_fails_says_why(model):
    m = model("g (float[2,3] x) => (float[2] y) { h = MatMul(x, x) y = Relu(h) }")
    reason = m.infer_shapes()
    assert reason is None or (reason.startswith("shape inference failed") and "\n" not in reason)
    assert shape_of(m, "h") is None
