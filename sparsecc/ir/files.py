"""The files a model on disk consists of: the ``.onnx`` and the data files it refers to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import onnx

from sparsecc.ir.densify import graph_protos
from sparsecc.ir.read import read_proto

__all__ = ["file_bytes", "file_sha256", "model_files"]


def model_files(path: str | os.PathLike[str]) -> list[Path]:
    """The model file and its external data files, each once, sorted after the model by name.

    Raises:
        ModelError: the file is no ONNX model.
    """
    source = Path(path)
    locations = {
        entry.value
        for graph in graph_protos(read_proto(source))
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [source, *(source.parent / location for location in sorted(locations))]


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes on disk of the model, external data included."""
    return sum(part.stat().st_size for part in model_files(path))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the model file and its external data files."""
    digest = hashlib.sha256()
    for part in model_files(path):
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
