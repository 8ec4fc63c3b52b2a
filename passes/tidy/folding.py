"""Constant folding: what depends on constants only is computed once, now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.trace import UNPACKS_KEY
from sparsecc.passes.tidy.graph import add_constant, constant_of

__all__ = ["fold_constants"]

# Deterministic operators whose reference implementation equals onnxruntime exactly, or to rounding.
# DequantizeLinear is left out on purpose: folding it would store integer weights as floats.
_FOLDABLE = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Cos", "Div", "Equal", "Exp"),
        *("Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log"),
        *("Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "Reshape", "Shape", "Sin"),
        *("Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    }
)
_LARGEST_NBYTES = 1 << 28  # above this a folded tensor would weigh more on memory than the node on time
_LARGE_NBYTES = 1 << 12  # equal results above this are stored once; constants above this tie their readers

Values = dict[ir.Value, NDArray[Any]]


def fold_constants(model: ir.Model, used: set[str], max_growth: int) -> int:
    """Replace nodes whose inputs are all constant by their values; return how many.

    Nodes are taken in regions that hang together. Of a region that would add too much to the file the nodes
    with the largest results stay, until it fits. Equal large results are stored once, in the main graph: the
    two bodies of an If often prepare the same weight.

    Args:
        model: changed in place, subgraphs too.
        used: names taken; new ones are added.
        max_growth: bytes that folding one region may add, after what it makes unnecessary is gone.
    """
    known, nodes = _evaluate_all(model)
    stored: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    folded = 0
    for region in _regions(nodes, known):
        kept = _fitting(region, known, max_growth)
        for value in list(_results(kept, known)):
            _store(model, value, known[value], stored, used)
        for node in reversed(kept):
            assert node.graph is not None, "the nodes of a model belong to a graph"
            node.graph.remove(node, safe=True)
        folded += len(kept)
    return folded


def _evaluate_all(model: ir.Model) -> tuple[Values, list[ir.Node]]:
    """Return every value that constants determine, and the nodes that compute them, in graph order."""
    opset = model.graph.opset_imports.get("", 1)
    known: Values = {}
    nodes: list[ir.Node] = []
    for graph in model.graphs():  # outer graphs come first, so what a body reads from them is known by then
        for node in graph:
            if not _is_foldable(node):
                continue
            if (sizes := _sizes_of_input(node, model.graph, known)) is not None:
                known[node.outputs[0]] = sizes
                nodes.append(node)
                continue
            inputs = [_lookup(value, known) for value in node.inputs]
            if any(
                value is not None and array is None for value, array in zip(node.inputs, inputs, strict=True)
            ):
                continue
            results = _evaluate(node, inputs, opset)
            if results is not None:
                known.update(zip(node.outputs, results, strict=True))
                nodes.append(node)
    return known, nodes


def _sizes_of_input(node: ir.Node, main: ir.Graph, known: Values) -> NDArray[np.int64] | None:
    """What a Gather takes from the Shape of an input of the model, where the input declares those sizes as fixed.

    onnxruntime refuses other sizes for such an input; what is declared of values inside nobody checks.
    """
    axis = node.attributes.get_int("axis", 0)
    if node.op_type != "Gather" or len(node.inputs) != 2 or axis != 0:
        return None
    indices = _lookup(node.inputs[1], known)
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    if indices is None or shape is None or shape.domain != "" or shape.op_type != "Shape" or shape.attributes:
        return None
    source = shape.inputs[0]
    if source is None or source.shape is None or not any(source is item for item in main.inputs):
        return None
    rank = len(source.shape)
    if ((indices < -rank) | (indices >= rank)).any():
        return None
    sizes = [source.shape[int(index)] for index in indices.reshape(-1)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return np.array(sizes, np.int64).reshape(indices.shape)


def _is_foldable(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _FOLDABLE or not node.inputs:
        return False
    if UNPACKS_KEY in node.metadata_props:  # it unpacks the weight of a site, which is packed to save bytes
        return False
    return not any(value.is_graph_output() for value in node.outputs)


def _lookup(value: ir.Value | None, known: Values) -> NDArray[Any] | None:
    if value is None or value in known:
        return None if value is None else known[value]
    tensor = constant_of(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _LARGEST_NBYTES:
        return None
    return tensor.numpy()


def _evaluate(node: ir.Node, inputs: list[NDArray[Any] | None], opset: int) -> list[NDArray[Any]] | None:
    """Return the outputs of one node, or ``None`` where the reference evaluator cannot tell."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = onnx.NodeProto()
    proto.CopyFrom(ir.to_proto(node))
    feeds: dict[str, NDArray[Any]] = {}
    for index, array in enumerate(inputs):
        if array is not None:
            proto.input[index] = f"in{index}"
            feeds[f"in{index}"] = array
    infos = [onnx.ValueInfoProto(name=name) for name in feeds]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = onnx.GraphProto(name="node", node=[proto], input=infos, output=outputs)
    model = onnx.ModelProto(ir_version=8, graph=graph, opset_import=[onnx.OperatorSetIdProto(version=opset)])
    try:
        with np.errstate(all="ignore"):
            arrays = [np.asarray(item) for item in ReferenceEvaluator(model).run(None, feeds)]
    except Exception:  # whatever it cannot evaluate (version, type, invalid values) stays a node
        return None
    fits = len(arrays) == len(node.outputs) and all(array.nbytes <= _LARGEST_NBYTES for array in arrays)
    return arrays if fits and _types_agree(node, arrays) else None


