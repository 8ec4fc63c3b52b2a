"""How exporters show rows ``[B, S, W]`` head by head: cut, turned by positions, repeated, scaled on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.known_sizes import known_sizes
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import dims, made_by, same, unscaled
from sparsecc.passes.tidy.graph import int_attribute

__all__ = [
    "HEADS_BEFORE_ROWS",
    "HeadView",
    "Rotary",
    "Turn",
    "fits",
    "keeps_rows",
    "keys_of",
    "permutation",
    "queries_of",
    "target_of",
    "values_of",
]

HEADS_BEFORE_ROWS = [0, 2, 1, 3]
_KEYS_TURNED_AT_ONCE = [0, 2, 3, 1]
_RANK = 4  # of [batch, heads, rows, head size]

Dims = list[int | str | None]
Rotary = tuple[ir.Value, ir.Value]
"""Cosines and sines, to be broadcast over the heads."""


@dataclass(frozen=True)
class Turn:
    """``x * cosines + y * sines``: positions turn the dimensions of each head in pairs.

    Attributes:
        x: ``[B, heads, S, size]``, what is turned.
        tables: cosines and sines.
        partners: the other dimension of each one's pair, where y is ``x`` in that order and the sines have the signs;
            ``None``: y is the second half of x, negated, and behind it the first.
    """

    x: ir.Value
    tables: Rotary
    partners: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HeadView:
    """Rows seen head by head.

    Attributes:
        rows: ``[B, S, heads * size]``.
        heads: how many.
        factor: by which they are multiplied on the way.
        turn: how they are turned, or ``None``.
        shared: how many heads of q read each of these: 1 for plain ones.
        by_axis: whether the heads of q that share one stand along an axis of their own.
    """

    rows: ir.Value
    heads: int
    factor: float = 1.0
    turn: Turn | None = None
    shared: int = 1
    by_axis: bool = False


def permutation(node: ir.Node | None) -> list[int]:
    """The permutation of a Transpose; empty if there is none."""
    attribute = None if node is None else node.attributes.get("perm")
    return [] if attribute is None or attribute.is_ref() else list(attribute.as_ints())


def queries_of(value: ir.Value) -> HeadView:
    """What ``value``, the left side of the scores, shows.

    Raises:
        Refusal: it is no such view.
    """
    value, factor = unscaled(value)
    shape, shared = dims(value), 1
    by_axis = shape is not None and len(shape) == _RANK + 1
    if by_axis and shape is not None:
        join = made_by(value, "Reshape")
        inner = None if join is None else join.inputs[0]
        before = dims(inner)
        if inner is None or before is None or not _joins(shape, before):
            raise Refusal("how its queries share keys is not known")
        shared = int(shape[2])  # type: ignore[arg-type]  # _joins has seen that it is a number
        value, more = unscaled(inner)
        factor *= more
    source, turn = _unturned(value)
    return _view(source, factor, turn, shared, by_axis)


def keys_of(value: ir.Value) -> HeadView:
    """What ``value``, the right side of the scores ``[..., size, keys]``, shows; raises as ``queries_of``."""
    value, factor = unscaled(value)
    exchange = made_by(value, "Transpose")
    inner = None if exchange is None else exchange.inputs[0]
    if inner is None:
        raise _no_heads(value)
    if permutation(exchange) == _KEYS_TURNED_AT_ONCE:
        return _cut(inner, factor, None, 1, by_axis=False)
    if permutation(exchange) not in ([0, 1, 3, 2], [0, 1, 2, 4, 3]):
        raise _no_heads(value)
    inner, more = unscaled(inner)
    source, shared, by_axis = _unrepeated(inner)
    source, last = unscaled(source)
    source, turn = _unturned(source)
    return _view(source, factor * more * last, turn, shared, by_axis)


def values_of(value: ir.Value) -> HeadView:
    """What ``value``, the right side of the product with the weights, shows; raises as ``queries_of``."""
    source, shared, by_axis = _unrepeated(value)
    return _view(source, 1.0, None, shared, by_axis)


def _no_heads(value: ir.Value) -> Refusal:
    if made_by(value, "Concat") is not None:
        return Refusal("its keys and values come from a cache as well")
    return Refusal("it is not made of heads that are columns of rows")


def _view(value: ir.Value, factor: float, turn: Turn | None, shared: int, by_axis: bool) -> HeadView:
    value, more = unscaled(value)
    exchange = made_by(value, "Transpose")
    if exchange is None or exchange.inputs[0] is None or permutation(exchange) != HEADS_BEFORE_ROWS:
        raise _no_heads(value)
    return _cut(exchange.inputs[0], factor * more, turn, shared, by_axis=by_axis)


def _cut(value: ir.Value, factor: float, turn: Turn | None, shared: int, *, by_axis: bool) -> HeadView:
    rows, more = unscaled(value)
    cut = made_by(rows, "Reshape")
    source = None if cut is None else cut.inputs[0]
    if cut is None or source is None:
        raise _no_heads(rows)
    heads = _cut_in_heads(source, rows, cut)
    source, last = unscaled(source)
    return HeadView(source, heads, factor * more * last, turn, shared, by_axis)


def target_of(reshape: ir.Node, before: Dims) -> list[int] | None:
    """The target of a Reshape of something of shape ``before``: 0 also where the symbol of that dimension stands."""
    sizes = known_sizes(reshape.inputs[1])
    if sizes is None or int_attribute(reshape, "allowzero", 0) != 0:
        return None
    wanted = [0 if isinstance(a, str) and a == b else a for a, b in zip_longest(sizes, before[: len(sizes)])]
    numbers = [dim for dim in wanted if isinstance(dim, int)]
    return numbers if len(numbers) == len(sizes) else None


def _cut_in_heads(source: ir.Value, rows: ir.Value, cut: ir.Node) -> int:
    """How many heads the Reshape of ``source`` ``[B, S, W]`` to ``rows`` ``[B, S, heads, W / heads]`` makes."""
    before, after = dims(source), dims(rows)
    rank = 3
    if before is None or len(before) != rank or source.dtype != ir.DataType.FLOAT:
        raise Refusal("the shape of its rows is not known")
    wanted = target_of(cut, before)
    if wanted is not None and len(wanted) == _RANK and wanted[:2] == [0, 0]:
        after = [*before[:2], *wanted[2:]]
    if after is None or len(after) != _RANK or not all(map(same, before[:2], after[:2])):
        if wanted is None or len(wanted) != _RANK or not keeps_rows(before, wanted):
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


def keeps_rows(before: Dims, wanted: list[int]) -> bool:
    """Whether a target such as [-1, 128, heads, size] leaves both leading dimensions as they are."""
    exact = [want == 0 or want == have for want, have in zip(wanted[:2], before[:2], strict=True)]
    return all(exact) or (wanted[:2].count(-1) == 1 and -1 not in wanted[2:] and any(exact))


# ---- heads that several heads of q share ------------------------------------------------------------


def _joins(apart: Dims, joined: Dims) -> bool:
    """Whether a Reshape between ``[B, H, G, S, D]`` and ``[B, H * G, S, D]`` only joins heads or takes them apart."""
    if len(apart) != _RANK + 1 or len(joined) != _RANK:
        return False
    heads = (apart[1], apart[2], joined[1])
    if not all(isinstance(count, int) and count > 0 for count in heads):
        return False
    product = math.prod(count for count in heads[:2] if isinstance(count, int))
    return product == joined[1] and all(map(same, [apart[0], *apart[3:]], [joined[0], *joined[2:]]))


def _unrepeated(value: ir.Value) -> tuple[ir.Value, int, bool]:
    """The heads ``[B, H, T, D]`` that ``value`` repeats for neighbouring heads of q, how often, whether by an axis.

    ``[B, H, 1, T, D]`` leaves the repeating to the product: 1 then, by an axis.

    Raises:
        Refusal: it repeats something in another order.
    """
    axis = made_by(value, "Unsqueeze")
    if axis is not None and _at_heads(axis):
        return _input(axis), 1, True
    copies = made_by(value, "Gather")
    if copies is not None and copies.inputs[0] is not None:
        return copies.inputs[0], _copies(copies), False
    join = made_by(value, "Reshape")
    expand = None if join is None else made_by(join.inputs[0], "Expand")
    if join is None or expand is None:
        return value, 1, False
    axis = made_by(expand.inputs[0], "Unsqueeze")
    apart, joined = known_sizes(expand.inputs[1]), known_sizes(join.inputs[1])
    source = None if axis is None else dims(axis.inputs[0])
    if axis is None or not _at_heads(axis) or apart is None or joined is None or source is None:
        raise Refusal("how its keys and values are repeated is not known")
    if len(source) == _RANK == len(apart) - 1 == len(joined):
        # Expand keeps a size where 1 stands; Reshape takes over one where 0 stands.
        apart = [
            old if new == 1 else new for old, new in zip([*source[:2], 1, *source[2:]], apart, strict=True)
        ]
        joined = [old if new == 0 else new for old, new in zip([*apart[:2], *apart[3:]], joined, strict=True)]
    kept = [*apart[:2], *apart[3:]]
    if not _joins(apart, joined) or not all(map(same, kept, source)):
        raise Refusal("how its keys and values are repeated is not known")
    return _input(axis), int(apart[2]), False  # type: ignore[arg-type]  # _joins has seen that it is a number


def _copies(gather: ir.Node) -> int:
    """How often a Gather on the axis of heads takes each of them, one after the other."""
    source, picked = dims(gather.inputs[0]), constant_array(gather.inputs[1])
    axis = int_attribute(gather, "axis", 0)
    heads = source[1] if source is not None and len(source) == _RANK and axis in (1, 1 - _RANK) else None
    if isinstance(heads, int) and heads > 0 and picked is not None and picked.ndim == 1:
        often, rest = divmod(len(picked), heads)
        if often and not rest and np.array_equal(picked % heads, np.arange(heads).repeat(often)):
            return often
    raise Refusal("how its keys and values are repeated is not known")


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, "the operator needs it"
    return value


def _at_heads(node: ir.Node) -> bool:
    """Whether an Unsqueeze puts an axis behind that of the heads."""
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return (
        axes is not None
        and axes.reshape(-1).tolist() in ([2], [-3])
        and len(dims(node.inputs[0]) or ()) == _RANK
    )


# ---- rotary positions -------------------------------------------------------------------------------


def _unturned(value: ir.Value) -> tuple[ir.Value, Turn | None]:
    """``x`` and how it is turned, if ``value`` is ``x * cos + y * sin`` with y the partners of x."""
    add = made_by(value, "Add")
    if add is None:
        return value, None
    for plain, other in ((0, 1), (1, 0)):
        by_cosine, by_sine = (made_by(add.inputs[i], "Mul") for i in (plain, other))
        if by_cosine is None or by_sine is None:
            continue
        for i in (0, 1):
            x, partners = _halves_of(by_sine.inputs[i]), None
            if x is None:
                x, partners = _exchanged(by_sine.inputs[i])
            if x is None or x not in by_cosine.inputs:
                continue
            cosines = by_cosine.inputs[1 if by_cosine.inputs[0] is x else 0]
            sines = by_sine.inputs[1 - i]
            assert cosines is not None, "Mul needs it"
            assert sines is not None, "Mul needs it"
            return x, Turn(x, (cosines, sines), partners)
    return value, None


def _exchanged(value: ir.Value | None) -> tuple[ir.Value | None, tuple[int, ...] | None]:
    """``x`` and its order, if ``value`` is x with the dimensions of its heads exchanged in pairs."""
    pick = made_by(value, "Gather")
    x = None if pick is None else pick.inputs[0]
    order = None if pick is None else constant_array(pick.inputs[1])
    size = _size(x)
    if pick is None or order is None or order.shape != (size,) or not size:
        return None, None
    own, order = np.arange(size), order % size
    pairs = np.array_equal(order[order], own) and (order != own).all()
    if int_attribute(pick, "axis", 0) not in (-1, _RANK - 1) or not pairs:
        return None, None
    return x, tuple(int(partner) for partner in order)


def _halves_of(value: ir.Value | None) -> ir.Value | None:
    """``x``, if ``value`` is its second half, negated, and behind it its first."""
    join = made_by(value, "Concat")
    if join is None or len(join.inputs) != 2 or int_attribute(join, "axis", 0) not in (-1, _RANK - 1):
        return None
    minus = made_by(join.inputs[0], "Neg")
    first, second = join.inputs[1], None if minus is None else minus.inputs[0]
    if first is None or second is None:
        return None
    for halves in (_split_halves, _sliced_halves):
        x = halves(first, second)
        if x is not None:
            return x
    return None


def _size(x: ir.Value | None) -> int:
    """How wide the heads of ``x`` are, 0 if that is not known or odd."""
    shape = dims(x)
    size = shape[-1] if shape is not None and len(shape) == _RANK else None
    return size if isinstance(size, int) and size % 2 == 0 else 0


def _split_halves(first: ir.Value, second: ir.Value) -> ir.Value | None:
    split = made_by(first, "Split")
    if split is None or len(split.outputs) != 2 or [*split.outputs] != [first, second]:
        return None
    x = split.inputs[0]
    half = [_size(x) // 2]
    equal = dims(first) is not None and (dims(first) or [])[-1:] == half == (dims(second) or [])[-1:]
    return x if int_attribute(split, "axis", 0) in (-1, _RANK - 1) and half[0] and equal else None


def _sliced_halves(first: ir.Value, second: ir.Value) -> ir.Value | None:
    low, high = made_by(first, "Slice"), made_by(second, "Slice")
    if low is None or high is None or low.inputs[0] is not high.inputs[0]:
        return None
    x = low.inputs[0]
    half = _size(x) // 2
    wanted: tuple[tuple[ir.Node, Callable[[int, int], bool]], ...] = (
        (low, lambda start, end: start in (0, -2 * half) and end in (half, -half)),
        (high, lambda start, end: start in (half, -half) and end >= 2 * half),
    )
    for node, right in wanted:
        given = [known_sizes(item) for item in node.inputs[1:]]
        numbers = [
            item[0] for item in given if item is not None and len(item) == 1 and isinstance(item[0], int)
        ]
        if len(given) not in (3, 4) or len(numbers) != len(given):
            return None
        start, end, axis, *step = numbers
        if axis not in (-1, _RANK - 1) or step not in ([], [1]) or not right(start, end):
            return None
    return x if half else None


def fits(table: ir.Value, x: ir.Value) -> bool:
    """Whether ``table`` is ``[S, D]`` for heads ``x`` ``[B, H, S, D]``, before it ones or, at the batch, as many."""
    shape, whole = dims(table), dims(x)
    if shape is None or whole is None or table.dtype != ir.DataType.FLOAT or not 2 <= len(shape) <= _RANK:
        return False
    leading = shape[:-2]
    one_head = not leading or leading[-1] == 1
    batch = len(leading) < 2 or leading[0] == 1 or same(leading[0], whole[0])
    return one_head and batch and all(map(same, shape[-2:], whole[-2:]))
