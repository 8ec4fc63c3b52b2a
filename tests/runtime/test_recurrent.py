"""LSTM and GRU of the library through its C interface, against plain NumPy loops in double precision.

Tolerance: a gate sums I + H products and two biases; what it gets wrong is carried on by the state, which the
forget gate (below one) and the slopes of the activations (at most one) keep from growing faster than the steps.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime import isas
from sparsecc.runtime.capi_recurrent import NativeRecurrent, PackedMatrix, RecurrentDesc, RecurrentIo
from sparsecc.sparse import Pattern, SparseTensor, keep_mask

EPS = float(np.finfo(np.float32).eps)
CANARY = np.float32(-12345.5)
ISAS = isas()
GATES = {"LSTM": 4, "GRU": 3}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def recurrent(
    cell: str, direction: str, before_reset: bool, x: np.ndarray, w: np.ndarray, r: np.ndarray, b: np.ndarray,
    lengths: np.ndarray, h: np.ndarray, c: np.ndarray,
) -> list[np.ndarray]:  # fmt: skip
    """ONNX's LSTM and GRU, one row and one step at a time, in float64."""
    steps, batch, hidden = *x.shape[:2], r.shape[2]
    x, w, r, b, h, c = (array.astype(np.float64) for array in (x, w, r, b, h, c))
    y = np.zeros((steps, w.shape[0], batch, hidden))
    for d, row in itertools.product(range(w.shape[0]), range(batch)):
        backwards = direction == "reverse" or d == 1
        order = range(int(lengths[row]))
        for t in reversed(order) if backwards else order:
            wb, rb = np.split(b[d], 2)
            from_x, from_h = w[d] @ x[t, row] + wb, r[d] @ h[d, row] + rb
            if cell == "LSTM":
                i, o, f, g = np.split(from_x + from_h, 4)
                c[d, row] = sigmoid(f) * c[d, row] + sigmoid(i) * np.tanh(g)
                h[d, row] = sigmoid(o) * np.tanh(c[d, row])
            else:
                (xz, xr, xh), (hz, hr, hh) = np.split(from_x, 3), np.split(from_h, 3)
                z, reset = sigmoid(xz + hz), sigmoid(xr + hr)
                if not before_reset:
                    hh = r[d, 2 * hidden :] @ (reset * h[d, row]) + rb[2 * hidden :]
                fresh = np.tanh(xh + (reset * hh if before_reset else hh))
                h[d, row] = (1 - z) * fresh + z * h[d, row]
            y[t, d, row] = h[d, row]
        if not lengths[row]:
            h[d, row] = c[d, row] = 0
    return [y, h, c] if cell == "LSTM" else [y, h]


def pack(weight: np.ndarray, layout: str) -> PackedMatrix:
    matrix = weight.reshape(-1, weight.shape[2])
    packed = SparseTensor.encode(matrix, Pattern.parse(layout))
    return PackedMatrix(layout, matrix.shape, packed.values, packed.indices)


def pruned(rng: np.random.Generator, shape: tuple[int, ...], layout: str, sparsity: float) -> np.ndarray:
    weight = rng.standard_normal(shape).astype(np.float32) / 4
    pattern, matrix = Pattern.parse(layout), (-1, shape[2])
    keep = keep_mask(
        rng.random(weight.reshape(matrix).shape), pattern, None if pattern.kind == "nm" else sparsity
    )
    return weight * keep.reshape(shape)


