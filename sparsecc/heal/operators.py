"""ONNX operators on tensors of PyTorch: arithmetic, shapes, indices and reductions.

Every function takes a :class:`Call` and the inputs, None for one left out, and returns the output or a tuple of them.
Integers that are shapes, axes or indices are int64 tensors like any other value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir
import torch

__all__ = ["OPERATORS", "Call", "Operator", "Tensor", "as_ints"]

Tensor: TypeAlias = Any
"""A ``torch.Tensor``; the package is checked on machines without PyTorch."""


@dataclass(frozen=True, eq=False)
class Call:
    """One node as its operator sees it: attributes with defaults, and the operator set they belong to."""

    node: onnx_ir.Node
    opset: int

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return self.node.attributes.get_int(name, default) or 0

    def number(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        found = self.node.attributes.get_float(name, default)
        return default if found is None else found

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        return self.node.attributes.get_string(name, default) or default

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, or None."""
        found = self.node.attributes.get_ints(name, None)
        return None if found is None else list(found)

    def dtype(self, name: str) -> torch.dtype | None:
        """The type that an attribute names; half precision is computed in float32."""
        code = self.node.attributes.get_int(name, None)
        return None if code is None else torch_dtype(onnx_ir.DataType(code))


Operator: TypeAlias = Callable[..., Any]


def torch_dtype(dtype: onnx_ir.DataType) -> torch.dtype:
    """The type a tensor of ``dtype`` has here: every floating-point type but float64 becomes float32."""
    if dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT):
        return torch.float32
    return getattr(torch, dtype.numpy().name)


def as_ints(value: Tensor) -> list[int]:
    """The integers of a tensor of any shape, in order."""
    return [int(item) for item in value.reshape(-1).tolist()]


def _axes(call: Call, given: Tensor | None) -> list[int] | None:
    """Axes from the input that newer operator sets have, else from the attribute."""
    return as_ints(given) if given is not None else call.integers("axes")


# arithmetic and logic


def _simple(function: Callable[..., Tensor]) -> Operator:
    return lambda call, *inputs: function(*inputs)


def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.integer("fmod", 0) else torch.remainder(a, b)


def _power(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of one or more inputs, taken two at a time."""

    def run(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    return run


def _mean_of(call: Call, *inputs: Tensor) -> Tensor:
    return _folded(torch.add)(call, *inputs) / len(inputs)


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if call.opset < 11:
        return x.clamp(call.number("min", -math.inf), call.number("max", math.inf))
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(call: Call, x: Tensor) -> Tensor:
    return x.to(call.dtype("to"))


def _gelu(call: Call, x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=call.text("approximate", "none"))


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (x * call.number("alpha", 0.2) + call.number("beta", 0.5)).clamp(0, 1)


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(x, call.number("alpha", 0.01))


def _elu(call: Call, x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x, call.number("alpha", 1.0))


def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def run(call: Call, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return function(x, dim=call.integer("axis", -1))
        axis = call.integer("axis", 1) % x.ndim  # everything behind it is one axis
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return run


# shapes


def _shape(call: Call, x: Tensor) -> Tensor:
    end = call.node.attributes.get_int("end", None)
    return torch.tensor(list(x.shape)[call.integer("start", 0) : end], dtype=torch.int64, device=x.device)


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    wanted = as_ints(shape)
    if not call.integer("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.integers("perm") or list(reversed(range(x.ndim))))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(call, axes) or []
    rank = x.ndim + len(wanted)
    for axis in sorted(axis % rank for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(call, axes)
    if wanted is None:
        return x.squeeze()
    kept = {axis % x.ndim for axis in wanted}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in kept])


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.integer("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, dim=call.integer("axis", 0))


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, count = call.integer("axis", 0), len(call.node.outputs)
    given = as_ints(sizes) if sizes is not None else call.integers("split")
    each = -(-x.shape[axis] // count)
    return tuple(torch.split(x, given if given is not None else each, dim=axis))


def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = as_ints(starts) if starts is not None else call.integers("starts") or []
    last = as_ints(ends) if ends is not None else call.integers("ends") or []
    over = _axes(call, axes) or list(range(len(first)))
    by = as_ints(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, over, by, strict=True):
        size = x.shape[axis]
        begin, stop, stride = slice(start, _open_end(end, size, step), step).indices(size)
        picked = range(begin, stop, stride)
        if stride == 1:
            x = x.narrow(axis, begin, len(picked))
        else:
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x


def _open_end(end: int, size: int, step: int) -> int | None:
    """ONNX walks past the first element with any end below -size, Python only with None."""
    return None if step < 0 and end < -size else end


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0) % x.ndim
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    picked = x.index_select(axis, wrapped.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0) % x.ndim
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    return torch.gather(x, axis, wrapped)


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(as_ints(shape))))


def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(as_ints(repeats))


def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    attr = call.node.attributes.get("value")
    if attr is None:
        return torch.zeros(as_ints(shape), device=shape.device)
    value = attr.as_tensor()
    dtype = torch_dtype(value.dtype)
    return torch.full(as_ints(shape), value.numpy().item(), dtype=dtype, device=shape.device)


def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    given = as_ints(pads) if pads is not None else call.integers("pads") or []
    over = as_ints(axes) if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for number, axis in enumerate(over):
        before[axis], after[axis] = given[number], given[number + len(over)]
    mode = call.text("mode", "constant")
    if mode == "constant":
        fill = call.number("value", 0.0) if value is None else value.item()
        widths = [width for axis in reversed(range(x.ndim)) for width in (before[axis], after[axis])]
        return torch.nn.functional.pad(x, widths, value=fill)
    for axis in range(x.ndim):
        if before[axis] or after[axis]:
            x = x.index_select(axis, _border(mode, x.shape[axis], before[axis], after[axis]).to(x.device))
    return x


def _border(mode: str, size: int, before: int, after: int) -> Tensor:
    """Index of the element that stands at each place of an axis padded by its own elements."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if call.integer("upper", 1) else torch.tril(x, diagonal)


def _cumsum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis.item())
    flipped = x.flip(along) if call.integer("reverse", 0) else x
    total = torch.cumsum(flipped, along)
    if call.integer("exclusive", 0):
        total = total - flipped
    return total.flip(along) if call.integer("reverse", 0) else total


