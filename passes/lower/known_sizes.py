"""What exporters compute from shapes, as far as shapes are known: targets of Reshape, bounds of Slice, scales.

ONNX's own shape inference follows some of the operators that exporters use for this, not all; then a dimension gets
a symbol of its own, and nobody can tell that two tensors have as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from sparsecc.ir.shapes import infer_shapes
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.tidy.graph import int_attribute

__all__ = ["Size", "infer_more_shapes", "known_number", "known_sizes"]

Size = int | str | None
"""A number, the symbol of a dimension, or unknown."""

_DEEPEST = 64  # nodes on a path: exporters need about ten
_LONGEST = 64  # entries: shapes are short
_ROUNDS = 3  # of inference: what one finds out, the next takes further
_MADE_UP = "unk__"  # how ONNX's inference names a dimension of which it knows nothing
_SAME_ENTRIES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_WHOLE: Mapping[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
}


def known_sizes(value: ir.Value | None, depth: int = _DEEPEST) -> list[Size] | None:
    """The entries of an integer scalar or vector, ``None`` for each that is unknown; ``None`` if even their number is.

    A symbol stands for the size of a dimension, so it is never negative.
    """
    if value is None or depth == 0:
        return None
    array = constant_array(value)
    if array is not None:
        plain = array.dtype.kind in "iu" and array.ndim <= 1 and array.size <= _LONGEST
        return [int(entry) for entry in array.reshape(-1)] if plain else None
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Shape":
        source = node.inputs[0]
        whole = source is not None and source.shape is not None and not node.attributes
        return [_plain(dim) for dim in source.shape] if whole else None  # type: ignore[union-attr]
    if node.op_type == "ConstantOfShape":
        return _repeated(node, depth)
    if node.op_type not in (*_SAME_ENTRIES, *_WHOLE, "Div", "Concat", "Gather", "Slice", "Where"):
        return None
    first = known_sizes(node.inputs[0], depth - 1)
    if node.op_type in _SAME_ENTRIES:
        return first
    if node.op_type == "Where":
        return _chosen(node, depth)
    rest = [known_sizes(item, depth - 1) for item in node.inputs[1:]]
    if first is None or any(item is None for item in rest):
        return None
    lists = [first, *(item for item in rest if item is not None)]
    if node.op_type == "Concat":
        joined = [entry for item in lists for entry in item]
        return joined if len(joined) <= _LONGEST else None
    if node.op_type == "Gather":
        places = [i for i in lists[1] if isinstance(i, int) and -len(first) <= i < len(first)]
        return [first[i] for i in places] if len(places) == len(lists[1]) else None
    if node.op_type == "Slice":
        return _sliced(lists)
    return _computed(node.op_type, first, lists[1])


def _plain(dim: int | ir.SymbolicDim) -> Size:
    return dim if isinstance(dim, int) else dim.value


def _repeated(node: ir.Node, depth: int) -> list[Size] | None:
    shape = known_sizes(node.inputs[0], depth - 1)
    content = node.attributes.get("value")
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or not 0 <= shape[0] <= _LONGEST:
        return None
    entry = 0.0 if content is None or content.is_ref() else content.as_tensor().numpy().reshape(-1)[0]
    return [int(entry)] * shape[0]


def _chosen(node: ir.Node, depth: int) -> list[Size] | None:
    """``Where(Equal(sizes, -1), others, sizes)``: what torch makes of an ``expand`` that keeps some sizes."""
    equal = None if node.inputs[0] is None else node.inputs[0].producer()
    if equal is None or equal.op_type != "Equal" or equal.domain not in ("", "ai.onnx"):
        return None
    left, right, one, other = (known_sizes(v, depth - 1) for v in (*equal.inputs, *node.inputs[1:]))
    if left is None or right is None or one is None or other is None:
        return None
    if not len(left) == len(right) == len(one) == len(other):
        return None
    entries: list[Size] = []
    for a, b, yes, no in zip(left, right, one, other, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            entries.append(yes if a == b else no)
        else:
            different = {type(a), type(b)} == {int, str} and min(x for x in (a, b) if isinstance(x, int)) < 0
            entries.append(no if different else None)
    return entries


def _sliced(lists: list[list[Size]]) -> list[Size] | None:
    data, *bounds = lists
    numbers = [item[0] for item in bounds if len(item) == 1 and isinstance(item[0], int)]
    if len(bounds) not in (2, 3, 4) or len(numbers) != len(bounds):
        return None
    start, end, axis, step = [*numbers, 0, 1][: len(numbers)] + [0, 1][len(numbers) - 2 :]
    return data[start:end] if axis in (0, -1) and step == 1 else None


def _computed(op_type: str, a: list[Size], b: list[Size]) -> list[Size] | None:
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return None
    length = max(len(a), len(b)) if a and b else 0
    pairs = zip(a * (length // max(len(a), 1)), b * (length // max(len(b), 1)), strict=True)
    return [_entry(op_type, x, y) for x, y in pairs]


def _entry(op_type: str, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        if op_type == "Div":
            return a // b if a >= 0 and b > 0 else None
        return _WHOLE[op_type](a, b)
    if b == 1 and op_type in ("Mul", "Div"):
        return a
    return b if a == 1 and op_type == "Mul" else None


def known_number(value: ir.Value | None, depth: int = _DEEPEST) -> float | None:
    """The one number that ``value`` holds, computed from shapes and constants by Cast, Sqrt, Mul, Div, Reciprocal."""
    if value is None or depth == 0 or value.shape is None or list(value.shape) not in ([], [1]):
        return None
    array = constant_array(value)
    if array is not None:
        return float(array.reshape(())) if array.dtype.kind in "fiu" else None
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        sizes = known_sizes(value, depth)
        return (
            float(sizes[0]) if sizes is not None and len(sizes) == 1 and isinstance(sizes[0], int) else None
        )
    inputs = [known_number(item, depth - 1) for item in node.inputs]
    if any(item is None for item in inputs):
        return None
    a, b = (*(item for item in inputs if item is not None), 1.0, 1.0)[:2]
    if node.op_type in ("Cast", "Identity") or (node.op_type == "Sqrt" and a >= 0):
        return math.sqrt(a) if node.op_type == "Sqrt" else a
    if node.op_type == "Mul":
        return a * b
    if node.op_type in ("Div", "Reciprocal"):
        over, under = (a, b) if node.op_type == "Div" else (1.0, a)
        return over / under if under != 0 else None
    return None


def infer_more_shapes(model: ir.Model) -> None:
    """Infer shapes in the main graph also behind Expand, Reshape and Slice whose targets and bounds are computed."""
    infer_shapes(model)
    for _ in range(_ROUNDS):
        found = False
        for node in model.graph:
            if node.op_type in _RULES and node.domain in ("", "ai.onnx"):
                found |= _fill_result(node)
        if not found:
            return
        for node in model.graph:
            for value in node.outputs:
                if not value.is_graph_output() and _unknown(value.shape) and node.op_type not in _RULES:
                    value.shape = None
        infer_shapes(model)


def _unknown(shape: ir.Shape | None) -> int:
    """How many sizes nothing is known of; more than any shape has where there is none."""
    if shape is None:
        return _LONGEST
    return sum(not isinstance(dim, int) and (dim.value or _MADE_UP).startswith(_MADE_UP) for dim in shape)


def _fill_result(node: ir.Node) -> bool:
    """Write the shape of the result where more of it is known than stands there."""
    source, result = node.inputs[0], node.outputs[0]
    bounds = [known_sizes(value) for value in node.inputs[1:]]
    if (
        source is None
        or source.shape is None
        or result.is_graph_output()
        or int_attribute(node, "allowzero", 0)
    ):
        return False
    if not bounds or any(item is None for item in bounds):
        return False
    sizes = _RULES[node.op_type](
        [_plain(dim) for dim in source.shape], [item for item in bounds if item is not None]
    )
    shape = None if sizes is None else ir.Shape(sizes)
    if shape is None or _unknown(shape) >= _unknown(result.shape):
        return False
    result.shape = shape
    return True


def _expanded(source: list[Size], given: list[list[Size]]) -> list[Size]:
    target = given[0]
    rank = max(len(source), len(target))
    pairs = zip([1] * (rank - len(source)) + source, [1] * (rank - len(target)) + target, strict=True)
    sizes: list[Size] = []
    for have, want in pairs:
        if have == want or want == 1:
            sizes.append(have)
        elif have == 1 or isinstance(want, int):
            sizes.append(want)
        else:
            sizes.append(have if isinstance(have, int) else None)
    return sizes


def _reshaped(source: list[Size], given: list[list[Size]]) -> list[Size] | None:
    target = given[0]
    if None in source or any(size == 0 and i >= len(source) for i, size in enumerate(target)):
        return None
    sizes = [source[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 not in sizes:
        return sizes
    left, told = list(source), [size for size in sizes if size != -1]
    for size in [size for size in told if isinstance(size, str)]:
        if size not in left:
            return None
        left.remove(size)
    numbers = [math.prod(size for size in part if isinstance(size, int)) for part in (left, told)]
    symbols = [size for size in left if isinstance(size, str)]
    if numbers[1] <= 0 or numbers[0] % numbers[1] or len(symbols) > (numbers[0] == numbers[1]):
        return None
    return [(symbols[0] if symbols else numbers[0] // numbers[1]) if size == -1 else size for size in sizes]


def _cut_off(source: list[Size], given: list[list[Size]]) -> list[Size] | None:
    starts, ends, *axes = given
    if len(axes) not in (1, 2) or (len(axes) == 2 and axes[1] != [1] * len(starts)):
        return None
    sizes: list[Size] = list(source)
    for start, end, axis in zip(starts, ends, axes[0], strict=False):
        if not isinstance(axis, int) or not -len(source) <= axis < len(source):
            return None
        size = sizes[axis]
        if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
            sizes[axis] = len(range(size)[start:end])
        elif start != 0 or end != size:
            sizes[axis] = None
    return sizes


_RULES: Mapping[str, Callable[[list[Size], list[list[Size]]], list[Size] | None]] = {
    "Expand": _expanded,
    "Reshape": _reshaped,
    "Slice": _cut_off,
}
