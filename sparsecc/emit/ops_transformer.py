"""Attention, normalisation and gated units: declaration, shape rule, function body, reference.

Dense operators: they exist because onnxruntime's own fusions of a transformer do not fire any more once its
matrix products are sparse operators.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.emit import reference
from sparsecc.emit.activations import ACTIVATION_BODIES
from sparsecc.emit.bodies_transformer import FIRST_WITH_NUM_OUTPUTS, attention_body
from sparsecc.emit.operator import Attribute, Attributes, Constants, Dim, Input, Operator, Output, Shapes
from sparsecc.ir.ops_transformer import ATTENTIONS, GATES, NORMS, AttentionVariant, NormVariant

__all__ = ["AttentionOp", "GateOp", "NormOp", "TransformerOp", "transformer_operators"]

Array = NDArray[np.float64]

_OLDEST_OPSET = 13  # Constant with value_int, Softmax of one axis, Split with equal parts
_FIRST_WITH_LAYER_NORM = 17
_FIRST_WITH_AXES_AS_INPUT = 18


class TransformerOp(Operator, ABC):
    """An operator without packed weights."""

    @property
    def oldest_opset(self) -> int:
        """Lowest version of the default domain that the body can be written in."""
        return _OLDEST_OPSET


@dataclass(frozen=True)
class AttentionOp(TransformerOp):
    """``softmax(scale q k^T + mask) v`` for every head, on rows as the matrix products make them."""

    variant: AttentionVariant

    @property
    def name(self) -> str:
        """The operator's type."""
        return self.variant.name

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order; none needs to be constant."""
        shared, rows = self.variant.kind != "", "S" if self.variant.kind == "Rotary" else "T"
        narrow = f"[B,{rows},V]" if shared else f"[B,{rows},W]"
        three = (
            Input("q", "float32", "[B,S,W]", "queries, heads side by side"),
            Input("k", "float32", narrow, "keys" + ", `kv_heads` heads as wide as those of q" * shared),
            Input("v", "float32", narrow, "values"),
        )
        wide = "[B,S,W+2*V]" if shared else "[B,S,3*W]"
        packed = Input("qkv", "float32", wide, "queries, keys and values side by side; T = S")
        tables = (
            Input("cos", "float32", "[S,D]", "cosines for a head; before them 1, or the batch or 1, and 1"),
            Input("sin", "float32", "[S,D]", "sines, of the same shape"),
        )
        mask = Input("mask", "float32", "up to [B,heads,S,T]", "added to the scores, broadcast")
        return (
            *((packed,) if self.variant.packed else three),
            *(tables if self.variant.kind == "Rotary" else ()),
            *((mask,) if self.variant.mask else ()),
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        turned = ", q and k turned: z cos + (-second half of z, first half of z) sin"
        meaning = "softmax(`scale` q k^T + mask) v of every head" + turned * (self.variant.kind == "Rotary")
        return (Output("y", "float32", "[B,S,W]", meaning),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        shared = Attribute("kv_heads", "int", "into how many parts V is cut; heads / kv_heads of q share one")
        return (
            Attribute("heads", "int", "into how many parts W is cut"),
            *((shared,) if self.variant.kind else ()),
            Attribute("scale", "float", "factor of the scores"),
        )

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where that of the first input is known."""
        x = inputs[0]
        if x is None:
            return (None,)
        batch, rows, width = x
        if self.variant.packed and isinstance(width, int):
            heads, kv_heads = attributes["heads"], attributes.get("kv_heads")
            width = width // 3 if kv_heads is None else width // (heads + 2 * kv_heads) * heads
        elif self.variant.packed:
            width = None
        return ((batch, rows, width),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        return self.function_in(opset, attention_body(self.variant, opset))

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return y in double precision."""
        arrays = [array.astype(np.float64) for array in inputs]
        mask = arrays.pop() if self.variant.mask else np.zeros(1)
        heads = cast(int, attributes["heads"])
        kv_heads = cast(int, attributes["kv_heads"]) if self.variant.kind else heads
        if self.variant.packed:
            size = arrays[0].shape[-1] // (heads + 2 * kv_heads)
            three = np.split(arrays[0], [heads * size, (heads + kv_heads) * size], axis=-1)
        else:
            three = arrays[:3]
        q, k, v = (
            x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)
            for x, count in zip(three, (heads, kv_heads, kv_heads), strict=True)
        )
        if self.variant.kind == "Rotary":
            q, k = (_turned(x, *arrays[-2:]) for x in (q, k))
        k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * cast(float, attributes["scale"]) + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = weights / weights.sum(axis=-1, keepdims=True) @ v
        return (y.transpose(0, 2, 1, 3).reshape(three[0].shape),)


@dataclass(frozen=True)
class NormOp(TransformerOp):
    """Normalisation over the last axis, of a sum where there is a residual."""

    variant: NormVariant

    @property
    def name(self) -> str:
        """The operator's type."""
        return self.variant.name

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order; none needs to be constant."""
        residual = Input(
            "residual", "float32", "[...,N]", "added to x; leading dimensions may be missing or 1"
        )
        return (
            Input("x", "float32", "[...,N]", "the rows"),
            *((residual,) if self.variant.residual else ()),
            Input("gain", "float32", "[N]", "factor of the result"),
            *((Input("shift", "float32", "[N]", "added to the result"),) if self.variant.centred else ()),
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result, and with ``Sum`` what was normalised."""
        result = (
            "(z - mean) / sqrt(variance + `epsilon`)"
            if self.variant.centred
            else "z / sqrt(mean z^2 + `epsilon`)"
        )
        z = "x + residual" if self.variant.residual else "x"
        tail = " gain + shift" if self.variant.centred else " gain"
        return (
            Output("y", "float32", "[...,N]", f"{result}{tail} with z = {z}"),
            *((Output("sum", "float32", "[...,N]", "z"),) if self.variant.sum else ()),
        )

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        return (Attribute("epsilon", "float", "added under the root"),)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None, ...]:
        """Return the shape of x for every output."""
        shape = None if inputs[0] is None else tuple(inputs[0])
        return tuple(shape for _ in self.outputs)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        z = "sum" if self.variant.sum else "z"
        start = f"  {z} = Add (x, residual)\n" if self.variant.residual else f"  {z} = Identity (x)\n"
        if self.variant.centred and opset >= _FIRST_WITH_LAYER_NORM:
            body = f"  y = LayerNormalization <axis = -1, epsilon: float = @epsilon> ({z}, gain, shift)\n"
            return self.function_in(opset, "\n" + start + body)
        late = opset >= _FIRST_WITH_AXES_AS_INPUT
        last = "  last = Constant <value = int64[1] {-1}> ()\n" if late else ""
        centre = (
            f"  middle = {_mean(z, late)}\n  centred = Sub ({z}, middle)\n"
            if self.variant.centred
            else f"  centred = Identity ({z})\n"
        )
        end = (
            "  scaled = Mul (unit, gain)\n  y = Add (scaled, shift)\n"
            if self.variant.centred
            else "  y = Mul (unit, gain)\n"
        )
        return self.function_in(
            opset,
            f"\n{start}{last}{centre}"
            "  two = Constant <value = float {2.0}> ()\n"
            "  squares = Pow (centred, two)\n"
            f"  variance = {_mean('squares', late)}\n"
            "  little = Constant <value_float: float = @epsilon> ()\n"
            "  more = Add (variance, little)\n"
            "  root = Sqrt (more)\n"
            f"  unit = Div (centred, root)\n{end}",
        )

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return all outputs in double precision."""
        arrays = {name: array.astype(np.float64) for name, array in self.by_name(inputs).items()}
        z = arrays["x"] + arrays.get("residual", 0.0)
        centred = z - z.mean(axis=-1, keepdims=True) if self.variant.centred else z
        variance = np.mean(centred**2, axis=-1, keepdims=True)
        y = centred / np.sqrt(variance + cast(float, attributes["epsilon"])) * arrays["gain"]
        y = y + arrays.get("shift", 0.0)
        return (y, z) if self.variant.sum else (y,)


@dataclass(frozen=True)
class GateOp(TransformerOp):
    """A gated unit: half of every row, activated, times the other half."""

    operator: str

    @property
    def name(self) -> str:
        """The operator's type, for instance ``GatedSilu``."""
        return self.operator

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The rows alone."""
        return (Input("x", "float32", "[...,2*N]", "gates, then what they are multiplied with"),)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        return (Output("y", "float32", "[...,N]", f"{GATES[self.operator]}(gates) times the rest"),)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of x with half its last dimension."""
        x = inputs[0]
        if x is None:
            return (None,)
        return ((*x[:-1], x[-1] // 2 if isinstance(x[-1], int) else None),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        equal = ", num_outputs = 2" if opset >= FIRST_WITH_NUM_OUTPUTS else ""
        activation = ACTIVATION_BODIES[GATES[self.operator]].replace("\n  y = ", "\n  opened = ")
        return self.function_in(
            opset, f"\n  z, up = Split <axis = -1{equal}> (x)\n{activation}  y = Mul (opened, up)\n"
        )

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return y in double precision."""
        gates, ups = np.split(inputs[0].astype(np.float64), 2, axis=-1)
        return (reference.activated(gates, GATES[self.operator]) * ups,)


def transformer_operators() -> tuple[Operator, ...]:
    """Return every operator of this module."""
    return (
        *(AttentionOp(variant) for variant in ATTENTIONS),
        *(NormOp(variant) for variant in NORMS),
        *(GateOp(name) for name in GATES),
    )


def _turned(x: Array, cosines: Array, sines: Array) -> Array:
    low, high = np.split(x, 2, axis=-1)
    return x * cosines + np.concatenate([-high, low], axis=-1) * sines


def _mean(value: str, axes_as_input: bool) -> str:
    return f"ReduceMean ({value}, last)" if axes_as_input else f"ReduceMean <axes = [-1]> ({value})"