class Case:
    """Weights and inputs of one operator."""

    def __init__(
        self, cell: str, direction: str, sizes: tuple[int, int, int, int], layouts: tuple[str, str],
        seed: int = 0, sparsity: float = 0.7,
    ) -> None:  # fmt: skip
        self.steps, self.batch, self.inputs, self.hidden = sizes
        rng = np.random.default_rng([seed, *sizes])
        self.cell, self.direction, self.layouts = cell, direction, layouts
        d, g = DIRECTIONS[direction], GATES[cell] * self.hidden
        self.w = pruned(rng, (d, g, self.inputs), layouts[0], sparsity)
        self.r = pruned(rng, (d, g, self.hidden), layouts[1], sparsity)
        self.b = rng.standard_normal((d, 2 * g)).astype(np.float32)
        self.x = rng.standard_normal((self.steps, self.batch, self.inputs)).astype(np.float32)
        self.h, self.c = rng.standard_normal((2, d, self.batch, self.hidden)).astype(np.float32)
        self.lengths = rng.integers(0, self.steps + 1, self.batch).astype(np.int32)

    def op(self, before_reset: bool = False, **options: Any) -> NativeRecurrent:
        return NativeRecurrent(
            self.cell, self.hidden, pack(self.w, self.layouts[0]), pack(self.r, self.layouts[1]),
            **{"bias": self.b, **options}, direction=self.direction, linear_before_reset=before_reset,
        )  # fmt: skip

    def check(
        self, results: Any, *, before_reset: bool = False, bias: bool = True, state: bool = True,
        lengths: bool = False,
    ) -> None:  # fmt: skip
        whole = np.full(self.batch, self.steps)
        expected = recurrent(
            self.cell, self.direction, before_reset, self.x, self.w, self.r, self.b * bias,
            self.lengths if lengths else whole, self.h * state, self.c * state,
        )  # fmt: skip
        terms = self.inputs + self.hidden + 2
        reach = max(float(np.abs(array).max(initial=1)) for array in (self.x, self.h, self.b))
        for got, wanted in zip(results, expected, strict=True):
            assert got.shape == wanted.shape
            bound = 4 * EPS * terms * reach * (1 + np.sqrt(self.steps))
            assert (np.abs(got - wanted) <= bound * (1 + np.abs(wanted))).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("cell", "before_reset"), [("LSTM", False), ("GRU", False), ("GRU", True)], ids=["lstm", "gru", "gru_lbr"]
)
def test_random(isa: str, cell: str, direction: str, before_reset: bool) -> None:
    shapes = [(1, 1, 5, 16), (7, 1, 20, 32), (5, 3, 33, 48), (3, 20, 8, 16), (90, 2, 7, 16)]
    layouts = [
        ("16x1", "16x1"),
        ("unstructured", "16x1"),
        ("2:4", "unstructured"),
        ("4x1", "8x2"),
        ("16x4", "1:4"),
    ]
    for number, (sizes, layout) in enumerate(zip(shapes, layouts, strict=True)):
        case = Case(cell, direction, sizes, layout, seed=number)
        with case.op(before_reset, isa=isa) as op:
            case.check(op(case.x, None, case.h, case.c), before_reset=before_reset)
            case.check(op(case.x), before_reset=before_reset, state=False)
            case.check(op(case.x, case.lengths, case.h, case.c), before_reset=before_reset, lengths=True)
            assert isa in op.kernels[0]
        with case.op(before_reset, isa=isa, bias=None) as op:
            case.check(op(case.x), before_reset=before_reset, state=False, bias=False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("hidden", [1, 3, 15, 17, 31, 33, 100])
def test_hidden_sizes(isa: str, cell: str, hidden: int) -> None:
    """Sizes off the vector width; several parts of the sequence in work one after another at the largest."""
    case = Case(cell, "bidirectional", (4, 2, 9, hidden), ("unstructured", "unstructured"))
    for before_reset in (False, True):
        with case.op(before_reset, isa=isa) as op:
            case.check(op(case.x, None, case.h, case.c), before_reset=before_reset)


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sequence_in_parts(cell: str, direction: str) -> None:
    """Longer than what is multiplied with x at once."""
    case = Case(cell, direction, (150, 40, 3, 64), ("16x1", "16x1"), sparsity=0.95)
    with case.op() as op:
        case.check(op(case.x, case.lengths, case.h, case.c), lengths=True)


def test_empty_weights_and_no_steps() -> None:
    case = Case("LSTM", "forward", (4, 2, 6, 16), ("unstructured", "unstructured"))
    case.w *= 0
    case.r *= 0
    with case.op() as op:
        case.check(op(case.x, None, case.h, case.c))
        y, h, c = op(case.x[:0], None, case.h, case.c)
        assert y.size == 0
        np.testing.assert_array_equal((h, c), (case.h, case.c))
        assert all(result.size == 0 for result in op(case.x[:, :0]))


@pytest.mark.parametrize("isa", ISAS)
def test_far_out_of_range_and_nan(isa: str) -> None:
    """Gates saturate instead of overflowing; NaN reaches the units that read it and no others."""
    case = Case("LSTM", "forward", (3, 1, 4, 16), ("unstructured", "unstructured"))
    case.w[:] = 0
    case.r[:] = 0
    case.w[0, :, 0] = np.tile([1, -1], 32)
    case.b[:] = 0
    for size in (1e3, 1e30, np.inf):
        case.x[:] = 0
        case.x[..., 0] = size
        with case.op(isa=isa) as op:
            y, *_ = op(case.x)
        assert np.isfinite(y).all()
        assert np.abs(y).max() <= 1
    case.w[0, 1::2, 0] = 0
    case.x[..., 0] = np.nan
    with case.op(isa=isa) as op:
        y, *_ = op(case.x)
    np.testing.assert_array_equal(np.isnan(y[0, 0, 0]), np.arange(16) % 2 == 0)


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", [(30, 5, 64, 64), (200, 1, 64, 64), (3, 1, 64, 256)])
def test_threads_and_canaries(
    cell: str, direction: str, sizes: tuple[int, int, int, int], pool_executor: Callable[..., Any]
) -> None:
    """On borrowed threads, into outputs surrounded by values that must stay."""
    case = Case(cell, direction, sizes, ("unstructured", "16x1"), sparsity=0.0 if sizes[3] > 64 else 0.5)
    d = DIRECTIONS[direction]
    state = d * case.batch * case.hidden
    counts = [case.steps * state, state, state if cell == "LSTM" else 0]
    room = [np.full(count + 64, CANARY, np.float32) for count in counts]
    out = [part.ctypes.data + 32 * 4 for part in room]
    calls: list[int] = []
    with case.op() as op:
        io = RecurrentIo(
            ctypes.sizeof(RecurrentIo), case.x.ctypes.data, case.steps, case.batch, None,
            case.h.ctypes.data, case.c.ctypes.data, *out,
        )  # fmt: skip
        op._call("run", op._handle, ctypes.byref(io), pool_executor(3, calls))
    assert calls
    for part in room:
        assert (part[:32] == CANARY).all()
        assert (part[-32:] == CANARY).all()
    shapes = [(case.steps, d, case.batch, case.hidden), *[(d, case.batch, case.hidden)] * 2]
    results = [
        part[32:-32].reshape(shape) for part, shape in zip(room, shapes, strict=True) if len(part) > 64
    ]
    case.check(results)


def test_every_cell_kernel_is_exercised() -> None:
    """The table names what ``test_random`` runs on each instruction set, and nothing else."""
    case = Case("LSTM", "forward", (1, 1, 4, 16), ("16x1", "16x1"))
    with case.op() as op:
        table = op._library.sparsecc_recurrent_kernel_table().decode().split("\n")
    names = {line.split()[0] for line in table if line}
    assert names == {f"{kernel}-{isa}" for kernel in ("lstm_cell", "gru_reset", "gru_cell") for isa in ISAS}


def test_malformed() -> None:
    case = Case("GRU", "forward", (2, 1, 8, 16), ("16x1", "16x1"))

    def create(**changes: Any) -> None:
        w, r = pack(case.w, "16x1"), pack(case.r, "16x1")
        desc = RecurrentDesc(ctypes.sizeof(RecurrentDesc), 1, 0, 0, 16, w.desc(1), r.desc(1), None, None)
        for name, value in changes.items():
            target, _, field = name.rpartition("__")
            setattr(getattr(desc, target) if target else desc, field, value)
        with case.op() as op:
            handle = ctypes.c_void_p()
            op._call("create", ctypes.byref(desc), ctypes.byref(handle), fault=ModelError)
            op._library.sparsecc_recurrent_destroy(handle)

    create()
    for changes, message in (
        ({"struct_size": 8}, "caller and library do not match"),
        ({"cell": 2}, "unknown cell 2"),
        ({"direction": -1}, "unknown direction"),
        ({"hidden": 0}, "hidden is 0"),
        ({"hidden": 1 << 40}, "hidden is"),
        ({"hidden": 17}, "input weight has 48 outputs, expected 51"),
        ({"cell": 0}, "has 48 outputs, expected 64"),
        ({"direction": 2}, "has 48 outputs, expected 96"),
        ({"state_weight__inputs": 15}, "state weight has 15 inputs"),
        ({"state_weight__bias": case.b.ctypes.data}, "a bias or an activation of its own"),
        ({"input_weight__activation": 1}, "a bias or an activation of its own"),
        ({"input_weight__layout": b"17x1"}, "not a whole number of blocks"),
        ({"input_weight__layout": b"32x1"}, "whole number of blocks of 32"),
        ({"state_weight__layout_version": 2}, "layout version 2"),
        ({"state_weight__index_bytes": 1}, "index"),
        ({"isa": b"avx1024"}, "isa is"),
    ):
        with pytest.raises(ModelError, match=message):
            create(**changes)
    uneven = Case("GRU", "forward", (2, 1, 8, 24), ("unstructured", "unstructured"))
    uneven.layouts = ("16x1", "unstructured")
    with pytest.raises(ModelError, match="blocks of 16 outputs cross the gates of 24 hidden units"):
        uneven.op()


def test_wrong_inputs() -> None:
    case = Case("LSTM", "forward", (4, 2, 8, 16), ("16x1", "16x1"))
    with case.op() as op:
        for lengths in ([1, 5], [-1, 2]):
            with pytest.raises(UsageError, match=r"is not in 0\.\.4"):
                op(case.x, np.int32(lengths))
        with pytest.raises(UsageError, match="expected"):
            op(case.x[..., 1:])
        with pytest.raises(UsageError, match="initial state"):
            op(case.x, None, case.h[:, :1])
        io = RecurrentIo(ctypes.sizeof(RecurrentIo), case.x.ctypes.data, -1, 2)
        with pytest.raises(UsageError, match="negative"):
            op._call("run", op._handle, ctypes.byref(io), None)
        io.steps = 4
        with pytest.raises(UsageError, match="must not be null"):
            op._call("run", op._handle, ctypes.byref(io), None)
    with pytest.raises(UsageError, match="bias has shape"):
        case.op(bias=case.b[:, 1:])
