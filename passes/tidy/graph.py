"""Small steps on onnx-ir graphs that the rewrites of ``tidy`` are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.names import free_name

__all__ = [
    "add_constant",
    "bypass",
    "constant_of",
    "float_attribute",
    "float_constant",
    "int_attribute",
    "only_consumer",
    "remove_dead",
    "set_constant",
]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initialiser that no caller can override, or ``None``."""
    if value is None or value.is_graph_input() or not value.is_initializer():
        return None
    return value.const_value


def float_constant(value: ir.Value | None) -> NDArray[np.float64] | None:
    """Return the constant as float64 when it is one of the floating types, or ``None``."""
    tensor = constant_of(value)
    if tensor is None or tensor.dtype not in _FLOATS:
        return None
    return tensor.numpy().astype(np.float64)


def add_constant(graph: ir.Graph, name: str, array: NDArray[Any], used: set[str]) -> ir.Value:
    """Return a new initialiser of ``graph``; its name gets a number where it is ``used`` already."""
    value = ir.Value(name=free_name(name, used))
    set_constant(value, array)
    graph.register_initializer(value)
    return value


def set_constant(value: ir.Value, array: NDArray[Any]) -> None:
    """Make ``array`` the content, shape and type of an initialiser."""
    # np.ascontiguousarray would make a vector of a scalar.
    tensor = ir.Tensor(np.asarray(array, order="C"), name=value.name)
    value.const_value = tensor
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(tensor.dtype)


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_float()


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads ``value`` in its own graph; ``None`` if it is read elsewhere too."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    producer = value.producer()
    consumer = uses[0].node
    return consumer if producer is not None and consumer.graph is producer.graph else None


def bypass(node: ir.Node, source: ir.Value) -> bool:
    """Remove ``node`` and let ``source`` stand where its first output stood, unless a name would be lost.

    A graph output keeps its name, type and shape: ``source`` takes them over, which it can only do when it
    is made by a node of the same graph and is no output itself.
    """
    output, graph = node.outputs[0], node.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return False
        source.type = output.type if output.type is not None else source.type
        source.shape = output.shape if output.shape is not None else source.shape
    name, was_output = output.name, output.is_graph_output()
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if was_output:
        output.name = None
        source.name = name
    return True


def remove_dead(model: ir.Model) -> tuple[int, int]:
    """Remove what no output depends on; return how many (nodes, initialisers)."""
    nodes = initializers = 0
    for graph in reversed(list(model.graphs())):  # subgraphs first: what they read may die with them
        outputs, inputs = set(graph.outputs), set(graph.inputs)
        for node in reversed(graph):
            if node.outputs and not any(value in outputs or value.uses() for value in node.outputs):
                _detach_subgraphs(node)
                graph.remove(node, safe=True)
                nodes += 1
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value in outputs or value in inputs):
                del graph.initializers[name]
                initializers += 1
    return nodes, initializers


def _detach_subgraphs(node: ir.Node) -> None:
    """Let the bodies of a node that goes away stop counting as readers of outer values."""
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for inner in [item for graph in graphs for item in ir.traversal.RecursiveGraphIterator(graph)]:
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
