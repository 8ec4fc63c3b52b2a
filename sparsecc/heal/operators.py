"""ONNX operators on tensors of PyTorch: arithmetic, logic, activations and reductions.

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

__all__ = ["OPERATORS", "Call", "Operator", "Tensor", "as_ints", "axes_of", "torch_dtype"]

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


def axes_of(call: Call, given: Tensor | None) -> list[int] | None:
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


# reductions


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        wanted = axes_of(call, axes)
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
    "Cos": _simple(torch.cos),
    "Div": _div,
    "Dropout": lambda call, x, *options: x,
    "Elu": _elu,
    "Equal": _simple(torch.eq),
    "Erf": _simple(torch.erf),
    "Exp": _simple(torch.exp),
    "Floor": _simple(torch.floor),
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
    "Pow": _power,
    "Reciprocal": _simple(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduce(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _simple(torch.relu),
    "Round": _simple(torch.round),
    "Sigmoid": _simple(torch.sigmoid),
    "Sign": _simple(torch.sign),
    "Sin": _simple(torch.sin),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _simple(torch.nn.functional.softplus),
    "Sqrt": _simple(torch.sqrt),
    "Sub": _simple(torch.sub),
    "Sum": _folded(torch.add),
    "Tanh": _simple(torch.tanh),
    "Where": _simple(torch.where),
}
