"""The library's attention, normalisation and gates from Python, without onnxruntime; see ``sparsecc.runtime.capi``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.runtime.capi import (
    ACTIVATION_CODES,
    Signatures,
    call,
    declare,
    encoded,
    open_library,
    usable_isas,
)
from sparsecc.runtime.native import get_library_path

__all__ = [
    "AttentionDesc",
    "NormDesc",
    "native_attention",
    "native_gate",
    "native_norm",
    "transformer_library",
]


class AttentionDesc(ctypes.Structure):
    """``sparsecc_attention_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_size")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("rotary_strides", ctypes.c_int64 * 2),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("y", ctypes.c_void_p),
        ("y_strides", ctypes.c_int64 * 3),
        ("isa", ctypes.c_char_p),
    )


class NormDesc(ctypes.Structure):
    """``sparsecc_norm_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("centred", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_rows", ctypes.c_int64),
        ("gain", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("isa", ctypes.c_char_p),
    )


@cache
def _declared(path: str) -> ctypes.CDLL:
    library = open_library(path)
    pointer, count, error_text = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_char_p, ctypes.c_size_t)
    signatures: Signatures = {
        "sparsecc_attention_run": (ctypes.c_int, (pointer, pointer, *error_text)),
        "sparsecc_norm_run": (ctypes.c_int, (pointer, pointer, *error_text)),
        "sparsecc_gate_run": (
            ctypes.c_int,
            (pointer, count, count, ctypes.c_int, ctypes.c_char_p, pointer, pointer, *error_text),
        ),
        "sparsecc_transformer_kernel_table": (ctypes.c_char_p, ()),
    }
    declare(library, signatures)
    return library


def transformer_library() -> ctypes.CDLL:
    """Return the library with these functions declared.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: ``SPARSECC_ISA`` names no usable instruction set.
    """
    path = get_library_path()
    usable_isas(path)
    return _declared(path)


def _call(name: str, *arguments: Any) -> None:
    call(getattr(transformer_library(), f"sparsecc_{name}_run"), *arguments)


def _strides(array: NDArray[np.float32]) -> Any:
    """Strides in floats of ``[batch, rows, heads, size]``, without the last, which must be 1."""
    *outer, last = (stride // array.itemsize for stride in array.strides)
    if last != 1 and array.shape[-1] > 1 and array.size > 0:
        raise UsageError("the last axis must be contiguous")
    return (ctypes.c_int64 * 3)(*outer)


def native_attention(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    *,
    scale: float,
    mask: NDArray[np.float32] | None = None,
    rotary: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    isa: str | None = None,
    out: NDArray[np.float32] | None = None,
    executor: Any = None,
) -> NDArray[np.float32]:
    """Return ``softmax(scale q k^T + mask) v`` for every head.

    Args:
        q: float32 ``[batch, queries, heads, size]``, the last axis contiguous.
        k: ``[batch, keys, kv heads, size]``, likewise; neighbouring heads of q share one where there are fewer.
        v: as k.
        scale: factor of the scores.
        mask: float32, to be broadcast to ``[batch, heads, queries, keys]``; added to the scores.
        rotary: cosines and sines ``[1 or batch, queries, size]`` by which q and k are turned first.
        isa: one of ``isas()``; ``None`` is the best (or ``SPARSECC_ISA``).
        out: where y ``[batch, queries, heads, size]`` is written; made when not given.
        executor: a ``sparsecc_executor`` by reference; ``None`` is the calling thread.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: the arrays do not fit together.
    """
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape != (batch, keys, kv_heads, size) or v.shape != k.shape:
        raise UsageError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    y = np.empty(q.shape, np.float32) if out is None else out
    mask_strides = (ctypes.c_int64 * 4)()
    if mask is not None:
        mask = np.asarray(mask, np.float32, order="C")
        wide = np.broadcast_to(mask, (batch, heads, queries, keys))
        mask_strides = (ctypes.c_int64 * 4)(*(stride // 4 for stride in wide.strides))
    tables = [np.ascontiguousarray(table, np.float32) for table in rotary or ()]
    fitting = [(1, queries, size), (batch, queries, size)]
    if tables and not tables[0].shape == tables[1].shape in fitting:
        raise UsageError(f"cosines and sines must be [1 or {batch}, {queries}, {size}]")
    cosines, sines = (table.ctypes.data for table in tables) if tables else (None, None)
    per_batch = queries * size if tables and len(tables[0]) > 1 else 0
    desc = AttentionDesc(
        ctypes.sizeof(AttentionDesc), batch, heads, kv_heads, queries, keys, size, scale,
        q.ctypes.data, k.ctypes.data, v.ctypes.data, _strides(q), _strides(k), _strides(v),
        cosines, sines, (ctypes.c_int64 * 2)(per_batch, size),
        None if mask is None else mask.ctypes.data, mask_strides, y.ctypes.data, _strides(y),
        encoded(isa),
    )  # fmt: skip
    _call("attention", ctypes.byref(desc), executor)
    return y


def native_norm(
    x: NDArray[np.float32],
    gain: NDArray[np.float32],
    *,
    shift: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
    epsilon: float = 1e-5,
    centred: bool = True,
    isa: str | None = None,
    executor: Any = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ``(y, z)`` with z = x + residual and y its layer norm, or root-mean-square norm.

    Args:
        x: float32 ``[rows, size]``.
        gain: ``[size]``.
        shift: ``[size]`` or ``None``.
        residual: ``[some rows, size]``, which begins again when it is used up, or ``None``.
        epsilon: added to the variance.
        centred: whether the mean is subtracted.
        isa: as in ``native_attention``.
        executor: as in ``native_attention``.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: the arrays do not fit together.
    """
    rows, size = x.shape
    for name, array in (("gain", gain), ("shift", shift)):
        if array is not None and array.shape != (size,):
            raise UsageError(f"{name} has shape {array.shape}, expected ({size},)")
    held = {
        name: None if array is None else np.ascontiguousarray(array, np.float32)
        for name, array in (("x", x), ("gain", gain), ("shift", shift), ("residual", residual))
    }
    y, z = np.empty((rows, size), np.float32), np.empty((rows, size), np.float32)
    address = {name: None if array is None else array.ctypes.data for name, array in held.items()}
    desc = NormDesc(
        ctypes.sizeof(NormDesc), rows, size, centred, epsilon, address["x"], address["residual"],
        0 if residual is None else residual.shape[0], address["gain"], address["shift"],
        y.ctypes.data, z.ctypes.data, encoded(isa),
    )  # fmt: skip
    _call("norm", ctypes.byref(desc), executor)
    return y, z


def native_gate(
    x: NDArray[np.float32], activation: str, *, isa: str | None = None, executor: Any = None
) -> NDArray[np.float32]:
    """Return ``act(x[:, :n]) * x[:, n:]``, float32 ``[rows, n]``, of x ``[rows, 2 n]``.

    Args:
        x: the two halves side by side.
        activation: a key of ``ACTIVATION_CODES`` that takes no parameters.
        isa: as in ``native_attention``.
        executor: as in ``native_attention``.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: there is no such activation.
    """
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty((x.shape[0], x.shape[1] // 2), np.float32)
    _call(
        "gate", x.ctypes.data, *y.shape, ACTIVATION_CODES[activation], encoded(isa),
        y.ctypes.data, executor,
    )  # fmt: skip
    return y
