"""External weight files, checked before use and mapped into memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir

from sparsecc.errors import ModelError, UnsafeModelError
from sparsecc.ir.check import check_tensor, require_regular
from sparsecc.ir.mapped import Mapping
from sparsecc.ir.slots import Tensor

__all__ = ["ExternalFiles"]


class ExternalFiles:
    """The weight files of one model. Each is opened once, and what was checked is what is mapped.

    The mapping pins the file: a tensor keeps its values when the file is later replaced by a rename,
    which is what lets a model be saved over the files it was loaded from.
    """

    def __init__(self, base_dir: Path | None) -> None:
        """``base_dir`` is the model's folder; None refuses every external tensor."""
        self._base_dir = base_dir
        self._open: dict[str, tuple[Mapping | bytes, int]] = {}

    @property
    def used(self) -> bool:
        """Whether any tensor came from a file."""
        return bool(self._open)

    def load(self, proto: onnx.TensorProto) -> Tensor:
        """Return the tensor of ``proto``, checked, and mapped into memory where it is external.

        Raises:
            UnsafeModelError: the location leaves the model's folder, or offset or length is wrong.
            ModelError: the file is missing or cannot be read, or the tensor is malformed.
        """
        check_tensor(proto)
        tensor = onnx_ir.serde.deserialize_tensor(proto)
        return self.map(tensor) if isinstance(tensor, onnx_ir.ExternalTensor) else tensor

    def map(self, tensor: onnx_ir.ExternalTensor) -> Tensor:
        """Return ``tensor`` as a read-only view of its file; errors as for ``load``."""
        location = os.fspath(tensor.location)
        if tensor.dtype == onnx_ir.DataType.STRING:
            raise ModelError(f"tensor {tensor.name!r} keeps strings in an external file, which ONNX forbids")
        data, size = self._file(location, tensor.name)
        offset = tensor.offset or 0
        needed = int(tensor.nbytes)
        length = needed if tensor.length is None else tensor.length
        if length != needed:
            raise UnsafeModelError(
                f"external data of {tensor.name!r}: offset {offset} and length {length} are wrong for its "
                f"type and shape, which need {needed} bytes; export the model again"
            )
        if offset + length > size:
            raise UnsafeModelError(
                f"external data of {tensor.name!r}: needs bytes {offset}..{offset + length} of {location!r}, "
                f"which has only {size}; the file is truncated or belongs to another model"
            )
        return _view(tensor, data, offset)

    def _file(self, location: str, name: str) -> tuple[Mapping | bytes, int]:
        if location not in self._open:
            path = self._resolve(location, name)
            try:
                require_regular(path)
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    data = Mapping(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            except FileNotFoundError:
                raise ModelError(
                    f"external data file {str(path)!r} (weight {name!r}) is missing: put it beside the model"
                ) from None
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"external data file {str(path)!r} (weight {name!r}) cannot be read: {error}; "
                    "put the data file beside the model"
                ) from None
            self._open[location] = data, size
        return self._open[location]

    def _resolve(self, location: str, name: str) -> Path:
        """Return the path of ``location``, which must lie inside the model's folder, links followed."""
        if self._base_dir is None:
            raise ModelError(
                f"weight {name!r} is external and the model has no folder: load it from its file"
            )
        path = self._base_dir / location
        inside = os.path.realpath(self._base_dir)
        real = os.path.realpath(path) if "\0" not in location else ""
        if not location or os.path.isabs(location) or os.path.commonpath([inside, real or "/"]) != inside:
            raise UnsafeModelError(
                f"external data location {location!r} of weight {name!r} leaves the model's folder: "
                "copy the data file beside the model and correct the location"
            )
        return path


def _view(tensor: onnx_ir.ExternalTensor, data: Mapping | bytes, offset: int) -> Tensor:
    shape = tensor.shape.numpy()
    if tensor.dtype.bitwidth < 8:
        # Packed types go through onnx-ir's own unpacking; they are small, so a copy does not matter.
        proto = onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value, dims=shape)
        proto.raw_data = bytes(data[offset : offset + tensor.nbytes])
        return onnx_ir.serde.deserialize_tensor(proto)
    dtype = np.dtype(tensor.dtype.numpy())
    array = (
        np.frombuffer(data, dtype.newbyteorder("<"), tensor.size, offset)
        if tensor.size
        else np.empty(0, dtype)
    )
    return onnx_ir.Tensor(
        array.reshape(shape),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
