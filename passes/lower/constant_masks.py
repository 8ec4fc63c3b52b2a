"""Attention whose mask is a constant that hides keys, and the mask as a sparse matrix.

A pattern starts at its Softmax and either returns what it found or raises ``Refusal`` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.attention_patterns import masked_scores
from sparsecc.passes.lower.head_patterns import permutation
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import dims, made_by, only_reader, same, standard, unscaled
from sparsecc.passes.tidy.graph import int_attribute

__all__ = ["MaskedAttention", "Seen", "attention_shapes", "match_masked", "seen_keys"]

_RANK = 4  # of [batch, heads, rows, head size]


@dataclass(frozen=True, eq=False)
class Seen:
    """Which keys each query sees, as the rows of a sparse matrix.

    Attributes:
        positions: ``[queries + 1]``, int32 where the entries fit.
        coordinates: ``[entries]``, rising in each row, of the same type.
        shape: queries and keys.
    """

    positions: NDArray[Any]
    coordinates: NDArray[Any]
    shape: tuple[int, int]

    @property
    def density(self) -> float:
        """Which share of all pairs is there."""
        return len(self.coordinates) / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Of both arrays."""
        return int(self.positions.nbytes + self.coordinates.nbytes)

    def key(self) -> bytes:
        """Equal for equal patterns."""
        return repr(self.shape).encode() + self.positions.tobytes() + self.coordinates.tobytes()


@dataclass(frozen=True, eq=False)
class MaskedAttention:
    """``output = softmax(scale q k^T + mask) v``.

    Attributes:
        q: ``[B, heads, S, D]``.
        k: ``[B, heads, T, D]``, or with axes ``k_axes`` that give it, or ``[B, heads, D, T]``.
        k_axes: the permutation of ``k`` to ``[B, heads, T, D]``, or ``None``.
        v: ``[B, heads, T, D]``.
        scale: factor of the scores.
        seen: what the mask lets through.
        mask_nbytes: bytes of the constant.
        output: the result.
    """

    q: ir.Value
    k: ir.Value
    k_axes: tuple[int, ...] | None
    v: ir.Value
    scale: float
    seen: Seen
    mask_nbytes: int
    output: ir.Value


def match_masked(node: ir.Node, hidden: float) -> MaskedAttention | None:
    """Attention with a constant mask, found at its Softmax; ``None`` for nodes that are no Softmax of such scores.

    Args:
        node: any.
        hidden: numbers of the mask up to this one hide a key.

    Raises:
        Refusal: it is attention, but not what the sparse operator computes.
    """
    if not standard(node, "Softmax") or node.inputs[0] is None:
        return None
    weights = _without_guard(node.outputs[0])
    weigh = only_reader(weights, "MatMul")
    if weigh is None or weigh.inputs[0] is not weights or weigh.inputs[1] is None:
        return None
    scores, mask, scale = _scores(node.inputs[0])
    left, right = scores.inputs
    assert left is not None, "masked_scores looked"
    assert right is not None, "masked_scores looked"
    q, v = left, weigh.inputs[1]
    shape, k_shape, v_shape = attention_shapes(q, right, v)
    if int_attribute(node, "axis", -1) not in (-1, _RANK - 1):
        raise Refusal("its softmax is not over the keys")
    queries, keys = shape[2], v_shape[2]
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise Refusal("the numbers of queries and keys are not known")
    if not all(map(same, [*shape[:2], shape[3]], [*v_shape[:2], v_shape[3]])) or not all(
        map(same, [*shape[:2], shape[3], keys], k_shape)
    ):
        raise Refusal("queries, keys and values are not known to have the same heads")
    q, q_factor = unscaled(q)
    k, k_axes, k_factor = _keys(right)
    leading = zip(reversed(mask.shape[:-2]), reversed(shape[:2]), strict=False)
    if mask.ndim > _RANK or not all(size == 1 or same(size, dim) for size, dim in leading):
        raise Refusal(f"its mask {list(mask.shape)} may be larger than the scores {shape}")
    seen = seen_keys(mask, (queries, keys), hidden, guarded=weights is not node.outputs[0])
    return MaskedAttention(q, k, k_axes, v, scale * q_factor * k_factor, seen, mask.nbytes, weigh.outputs[0])


def _without_guard(weights: ir.Value) -> ir.Value:
    """What takes the place of ``weights`` where exporters put 0 for NaN, which rows that see nothing give."""
    test = next((node for node in weights.consumers() if standard(node, "IsNaN")), None)
    guard = None if test is None else only_reader(test.outputs[0], "Where")
    if guard is None or set(weights.consumers()) != {test, guard} or weights.is_graph_output():
        return weights
    zero = constant_array(guard.inputs[1])
    right = zero is not None and zero.size == 1 and zero.reshape(()) == 0 and guard.inputs[2] is weights
    return guard.outputs[0] if right else weights