# reductions


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        wanted = _axes(call, axes)
        if not wanted:
            if call.integer("noop_with_empty_axes", 0):
                return x
            wanted = list(range(x.ndim))
        return function(x, wanted, bool(call.integer("keepdims", 1)))

    return run


def _arg(function: Callable[..., Tensor]) -> Operator:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x, dim=call.integer("axis", 0), keepdim=bool(call.integer("keepdims", 1)))

    return run


OPERATORS: dict[str, Operator] = {
    "Abs": _simple(torch.abs),
    "Add": _simple(torch.add),
    "And": _simple(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Cast": _cast,
    "Ceil": _simple(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _simple(torch.cos),
    "CumSum": _cumsum,
    "Div": _div,
    "Dropout": lambda call, x, *options: x,
    "Elu": _elu,
    "Equal": _simple(torch.eq),
    "Erf": _simple(torch.erf),
    "Exp": _simple(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _simple(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Greater": _simple(torch.gt),
    "GreaterOrEqual": _simple(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _simple(torch.nn.functional.hardswish),
    "Identity": lambda call, x: x,
    "LeakyRelu": _leaky_relu,
    "Less": _simple(torch.lt),
    "LessOrEqual": _simple(torch.le),
    "Log": _simple(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Max": _folded(torch.maximum),
    "Mean": _mean_of,
    "Min": _folded(torch.minimum),
    "Mod": _mod,
    "Mul": _simple(torch.mul),
    "Neg": _simple(torch.neg),
    "Not": _simple(torch.logical_not),
    "Or": _simple(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _power,
    "Range": _range,
    "Reciprocal": _simple(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduce(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _simple(torch.relu),
    "Reshape": _reshape,
    "Round": _simple(torch.round),
    "Shape": _shape,
    "Sigmoid": _simple(torch.sigmoid),
    "Sign": _simple(torch.sign),
    "Sin": _simple(torch.sin),
    "Size": lambda call, x: torch.tensor(x.numel(), dtype=torch.int64, device=x.device),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _simple(torch.nn.functional.softplus),
    "Split": _split,
    "Sqrt": _simple(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _simple(torch.sub),
    "Sum": _folded(torch.add),
    "Tanh": _simple(torch.tanh),
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _simple(torch.where),
}
