"""Steps through a transformer's graph, and its normalisations, in the forms exporters write.

Every function starts at one node that the pattern cannot do without and either returns what it found or raises
``Refusal`` with the reason; ``None`` means that the node has nothing to do with the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.known_sizes import known_number
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.tidy.graph import float_attribute, int_attribute

__all__ = [
    "NormMatch",
    "dims",
    "made_by",
    "match_norm",
    "only_reader",
    "same",
    "single",
    "standard",
    "unscaled",
]


@dataclass(frozen=True)
class NormMatch:
    """``output = norm(source) * gain + shift``.

    Attributes:
        source: what is normalised.
        gain, shift: constants ``[N]``; no shift is a root-mean-square norm.
        epsilon: added under the root.
        readers: the nodes of the pattern that read ``source``.
        output: the result.
    """

    source: ir.Value
    gain: ir.Value
    shift: ir.Value | None
    epsilon: float
    readers: frozenset[ir.Node]
    output: ir.Value


def standard(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is of the default domain and one of ``op_types``."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of ``op_types`` that makes ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and standard(node, *op_types) else None


def single(value: ir.Value | None) -> float | None:
    """The number of a one-element float, constant or computed from sizes, that leaves every tensor the rank it has."""
    array = constant_array(value)
    if array is None:
        floating = value is not None and value.dtype == ir.DataType.FLOAT
        return known_number(value) if floating else None
    if array.size != 1 or array.ndim > 1 or array.dtype.kind != "f":
        return None
    return float(array.reshape(()))


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The dimensions of ``value``: numbers, symbols or ``None``; ``None`` where not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def same(a: int | str | None, b: int | str | None) -> bool:
    """Whether two dimensions are known to be equal."""
    return a is not None and a == b


def _with_constant(node: ir.Node) -> Iterator[tuple[ir.Value, float]]:
    """(other input, number) for each input of a two-input node that is a one-element constant."""
    for value, other in zip(node.inputs, reversed(node.inputs), strict=True):
        number = single(other)
        if value is not None and number is not None:
            yield value, number


def unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` without the multiplications and divisions by constants that made it, and their product."""
    factor = 1.0
    while (node := made_by(value, "Mul", "Div")) is not None:
        if node.op_type == "Div":
            number = single(node.inputs[1])
            found = None if number in (None, 0.0) or node.inputs[0] is None else (node.inputs[0], 1 / number)
        else:
            found = next(_with_constant(node), None)
        if found is None:
            break
        value, factor = found[0], factor * found[1]
    return value, factor


# ---- normalisation ----------------------------------------------------------------------------------


def _over_last_axis(node: ir.Node) -> bool:
    if int_attribute(node, "keepdims", 1) != 1:
        return False
    attribute = node.attributes.get("axes")
    if attribute is not None and not attribute.is_ref():
        axes = list(attribute.as_ints())
    else:
        array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if array is None else [int(axis) for axis in array.reshape(-1)]
    shape = dims(node.inputs[0])
    return axes == [-1] or (shape is not None and axes == [len(shape) - 1])


def _mean_of(value: ir.Value | None) -> tuple[ir.Node, ir.Value] | None:
    node = made_by(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not _over_last_axis(node):
        return None
    return node, node.inputs[0]


def _square_of(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    node = made_by(value, "Pow", "Mul")
    if node is None or node.inputs[0] is None:
        return None
    square = single(node.inputs[1]) == 2 if node.op_type == "Pow" else node.inputs[0] is node.inputs[1]
    return (node, node.inputs[0]) if square else None


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node of one of ``op_types`` that alone reads ``value``."""
    readers = value.consumers()
    if value.is_graph_output() or len(readers) != 1 or not standard(readers[0], *op_types):
        return None
    return readers[0]


def _per_column(node: ir.Node | None, of: ir.Value, size: int | str | None) -> ir.Value | None:
    """The other input of ``node`` if it is a constant ``[size]``."""
    if node is None or len(node.inputs) != 2:
        return None
    other = node.inputs[1] if node.inputs[0] is of else node.inputs[0]
    array = constant_array(other)
    return other if array is not None and array.ndim == 1 and array.shape[0] == size else None


def match_norm(node: ir.Node) -> NormMatch | None:
    """A normalisation over the last axis, found at its LayerNormalization or its Sqrt."""
    if standard(node, "LayerNormalization"):
        found = _match_whole(node)
    elif standard(node, "Sqrt"):
        found = _match_pieces(node)
    else:
        return None
    if found is not None and found.source.dtype != ir.DataType.FLOAT:
        raise Refusal("what is normalised is not known to be float32")
    return found


def _match_whole(node: ir.Node) -> NormMatch | None:
    x, gain = node.inputs[0], node.inputs[1]
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    shape = dims(x)
    if x is None or gain is None or shape is None:
        raise Refusal("the shape of what is normalised is not known")
    if int_attribute(node, "axis", -1) not in (-1, len(shape) - 1):
        raise Refusal("it normalises more than the last axis")
    if shift is None or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise Refusal("it has no bias, or its mean is used")
    for value in (gain, shift):
        array = constant_array(value)
        if array is None or array.shape != tuple(shape[-1:]):
            raise Refusal("its scale or bias is not one constant per column")
    epsilon = float_attribute(node, "epsilon", 1e-5)
    return NormMatch(x, gain, shift, epsilon, frozenset({node}), node.outputs[0])


def _divided_by(root: ir.Value, deviation: ir.Value) -> ir.Node | None:
    """The node that makes ``deviation / root`` (or ``deviation * (1 / root)``) where nobody else reads ``root``."""
    divide = only_reader(root, "Div", "Reciprocal")
    if divide is None or (divide.op_type == "Div" and divide.inputs[0] is deviation):
        return divide
    if divide.op_type == "Div" and (divide.inputs[1] is not root or single(divide.inputs[0]) != 1):
        return None
    times = only_reader(divide.outputs[0], "Mul")
    return times if times is not None and any(value is deviation for value in times.inputs) else None


def _match_pieces(node: ir.Node) -> NormMatch | None:
    """``d / sqrt(mean(d^2) + epsilon) * gain [+ shift]`` with d = x - mean(x), or x itself."""
    add = made_by(node.inputs[0], "Add")
    found = None if add is None else next(_with_constant(add), None)
    mean = None if found is None else _mean_of(found[0])
    square = None if mean is None else _square_of(mean[1])
    if found is None or square is None:
        return None
    squarer, deviation = square
    divide = _divided_by(node.outputs[0], deviation)
    if divide is None:
        return None
    size = (dims(deviation) or [None])[-1]
    multiply = only_reader(divide.outputs[0], "Mul")
    gain = _per_column(multiply, divide.outputs[0], size)
    if multiply is None or gain is None:
        raise Refusal("its scale is not one constant per column")
    centre = made_by(deviation, "Sub")
    middle = None if centre is None else _mean_of(centre.inputs[1])
    if centre is None or middle is None or middle[1] is not centre.inputs[0]:
        readers = frozenset({squarer, divide})
        return NormMatch(deviation, gain, None, found[1], readers, multiply.outputs[0])
    last = only_reader(multiply.outputs[0], "Add")
    shift = _per_column(last, multiply.outputs[0], size)
    if last is None or shift is None:
        raise Refusal("its bias is not one constant per column")
    return NormMatch(middle[1], gain, shift, found[1], frozenset({centre, middle[0]}), last.outputs[0])