def _scores(value: ir.Value) -> tuple[ir.Node, NDArray[Any], float]:
    """The product, what is added to it and its factor; what takes the place of scores counts as added."""
    choice = made_by(value, "Where")
    if choice is not None:
        condition = constant_array(choice.inputs[0])
        for at in (1, 2):
            other, scores = constant_array(choice.inputs[3 - at]), choice.inputs[at]
            if condition is None or other is None or scores is None or other.size != 1 or other.ndim > _RANK:
                continue
            product, none, scale = masked_scores(scores)
            if none is not None:
                raise Refusal("it has two masks: fold them into one")
            kept = condition if at == 1 else ~condition
            return product, np.where(kept, 0.0, other.reshape(())), scale
    product, mask, scale = masked_scores(value)
    if mask is None:
        raise Refusal("it has no mask")
    array = constant_array(mask)
    if array is None:
        raise Refusal("its mask is computed at run time")
    return product, array, scale


def attention_shapes(*values: ir.Value) -> list[list[int | str | None]]:
    """Return the shapes of queries, keys and values.

    Raises:
        Refusal: they are not known to be float32 of four dimensions.
    """
    found = [dims(value) for value in values]
    if any(value.dtype != ir.DataType.FLOAT for value in values):
        raise Refusal("queries, keys or values are not known to be float32")
    known = [shape for shape in found if shape is not None and len(shape) == _RANK]
    if len(known) != len(values):
        raise Refusal("queries, keys and values are not known to be [batch, heads, rows, size]")
    return known


def _keys(right: ir.Value) -> tuple[ir.Value, tuple[int, ...] | None, float]:
    """What the right side of the scores, ``[B, heads, D, T]``, is made of: value, its permutation, its factor."""
    value, factor = unscaled(right)
    exchange = made_by(value, "Transpose")
    if exchange is not None and exchange.inputs[0] is not None:
        source = exchange.inputs[0]
        if permutation(exchange) == [0, 1, 3, 2]:
            return source, None, factor
        if permutation(exchange) == [0, 2, 3, 1]:
            return source, (0, 2, 1, 3), factor
    return value, (0, 1, 3, 2), factor


def seen_keys(mask: NDArray[Any], shape: tuple[int, int], hidden: float, *, guarded: bool = False) -> Seen:
    """Return which keys a mask lets each query see.

    Understood are masks that are 0 where a key is seen and ``hidden`` or less (minus infinity too) where it is not, the
    same for all batches and heads, with a key for each query. Weights of hidden keys are exactly 0 then, as long as no
    hidden key has a score that is above the largest seen one by about as much.

    Args:
        mask: to be broadcast to ``[..., queries, keys]``.
        shape: queries and keys.
        hidden: below 0.
        guarded: weights that are NaN become 0: a query may see nothing then, by minus infinity, and its result is 0.

    Raises:
        Refusal: it is another mask.
    """
    array = np.asarray(mask)
    if array.dtype.kind != "f" or np.isnan(array).any():
        raise Refusal("its mask is not of numbers")
    lead = array.shape[:-2]
    if array.size == 0 or any(size != 1 for size in lead):
        first = array.reshape(-1, *array.shape[-2:])[:1] if array.size else array
        if not array.size or (array.reshape(-1, *array.shape[-2:]) != first).any():
            raise Refusal("its mask is not the same for all batches and heads")
        array = first[0]
    try:
        array = np.broadcast_to(array.reshape(array.shape[-2:]), shape)
    except ValueError:
        raise Refusal(
            f"its mask {list(mask.shape)} is not one of {shape[0]} queries and {shape[1]} keys"
        ) from None
    seen = array == 0
    between = ~seen & ~(array <= hidden)
    if between.any():
        raise Refusal(
            f"its mask holds {array[between][0]:g}, which is neither 0 nor at most {hidden:g} (option hidden)"
        )
    if seen.all():
        raise Refusal("its mask hides nothing")
    blind = ~seen.any(1)
    if blind.any() and not (guarded and np.isneginf(array[blind]).all()):
        row = int(np.flatnonzero(blind)[0])
        raise Refusal(f"query {row} sees no key: what dense attention gives then depends on the mask")
    lengths = np.concatenate([[0], np.cumsum(seen.sum(1))])
    integers = np.int32 if lengths[-1] <= np.iinfo(np.int32).max else np.int64
    return Seen(lengths.astype(integers), np.nonzero(seen)[1].astype(integers), shape)
