"""The library's LSTM and GRU from Python, without onnxruntime; see ``sparsecc.runtime.capi``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime.capi import (
    NativeHandle,
    Signatures,
    WeightDesc,
    declare,
    describe,
    encoded,
    open_library,
    usable_isas,
)
from sparsecc.runtime.native import get_library_path

__all__ = ["NativeRecurrent", "PackedMatrix", "RecurrentDesc", "RecurrentIo"]

_CELLS = {"LSTM": (0, 4), "GRU": (1, 3)}  # code, gates
_DIRECTIONS = {"forward": (0, 1), "reverse": (1, 1), "bidirectional": (2, 2)}  # code, directions


class RecurrentDesc(ctypes.Structure):
    """``sparsecc_recurrent_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("cell", ctypes.c_int32),
        ("direction", ctypes.c_int32),
        ("linear_before_reset", ctypes.c_int32),
        ("hidden", ctypes.c_int64),
        ("input_weight", WeightDesc),
        ("state_weight", WeightDesc),
        ("bias", ctypes.c_void_p),
        ("isa", ctypes.c_char_p),
    )


class RecurrentIo(ctypes.Structure):
    """``sparsecc_recurrent_io``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("x", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("initial_h", ctypes.c_void_p),
        ("initial_c", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_h", ctypes.c_void_p),
        ("y_c", ctypes.c_void_p),
    )


@cache
def _library(path: str) -> ctypes.CDLL:
    library = open_library(path)
    pointer, error_text = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_size_t)
    signatures: Signatures = {
        "sparsecc_recurrent_create": (ctypes.c_int, (pointer, pointer, *error_text)),
        "sparsecc_recurrent_run": (ctypes.c_int, (pointer, pointer, pointer, *error_text)),
        "sparsecc_recurrent_destroy": (None, (pointer,)),
        "sparsecc_recurrent_kernels": (ctypes.c_char_p, (pointer,)),
        "sparsecc_recurrent_kernel_table": (ctypes.c_char_p, ()),
    }
    declare(library, signatures)
    return library


@dataclass(frozen=True)
class PackedMatrix:
    """A packed weight: layout, shape (N, K), kept values (of a type in ``VALUE_TYPES``) and gap stream (uint8)."""

    layout: str
    shape: tuple[int, int]
    values: NDArray[Any]
    indices: NDArray[np.uint8]

    def desc(self, layout_version: int) -> WeightDesc:
        """Return the descriptor, which keeps alive what it points to."""
        return describe(
            WeightDesc, self.layout, self.shape, self.values, self.indices, layout_version=layout_version
        )


class NativeRecurrent(NativeHandle):
    """An LSTM or GRU of ONNX by the library's kernels, on the calling thread, without onnxruntime.

    Use as a context manager, or call ``close``.

    Args:
        cell: ``LSTM`` or ``GRU``.
        hidden: units of the hidden state, H.
        input_weight: W as a matrix ``[D * gates * H, I]``.
        state_weight: R as a matrix ``[D * gates * H, H]``.
        bias: ``[D, 2 * gates * H]`` or ``None``.
        direction: ``forward``, ``reverse`` or ``bidirectional`` (D = 2).
        linear_before_reset: of a GRU.
        isa: one of ``isas()``; ``None`` is the best (or ``SPARSECC_ISA``).
        layout_version: version of the packed format.

    Raises:
        ModelError: a weight is malformed or does not fit; the message is the library's.
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: the bias has another shape, or ``SPARSECC_ISA`` is wrong.
    """

    _family = "recurrent"

    def __init__(
        self,
        cell: str,
        hidden: int,
        input_weight: PackedMatrix,
        state_weight: PackedMatrix,
        *,
        bias: NDArray[np.float32] | None = None,
        direction: str = "forward",
        linear_before_reset: bool = False,
        isa: str | None = None,
        layout_version: int = 1,
    ) -> None:
        path = get_library_path()
        super().__init__(_library(path))
        if isa is None:
            usable_isas(path)
        (self._cell, gates), (code, self.directions) = _CELLS[cell], _DIRECTIONS[direction]
        self.hidden, self.inputs = hidden, input_weight.shape[1]
        expected = (self.directions, 2 * gates * hidden)
        if bias is not None and bias.shape != expected:
            raise UsageError(f"bias has shape {bias.shape}, expected {expected}")
        # Everything is copied by the library; this only has to live until it returns.
        held_bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        weights = input_weight.desc(layout_version), state_weight.desc(layout_version)
        desc = RecurrentDesc(
            ctypes.sizeof(RecurrentDesc), self._cell, code, linear_before_reset, hidden, *weights,
            None if held_bias is None else held_bias.ctypes.data, encoded(isa),
        )  # fmt: skip
        self._call("create", ctypes.byref(desc), ctypes.byref(self._handle), fault=ModelError)

    def __call__(
        self,
        x: NDArray[np.float32],
        lengths: NDArray[np.int32] | None = None,
        initial_h: NDArray[np.float32] | None = None,
        initial_c: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], ...]:
        """Return y ``[T, D, B, H]``, y_h ``[D, B, H]`` and, of an LSTM, y_c ``[D, B, H]``.

        Args:
            x: float32 ``[T, B, I]``.
            lengths: ``[B]``, each 0..T; ``None`` is T for all.
            initial_h: ``[D, B, H]``; ``None`` is zeros.
            initial_c: as ``initial_h``; LSTM only.

        Raises:
            UsageError: a shape or a length does not fit.
        """
        x = np.asarray(x, np.float32, order="C")
        if x.ndim != 3 or x.shape[2] != self.inputs:
            raise UsageError(f"x has shape {x.shape}, expected [T,B,{self.inputs}]")
        steps, batch = x.shape[:2]
        state = (self.directions, batch, self.hidden)
        held = [
            None if array is None else np.asarray(array, dtype, order="C")
            for array, dtype in ((lengths, np.int32), (initial_h, np.float32), (initial_c, np.float32))
        ]
        for array, expected in zip(held, ((batch,), state, state), strict=True):
            if array is not None and array.shape != expected:
                raise UsageError(f"lengths or initial state has shape {array.shape}, expected {expected}")
        y = np.empty((steps, *state), np.float32)
        results = [y, *(np.empty(state, np.float32) for _ in range(2 if self._cell == 0 else 1))]
        pointers = [None if array is None else array.ctypes.data for array in held]
        out = [array.ctypes.data for array in results] + [None] * (3 - len(results))
        io = RecurrentIo(ctypes.sizeof(RecurrentIo), x.ctypes.data, steps, batch, *pointers, *out)
        self._call("run", self._handle, ctypes.byref(io), None)
        return tuple(results)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels of the cell and of its products with one row of x and of h."""
        return tuple(self._library.sparsecc_recurrent_kernels(self._handle).decode().split())
