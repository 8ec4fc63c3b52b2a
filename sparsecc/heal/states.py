"""Which tensors are the internal states of a model: those that everything later is computed from."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir

from sparsecc.ir import Model
from sparsecc.ir.trace import captured_inputs

__all__ = ["block_states", "downstream"]

#: Operators whose result says nothing of the values they read.
_SHAPE_ONLY = {"Shape", "Size"}


def downstream(model: Model) -> set[onnx_ir.Value]:
    """The values of the main graph that depend on the output of a site."""
    sites = {node for site in model.sites() for node in site.nodes}
    found: set[onnx_ir.Value] = set()
    for node in model.onnx.graph:
        if node in sites or (_carries(node) and any(value in found for value in _read_by(node))):
            found.update(node.outputs)
    return found


def block_states(model: Model) -> list[str]:
    """Names of the tensors of the main graph at the borders of blocks, in order.

    Such a tensor is the only one, of those the sites before it read or made, that anything after it reads: the
    residual stream between the halves of a transformer's layer, the sum at the end of a residual block, every
    activation of a chain of convolutions. Of several without a site between them the last is taken; what follows
    the last site is left to the outputs of the model.
    """
    sites = {node for site in model.sites() for node in site.nodes}
    computed = downstream(model)
    values = computed | _upstream(model)
    left = _readers(model.onnx.graph, values)
    names: list[str] = []
    live = {value for value in model.onnx.graph.inputs if value in values and left.get(value)}
    candidate = ""
    for node in model.onnx.graph:
        if node in sites and candidate:
            names.append(candidate)
            candidate = ""
        for value in _read_by(node) if _carries(node) else ():
            if value in values:
                left[value] -= 1
                if not left[value]:
                    live.discard(value)
        live.update(value for value in node.outputs if value in values and left.get(value))
        if len(live) == 1 and live <= computed:
            candidate = next(iter(live)).name or ""
    return names


def _upstream(model: Model) -> set[onnx_ir.Value]:
    """What the first sites are computed from: the stream that their results are added to may start there."""
    reached = downstream(model)
    pending = [
        value
        for site in model.sites()
        for node in site.nodes
        for value in node.inputs
        if value is not None and value not in reached and value.const_value is None
    ]
    found: set[onnx_ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in found or value in reached:
            continue
        found.add(value)
        producer = value.producer()
        if producer is not None and _carries(producer):
            pending += [
                before for before in producer.inputs if before is not None and before.const_value is None
            ]
    return found


def _readers(graph: onnx_ir.Graph, values: set[onnx_ir.Value]) -> dict[onnx_ir.Value, int]:
    """How many nodes read each value, shapes apart."""
    counts: dict[onnx_ir.Value, int] = {}
    for node in graph:
        for value in _read_by(node) if _carries(node) else ():
            if value in values:
                counts[value] = counts.get(value, 0) + 1
    return counts


def _carries(node: onnx_ir.Node) -> bool:
    return node.op_type not in _SHAPE_ONLY


def _read_by(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """The distinct values that the node or a body in it reads."""
    return iter(dict.fromkeys(captured_inputs(node)))
