"""What exporters compute from shapes, as far as shapes are known: targets of Reshape, bounds of Slice, scales.

ONNX's own shape inference follows some of the operators that exporters use for this, not all; then a dimension gets
a symbol of its own, and nobody can tell that two tensors have as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
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
_LARGEST = 1 << 63  # of an int64


def known_sizes(value: ir.Value | None) -> list[Size] | None:
    """The entries of an integer scalar or vector, ``None`` for each that is unknown; ``None`` if even their number is.

    A symbol stands for the size of a dimension, so it is never negative.
    """
    return _Reader().sizes(value, _DEEPEST)


def known_number(value: ir.Value | None) -> float | None:
    """The one number that ``value`` holds, computed from shapes and constants by Cast, Sqrt, Mul, Div, Reciprocal."""
    return _Reader().number(value, _DEEPEST)


class _Reader:
    """Follows values to where they come from, each once: a chain of ``x * x`` has more paths than anybody has time."""

    def __init__(self) -> None:
        self._sizes: dict[ir.Value, list[Size] | None] = {}
        self._numbers: dict[ir.Value, float | None] = {}

    def sizes(self, value: ir.Value | None, depth: int) -> list[Size] | None:
        if value is None or value.shape is None or len(value.shape) > 1 or depth == 0:
            return None
        if value not in self._sizes:
            self._sizes[value] = self._sizes_of(value, depth)
        return self._sizes[value]

    def number(self, value: ir.Value | None, depth: int) -> float | None:
        if value is None or value.shape is None or list(value.shape) not in ([], [1]) or depth == 0:
            return None
        if value not in self._numbers:
            self._numbers[value] = self._number_of(value, depth)
        return self._numbers[value]

    def _sizes_of(self, value: ir.Value, depth: int) -> list[Size] | None:
        array = constant_array(value)
        if array is not None:
            plain = array.dtype.kind in "iu" and array.size <= _LONGEST
            return [int(entry) for entry in array.reshape(-1)] if plain else None
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Shape":
            source = node.inputs[0]
            whole = source is not None and source.shape is not None and not node.attributes
            return [_plain(dim) for dim in source.shape] if whole else None  # type: ignore[union-attr]
        if node.op_type == "ConstantOfShape":
            return _repeated(node, self.sizes(node.inputs[0], depth - 1))
        if node.op_type == "Where":
            equal = None if node.inputs[0] is None else node.inputs[0].producer()
            if equal is None or equal.op_type != "Equal" or equal.domain not in ("", "ai.onnx"):
                return None
            return _chosen([self.sizes(item, depth - 1) for item in (*equal.inputs, *node.inputs[1:])])
        if node.op_type in _SAME_ENTRIES:
            whole = node.op_type != "Cast" or value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
            return self.sizes(node.inputs[0], depth - 1) if whole else None
        if node.op_type not in _COMPUTED:
            return None
        lists = [self.sizes(item, depth - 1) for item in node.inputs]
        known = [item for item in lists if item is not None]
        return _COMPUTED[node.op_type](known) if len(known) == len(lists) else None

    def _number_of(self, value: ir.Value, depth: int) -> float | None:
        array = constant_array(value)
        if array is not None:
            return float(array.reshape(())) if array.dtype.kind in "fiu" else None
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            sizes = self.sizes(value, depth)
            return float(sizes[0]) if sizes and len(sizes) == 1 and isinstance(sizes[0], int) else None
        inputs = [self.number(item, depth - 1) for item in node.inputs]
        if not inputs or any(item is None for item in inputs):
            return None
        a, b = (*(item for item in inputs if item is not None), 1.0)[:2]
        if node.op_type in ("Cast", "Identity"):
            return a
        if node.op_type == "Sqrt":
            return math.sqrt(a) if a >= 0 else None
        if node.op_type == "Mul":
            return a * b
        if node.op_type in ("Div", "Reciprocal"):
            over, under = (a, b) if node.op_type == "Div" else (1.0, a)
            return over / under if under != 0 else None
        return None


def _plain(dim: int | ir.SymbolicDim) -> Size:
    return dim if isinstance(dim, int) else dim.value


def _repeated(node: ir.Node, shape: list[Size] | None) -> list[Size] | None:
    content = node.attributes.get("value")
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or not 0 <= shape[0] <= _LONGEST:
        return None
    entries = np.zeros(1) if content is None or content.is_ref() else content.as_tensor().numpy().reshape(-1)
    return [int(entries[0])] * shape[0] if entries.size == 1 and np.isfinite(entries[0]) else None


def _chosen(lists: list[list[Size] | None]) -> list[Size] | None:
    """``Where(Equal(sizes, -1), others, sizes)``: what torch makes of an ``expand`` that keeps some sizes."""
    known = [item for item in lists if item]
    length = max(map(len, known), default=0)
    if len(known) != len(lists) or any(len(item) not in (1, length) for item in known):
        return None
    left, right, one, other = (item * (length // len(item)) for item in known)
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
    start, end, axis, step = numbers + [0, 1][len(numbers) - 2 :]
    return data[start:end] if axis in (0, -1) and step == 1 else None


def _joined(lists: list[list[Size]]) -> list[Size] | None:
    entries = [entry for item in lists for entry in item]
    return entries if len(entries) <= _LONGEST else None


def _gathered(lists: list[list[Size]]) -> list[Size] | None:
    data, wanted = lists
    places = [i for i in wanted if isinstance(i, int) and -len(data) <= i < len(data)]
    return [data[i] for i in places] if len(places) == len(wanted) else None


def _each(entry: Callable[[Size, Size], Size]) -> Callable[[list[list[Size]]], list[Size] | None]:
    """A rule that takes two vectors entry by entry, where one may have a single one."""

    def rule(lists: list[list[Size]]) -> list[Size] | None:
        a, b = lists
        if not a or not b or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        length = max(len(a), len(b))
        return [entry(x, y) for x, y in zip(a * (length // len(a)), b * (length // len(b)), strict=True)]

    return rule


def _small(number: int) -> Size:
    return number if abs(number) < _LARGEST else None


def _sum(a: Size, b: Size) -> Size:
    return _small(a + b) if isinstance(a, int) and isinstance(b, int) else None


def _difference(a: Size, b: Size) -> Size:
    return _small(a - b) if isinstance(a, int) and isinstance(b, int) else None


def _product(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return _small(a * b)
    return a if b == 1 else b if a == 1 else None


def _quotient(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a >= 0 and b > 0 else None
    return a if b == 1 else None


_COMPUTED: Mapping[str, Callable[[list[list[Size]]], list[Size] | None]] = {
    "Add": _each(_sum),
    "Concat": _joined,
    "Div": _each(_quotient),
    "Gather": _gathered,
    "Mul": _each(_product),
    "Slice": _sliced,
    "Sub": _each(_difference),
}


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
    if any(size == 0 and i >= len(source) for i, size in enumerate(target)):
        return None
    sizes = [source[i] if size == 0 else size for i, size in enumerate(target)]
    return [_left_over(source, sizes) if size == -1 else size for size in sizes]


def _left_over(source: list[Size], sizes: list[Size]) -> Size:
    """What -1 stands for among ``sizes``."""
    left, told = list(source), [size for size in sizes if size != -1]
    if None in left or None in told:
        return None
    for size in told:
        if isinstance(size, str):
            if size not in left:
                return None
            left.remove(size)
    whole, part = (math.prod(size for size in some if isinstance(size, int)) for some in (left, told))
    symbols = [size for size in left if isinstance(size, str)]
    if symbols:
        return symbols[0] if len(symbols) == 1 and whole == part else None
    return whole // part if part > 0 and whole % part == 0 else None


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
