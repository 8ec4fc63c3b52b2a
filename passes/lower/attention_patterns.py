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
    Turn,
    fits,
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

__all__ = ["AttentionMatch", "find_attention", "masked_scores", "match_attention"]


@dataclass(frozen=True)
class AttentionMatch:
    """``output = softmax(scale q k^T + mask) v`` of every head.

    Attributes:
        q: ``[B, S, heads * size]``, with how its heads are seen.
        k: ``[B, T, kv_heads * size]``.
        v: ``[B, T, kv_heads * value size]``.
        mask: added to the scores, or ``None``.
        scale: factor of the scores.
        output: ``[B, S, heads * value size]``.
    """

    q: HeadView
    k: HeadView
    v: HeadView
    mask: ir.Value | None
    scale: float
    output: ir.Value

    @property
    def inputs(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Rows of q, k and v."""
        return self.q.rows, self.k.rows, self.v.rows

    @property
    def heads(self) -> int:
        """How many q has."""
        return self.q.heads

    @property
    def kv_heads(self) -> int:
        """How many k and v have."""
        return self.k.heads

    @property
    def rotary(self) -> Rotary | None:
        """Cosines and sines by which q and k are turned first, or ``None``."""
        return None if self.q.turn is None else self.q.turn.tables

    @property
    def sizes(self) -> tuple[int, int]:
        """How wide heads of q and k, and those of v, are."""
        q, v = (dims(view.rows) for view in (self.q, self.v))
        assert q is not None, "find_attention looked"
        assert v is not None, "find_attention looked"
        return int(q[2] or 0) // self.heads, int(v[2] or 0) // self.kv_heads


def match_attention(node: ir.Node) -> AttentionMatch | None:
    """Attention that the operators of this package compute too, found at its Softmax; ``None`` for other nodes.

    Raises:
        Refusal: it is a Softmax of something else, or one that those operators may compute differently.
    """
    found = find_attention(node)
    if found is None:
        return None
    q, k, v = found.q, found.k, found.v
    shape, k_shape = dims(q.rows), dims(k.rows)
    if dims(v.rows) != k_shape:
        raise Refusal("queries, keys and values have different heads")
    if shape is None or k_shape is None or not same(shape[0], k_shape[0]):
        raise Refusal("queries, keys and values do not fit together")
    for turn in (q.turn, k.turn):
        if turn is not None and turn.partners is not None:
            raise Refusal("its queries are turned in pairs that are not the halves of their heads")
        fit = turn is None or all(fits(table, turn.x) for table in turn.tables)
        if turn is not None and not (fit and dims(turn.tables[0]) == dims(turn.tables[1])):
            raise Refusal(
                "its cosines or sines are not known to be one row for each row, the same for all heads"
            )
    if q.turn is not None and not same(shape[1], k_shape[1]):
        raise Refusal("queries and keys are not turned by the same positions")
    if found.mask is not None:
        _check_mask(found.mask, [shape[0], q.heads, shape[1], k_shape[1]], by_axis=q.by_axis)
    return found


def find_attention(node: ir.Node) -> AttentionMatch | None:
    """Attention, found at its Softmax, also where the shapes of mask and tables are not known; else ``None``.

    The same standard operators on four axes compute the same with the same mask, whatever its shape; one of scores on
    five axes is known to be the same for all heads.

    Raises:
        Refusal: it is a Softmax of something else.
    """
    if not standard(node, "Softmax") or node.inputs[0] is None:
        return None
    rank = len(dims(node.inputs[0]) or ())
    if int_attribute(node, "axis", -1) not in (-1, (rank or 4) - 1):
        raise Refusal("its softmax is not over the keys")
    product, mask, scale = masked_scores(node.inputs[0])
    weigh = only_reader(node.outputs[0], "MatMul")
    left, right = product.inputs
    if weigh is None or weigh.inputs[0] is not node.outputs[0] or weigh.inputs[1] is None:
        raise Refusal("its weights are used otherwise than for one product")
    assert left is not None, "checked with the product"
    assert right is not None, "checked with the product"
    q, k, v = queries_of(left), keys_of(right), values_of(weigh.inputs[1])
    if k.heads != v.heads or (k.shared, k.by_axis) != (v.shared, v.by_axis) or not _share_heads(q, k):
        raise Refusal("queries, keys and values have different heads")
    shape, k_shape, v_shape = (dims(view.rows) or [None] * 3 for view in (q, k, v))
    width, k_width, v_width = shape[2], k_shape[2], v_shape[2]
    fit = isinstance(width, int) and isinstance(k_width, int) and width * k.heads == k_width * q.heads
    if not fit or not isinstance(v_width, int) or v.factor != 1:
        raise Refusal("queries, keys and values do not fit together")
    if not _equally_turned(q.turn, k.turn):
        raise Refusal("queries and keys are not turned by the same positions")
    if mask is not None and q.by_axis and any(dim != 1 for dim in (dims(mask) or [None] * 3)[:-2]):
        raise Refusal(f"its mask {dims(mask)} may be another one for each head")
    output = _joined_rows(weigh.outputs[0], [*shape[:2], v_width // k.heads * q.heads], q)
    return AttentionMatch(q, k, v, mask, scale * q.factor * k.factor, output)


def _share_heads(q: HeadView, k: HeadView) -> bool:
    """Whether head h of q reads head h / (heads / kv_heads) of k, as the operator does."""
    if q.by_axis != k.by_axis:
        return False
    return q.heads == k.heads * (q.shared if q.by_axis else k.shared)


def _equally_turned(one: Turn | None, other: Turn | None) -> bool:
    if one is None or other is None or one.partners != other.partners:
        return one is other
    a, b = one.tables, other.tables
    arrays = [(constant_array(x), constant_array(y)) for x, y in zip(a, b, strict=True)]
    return all(
        x is y or (p is not None and q is not None and np.array_equal(p, q))
        for (x, y), (p, q) in zip(zip(a, b, strict=True), arrays, strict=True)
    )


def masked_scores(value: ir.Value) -> tuple[ir.Node, ir.Value | None, float]:
    """The product of queries and keys that ``value`` is made of, what is added to it and its factor.

    Raises:
        Refusal: it is made otherwise.
    """
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
