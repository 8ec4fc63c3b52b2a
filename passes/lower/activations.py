"""Recognise an activation by its values.

Exporters spell one activation in many ways (Gelu alone has five common decompositions). Instead of one graph pattern
per spelling, the element-wise region that follows a linear operator is evaluated on sample points and compared with
the activations that the sparse operators can fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.passes.tidy.graph import float_attribute

__all__ = ["Activation", "ElementwiseRegion", "constant_array", "elementwise_region"]

Array = npt.NDArray[np.float64]

_erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])
_FLOAT32_MAX = float(np.finfo(np.float32).max)

#: Longest decomposition searched; the tanh form of Gelu with everything spelled out has nine nodes.
_MAX_NODES = 14
#: The samples: dense where activations bend, at zero, and far out where a bound would show.
_FAR = 1e30
_OUTER = np.array([1e-30, 1e-8, 1e-4, 40, 1e3, 1e6, _FAR])
_POINTS: Array = np.concatenate([-_OUTER[::-1], np.linspace(-12, 12, 193), _OUTER])
#: Agreement asked for: relative to the value, and as a share of x. A constant is stored in float32, or written by
#: hand with some six digits; but a bound or a shift of 1e-7 is there on purpose (a logarithm may follow), so a share
#: of x is forgiven only for what cancellation in 1 + erf leaves, and at the kinks of HardSwish.
_AGREEMENT = {
    "Sigmoid": (1e-7, 1e-14),
    "Tanh": (1e-7, 1e-14),
    "Silu": (1e-7, 1e-14),
    "Gelu": (2e-6, 1e-14),
    "GeluTanh": (2e-6, 1e-14),
    "HardSwish": (2e-7, 1e-7),
}


def _sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


def _gelu_tanh(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


#: Smooth activations by the operator-name suffix of the fused form.
_SMOOTH: Mapping[str, Callable[[Array], Array]] = {
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Gelu": _gelu,
    "GeluTanh": _gelu_tanh,
    "Silu": lambda x: x * _sigmoid(x),
    "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
}


@dataclass(frozen=True)
class Activation:
    """A fusable activation: the suffix of the operator name and its numbers (``alpha``, or ``lo`` and ``hi``)."""

    suffix: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def recognise(cls, values: Array) -> Activation | None:
        """The activation that takes the sample points to ``values``, or ``None``."""
        if np.array_equal(values, np.maximum(_POINTS, 0)):
            return cls("Relu")
        for suffix, function in _SMOOTH.items():
            if _close(values, function(_POINTS), *_AGREEMENT[suffix]):
                return cls(suffix)
        low, high = float(values.min()), float(values.max())
        bounded = low > -_FAR or high < _FAR
        if bounded and low < high and np.array_equal(values, np.clip(_POINTS, low, high)):
            # A side that reaches as far as the samples has no bound.
            lo = low if low > -_FAR else -_FLOAT32_MAX
            return cls("Clip", {"lo": lo, "hi": high if high < _FAR else _FLOAT32_MAX})
        alpha = float(-values[np.flatnonzero(_POINTS == -1)[0]])
        leaky = np.where(_POINTS < 0, alpha * _POINTS, _POINTS)
        if alpha != 1 and _close(values, leaky, 1e-12, 0):
            return cls("LeakyRelu", {"alpha": alpha})
        return None


def _close(values: Array, expected: Array, relative: float, share: float) -> bool:
    allowed = relative * np.abs(expected) + share * np.minimum(np.abs(_POINTS), 100)
    return bool(np.all(np.abs(values - expected) <= allowed))


def constant_array(value: onnx_ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of a constant that no caller can override, or ``None`` for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype == onnx_ir.DataType.STRING else np.asarray(tensor.numpy())


def _scalar(value: onnx_ir.Value | None, rank: int) -> float | None:
    """The number of a one-element constant that leaves a tensor of ``rank`` dimensions its rank."""
    array = constant_array(value)
    if array is None or array.size != 1 or array.ndim > rank:
        return None
    return float(array.reshape(()))


def _gelu_of_node(x: Array, node: onnx_ir.Node) -> Array:
    approximate = node.attributes.get("approximate")
    return _gelu_tanh(x) if approximate is not None and approximate.as_string() == "tanh" else _gelu(x)


def _clip(node: onnx_ir.Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    lower = float_attribute(node, "min", -np.inf) if low is None else low
    upper = float_attribute(node, "max", np.inf) if high is None else high
    return np.clip(x, lower, upper)


_EVALUATE: Mapping[str, Callable[..., Array]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Pow": lambda _, a, b: a**b,
    "Min": lambda _, *xs: np.minimum.reduce(np.broadcast_arrays(*xs)),
    "Max": lambda _, *xs: np.maximum.reduce(np.broadcast_arrays(*xs)),
    "Erf": lambda _, x: _erf(x),
    "Tanh": lambda _, x: np.tanh(x),
    "Sigmoid": lambda _, x: _sigmoid(x),
    "Relu": lambda _, x: np.maximum(x, 0),
    "Neg": lambda _, x: -x,
    "Exp": lambda _, x: np.exp(x),
    "Clip": _clip,
    "LeakyRelu": lambda node, x: np.where(x < 0, float_attribute(node, "alpha", 0.01) * x, x),
    "HardSigmoid": lambda node, x: _hard_sigmoid(
        x, float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    ),
    "HardSwish": lambda _, x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "Gelu": lambda node, x: _gelu_of_node(x, node),
    "Swish": lambda node, x: x * _sigmoid(float_attribute(node, "alpha", 1.0) * x),
}


@dataclass(frozen=True)
class ElementwiseRegion:
    """Nodes that together apply one activation, and the value they produce."""

    activation: Activation
    nodes: tuple[onnx_ir.Node, ...]
    output: onnx_ir.Value


def _next_node(
    known: Mapping[onnx_ir.Value, Array], taken: set[onnx_ir.Node], rank: int
) -> onnx_ir.Node | None:
    """A node not yet taken, all of whose inputs are known values or one-element constants."""
    for value in known:
        for node in value.consumers():
            if node in taken or node.domain not in ("", "ai.onnx") or node.op_type not in _EVALUATE:
                continue
            if node.graph is not value.graph and value.graph is not None:
                continue
            if all(i is None or i in known or _scalar(i, rank) is not None for i in node.inputs):
                return node
    return None


def elementwise_region(start: onnx_ir.Value) -> ElementwiseRegion | None:
    """The longest run of element-wise nodes after ``start`` that amounts to one fusable activation.

    All uses of ``start`` must lie inside the region, and only its last value may be used outside.
    """
    if start.is_graph_output():
        return None
    rank = (
        1 if start.shape is None else len(start.shape)
    )  # a linear operator's output has at least one dimension
    known: dict[onnx_ir.Value, Array] = {start: _POINTS}
    taken: list[onnx_ir.Node] = []
    best: ElementwiseRegion | None = None
    while len(taken) < _MAX_NODES and (node := _next_node(known, set(taken), rank)) is not None:
        arguments = [
            None if i is None else known[i] if i in known else np.asarray(_scalar(i, rank))
            for i in node.inputs
        ]
        with np.errstate(all="ignore"):
            result = np.broadcast_to(_EVALUATE[node.op_type](node, *arguments), _POINTS.shape)
        taken.append(node)
        known[node.outputs[0]] = result
        inside = set(taken)
        exits = [v for v in known if v.is_graph_output() or not set(v.consumers()) <= inside or not v.uses()]
        if len(exits) == 1 and exits[0] is not start and np.all(np.isfinite(known[exits[0]])):
            activation = Activation.recognise(known[exits[0]])
            if activation is not None:
                best = ElementwiseRegion(activation, tuple(taken), exits[0])
    return best
