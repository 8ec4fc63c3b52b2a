"""The native operator library: finding it, registering it with onnxruntime, calling it directly.

A machine that only runs models needs this package and the library, nothing else of sparsecc.
"""

from __future__ import annotations

from sparsecc.runtime.capi import (
    ConvGeometry,
    NativeConv,
    NativeMatMul,
    isas,
    library_version,
    operator_table,
)
from sparsecc.runtime.capi_int8 import NativeInt8MatMul, int8_isas
from sparsecc.runtime.capi_planes import (
    NativePlaneConv,
    PlaneQuantization,
    add_planes,
    concat_planes,
    dequantize_planes,
    max_pool_planes,
    mean_planes,
    quantize_planes,
)
from sparsecc.runtime.capi_recurrent import NativeRecurrent, PackedMatrix
from sparsecc.runtime.native import get_library_path, get_runner_path, load, register, triple_of

__all__ = [
    "ConvGeometry",
    "NativeConv",
    "NativeInt8MatMul",
    "NativeMatMul",
    "NativePlaneConv",
    "NativeRecurrent",
    "PackedMatrix",
    "PlaneQuantization",
    "add_planes",
    "concat_planes",
    "dequantize_planes",
    "get_library_path",
    "get_runner_path",
    "int8_isas",
    "isas",
    "library_version",
    "load",
    "max_pool_planes",
    "mean_planes",
    "operator_table",
    "quantize_planes",
    "register",
    "triple_of",
]
