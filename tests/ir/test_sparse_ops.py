"""The nodes of sparse operators: their constants must not meet other names, also those of other graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.ir.names import free_name, value_names
from sparsecc.ir.sparse_ops import sparse_op_node
from sparsecc.sparse import Pattern, SparseTensor

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((4, 6)) * (RNG.random((4, 6)) < 0.4)).astype(np.float32)
PACKED = SparseTensor.encode(WEIGHT, Pattern.parse("unstructured"))


def lower(node, **keywords):
    """Put a sparse operator in the place of a MatMul."""
    graph = node.graph
    sparse = sparse_op_node(graph, node.inputs[0], PACKED, name="fc", **keywords)
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [sparse], node.outputs, sparse.outputs)


def test_constants_keep_away_from_inputs_and_results(model):
    clash = model(
        "g (float[2,6] x, float[4] z) => (float[2,4] y, float[4] b) { y = MatMul(x, w) b = Relu(z) }",
        w=WEIGHT.T,
    )
    graph = clash.onnx.graph
    graph.inputs[1].name, graph.outputs[0].name = "fc.bias", "fc.shape"  # the text form has no dots
    lower(graph[0])
    emit.finalize(clash)
    assert {"fc.values", "fc.indices", "fc.shape.1", "fc.bias.1"} <= set(graph.initializers)
    onnx.checker.check_model(clash.to_proto(), full_check=True)


@pytest.mark.parametrize("whole_model", [True, False])
def test_constants_of_a_body_do_not_hide_names_around_it(model, run, whole_model):
    clash = model(
        """g (float[2,6] x, bool c, float[4] z) => (float[2,4] y) {
            y = If(c) <
                then_branch = t () => (float[2,4] r) { m = MatMul(x, w) r = Add(m, z) },
                else_branch = e () => (float[2,4] s) { s = MatMul(x, w) }
            >
        }""",
        w=WEIGHT.T,
    )
    clash.onnx.graph.inputs[2].name = "fc.bias"
    then = clash.onnx.graph[0].attributes["then_branch"].as_graph()
    lower(then[0], taken=value_names(clash.onnx) if whole_model else None)
    emit.finalize(clash)
    assert "fc.bias" not in then.initializers
    feed = {"x": np.ones((2, 6), np.float32), "c": np.array(True), "fc.bias": np.arange(4, dtype=np.float32)}
    (y,) = run(clash, feed)
    np.testing.assert_allclose(y, feed["x"] @ WEIGHT.T + feed["fc.bias"], rtol=1e-5)


def test_free_names_are_numbered_and_remembered():
    taken = {"a"}
    assert [free_name("a", taken), free_name("a", taken), free_name("b", taken)] == ["a.1", "a.2", "b"]
    assert taken == {"a", "a.1", "a.2", "b"}
