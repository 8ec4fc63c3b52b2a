"""Arrays that live in files: external weights, and whatever is too large to be held in memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.errors import UsageError

__all__ = ["Mapping", "Scratch", "array_of", "is_mapped", "release"]

T = TypeVar("T", bound=np.generic)

#: Bytes of one file of ``Scratch``: each costs a file descriptor. Its blocks are taken from the disk one by one.
_FILE = 1 << 30


class Mapping(mmap.mmap):
    """A mapping of a whole file that nobody writes to privately, so that its pages may leave memory at any time."""


class Scratch:
    """Hands out arrays in files without a name in the folder for temporary files.

    A file goes when the last array in it does, however the process ends. The folder (``TMPDIR``) must be on a
    disk: one in memory would save nothing.
    """

    def __init__(self) -> None:
        self._open: tuple[int, Mapping] | None = None
        self._end = 0

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a writable array of zeros.

        Raises:
            UsageError: there is no space for it.
        """
        kind = np.dtype(dtype)
        nbytes = kind.itemsize * math.prod(shape)
        if not nbytes:
            return np.zeros(shape, kind)
        try:
            mapping, offset = self._take(nbytes)
        except OSError as error:
            raise UsageError(
                f"cannot keep {nbytes} bytes in {tempfile.gettempdir()}: {error.strerror}; "
                "free space or set TMPDIR to a folder on another disk"
            ) from error
        return np.frombuffer(mapping, kind, math.prod(shape), offset).reshape(shape)

    def keep(self, array: npt.NDArray[T]) -> npt.NDArray[T]:
        """Return a read-only copy of ``array`` that takes no memory until it is read.

        Raises:
            UsageError: there is no space for it.
        """
        kept = self.zeros(array.shape, array.dtype)
        kept[...] = array
        release(kept)
        kept.flags.writeable = False
        return kept

    def _take(self, nbytes: int) -> tuple[Mapping, int]:
        if self._open is None or self._end + nbytes > len(self._open[1]):
            with tempfile.TemporaryFile() as file:
                os.truncate(file.fileno(), max(_FILE, nbytes))
                mapping = Mapping(file.fileno(), 0)
                handle = os.dup(file.fileno())
            weakref.finalize(mapping, os.close, handle)
            self._open, self._end = (handle, mapping), 0
        handle, mapping = self._open
        offset, self._end = self._end, -(-(self._end + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        # A page without a block of its own that finds the disk full would kill the process.
        os.posix_fallocate(handle, offset, nbytes)
        return mapping, offset


def array_of(tensor: onnx_ir.TensorProtocol) -> npt.NDArray[Any] | None:
    """Return the array that ``tensor`` holds without reading or copying it; None if it holds none."""
    raw = tensor.raw if isinstance(tensor, onnx_ir.Tensor) else None
    return raw if isinstance(raw, np.ndarray) else None


def is_mapped(array: npt.NDArray[Any]) -> bool:
    """Whether the elements of ``array`` lie in a file."""
    return _mapping_of(array) is not None


def release(array: npt.NDArray[Any]) -> None:
    """Let the pages of a mapped array leave memory; its elements are read from the file when they are next used."""
    mapping = _mapping_of(array)
    if mapping is None or not array.nbytes:
        return
    whole = np.frombuffer(mapping, np.uint8)
    first = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    stop = min(first + array.nbytes, len(mapping))
    mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _mapping_of(array: npt.NDArray[Any]) -> Mapping | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, Mapping) else None
