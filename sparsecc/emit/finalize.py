"""The last step before a model is saved: whatever makes its sparse operators valid ONNX everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from sparsecc.emit.operator import Dim, Operator
from sparsecc.emit.schema import operators
from sparsecc.errors import ModelError
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION
from sparsecc.ir.trace import UNPACKS_KEY

if TYPE_CHECKING:
    from sparsecc.ir import Model

__all__ = ["finalize"]

_FIRST_IR_VERSION_WITH_FUNCTIONS = 8


def finalize(model: Model) -> None:
    """Attach what the ``ai.sparsecc`` nodes of ``model`` need, wherever they are; changes it in place.

    Afterwards: every operator used has its model-local function, of the model's own opset; no other function
    of the domain is left; the domain is imported where it is used and nowhere else; the IR version knows
    functions; outputs carry type and shape. Doing it twice changes nothing more. A model without sparse
    operators only loses left-overs of the domain, and the types of what unpacks weights.

    Raises:
        ModelError: a node of the domain is none of our operators, or is not what such a node must be.
        UnsupportedModelError: the model's opset is older than the function bodies need.
    """
    onnx = model.onnx
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs if UNPACKS_KEY in node.metadata_props else ():
                if not value.is_graph_output():  # its type follows, and would take room in the file
                    value.type = value.shape = None
    others = {key: function for key, function in onnx.functions.items() if key[0] != DOMAIN}
    onnx.functions.clear()
    onnx.functions.update(others)
    used = {node.op_type: _operator(node) for node in _sparse_nodes(onnx)}
    _import_domain(onnx, bool(used))
    if not used:
        return
    # Ours first: ONNX's reference evaluator wants a function before the functions that call it.
    functions = [used[name].function(model.opset) for name in sorted(used)]
    onnx.functions.clear()
    onnx.functions.update({function.identifier(): function for function in functions})
    onnx.functions.update(others)
    onnx.ir_version = max(onnx.ir_version, _FIRST_IR_VERSION_WITH_FUNCTIONS)
    for node in _sparse_nodes(onnx):
        _describe_outputs(node, used[node.op_type])


def _sparse_nodes(onnx: ir.Model) -> Iterator[ir.Node]:
    graphs: tuple[ir.Graph | ir.Function, ...] = (onnx.graph, *onnx.functions.values())
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.domain == DOMAIN:
                yield node


def _operator(node: ir.Node) -> Operator:
    op = operators().get(node.op_type)
    if op is None:
        raise ModelError(
            f"node '{node.name}' is {DOMAIN}.{node.op_type}, which this release does not know: "
            "use the sparsecc release that wrote the model"
        )
    given = [value for value in node.inputs if value is not None]
    missing = [item.name for item in op.attributes if not (item.optional or item.name in node.attributes)]
    if (
        len(given) != len(op.inputs)
        or len(node.inputs) != len(op.inputs)
        or len(node.outputs) != len(op.outputs)
        or missing
    ):
        raise ModelError(
            f"node '{node.name}' ({DOMAIN}.{op.name}) has {len(given)} inputs, {len(node.outputs)} outputs"
            f"{' and no ' + ', '.join(missing) if missing else ''}; it takes {len(op.inputs)} inputs, "
            f"{len(op.outputs)} outputs and "
            f"the attributes {', '.join(item.name for item in op.attributes)}: write the model again"
        )
    return op


def _import_domain(onnx: ir.Model, used: bool) -> None:
    scopes = [(onnx.opset_imports, used)]
    for function in onnx.functions.values():
        nodes = ir.traversal.RecursiveGraphIterator(function)
        scopes.append((function.opset_imports, any(node.domain == DOMAIN for node in nodes)))
    for imports, wanted in scopes:
        if wanted:
            imports[DOMAIN] = DOMAIN_VERSION
        else:
            imports.pop(DOMAIN, None)


def _describe_outputs(node: ir.Node, op: Operator) -> None:
    """Give the outputs their types, and their shapes where the node's constants tell."""
    for value, declared in zip(node.outputs, op.outputs, strict=True):
        value.type = ir.TensorType(ir.DataType[declared.dtype.replace("float32", "float").upper()])
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return  # in a function whose caller decides
    inputs = [None if value is None or value.shape is None else _dims(value.shape) for value in node.inputs]
    constants = {
        declared.name: value.const_value.numpy()
        for value, declared in zip(node.inputs, op.inputs, strict=True)
        if value is not None and value.const_value is not None
    }
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    try:
        shapes = op.output_shapes(inputs, constants, attributes)
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"node '{node.name}' ({DOMAIN}.{op.name}): shape and geometry do not fit ({error}); write the model again"
        ) from error
    for value, shape in zip(node.outputs, shapes, strict=True):
        if value.shape is None and shape is not None:
            value.shape = ir.Shape(shape)


def _dims(shape: ir.Shape) -> list[Dim]:
    return [dim if isinstance(dim, int) else dim.value for dim in shape]