def _types_agree(node: ir.Node, arrays: list[NDArray[Any]]) -> bool:
    """Whether computed types are the ones the model states, as far as it states them."""
    return all(
        array.dtype.kind not in "OSU"
        and (value.dtype is None or value.dtype == ir.DataType.from_numpy(array.dtype))
        for value, array in zip(node.outputs, arrays, strict=True)
    )


def _regions(nodes: list[ir.Node], known: Values) -> list[list[ir.Node]]:
    """Return the nodes in groups tied by computed values and by large constants, each in graph order."""
    ties = nx.Graph()
    ties.add_nodes_from(nodes)
    for node in nodes:
        for value in node.inputs:
            tensor = constant_of(value)
            if value in known or (tensor is not None and tensor.nbytes > _LARGE_NBYTES):
                ties.add_edge(node, value if tensor is not None else value.producer())  # type: ignore[union-attr]
    order = {node: index for index, node in enumerate(nodes)}
    groups = [
        sorted((n for n in part if n in order), key=order.__getitem__)
        for part in nx.connected_components(ties)
    ]
    return sorted(groups, key=lambda group: order[group[0]])


def _fitting(region: list[ir.Node], known: Values, max_growth: int) -> list[ir.Node]:
    """Return the nodes of the region to fold: all, or what is left once its growth is within the limit."""
    kept = list(region)
    while kept and _growth(kept, known) > max_growth:
        results = {value: known[value].nbytes for value in _results(kept, known)}
        largest = max(results.values())
        heavy = {value.producer() for value, nbytes in results.items() if nbytes == largest}
        kept = [node for node in kept if node not in heavy]
    return kept


def _results(nodes: list[ir.Node], known: Values) -> Iterator[ir.Value]:
    """Yield what nodes outside of ``nodes`` read."""
    inside = set(nodes)
    for node in nodes:
        for value in node.outputs:
            if any(use.node not in inside for use in value.uses()):
                yield value


def _growth(nodes: list[ir.Node], known: Values) -> int:
    """Return bytes stored for the results minus bytes of constants that nothing else reads."""
    inside = set(nodes)
    sources = {value for node in nodes for value in node.inputs if value is not None and value not in known}
    freed = 0
    for value in sources:
        tensor = constant_of(value)
        if tensor is not None and all(use.node in inside for use in value.uses()):
            freed += tensor.nbytes
    return sum(_unique_nbytes(known[value] for value in _results(nodes, known))) - freed


def _unique_nbytes(arrays: Iterable[NDArray[Any]]) -> Iterator[int]:
    seen = set()
    for array in arrays:
        key = _content(array) if array.nbytes > _LARGE_NBYTES else None
        if key is None or key not in seen:
            yield array.nbytes
        seen.add(key)


def _store(
    model: ir.Model,
    value: ir.Value,
    array: NDArray[Any],
    stored: dict[tuple[str, tuple[int, ...], bytes], ir.Value],
    used: set[str],
) -> None:
    """Let a constant stand where ``value`` stood; large ones in the main graph, for all to share."""
    producer = value.producer()
    assert producer is not None, "a folded value comes from a node"
    assert producer.graph is not None, "the nodes of a model belong to a graph"
    name = value.name or "folded"
    value.name = None
    used.discard(name)
    if array.nbytes <= _LARGE_NBYTES or model.graph is producer.graph:
        constant = add_constant(producer.graph, name, array, used)
    else:
        key = _content(array)
        if key not in stored:
            stored[key] = add_constant(model.graph, name, array, used)
        constant = stored[key]
    ir.convenience.replace_all_uses_with(value, constant)


def _content(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return str(array.dtype), array.shape, digest
