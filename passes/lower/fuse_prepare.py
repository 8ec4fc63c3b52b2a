"""Before and after patterns of a transformer's graph: what stands in their way goes, the new node takes a place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsecc.ir.names import value_names
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.known_sizes import infer_more_shapes
from sparsecc.passes.tidy.graph import add_constant, bypass, int_attribute

__all__ = ["prepare", "replace", "take_over"]


def prepare(model: ir.Model) -> None:
    """Infer shapes in the main graph; drop casts to the same type and read sizes from inputs where they begin."""
    infer_more_shapes(model)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.domain in ("", "ai.onnx"):
            _skip_cast_to_the_same(node)
    _read_sizes_from_inputs(model)


def _skip_cast_to_the_same(node: ir.Node) -> None:
    source = node.inputs[0]
    if source is not None and source.dtype == ir.DataType(int_attribute(node, "to", 0)):
        bypass(node, source)


def _read_sizes_from_inputs(model: ir.Model) -> None:
    """Let each Gather of one size read it from an input of the model, if one has a dimension of the same symbol.

    Exporters read how many keys there are from the keys, which then have a reader beside attention.
    """
    graph = model.graph
    places = {
        dim.value: (value, axis)
        for value in reversed(graph.inputs)
        if value.shape is not None and not value.is_initializer()
        for axis, dim in enumerate(value.shape)
        if not isinstance(dim, int) and dim.value is not None
    }
    shapes: dict[ir.Value, ir.Value] = {}
    used = value_names(model)
    for node in list(graph):
        symbol = _one_size(node)
        if symbol not in places:
            continue
        source, axis = places[symbol]
        if source not in shapes:
            reader = ir.Node("", "Shape", [source], num_outputs=1)
            graph.insert_before(graph[0], reader)
            shapes[source] = reader.outputs[0]
        index = constant_array(node.inputs[1])
        assert index is not None, "checked with the size"
        node.replace_input_with(0, shapes[source])
        node.replace_input_with(
            1, add_constant(graph, f"{source.name}_axis", np.full_like(index, axis), used)
        )


def _one_size(node: ir.Node) -> str | None:
    """The symbol of the size that a Gather takes from the shape of something that no input is."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or int_attribute(node, "axis", 0) != 0:
        return None
    index = constant_array(node.inputs[1])
    shape = None if node.inputs[0] is None else node.inputs[0].producer()
    if index is None or index.size != 1 or shape is None or shape.op_type != "Shape" or shape.attributes:
        return None
    source, place = shape.inputs[0], int(index.reshape(()))
    if source is None or source.is_graph_input() or source.shape is None:
        return None
    if not -len(source.shape) <= place < len(source.shape):
        return None
    dim = source.shape[place]
    return None if isinstance(dim, int) else dim.value


def replace(output: ir.Value, node: ir.Node, result: ir.Value, before: ir.Node) -> None:
    """Put ``node`` in front of ``before``; its ``result`` takes the place, name, type and shape of ``output``."""
    graph = before.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    graph.insert_before(before, node)
    take_over(output, result)


def take_over(output: ir.Value, result: ir.Value) -> None:
    """Let ``result`` take the place, name, type and shape of ``output``."""
    result.type, result.shape = output.type, output.shape
    name = output.name
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    output.name = None
    result.name = name
