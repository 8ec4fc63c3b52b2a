"""What a transformer's graph is made of around its matrix products, recognised in the forms exporters write.

Every function starts at one node that the pattern cannot do without and either returns what it found or raises
``Refusal`` with the reason; ``None`` means that the node has nothing to do with the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.tidy.graph import float_attribute, int_attribute

__all__ = ["AttentionMatch", "NormMatch", "match_attention", "match_norm"]

_LAST_AXIS_OF_SCORES = 3
_HEADS_BEFORE_ROWS = [0, 2, 1, 3]
_TRANSPOSED_KEYS = [0, 2, 3, 1]


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


@dataclass(frozen=True)
class AttentionMatch:
    """``output = softmax(scale q k^T + mask) v`` of every head, all ``[B, S, W]``."""

    inputs: tuple[ir.Value, ir.Value, ir.Value]
    mask: ir.Value | None
    heads: int
    scale: float
    output: ir.Value


def _standard(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def _made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of one of ``op_types`` that makes ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and _standard(node, *op_types) else None


def _single(value: ir.Value | None) -> float | None:
    """The number of a one-element constant that leaves every tensor the rank it has."""
    array = constant_array(value)
    if array is None or array.size != 1 or array.ndim > 1 or array.dtype.kind != "f":
        return None
    return float(array.reshape(()))


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The dimensions of ``value``: numbers, symbols or ``None``; ``None`` where not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _same(a: int | str | None, b: int | str | None) -> bool:
    return a is not None and a == b


def _with_constant(node: ir.Node) -> Iterator[tuple[ir.Value, float]]:
    """(other input, number) for each input of a two-input node that is a one-element constant."""
    for value, other in zip(node.inputs, reversed(node.inputs), strict=True):
        number = _single(other)
        if value is not None and number is not None:
            yield value, number


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` without the multiplications and divisions by constants that made it, and their product."""
    factor = 1.0
    while (node := _made_by(value, "Mul", "Div")) is not None:
        if node.op_type == "Div":
            number = _single(node.inputs[1])
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
    node = _made_by(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not _over_last_axis(node):
        return None
    return node, node.inputs[0]


def _square_of(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    node = _made_by(value, "Pow", "Mul")
    if node is None or node.inputs[0] is None:
        return None
    square = _single(node.inputs[1]) == 2 if node.op_type == "Pow" else node.inputs[0] is node.inputs[1]
    return (node, node.inputs[0]) if square else None


def _only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    readers = value.consumers()
    if value.is_graph_output() or len(readers) != 1 or not _standard(readers[0], *op_types):
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
    if _standard(node, "LayerNormalization"):
        found = _match_whole(node)
    elif _standard(node, "Sqrt"):
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


def _match_pieces(node: ir.Node) -> NormMatch | None:
    """``d / sqrt(mean(d^2) + epsilon) * gain [+ shift]`` with d = x - mean(x), or x itself."""
    add = _made_by(node.inputs[0], "Add")
    found = None if add is None else next(_with_constant(add), None)
    mean = None if found is None else _mean_of(found[0])
    square = None if mean is None else _square_of(mean[1])
    if found is None or square is None:
        return None
    squarer, deviation = square
    divide = _only_reader(node.outputs[0], "Div")
    if divide is None or divide.inputs[0] is not deviation:
        return None
    size = (dims(deviation) or [None])[-1]
    multiply = _only_reader(divide.outputs[0], "Mul")
    gain = _per_column(multiply, divide.outputs[0], size)
    if multiply is None or gain is None:
        raise Refusal("its scale is not one constant per column")
    centre = _made_by(deviation, "Sub")
    middle = None if centre is None else _mean_of(centre.inputs[1])
    if centre is None or middle is None or middle[1] is not centre.inputs[0]:
        readers = frozenset({squarer, divide})
        return NormMatch(deviation, gain, None, found[1], readers, multiply.outputs[0])
    last = _only_reader(multiply.outputs[0], "Add")
    shift = _per_column(last, multiply.outputs[0], size)
    if last is None or shift is None:
        raise Refusal("its bias is not one constant per column")
    return NormMatch(middle[1], gain, shift, found[1], frozenset({centre, middle[0]}), last.outputs[0])


# ---- attention --------------------------------------------------------------------------------------


def _permutation(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    return [] if attribute is None or attribute.is_ref() else list(attribute.as_ints())


def _heads_of(value: ir.Value, permutations: tuple[list[int], ...]) -> tuple[ir.Value, int, float]:
    """The rows ``[B, S, W]`` that ``value`` shows head by head, how many heads, and the factor on the way.

    Raises:
        Refusal: it is no such view.
    """
    value, factor = _unscaled(value)
    turn = _made_by(value, "Transpose")
    if turn is not None and turn.inputs[0] is not None and _permutation(turn) == [0, 1, 3, 2]:
        if _TRANSPOSED_KEYS not in permutations:
            raise Refusal("it is not made of heads that are columns of rows")
        inner, more = _unscaled(turn.inputs[0])
        factor *= more
        turn, permutations = _made_by(inner, "Transpose"), (_HEADS_BEFORE_ROWS,)
    if turn is None or turn.inputs[0] is None or _permutation(turn) not in permutations:
        raise Refusal("it is not made of heads that are columns of rows")
    rows, more = _unscaled(turn.inputs[0])
    cut = _made_by(rows, "Reshape")
    source = None if cut is None else cut.inputs[0]
    if source is None:
        raise Refusal("it is not made of heads that are columns of rows")
    heads = _cut_in_heads(source, rows, None if cut is None else constant_array(cut.inputs[1]))
    source, last = _unscaled(source)
    return source, heads, factor * more * last


def _cut_in_heads(source: ir.Value, rows: ir.Value, target: object) -> int:
    """How many heads the Reshape of ``source`` ``[B, S, W]`` to ``rows`` ``[B, S, heads, W / heads]`` makes."""
    before, after = dims(source), dims(rows)
    wanted = [int(dim) for dim in target] if target is not None else None  # type: ignore[attr-defined]
    rank, wide = 3, 4
    if before is None or len(before) != rank or source.dtype != ir.DataType.FLOAT:
        raise Refusal("the shape of its rows is not known")
    if wanted is not None and len(wanted) == wide and wanted[:2] == [0, 0]:
        after = [*before[:2], *wanted[2:]]
    if after is None or len(after) != wide or not all(map(_same, before[:2], after[:2])):
        if wanted is None or len(wanted) != wide or not _keeps_rows(before, wanted):
            raise Refusal("cutting its heads may move rows")
        after = [*before[:2], *wanted[2:]]
    heads, size, width = after[2], after[3], before[2]
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
        if size in (-1, width // heads):
            return heads
        raise Refusal("its heads do not divide its rows")
    if isinstance(width, int) and isinstance(size, int) and size > 0 and heads == -1 and width % size == 0:
        return width // size
    raise Refusal("its heads do not divide its rows")


def _keeps_rows(before: list[int | str | None], wanted: list[int]) -> bool:
    """Whether a target such as [-1, 128, heads, size] leaves both leading dimensions as they are."""
    exact = [want == 0 or want == have for want, have in zip(wanted[:2], before[:2], strict=True)]
    return all(exact) or (wanted[:2].count(-1) == 1 and -1 not in wanted[2:] and any(exact))


def _masked_scores(value: ir.Value) -> tuple[ir.Node, ir.Value | None, float]:
    """The product of queries and keys that ``value`` is made of, what is added to it and its factor."""
    add = _made_by(value, "Add")
    choices: list[tuple[ir.Value | None, ir.Value | None]] = [(value, None)]
    if add is not None:
        choices = [(add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])]
    for scores, mask in choices:
        if scores is None:
            continue
        inner, factor = _unscaled(scores)
        product = _made_by(inner, "MatMul")
        if product is not None and all(item is not None for item in product.inputs):
            return product, mask, factor
    raise Refusal("its scores are not a scaled product with a mask added")


def _check_mask(mask: ir.Value, wanted: list[int | str | None]) -> None:
    """Raise unless the mask is known to broadcast to ``wanted``, the shape of the scores.

    Of the keys nothing need be known: if the mask made more of them, the product with the values would fail.
    """
    shape = dims(mask)
    if shape is None or mask.dtype != ir.DataType.FLOAT:
        raise Refusal("the shape of its mask is not known")
    if len(shape) > len(wanted):
        raise Refusal("its mask has more than four dimensions")
    for dim, want in zip(reversed(shape[:-1]), reversed(wanted[:-1]), strict=False):
        if dim != 1 and not _same(dim, want):
            raise Refusal(f"its mask {shape} may be larger than the scores {wanted}")


def _joined_rows(context: ir.Value, shape: list[int | str | None]) -> ir.Value:
    """The rows made of the heads of ``context``, of the ``shape`` ``[B, S, W]`` of the queries."""
    turn = _only_reader(context, "Transpose")
    join = None if turn is None else _only_reader(turn.outputs[0], "Reshape")
    if turn is None or join is None or _permutation(turn) != _HEADS_BEFORE_ROWS:
        raise Refusal("its heads are not joined to rows again")
    target, joined = constant_array(join.inputs[1]), dims(join.outputs[0])
    if target is not None:
        wanted = [int(dim) for dim in target]
        kept = len(wanted) == len(shape) and wanted[-1] in (-1, shape[-1]) and _keeps_rows(shape, wanted)
    else:
        kept = joined is not None and len(joined) == len(shape) and all(map(_same, joined, shape))
    if not kept:
        raise Refusal("its heads are not joined to rows again")
    return join.outputs[0]


def match_attention(node: ir.Node) -> AttentionMatch | None:
    """Attention, found at its Softmax.

    Raises:
        Refusal: it is a Softmax of something else.
    """
    if not _standard(node, "Softmax") or node.inputs[0] is None:
        return None
    if int_attribute(node, "axis", -1) not in (-1, _LAST_AXIS_OF_SCORES):
        raise Refusal("its softmax is not over the keys")
    product, mask, scale = _masked_scores(node.inputs[0])
    weigh = _only_reader(node.outputs[0], "MatMul")
    left, right = product.inputs
    if weigh is None or weigh.inputs[0] is not node.outputs[0] or weigh.inputs[1] is None:
        raise Refusal("its weights are used otherwise than for one product")
    assert left is not None, "checked with the product"
    assert right is not None, "checked with the product"
    q, heads, q_factor = _heads_of(left, (_HEADS_BEFORE_ROWS,))
    k, k_heads, k_factor = _heads_of(right, (_TRANSPOSED_KEYS,))
    v, v_heads, v_factor = _heads_of(weigh.inputs[1], (_HEADS_BEFORE_ROWS,))
    shape, k_shape = dims(q), dims(k)
    if not heads == k_heads == v_heads or shape is None or k_shape is None or dims(v) != k_shape:
        raise Refusal("queries, keys and values have different heads")
    if not (_same(shape[0], k_shape[0]) and _same(shape[2], k_shape[2])) or v_factor != 1:
        raise Refusal("queries, keys and values do not fit together")
    if mask is not None:
        _check_mask(mask, [shape[0], heads, shape[1], k_shape[1]])
    output = _joined_rows(weigh.outputs[0], shape)
    return AttentionMatch((q, k, v), mask, heads, scale * q_factor * k_factor, output)
