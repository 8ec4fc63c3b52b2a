"""From an operand back to the constant it reads, and from a constant to all its readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx_ir

__all__ = [
    "UNPACKS_KEY",
    "RefusedError",
    "Traced",
    "all_readers",
    "captured_inputs",
    "refuse_matmul",
    "trace_back",
]

#: Metadata key on nodes that make a dense weight of packed constants: not sites, nor to be folded.
UNPACKS_KEY = "sparsecc.unpacks"


class RefusedError(Exception):
    """A node or weight is no site; the text is the reason."""


class Traced(NamedTuple):
    """What an operand reads.

    Attributes:
        constant: the value that holds the numbers.
        flipped: a Transpose stands in between.
        dequantize: the DequantizeLinear in between, or None.
    """

    constant: onnx_ir.Value
    flipped: bool
    dequantize: onnx_ir.Node | None = None


def refuse_matmul(node: onnx_ir.Node) -> None:
    """Say it better for a MatMul, whose operands are both data as a rule (attention)."""
    left, right = node.inputs[0], node.inputs[1]
    try:
        trace_back(left)
    except RefusedError:
        producer = right.producer() if right is not None else None
        if producer is not None and not _is_constant(producer):
            raise RefusedError("both operands are computed at run time") from None
        return
    raise RefusedError("the constant is the left operand; only weights on the right are supported")


def trace_back(value: onnx_ir.Value | None) -> Traced:
    """Return the constant that ``value`` hands on, with what stands in between.

    Raises:
        RefusedError: it is no constant, or not plainly one.
    """
    flipped, dequantize = False, None
    while value is not None and (producer := value.producer()) is not None:
        if producer.domain == "" and producer.op_type == "Constant":
            attr = producer.attributes.get("value")
            if attr is None or attr.is_ref():
                raise RefusedError("weight is a Constant without a fixed tensor")
            return Traced(value, flipped, dequantize)
        if dequantize is None and _dequantizes(producer):
            dequantize, value = producer, producer.inputs[0]
            continue
        if dequantize is not None and producer.op_type == "Transpose":
            raise RefusedError("quantised weight goes through Transpose before its DequantizeLinear")
        if not _passes_through(producer):
            raise RefusedError(_why_computed(producer))
        flipped ^= producer.op_type == "Transpose"
        value = producer.inputs[0]
    if value is None:
        raise RefusedError("weight is missing")
    if value.const_value is None:
        raise RefusedError(
            "weight is an input of the graph or function: make it constant, or inline the function"
        )
    if value.is_graph_input():
        raise RefusedError(
            "weight is also a graph input, so a caller may override it: remove it from the inputs"
        )
    return Traced(value, flipped, dequantize)


def _why_computed(producer: onnx_ir.Node) -> str:
    if UNPACKS_KEY in producer.metadata_props:
        return "weight is packed in the file: start from the model it was packed from"
    if not _is_constant(producer):
        return f"weight is computed at run time by {producer.op_type}"
    return f"weight is a constant that goes through {producer.op_type}: fold constants first (pass tidy)"


def _is_constant(producer: onnx_ir.Node) -> bool:
    """Whether the node's result depends on constants only."""
    pending, seen = [producer], {producer}
    while pending:
        node = pending.pop()
        for value in node.inputs:
            if value is None or value.const_value is not None:
                continue
            if (before := value.producer()) is None:
                return False
            if before not in seen:
                seen.add(before)
                pending.append(before)
    return True


def _passes_through(node: onnx_ir.Node) -> bool:
    """Whether the node hands a matrix on as it is, or transposed."""
    if node.domain != "":
        return False
    if node.op_type == "Identity":
        return True
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and (
        tuple(perm.as_ints()) == (1, 0) if perm is not None else _rank(node.inputs[0]) == 2
    )


def _dequantizes(node: onnx_ir.Node) -> bool:
    return node.domain == "" and node.op_type == "DequantizeLinear"


def _rank(value: onnx_ir.Value | None) -> int | None:
    if value is None:
        return None
    if value.const_value is not None:
        return len(value.const_value.shape)
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return len(producer.attributes["value"].as_tensor().shape)
    return len(value.shape) if value.shape is not None else None


def all_readers(weight: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
    """Yield every (node, input) the constant ends up in, beyond Identity, Transpose and DequantizeLinear."""
    pending = [weight]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise RefusedError(f"weight {weight.name!r} is also an output of the graph")
        for node, index in value.uses():
            if node.graph is None:
                continue  # removed from its graph without being detached
            if _passes_through(node) or (_dequantizes(node) and index == 0):
                pending.append(node.outputs[0])
            else:
                yield node, index


def captured_inputs(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """Yield what ``node`` reads: its inputs, and what the nodes in bodies of it read and these give."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        bodies: Sequence[onnx_ir.Graph] = ()
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        for body in bodies:
            for inner in body:
                yield from captured_inputs(inner)
            yield from body.outputs
