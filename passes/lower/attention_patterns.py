"""The core of attention, from the rows of q, k and v to rows again, in the forms exporters write.

A pattern starts at its Softmax and either returns what it found or raises ``Refusal`` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.head_patterns import (
    HEADS_BEFORE_ROWS,
    HeadView,
    Rotary,
    keeps_rows,
    keys_of,
    permutation,
    queries_of,
    target_of,
    values_of,
)
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import dims, made_by, only_reader, same, standard, unscaled
from sparsecc.passes.tidy.graph import int_attribute

__all__ = ["AttentionMatch", "match_attention"]


@dataclass(frozen=True)
class AttentionMatch:
    """``output = softmax(scale q k^T + mask) v`` of every head.

    Attributes:
        inputs: q ``[B, S, heads * size]``, k and v ``[B, T, kv_heads * size]``.
        mask: added to the scores, or ``None``.
        heads: of q.
        kv_heads: of k and v.
        scale: factor of the scores.
        rotary: cosines and sines by which q and k are turned first, or ``None``.
        output: ``[B, S, heads * size]``.
    """

    inputs: tuple[ir.Value, ir.Value, ir.Value]
    mask: ir.Value | None
    heads: int
    kv_heads: int
    scale: float
    rotary: Rotary | None
    output: ir.Value


def match_attention(node: ir.Node) -> AttentionMatch | None:
    """Attention, found at its Softmax; ``None`` for other nodes.

    Raises:
        Refusal: it is a Softmax of something else.
    """
    if not standard(node, "Softmax") or node.inputs[0] is None:
        return None
    rank = len(dims(node.inputs[0]) or ())
    if int_attribute(node, "axis", -1) not in (-1, (rank or 4) - 1):
        raise Refusal("its softmax is not over the keys")
    product, mask, scale = _masked_scores(node.inputs[0])
    weigh = only_reader(node.outputs[0], "MatMul")
    left, right = product.inputs
    if weigh is None or weigh.inputs[0] is not node.outputs[0] or weigh.inputs[1] is None:
        raise Refusal("its weights are used otherwise than for one product")
    assert left is not None, "checked with the product"
    assert right is not None, "checked with the product"
    q, k, v = queries_of(left), keys_of(right), values_of(weigh.inputs[1])
    shape, k_shape = dims(q.rows), dims(k.rows)
    if k.heads != v.heads or dims(v.rows) != k_shape or (k.shared, k.by_axis) != (v.shared, v.by_axis):
        raise Refusal("queries, keys and values have different heads")
    if not _share_heads(q, k) or shape is None or k_shape is None:
        raise Refusal("queries, keys and values have different heads")
    width, k_width = shape[2], k_shape[2]
    fit = isinstance(width, int) and isinstance(k_width, int) and width * k.heads == k_width * q.heads
    if not (same(shape[0], k_shape[0]) and fit) or v.factor != 1:
        raise Refusal("queries, keys and values do not fit together")
    if not _equally_turned(q.rotary, k.rotary) or (q.rotary and not same(shape[1], k_shape[1])):
        raise Refusal("queries and keys are not turned by the same positions")
    if mask is not None:
        _check_mask(mask, [shape[0], q.heads, shape[1], k_shape[1]], by_axis=q.by_axis)
    output = _joined_rows(weigh.outputs[0], shape, q)
    factor = scale * q.factor * k.factor
    return AttentionMatch((q.rows, k.rows, v.rows), mask, q.heads, k.heads, factor, q.rotary, output)


def _share_heads(q: HeadView, k: HeadView) -> bool:
    """Whether head h of q reads head h / (heads / kv_heads) of k, as the operator does."""
    if q.by_axis != k.by_axis:
        return False
    return q.heads == k.heads * (q.shared if q.by_axis else k.shared)


def _equally_turned(a: Rotary | None, b: Rotary | None) -> bool:
    if a is None or b is None:
        return a is b
    arrays = [(constant_array(x), constant_array(y)) for x, y in zip(a, b, strict=True)]
    return all(
        x is y or (p is not None and q is not None and np.array_equal(p, q))
        for (x, y), (p, q) in zip(zip(a, b, strict=True), arrays, strict=True)
    )


def _masked_scores(value: ir.Value) -> tuple[ir.Node, ir.Value | None, float]:
    """The product of queries and keys that ``value`` is made of, what is added to it and its factor."""
    add = made_by(value, "Add")
    choices: list[tuple[ir.Value | None, ir.Value | None]] = [(value, None)]
    if add is not None:
        choices = [(add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])]
    for scores, mask in choices:
        if scores is None:
            continue
        inner, factor = unscaled(scores)
        product = made_by(inner, "MatMul")
        if product is not None and all(item is not None for item in product.inputs):
            return product, mask, factor
    raise Refusal("its scores are not a scaled product with a mask added")


def _check_mask(mask: ir.Value, wanted: list[int | str | None], *, by_axis: bool) -> None:
    """Raise unless the mask is known to broadcast to ``wanted``, the shape of the scores.

    Of the keys nothing need be known: if the mask made more of them, the product with the values would fail. Where
    the scores have five axes, what comes before queries and keys must be 1, which means the same for four.
    """
    shape = dims(mask)
    if shape is None or mask.dtype != ir.DataType.FLOAT:
        raise Refusal("the shape of its mask is not known")
    if len(shape) > len(wanted):
        raise Refusal("its mask has more than four dimensions")
    for axis, dim in enumerate(reversed(shape)):
        want = wanted[-1 - axis]
        if axis > 0 and dim != 1 and not (same(dim, want) and (axis == 1 or not by_axis)):
            raise Refusal(f"its mask {shape} may be larger than the scores {wanted}")


def _joined_rows(context: ir.Value, shape: list[int | str | None], q: HeadView) -> ir.Value:
    """The rows made of the heads of ``context``, of the ``shape`` ``[B, S, W]`` of the queries."""
    if q.by_axis:
        flat = only_reader(context, "Reshape")
        found = None if flat is None else dims(flat.outputs[0])
        size = shape[2] // q.heads if isinstance(shape[2], int) else None
        if flat is None or found is None or not all(map(same, found, [shape[0], q.heads, shape[1], size])):
            raise Refusal("its heads are not joined to rows again")
        context = flat.outputs[0]
    turn = only_reader(context, "Transpose")
    join = None if turn is None else only_reader(turn.outputs[0], "Reshape")
    if turn is None or join is None or permutation(turn) != HEADS_BEFORE_ROWS:
        raise Refusal("its heads are not joined to rows again")
    wanted, joined = target_of(join, shape), dims(join.outputs[0])
    if wanted is not None:
        kept = len(wanted) == len(shape) and wanted[-1] in (-1, shape[-1]) and keeps_rows(shape, wanted)
    else:
        kept = joined is not None and len(joined) == len(shape) and all(map(same, joined, shape))
    if not kept:
        raise Refusal("its heads are not joined to rows again")
    return join.outputs[0]
