"""LSTM and GRU with packed weights: declaration, shape rule, function body, reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.emit.decoding import CONSTANTS, packed_matrix
from sparsecc.emit.operator import (
    STORED_VALUES,
    Attribute,
    Attributes,
    Constants,
    Dim,
    Input,
    Operator,
    Output,
    Shapes,
)
from sparsecc.emit.reference import check_version
from sparsecc.ir.ops_recurrent import GATES, RecurrentVariant
from sparsecc.sparse import Pattern, SparseTensor

__all__ = ["RecurrentOp", "recurrent_operators"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RecurrentOp(Operator):
    """ONNX's LSTM or GRU with default activations, W and R packed."""

    variant: RecurrentVariant

    @property
    def family(self) -> str:
        """``SparseLSTM`` or ``SparseGRU``."""
        return self.variant.family

    @property
    def name(self) -> str:
        """The operator's type, for instance ``SparseGRUState``."""
        return self.variant.name

    @property
    def _lstm(self) -> bool:
        return self.variant.cell == "LSTM"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. W, R and the bias must be constant initializers."""
        rows = f"D*{GATES[self.variant.cell]}*H"
        packed = (
            Input(name, dtype, shape, doc)
            for operand, inputs in (("w", "I"), ("r", "H"))
            for name, dtype, shape, doc in (
                (f"{operand}_values", STORED_VALUES, "[blocks,R,C]", f"kept weights of {operand.upper()}"),
                (f"{operand}_indices", "uint8", "[bytes]", "where they stand: the gap stream"),
                (f"{operand}_shape", "int64", "[2]", f"the matrix they stand in: [{rows},{inputs}]"),
            )
        )
        lengths = Input("lengths", "int32", "[B]", "steps of each sequence")
        states = [Input("initial_h", "float32", "[D,B,H]", "hidden state before the first step")]
        if self._lstm:
            states.append(Input("initial_c", "float32", "[D,B,H]", "cell state before the first step"))
        return (
            Input("x", "float32", "[T,B,I]", "the sequences"),
            *packed,
            Input("bias", "float32", f"[D,2*{GATES[self.variant.cell]}*H]", "of W, then of R"),
            *((lengths,) if self.variant.lengths else ()),
            *(states if self.variant.state else ()),
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All outputs, in order."""
        last_c = Output("y_c", "float32", "[D,B,H]", "the last cell states")
        return (
            Output("y", "float32", "[T,D,B,H]", "all hidden states"),
            Output("y_h", "float32", "[D,B,H]", "the last ones"),
            *((last_c,) if self._lstm else ()),
        )

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        before_reset = Attribute("linear_before_reset", "int", "as in GRU")
        layout = "`unstructured`, N:M or RxC with R dividing H"
        return (
            Attribute("hidden_size", "int", "H"),
            Attribute("direction", "string", "as in LSTM and GRU; D is 2 for `bidirectional`, else 1"),
            Attribute("layout_w", "string", f"of W: {layout}; all but RxC have R = C = 1"),
            Attribute("layout_r", "string", f"of R: {layout}; all but RxC have R = C = 1"),
            Attribute("layout_version", "int", "1"),
            *(() if self._lstm else (before_reset,)),
        )

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None, ...]:
        """Return the shapes of all outputs, where the rank of x is known."""
        hidden, x = int(attributes["hidden_size"]), inputs[0]
        directions = 2 if attributes["direction"] == "bidirectional" else 1
        if x is None or len(x) != 3:
            return (None,) * len(self.outputs)
        state = (directions, x[1], hidden)
        return ((x[0], *state), *(state for _ in self.outputs[1:]))

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form: W and R decoded, then the standard operator."""
        optional = ["lengths" if self.variant.lengths else '""']
        optional += [item.name for item in self.inputs if item.name.startswith("initial")]
        while optional and optional[-1] == '""':
            optional.pop()
        attributes = "hidden_size: int = @hidden_size, direction: string = @direction"
        if not self._lstm:
            attributes += ", linear_before_reset: int = @linear_before_reset"
        body = CONSTANTS + packed_matrix("w") + packed_matrix("r")
        body += f"""
  bias_shape = Shape (bias)
  directions = Slice (bias_shape, zero, one)
  w_cube_shape = Concat <axis = 0> (directions, minus_one, w_columns)
  w = Reshape (w_weight, w_cube_shape)
  r_cube_shape = Concat <axis = 0> (directions, minus_one, r_columns)
  r = Reshape (r_weight, r_cube_shape)
  {", ".join(item.name for item in self.outputs)} = {self.variant.cell} <{attributes}>
    ({", ".join(("x", "w", "r", "bias", *optional))})
