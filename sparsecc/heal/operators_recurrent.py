"""LSTM and GRU of ONNX on tensors of PyTorch, step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsecc.heal.operators import Call, Operator, Tensor

__all__ = ["OPERATORS_RECURRENT", "recurrent_refusal"]

_USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}

_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def recurrent_refusal(call: Call) -> str | None:
    """Why a node is not supported, or None: only the usual activations without clipping."""
    op = call.node.op_type
    given = call.node.attributes.get_strings("activations", None)
    usual = _USUAL[op]
    if given is not None and list(given) != usual * (len(given) // len(usual)):
        return f"{op} with activations {', '.join(given)}"
    if "clip" in call.node.attributes:
        return f"{op} with clip"
    if call.integer("input_forget", 0) or call.integer("layout", 0):
        return f"{op} with input_forget or layout"
    if len(call.node.inputs) > 4 and call.node.inputs[4] is not None:
        return f"{op} with sequence_lens"
    if len(call.node.inputs) > 7 and call.node.inputs[7] is not None:
        return f"{op} with peepholes"
    return None


def _directions(call: Call) -> list[str]:
    direction = call.text("direction", "forward")
    return ["forward", "reverse"] if direction == "bidirectional" else [direction]


def _scan(
    x: Tensor, reverse: bool, step: _Step, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs ``[T, B, H]`` in the order of time, and the last state."""
    found: list[Tensor] = []
    for at in reversed(range(len(x))) if reverse else range(len(x)):
        state = step(x[at], state)
        found.append(state[0])
    return torch.stack(found[::-1] if reverse else found), state


def _start(given: Tensor | None, x: Tensor, directions: int, hidden: int) -> Tensor:
    return x.new_zeros(directions, x.shape[1], hidden) if given is None else given


def _lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    hidden, names = r.shape[2], _directions(call)
    starts = [_start(h, x, len(names), hidden), _start(c, x, len(names), hidden)]
    outputs, ends = [], []
    for number, name in enumerate(names):
        bias = 0 if b is None else b[number, : 4 * hidden] + b[number, 4 * hidden :]
        recurrent = r[number]

        def step(row: Tensor, state: tuple[Tensor, ...], recurrent: Tensor = recurrent) -> tuple[Tensor, ...]:
            i, o, f, g = (row + state[0] @ recurrent.T).chunk(4, -1)
            cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(cell), cell

        state = tuple(start[number] for start in starts)
        y, end = _scan(x @ w[number].T + bias, name == "reverse", step, state)
        outputs.append(y)
        ends.append(end)
    return (torch.stack(outputs, 1), *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    hidden, names = r.shape[2], _directions(call)
    start, after = _start(h, x, len(names), hidden), bool(call.integer("linear_before_reset", 0))
    outputs, ends = [], []
    for number, name in enumerate(names):
        biases = x.new_zeros(6 * hidden) if b is None else b[number]
        inner = biases[3 * hidden :]

        def step(
            row: Tensor, state: tuple[Tensor, ...], recurrent: Tensor = r[number], inner: Tensor = inner
        ) -> tuple[Tensor, ...]:
            (state_now,) = state
            gates = row[..., : 2 * hidden] + state_now @ recurrent[: 2 * hidden].T + inner[: 2 * hidden]
            update, reset = torch.sigmoid(gates).chunk(2, -1)
            candidate, bias = recurrent[2 * hidden :].T, inner[2 * hidden :]
            inside = state_now if after else reset * state_now
            added = inside @ candidate + bias
            new = torch.tanh(row[..., 2 * hidden :] + (reset * added if after else added))
            return ((1 - update) * new + update * state_now,)

        y, end = _scan(x @ w[number].T + biases[: 3 * hidden], name == "reverse", step, (start[number],))
        outputs.append(y)
        ends.append(end[0])
    return torch.stack(outputs, 1), torch.stack(ends)


OPERATORS_RECURRENT: dict[str, Operator] = {"GRU": _gru, "LSTM": _lstm}
