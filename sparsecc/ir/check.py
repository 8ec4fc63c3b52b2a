"""Whether one tensor of a protobuf is what it says it is, and whether a file is one that can be read."""

from __future__ import annotations

import errno
import math
import os
import stat

import onnx
import onnx_ir

from sparsecc.errors import ModelError, UnsafeModelError, UnsupportedModelError

__all__ = ["check_tensor", "require_regular"]

# Field that holds the elements when raw_data does not. Types that pack several into one are left out.
_TYPED_FIELD = {
    "FLOAT": "float_data",
    "DOUBLE": "double_data",
    "INT64": "int64_data",
    "UINT64": "uint64_data",
    "UINT32": "uint64_data",
    "STRING": "string_data",
} | dict.fromkeys(("INT32", "INT16", "INT8", "UINT16", "UINT8", "BOOL", "FLOAT16", "BFLOAT16"), "int32_data")


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Check type, shape, and that there are as many elements as these say; of an external one, its entries.

    Raises:
        ModelError: type missing, a negative dimension, too few or too many elements.
        UnsafeModelError: an external offset or length is no number >= 0.
        UnsupportedModelError: a type the installed onnx-ir does not know.
    """
    try:
        dtype = onnx_ir.DataType(tensor.data_type)
    except ValueError:
        raise UnsupportedModelError(
            f"tensor {tensor.name!r} has the unknown type {tensor.data_type}"
        ) from None
    if min(tensor.dims, default=0) < 0 or dtype == onnx_ir.DataType.UNDEFINED:
        raise ModelError(f"tensor {tensor.name!r} has shape {list(tensor.dims)} and type {dtype.name}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_entries(tensor)
        return
    held, needed = _elements(tensor, dtype)
    if held != needed:
        raise ModelError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} and type {dtype.name} holds {held} "
            f"where {needed} are needed: the file is damaged"
        )


def _elements(tensor: onnx.TensorProto, dtype: onnx_ir.DataType) -> tuple[int, int]:
    """Return how much is held and how much is needed: bytes of raw data, elements of a typed field."""
    size = math.prod(tensor.dims)
    if tensor.HasField("raw_data") and dtype != onnx_ir.DataType.STRING:
        return len(tensor.raw_data), math.ceil(size * dtype.bitwidth / 8)
    field = _TYPED_FIELD.get(dtype.name)
    return (len(getattr(tensor, field)), size) if field else (0, 0)


def _check_entries(tensor: onnx.TensorProto) -> None:
    for entry in tensor.external_data:
        if not isinstance(entry.value, str):  # what protobuf makes of text that is no UTF-8
            raise UnsafeModelError(
                f"external data of {tensor.name!r}: {entry.key} is no text; export the model again"
            )
        if entry.key in ("offset", "length") and not (entry.value.isascii() and entry.value.isdigit()):
            raise UnsafeModelError(
                f"external data of {tensor.name!r}: {entry.key} {entry.value!r} is no number >= 0; "
                "export the model again"
            )


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` unless ``path`` is a file or a folder: opening a pipe or a device may wait for ever.

    A folder is left to ``open``, which says so by itself.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file")
