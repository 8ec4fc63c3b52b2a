"""The library's operations on quad planes from Python, without onnxruntime; see ``sparsecc.runtime.capi``.

Quad planes are uint8 ``[batch, ceil(channels / 4), height, width, 4]`` with one scale and zero point.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime.capi import (
    ConvGeometry,
    NativeHandle,
    Signatures,
    call,
    declare,
    describe,
    encoded,
    geometry_struct,
    open_library,
)
from sparsecc.runtime.capi_int8 import Int8WeightDesc
from sparsecc.runtime.native import get_library_path

__all__ = ["NativePlaneConv", "PlaneQuantization", "add_planes", "concat_planes", "dequantize_planes",
           "max_pool_planes", "mean_planes", "quantize_planes"]  # fmt: skip

Bytes = NDArray[np.uint8]


class QuantizationStruct(ctypes.Structure):
    """``sparsecc_plane_quantization``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("x_scale", ctypes.c_float),
        ("y_scale", ctypes.c_float),
        ("x_zero_point", ctypes.c_uint8),
        ("y_zero_point", ctypes.c_uint8),
        ("low", ctypes.c_uint8),
        ("high", ctypes.c_uint8),
        ("has_residual", ctypes.c_int32),
        ("residual_scale", ctypes.c_float),
        ("residual_zero_point", ctypes.c_uint8),
    )


@dataclass(frozen=True)
class PlaneQuantization:
    """Scales and zero points of what goes in and comes out, and the bounds of the result.

    ``residual`` is (scale, zero point) of what is added, ``None`` where nothing is.
    """

    x: tuple[float, int] = (1.0, 0)
    y: tuple[float, int] = (1.0, 0)
    bounds: tuple[int, int] = (0, 255)
    residual: tuple[float, int] | None = None

    def struct(self) -> QuantizationStruct:
        """Return the same as the library reads it."""
        residual = self.residual or (0.0, 0)
        return QuantizationStruct(
            ctypes.sizeof(QuantizationStruct), self.x[0], self.y[0], self.x[1], self.y[1], *self.bounds,
            self.residual is not None, *residual,
        )  # fmt: skip


@cache
def _library(path: str) -> ctypes.CDLL:
    library = open_library(path)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    tail = (pointer, ctypes.c_char_p, ctypes.c_size_t)  # executor, error text
    of_isa = (ctypes.c_char_p, *tail)
    converted = (ctypes.c_float, ctypes.c_uint8, pointer)
    signatures: Signatures = {
        "sparsecc_plane_kernel_table": (ctypes.c_char_p, ()),
        "sparsecc_plane_conv_create": (ctypes.c_int, (pointer, pointer, pointer, *tail)),
        "sparsecc_plane_conv_output_size": (ctypes.c_int, (pointer, pointer, *tail)),
        "sparsecc_plane_conv_run": (
            ctypes.c_int,
            (pointer, pointer, count, count, count, pointer, pointer, *tail),
        ),
        "sparsecc_plane_conv_kernel": (ctypes.c_char_p, (pointer,)),
        "sparsecc_plane_conv_destroy": (None, (pointer,)),
        "sparsecc_planes_quantize": (ctypes.c_int, (pointer, count, count, count, *converted, *of_isa)),
        "sparsecc_planes_dequantize": (ctypes.c_int, (pointer, count, count, count, *converted, *of_isa)),
        "sparsecc_planes_add": (ctypes.c_int, (pointer, pointer, count, pointer, pointer, *of_isa)),
        "sparsecc_planes_concat": (
            ctypes.c_int,
            (pointer, count, pointer, count, count, pointer, pointer, *of_isa),
        ),
        "sparsecc_planes_max_pool": (ctypes.c_int, (pointer, count, count, count, pointer, pointer, *of_isa)),
        "sparsecc_planes_output_size": (ctypes.c_int, (pointer, pointer, *tail)),
        "sparsecc_planes_mean": (ctypes.c_int, (pointer, count, count, pointer, pointer, *of_isa)),
    }
    declare(library, signatures)
    return library


