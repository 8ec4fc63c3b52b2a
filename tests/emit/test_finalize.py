"""The last step: functions, imports, IR version, output types."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from sparsecc import emit
from sparsecc.errors import ModelError
from sparsecc.ir import Model
from sparsecc.ir.sparse_ops import DOMAIN, sparse_op_node
from sparsecc.sparse import Pattern, SparseTensor

FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


def _weight() -> SparseTensor:
    dense = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return SparseTensor.encode(dense * (dense > 0), Pattern.parse("unstructured"))


def _graph() -> tuple[onnx_ir.Graph, onnx_ir.Value]:
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["B", 8]), type=FLOAT)
    return onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 17}, name="g"), x


def _chain(*activations: str) -> Model:
    """Sparse operators one after another."""
    graph, value = _graph()
    for number, activation in enumerate(activations):
        node = sparse_op_node(graph, value, _weight(), name=f"op{number}", activation=activation)
        value = node.outputs[0]
        value.name = f"y{number}"
        graph.append(node)
    graph.outputs.append(value)
    return Model(onnx_ir.Model(graph, ir_version=7))


def test_what_a_finished_model_has() -> None:
    model = _chain("", "Relu", "Relu")
    emit.finalize(model)
    proto = model.to_proto()
    assert proto.ir_version == 8
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 17, DOMAIN: 1}
    assert [function.name for function in proto.functions] == ["SparseMatMul", "SparseMatMulRelu"]
    assert all(function.opset_import[0].version == 17 for function in proto.functions)
    described = {info.name: info.type.tensor_type for info in (*proto.graph.value_info, *proto.graph.output)}
    for name in ("y0", "y1", "y2"):
        assert described[name].elem_type == onnx.TensorProto.FLOAT
        assert [dim.dim_param or dim.dim_value for dim in described[name].shape.dim] == ["B", 8]
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def test_twice_is_once() -> None:
    model = _chain("", "Gelu")
    emit.finalize(model)
    once = model.to_proto().SerializeToString(deterministic=True)
    emit.finalize(model)
    assert model.to_proto().SerializeToString(deterministic=True) == once


def test_a_newer_ir_version_is_kept() -> None:
    model = _chain("")
    model.onnx.ir_version = 10
    emit.finalize(model)
    assert model.onnx.ir_version == 10


def test_functions_no_longer_used_go() -> None:
    model = _chain("", "Relu")
    emit.finalize(model)
    graph = model.onnx.graph
    first, second = graph
    graph.outputs[0] = first.outputs[0]
    graph.remove(second, safe=True)
    emit.finalize(model)
    assert [key[1] for key in model.onnx.functions] == ["SparseMatMul"]
    graph.outputs.clear()
    graph.outputs.append(graph.inputs[0])
    graph.remove(first, safe=True)
    emit.finalize(model)
    assert not model.onnx.functions
    assert DOMAIN not in model.onnx.opset_imports


def test_functions_of_others_stay() -> None:
    model = _chain("")
    other = onnx.parser.parse_function(
        '<domain: "org.other", opset_import: ["" : 17]> Twice (a) => (b) { b = Add (a, a) }'
    )
    function = onnx_ir.serde.deserialize_function(other)
    model.onnx.functions[function.identifier()] = function
    emit.finalize(model)
    assert ("org.other", "Twice", "") in model.onnx.functions
    assert DOMAIN not in function.opset_imports


def test_operator_inside_a_function_of_the_model() -> None:
    """The packed weight comes in as an argument: the function imports the domain, and ONNX can run it."""
    graph, x = _graph()
    weight = _weight()
    inner = onnx.parser.parse_function(
        f'<domain: "org.other", opset_import: ["" : 17, "{DOMAIN}" : 1]>'
        "Layer (x, values, indices, shape, bias) => (y) {"
        f'y = {DOMAIN}.SparseMatMul <layout = "unstructured", layout_version = 1>'
        " (x, values, indices, shape, bias) }"
    )
    function = onnx_ir.serde.deserialize_function(inner)
    function.opset_imports.pop(DOMAIN)
    template = sparse_op_node(graph, x, weight, name="op")
    call = onnx_ir.Node("org.other", "Layer", list(template.inputs), name="call")
    call.outputs[0].name, call.outputs[0].type = "y", FLOAT
    graph.append(call)
    graph.outputs.append(call.outputs[0])
    graph.opset_imports["org.other"] = 1
    model = Model(onnx_ir.Model(graph, ir_version=8, functions=[function]))
    emit.finalize(model)
    assert function.opset_imports[DOMAIN] == 1
    assert (DOMAIN, "SparseMatMul", "") in model.onnx.functions
    x_value = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    y = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, {"x": x_value})[0]
    np.testing.assert_allclose(y, x_value @ weight.decode().T, rtol=1e-5, atol=1e-5)


def test_a_model_without_sparse_operators_is_left_alone() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 9]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model = Model.from_proto(proto)
    before = model.to_proto().SerializeToString(deterministic=True)
    emit.finalize(model)
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_unknown_operator_of_the_domain_is_an_error() -> None:
    graph, x = _graph()
    node = onnx_ir.Node(DOMAIN, "SparseFft", [x], name="future")
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    with pytest.raises(ModelError, match=r"node 'future' is ai\.sparsecc\.SparseFft"):
        emit.finalize(Model(onnx_ir.Model(graph, ir_version=8)))


def test_a_shape_already_known_is_kept() -> None:
    model = _chain("")
    (node,) = model.onnx.graph
    node.outputs[0].shape = onnx_ir.Shape([4, 8])
    emit.finalize(model)
    assert list(node.outputs[0].shape) == [4, 8]


def test_nodes_of_our_domain_that_are_not_ours() -> None:
    """A model of somebody else's, or a damaged one: told as such, at once."""
    model = _chain("")
    node = model.onnx.graph[0]
    node.resize_inputs(2)
    with pytest.raises(ModelError, match=r"op0.* has 2 inputs, .*it takes 5 inputs"):
        emit.finalize(model)
    model = _chain("")
    del model.onnx.graph[0].attributes["layout"]
    with pytest.raises(ModelError, match="no layout;"):
        emit.finalize(model)
    model = _chain("")
    shape = model.onnx.graph[0].inputs[3]
    shape.const_value = onnx_ir.Tensor(np.array(8, np.int64), name=shape.name)
    with pytest.raises(ModelError, match="shape and geometry do not fit"):
        emit.finalize(model)