"""
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[NDArray[np.float32], ...]:
        """Return the outputs computed by NumPy in double precision, whatever order the library sums in.

        Args:
            inputs: arrays in the order of ``inputs``.
            attributes: values by name, as on the node.

        Raises:
            ModelError: a packed weight is malformed.
        """
        arrays = self.by_name(inputs)
        check_version(attributes)
        x = arrays["x"].astype(np.float64)
        b = arrays["bias"].astype(np.float64)
        count, batch, hidden = len(b), x.shape[1], cast(int, attributes["hidden_size"])
        w, r = (_decoded(arrays, operand, attributes).reshape(count, b.shape[1] // 2, -1) for operand in "wr")
        lengths = np.asarray(arrays.get("lengths", np.full(batch, len(x))))
        nothing = np.zeros((count, batch, hidden))
        states = [
            [np.array(arrays.get(name, nothing)[d], np.float64) for name in ("initial_h", "initial_c")]
            for d in range(count)
        ]
        y = np.zeros((len(x), count, batch, hidden))
        for d, (h, c) in enumerate(states):
            backwards = attributes["direction"] == "reverse" or d == 1
            for t in reversed(range(len(x))) if backwards else range(len(x)):
                active = t < lengths
                from_x = x[t, active] @ w[d].T + b[d, : b.shape[1] // 2]
                if self._lstm:
                    h[active], c[active] = _lstm_step(from_x, h[active], c[active], r[d], b[d])
                else:
                    before_reset = bool(attributes["linear_before_reset"])
                    h[active] = _gru_step(from_x, h[active], r[d], b[d], before_reset)
                y[t, d, active] = h[active]
        last = np.array(states).swapaxes(0, 1)
        last[:, :, lengths == 0] = 0  # as onnxruntime does it
        return tuple(array.astype(np.float32) for array in (y, *(last if self._lstm else last[:1])))


def recurrent_operators() -> Iterator[RecurrentOp]:
    """Yield every recurrent operator, the plainest of each family first."""
    cells: tuple[Literal["LSTM", "GRU"], ...] = ("LSTM", "GRU")
    for cell, lengths, state in itertools.product(cells, (False, True), (False, True)):
        yield RecurrentOp(RecurrentVariant(cell, lengths, state))


def _decoded(arrays: Mapping[str, NDArray[Any]], operand: str, attributes: Mapping[str, object]) -> Array:
    pattern = Pattern.parse(str(attributes[f"layout_{operand}"]))
    values = arrays[f"{operand}_values"]
    rows, columns = (int(side) for side in arrays[f"{operand}_shape"])
    packed = SparseTensor(
        pattern,
        (rows, columns),
        values if pattern.kind == "block" else values.reshape(-1),
        arrays[f"{operand}_indices"],
    )
    return packed.decode().astype(np.float64)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _lstm_step(from_x: Array, h: Array, c: Array, r: Array, b: Array) -> tuple[Array, Array]:
    i, o, f, g = np.split(from_x + h @ r.T + b[len(b) // 2 :], 4, axis=1)
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(c), c


def _gru_step(from_x: Array, h: Array, r: Array, b: Array, before_reset: bool) -> Array:
    (rz, rr, rh), (bz, br, bh) = np.split(r, 3), np.split(b[len(b) // 2 :], 3)
    xz, xr, xh = np.split(from_x, 3, axis=1)
    z, reset = _sigmoid(xz + h @ rz.T + bz), _sigmoid(xr + h @ rr.T + br)
    inner = reset * (h @ rh.T + bh) if before_reset else (reset * h) @ rh.T + bh
    return (1 - z) * np.tanh(xh + inner) + z * h
