"""The library's products of bytes from Python, without onnxruntime; see ``sparsecc.runtime.capi``."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError
from sparsecc.runtime.capi import (
    NativeHandle,
    PackedDesc,
    Signatures,
    declare,
    describe,
    open_library,
    rows_and_result,
    usable_isas,
)
from sparsecc.runtime.native import get_library_path

__all__ = ["Int8WeightDesc", "NativeInt8MatMul", "int8_isas"]


class Int8WeightDesc(PackedDesc):
    """``sparsecc_int8_weight_desc``."""

    _fields_ = (
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("activation", ctypes.c_int),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("isa", ctypes.c_char_p),
    )

    value_types: ClassVar[Mapping[str, int]] = {"int8": 0}


@cache
def _library(path: str) -> ctypes.CDLL:
    library = open_library(path)
    pointer, count, error_text = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_char_p, ctypes.c_size_t)
    signatures: Signatures = {
        "sparsecc_int8_isas": (ctypes.c_char_p, ()),
        "sparsecc_int8_kernel_table": (ctypes.c_char_p, ()),
        "sparsecc_int8_matmul_create": (ctypes.c_int, (pointer, pointer, *error_text)),
        "sparsecc_int8_matmul_run": (ctypes.c_int, (pointer, pointer, count, pointer, pointer, *error_text)),
        "sparsecc_int8_matmul_run_given": (
            ctypes.c_int,
            (pointer, pointer, count, ctypes.c_float, ctypes.c_int32, pointer, pointer, *error_text),
        ),
        "sparsecc_int8_matmul_run_bytes": (
            ctypes.c_int,
            (pointer, pointer, count, ctypes.c_float, ctypes.c_int32, pointer, pointer, *error_text),
        ),
        "sparsecc_int8_matmul_kernel": (ctypes.c_char_p, (pointer, count)),
        "sparsecc_int8_matmul_balance": (ctypes.c_double, (pointer, count)),
        "sparsecc_int8_matmul_destroy": (None, (pointer,)),
    }
    declare(library, signatures)
    return library


def int8_isas() -> tuple[str, ...]:
    """Return the instruction sets for products of bytes that this machine can run, best first.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: ``SPARSECC_ISA`` names none of them.
    """
    path = get_library_path()
    usable_isas(path)
    return tuple(_library(path).sparsecc_int8_isas().decode().split())


class NativeInt8MatMul(NativeHandle):
    """``y = act(x W^T + bias)`` with W in bytes and x quantised inside, on the calling thread.

    Use as a context manager, or call ``close``.

    Args:
        layout: ``unstructured``, ``N:M`` or ``RxC``.
        shape: (N outputs, K inputs).
        values: int8, the kept weights (``[blocks, R, C]`` or flat).
        indices: uint8, the gap stream.
        scales: float32 ``[N]``, finite and positive.
        bias: ``[N]`` or ``None``.
        activation: a key of ``ACTIVATION_CODES``.
        alpha: slope of LeakyRelu, lower bound of Clip.
        beta: upper bound of Clip.
        isa: one of ``int8_isas()``, or the name of a kernel; ``None`` is the best (or ``SPARSECC_ISA``).
        layout_version: version of the packed format.

    Raises:
        ModelError: the packed weight is malformed; the message is the library's.
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: scales or bias do not have one number per output, or ``SPARSECC_ISA`` is wrong.
    """

    _family = "int8_matmul"

    def __init__(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[np.int8],
        indices: NDArray[np.uint8],
        scales: NDArray[np.float32],
        *,
        bias: NDArray[np.float32] | None = None,
        activation: str = "",
        alpha: float = 0.0,
        beta: float = 0.0,
        isa: str | None = None,
        layout_version: int = 1,
    ) -> None:
        self.shape = shape
        path = get_library_path()
        super().__init__(_library(path))
        if isa is None:
            usable_isas(path)
        desc = describe(
            Int8WeightDesc, layout, shape, values, indices, scales=scales, bias=bias, activation=activation,
            alpha=alpha, beta=beta, isa=isa, layout_version=layout_version,
        )  # fmt: skip
        self._call("create", ctypes.byref(desc), ctypes.byref(self._handle), fault=ModelError)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return y, ``[..., N]``, of x, float32 ``[..., K]``; x is quantised as a whole.

        Raises:
            UsageError: x does not fit.
        """
        x, y = rows_and_result(x, self.shape)
        self.run(x, y)
        return y

    def run(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Write y ``[M, N]``, contiguous, of x ``[M, K]``, contiguous; nothing is checked."""
        self._call("run", self._handle, x.ctypes.data, y.size // self.shape[0], y.ctypes.data, None)

    def kernel(self, rows: int) -> str:
        """Return the name of the kernel that would run for that many rows of x, or most of them."""
        return str(self._library.sparsecc_int8_matmul_kernel(self._handle, rows).decode())

    def balance(self, parts: int) -> float:
        """Return the work of the largest part over the mean part, as ``NativeMatMul.balance``."""
        return float(self._library.sparsecc_int8_matmul_balance(self._handle, parts))