def _quad_planes(x: Bytes) -> Bytes:
    x = np.asarray(x, np.uint8, order="C")
    if x.ndim != 5 or x.shape[-1] != 4:
        raise UsageError(f"x has shape {x.shape}, expected quad planes [B,Q,H,W,4]")
    return x


class NativePlaneConv(NativeHandle):
    """A convolution of quad planes with int8 weights, on the calling thread.

    Args:
        layout: ``RxC``.
        shape: (Cout, kh * kw * Cin / groups): columns in the order (kh, kw, cin).
        values: int8 ``[blocks, R, C]``.
        indices: uint8, the gap stream.
        scales: float32 ``[Cout]``, finite and positive.
        geometry: kernel, strides, pads, dilations, groups.
        quantization: scales, zero points and bounds.
        bias: ``[Cout]`` or ``None``.
        isa: one of ``int8_isas()``; ``None`` is the best (or ``SPARSECC_ISA``).

    Raises:
        ModelError: the weight, the geometry or the quantization is malformed; the message is the library's.
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: scales or bias do not have one number per output.
    """

    _family = "plane_conv"

    def __init__(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[np.int8],
        indices: NDArray[np.uint8],
        scales: NDArray[np.float32],
        geometry: ConvGeometry,
        quantization: PlaneQuantization,
        *,
        bias: NDArray[np.float32] | None = None,
        isa: str | None = None,
    ) -> None:
        super().__init__(_library(get_library_path()))
        self.shape = shape
        desc = describe(Int8WeightDesc, layout, shape, values, indices, scales=scales, bias=bias, isa=isa)
        self._call(
            "create", ctypes.byref(desc), ctypes.byref(geometry_struct(geometry)),
            ctypes.byref(quantization.struct()), ctypes.byref(self._handle), fault=ModelError,
        )  # fmt: skip
        self.channels = shape[1] // (geometry.kernel[0] * geometry.kernel[1]) * geometry.groups

    def __call__(self, x: Bytes, residual: Bytes | None = None) -> Bytes:
        """Return y, quad planes ``[B, ceil(Cout / 4), H', W', 4]``, of x and what is added.

        Raises:
            UsageError: x or the residual does not fit.
        """
        x = _quad_planes(x)
        if x.shape[1] != -(-self.channels // 4):
            raise UsageError(f"x has {x.shape[1]} quads, the weight has {self.channels} channels")
        size = (ctypes.c_int64 * 2)()
        self._call("output_size", self._handle, (ctypes.c_int64 * 2)(*x.shape[2:4]), size)
        y = np.empty((x.shape[0], -(-self.shape[0] // 4), *size, 4), np.uint8)
        if residual is not None:
            residual = _quad_planes(residual)
            if residual.shape != y.shape:
                raise UsageError(f"the residual has shape {residual.shape}, the result {y.shape}")
        self.run(x, y, residual)
        return y

    def run(self, x: Bytes, y: Bytes, residual: Bytes | None = None) -> None:
        """Write y, contiguous, of x and the residual, contiguous; shapes are not checked."""
        added = None if residual is None else residual.ctypes.data
        self._call("run", self._handle, x.ctypes.data, x.shape[0], *x.shape[2:4], added, y.ctypes.data, None)

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        return str(self._library.sparsecc_plane_conv_kernel(self._handle).decode())


def quantize_planes(x: NDArray[np.float32], scale: float, zero_point: int, isa: str | None = None) -> Bytes:
    """Return float32 x ``[B, C, H, W]`` in quad planes.

    Raises:
        UsageError: x has another rank, or the scale is not a finite positive number.
    """
    x = np.asarray(x, np.float32, order="C")
    if x.ndim != 4:
        raise UsageError(f"x has shape {x.shape}, expected [B,C,H,W]")
    y = np.empty((x.shape[0], -(-x.shape[1] // 4), *x.shape[2:], 4), np.uint8)
    pixels = x.shape[2] * x.shape[3]
    function = _library(get_library_path()).sparsecc_planes_quantize
    call(function, x.ctypes.data, *x.shape[:2], pixels, scale, zero_point, y.ctypes.data, encoded(isa), None)
    return y


def dequantize_planes(
    x: Bytes, channels: int, scale: float, zero_point: int, isa: str | None = None
) -> NDArray[np.float32]:
    """Return quad planes x as float32 ``[B, channels, H, W]``.

    Raises:
        UsageError: x are no quad planes of that many channels, or the scale is no finite positive number.
    """
    x = _quad_planes(x)
    if x.shape[1] != -(-channels // 4):
        raise UsageError(f"x has {x.shape[1]} quads, not those of {channels} channels")
    y = np.empty((x.shape[0], channels, *x.shape[2:4]), np.float32)
    pixels = x.shape[2] * x.shape[3]
    function = _library(get_library_path()).sparsecc_planes_dequantize
    call(
        function,
        x.ctypes.data,
        x.shape[0],
        channels,
        pixels,
        scale,
        zero_point,
        y.ctypes.data,
        encoded(isa),
        None,
    )
    return y


def add_planes(a: Bytes, b: Bytes, quantization: PlaneQuantization, isa: str | None = None) -> Bytes:
    """Return a + b; ``x`` of the quantization is a's and ``residual`` is b's.

    Raises:
        UsageError: the shapes differ, or the quantization has no residual or a bad scale.
    """
    a, b = np.asarray(a, np.uint8, order="C"), np.asarray(b, np.uint8, order="C")
    if a.shape != b.shape:
        raise UsageError(f"a has shape {a.shape}, b {b.shape}")
    y = np.empty_like(a)
    function = _library(get_library_path()).sparsecc_planes_add
    to = quantization.struct()
    call(function, a.ctypes.data, b.ctypes.data, a.size, ctypes.byref(to), y.ctypes.data, encoded(isa), None)
    return y


def concat_planes(a: Bytes, b: Bytes, quantization: PlaneQuantization, isa: str | None = None) -> Bytes:
    """Return b's quads behind those of a; ``x`` of the quantization is a's and ``residual`` is b's.

    Raises:
        UsageError: the other sizes differ, or the quantization has no residual or a bad scale.
    """
    a, b = _quad_planes(a), _quad_planes(b)
    if (a.shape[0], a.shape[2:]) != (b.shape[0], b.shape[2:]):
        raise UsageError(f"a has shape {a.shape}, b {b.shape}")
    y = np.empty((a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:]), np.uint8)
    batch = a.shape[0]
    sizes = [array.size // max(batch, 1) for array in (a, b)]
    function = _library(get_library_path()).sparsecc_planes_concat
    call(
        function, a.ctypes.data, sizes[0], b.ctypes.data, sizes[1], batch, ctypes.byref(quantization.struct()),
        y.ctypes.data, encoded(isa), None,
    )  # fmt: skip
    return y


def max_pool_planes(x: Bytes, geometry: ConvGeometry, isa: str | None = None) -> Bytes:
    """Return the maximum over windows of quad planes x.

    Raises:
        UsageError: the kernel does not fit, or a pad is not smaller than it.
    """
    x = _quad_planes(x)
    library, pool = _library(get_library_path()), ctypes.byref(geometry_struct(geometry))
    size = (ctypes.c_int64 * 2)()
    call(library.sparsecc_planes_output_size, pool, (ctypes.c_int64 * 2)(*x.shape[2:4]), size)
    y = np.empty((*x.shape[:2], *size, 4), np.uint8)
    planes = x.shape[0] * x.shape[1]
    function = library.sparsecc_planes_max_pool
    call(function, x.ctypes.data, planes, *x.shape[2:4], pool, y.ctypes.data, encoded(isa), None)
    return y


def mean_planes(x: Bytes, quantization: PlaneQuantization, isa: str | None = None) -> Bytes:
    """Return the mean over height and width of quad planes x, ``[B, Q, 1, 1, 4]``.

    Raises:
        UsageError: there is no pixel, or a scale is not a finite positive number.
    """
    x = _quad_planes(x)
    y = np.empty((*x.shape[:2], 1, 1, 4), np.uint8)
    function = _library(get_library_path()).sparsecc_planes_mean
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    to = quantization.struct()
    call(function, x.ctypes.data, planes, pixels, ctypes.byref(to), y.ctypes.data, encoded(isa), None)
    return y
