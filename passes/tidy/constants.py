"""Constant nodes and nodes that do nothing."""

from __future__ import annotations

import onnx_ir as ir

from sparsecc.passes.tidy.graph import bypass, constant_of, int_attribute

__all__ = ["lift_constants", "remove_identities"]


def lift_constants(model: ir.Model) -> int:
    """Turn Constant nodes into initialisers of their own graph; return how many."""
    lifted = 0
    for graph in model.graphs():
        for node in list(graph):
            if not _is_default(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            _replace_by_constant(node, node.outputs[0], tensor)
            graph.remove(node, safe=True)
            lifted += 1
    return lifted


def remove_identities(model: ir.Model) -> int:
    """Remove Identity and inference-mode Dropout where no graph output loses its name; return how many."""
    removed = 0
    for graph in model.graphs():
        for node in list(graph):
            source = node.inputs[0] if node.inputs else None
            if source is not None and _is_identity(node) and bypass(node, source):
                removed += 1
    return removed


def _is_default(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _is_identity(node: ir.Node) -> bool:
    if _is_default(node, "Identity"):
        return True
    if not _is_default(node, "Dropout") or any(value.uses() for value in node.outputs[1:]):
        return False
    if any(value.is_graph_output() for value in node.outputs[1:]) or int_attribute(node, "is_test", 1) == 0:
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    training = constant_of(node.inputs[2])
    return training is not None and not training.numpy().any()


def _replace_by_constant(node: ir.Node, output: ir.Value, tensor: ir.TensorProtocol) -> None:
    name = output.name
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    output.name = None
    tensor.name = name
    ir.convenience.replace_all_uses_with(output, value)
    assert node.graph is not None, "the nodes of a model belong to a graph"
    node.graph.register_initializer(value)
