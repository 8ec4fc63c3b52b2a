from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.errors import PassError, UnsupportedModelError
from sparsecc.ir.graphsurgeon import graphsurgeon, graphsurgeon_pass

gs = pytest.importorskip("onnx_graphsurgeon")
RNG = np.random.default_rng(0)
W, V = (RNG.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
TEXT = """g (float[B,64] x) => (float[B,64] y) {
  [skip] i = Identity(x) [first] h = MatMul(i, w) [act] r = Relu(h) [second] y = MatMul(r, v) }"""


def noted(model_proto):
    """Put a note on everything GraphSurgeon drops."""
    graph = model_proto.graph
    model_proto.doc_string, model_proto.domain, model_proto.model_version = "about", "here", 7
    for entry in (model_proto, graph, *graph.node, graph.input[0], graph.output[0]):
        entry.metadata_props.add(key="note", value="kept")
    for node in graph.node:
        node.doc_string = f"doc of {node.name}"
    for name in "ihr":
        note = graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    return model_proto


@pytest.fixture
def linear(proto):
    from sparsecc.ir import Model

    return Model.from_proto(noted(proto(TEXT, w=W, v=V)))


@graphsurgeon_pass
def drop_identities(graph):
    for node in [node for node in graph.nodes if node.op == "Identity"]:
        for reader in list(node.outputs[0].outputs):
            reader.inputs = [node.inputs[0] if t is node.outputs[0] else t for t in reader.inputs]
        node.outputs.clear()
    graph.cleanup()
    return len(graph.nodes)


def test_surgery_keeps_the_rest(linear, run):
    x = RNG.random((3, 64), np.float32)
    expected = run(linear, {"x": x})[0]
    held = linear.onnx.graph.initializers["w"].const_value
    ir_version = linear.onnx.ir_version
    assert drop_identities(linear) == 3
    assert [node.name for node in linear.onnx.graph] == ["first", "act", "second"]
    assert linear.onnx.graph.initializers["w"].const_value is held  # never copied
    assert np.array_equal(run(linear, {"x": x})[0], expected)

    proto = linear.to_proto()
    assert (proto.ir_version, proto.doc_string, proto.domain, proto.model_version) == (
        ir_version,
        "about",
        "here",
        7,
    )
    graph = proto.graph
    for entry in (proto, graph, *graph.node, graph.input[0], graph.output[0]):
        assert [(prop.key, prop.value) for prop in entry.metadata_props] == [("note", "kept")]
    assert [node.doc_string for node in graph.node] == ["doc of first", "doc of act", "doc of second"]
    assert [note.tensor_name for note in graph.quantization_annotation] == ["h", "r"]


def test_nothing_done_is_nothing_changed(linear):
    before = linear.to_proto()
    with graphsurgeon(linear):
        pass
    after = linear.to_proto()
    for model_proto in (before, after):
        for node in model_proto.graph.node:
            node.ClearField("domain")
        model_proto.graph.ClearField("value_info")
        model_proto.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert before == after


def test_weights_on_request_and_new_values(linear, run):
    with graphsurgeon(linear, weights=("w",)) as graph:
        tensors = graph.tensors()
        assert np.array_equal(tensors["w"].values, W)
        tensors["w"].values = W * 2
        tensors["v"].values = np.eye(64, dtype=np.float32)  # lent without values, replaced all the same
    x = RNG.random((3, 64), np.float32)
    assert np.allclose(run(linear, {"x": x})[0], np.maximum(x @ (2 * W), 0), atol=1e-4)


def test_renamed_weight(linear):
    with graphsurgeon(linear) as graph:
        graph.tensors()["w"].name = "renamed"
    assert np.array_equal(linear.onnx.graph.initializers["renamed"].const_value.numpy(), W)


def test_subgraphs_and_functions(proto, run):
    from sparsecc.ir import Model

    numbers = ", ".join(["2.0"] * 4)
    text = f"""g (bool c, float[B,64] x) => (float[B,64] y) {{
      [cond] h = If (c) <then_branch = t () => (float[B,64] a) {{ [in] a = MatMul(x, w) }},
                  else_branch = e () => (float[B,64] b) {{ b = Identity(x) }}> y = local.f(h) }}
      <domain: "local", opset_import: ["": 17]> f (p) => (q) {{
        k = Constant <value = float[2,2] {{{numbers}}}> ()
        s = ReduceMax <keepdims: int = 0> (k) [mul] q = Mul(p, s) }}"""
    changed = proto(text, '<ir_version: 10, opset_import: ["": 17, "local": 1]>', w=W)
    body = changed.graph.node[0].attribute[0].g
    for entry in (body, body.node[0], changed.functions[0], changed.functions[0].node[-1]):
        entry.metadata_props.add(key="note", value="kept")
    model = Model.from_proto(changed)
    feed = {"c": np.array(True), "x": RNG.random((2, 64), np.float32)}
    expected = run(model, feed)[0]
    with graphsurgeon(model):
        pass
    assert np.array_equal(run(model, feed)[0], expected)
    proto_after = model.to_proto()
    body = proto_after.graph.node[0].attribute[0].g
    for entry in (body, body.node[0], proto_after.functions[0], proto_after.functions[0].node[-1]):
        assert len(entry.metadata_props) == 1


def test_an_exception_leaves_the_model(linear):
    before = linear.fingerprint()

    @graphsurgeon_pass
    def broken(graph):
        graph.nodes.clear()
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        broken(linear)
    assert linear.fingerprint() == before


def test_an_invalid_result_leaves_the_model_and_says_so(linear):
    before = linear.fingerprint()

    @graphsurgeon_pass
    def broken(graph):
        graph.nodes[1].op = "NoSuchOp"

    with pytest.raises(PassError, match="NoSuchOp"):
        broken(linear)
    assert linear.fingerprint() == before


def test_the_function_may_return_another_graph(linear, run):
    @graphsurgeon_pass(weights=("w",))
    def replace(graph, factor):
        x, y = gs.Variable("x", np.float32, ("B", 64)), gs.Variable("y", np.float32, ("B", 64))
        w = gs.Constant("w", graph.tensors()["w"].values * factor)
        return gs.Graph([gs.Node("MatMul", inputs=[x, w], outputs=[y])], [x], [y], opset=17)

    assert replace(linear, factor=2) is None
    x = RNG.random((3, 64), np.float32)
    assert np.allclose(run(linear, {"x": x})[0], x @ (2 * W), atol=1e-4)


def test_what_graphsurgeon_would_drop_is_refused(proto):
    from sparsecc.ir import Model

    header = '<ir_version: 10, opset_import: ["": 17, "other": 1]>'
    changed = proto("g (float[2] x) => (float[2] y) { [odd] y = other.Op(x) }", header)
    tensors = [onnx.numpy_helper.from_array(np.zeros(2, np.float32), "t")]
    changed.graph.node[0].attribute.append(onnx.helper.make_attribute("tables", tensors))
    model = Model.from_proto(changed)
    with pytest.raises(UnsupportedModelError, match="tables"), graphsurgeon(model):
        pass
