"""Sparse tensor algebra of the operator library from Python; see ``sparsecc.runtime.capi``.

A tensor is given by its levels and values, as ``sparsecc.algebra`` has them: anything with ``levels`` and ``values``
whose levels have ``size``, and ``pos`` and ``crd`` if they are compressed. ``NativeTensor`` checks one and keeps it
ready for several calls; functions take both. Values are float32 or float64 (others become float64) and positions and
coordinates int32 or int64, whichever fits both.

Work is cut into a number of parts that depends on the operands only, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime.capi import NativeHandle, Signatures, call, declare, encoded, open_library
from sparsecc.runtime.native import LIBRARY_VARIABLE, get_library_path

__all__ = [
    "MOST_MODES",
    "Level",
    "NativeTensor",
    "Threads",
    "algebra_library",
    "find_splits",
    "native_add",
    "native_inner",
    "native_matmul",
    "native_mttkrp",
    "native_multiply",
    "native_sddmm",
    "native_spmm",
    "native_spmv",
]

#: That tensors have of which ``native_mttkrp`` takes products.
MOST_MODES = 16


class Level(NamedTuple):
    """One level of a tensor.

    Attributes:
        size: of the mode.
        pos: where the children of each node above begin and the last ends; None: the level is dense.
        crd: their coordinates; None: the level is dense.
    """

    size: int
    pos: NDArray[Any] | None = None
    crd: NDArray[Any] | None = None


class TensorLike(Protocol):
    """What ``NativeTensor`` is made from, such as ``sparsecc.algebra.Tensor``."""

    @property
    def levels(self) -> Sequence[Any]:
        """With ``size``, and ``pos`` and ``crd`` if they are compressed."""

    @property
    def values(self) -> NDArray[Any]:
        """One per node of the last level."""


class WalkLike(Protocol):
    """``sparsecc.algebra.Walk``."""

    @property
    def levels(self) -> Sequence[Any]:
        """As those of a tensor."""

    @property
    def costs(self) -> Sequence[int]:
        """Of visiting one coordinate of each level."""


class _Level(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_int64),
        ("pos", ctypes.c_void_p),
        ("crd", ctypes.c_void_p),
        ("pos_count", ctypes.c_int64),
        ("crd_count", ctypes.c_int64),
        ("pos_bytes", ctypes.c_int32),
        ("crd_bytes", ctypes.c_int32),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("levels", ctypes.c_void_p),
        ("level_count", ctypes.c_int32),
        ("value_bytes", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("value_count", ctypes.c_int64),
        ("cuts", ctypes.c_void_p),
        ("cut_parts", ctypes.c_int32),
    )


class _Walk(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("costs", ctypes.c_void_p),
        ("level_count", ctypes.c_int32),
    )


class _ResultLevel(ctypes.Structure):
    _fields_ = (
        ("pos", ctypes.c_void_p),
        ("crd", ctypes.c_void_p),
        ("pos_count", ctypes.c_int64),
        ("crd_count", ctypes.c_int64),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("levels", ctypes.c_void_p),
        ("level_count", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("value_count", ctypes.c_int64),
    )


_POINTER, _COUNT, _ERROR = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_char_p, ctypes.c_size_t)
_SIGNATURES: Signatures = {
    "sparsecc_tensor_check": (ctypes.c_int, (_POINTER, *_ERROR)),
    "sparsecc_threads_create_unequal": (
        ctypes.c_int,
        (ctypes.c_int32, _POINTER, _POINTER, _POINTER, *_ERROR),
    ),
    "sparsecc_threads_shares": (None, (_POINTER, _COUNT, _POINTER)),
    "sparsecc_threads_executor": (_POINTER, (_POINTER,)),
    "sparsecc_threads_busy": (None, (_POINTER, _POINTER)),
    "sparsecc_threads_destroy": (None, (_POINTER,)),
    "sparsecc_split": (
        ctypes.c_int,
        (_POINTER, ctypes.c_int32, _POINTER, _COUNT, _POINTER, _POINTER, _POINTER, *_ERROR),
    ),
    "sparsecc_spmv": (ctypes.c_int, (_POINTER, _POINTER, _POINTER, ctypes.c_char_p, _POINTER, *_ERROR)),
    "sparsecc_spmm": (
        ctypes.c_int,
        (_POINTER, _POINTER, _COUNT, _POINTER, ctypes.c_char_p, _POINTER, *_ERROR),
    ),
    "sparsecc_join": (ctypes.c_int, (_POINTER, ctypes.c_int32, ctypes.c_int32, _POINTER, _POINTER, *_ERROR)),
    "sparsecc_mttkrp": (
        ctypes.c_int,
        (_POINTER, _POINTER, _COUNT, _POINTER, ctypes.c_char_p, _POINTER, *_ERROR),
    ),
    "sparsecc_product_create": (ctypes.c_int, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, *_ERROR)),
    "sparsecc_product_entries": (_COUNT, (_POINTER,)),
    "sparsecc_product_fetch": (ctypes.c_int, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, *_ERROR)),
    "sparsecc_product_destroy": (None, (_POINTER,)),
    "sparsecc_sddmm": (
        ctypes.c_int,
        (_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, ctypes.c_char_p, _POINTER, *_ERROR),
    ),
}


@cache
def _library(_wanted: str | None) -> ctypes.CDLL:
    library = open_library(get_library_path())
    declare(library, _SIGNATURES)
    return library


def algebra_library() -> ctypes.CDLL:
    """Return the library with its functions for tensor algebra declared; raises ``RuntimeMissingError``.

    It is looked for once for each value of ``SPARSECC_OPS_LIBRARY``: that takes as long as many a product.
    """
    return _library(os.environ.get(LIBRARY_VARIABLE))


class Threads(NativeHandle):
    """A pool of threads, of which the calling one is the first. Use as a context manager, or call ``close``.

    Each begins with a run of neighbouring tasks in proportion to its speed, and then takes what others have left. Which
    thread does what changes no bit of a result.

    Args:
        count: 1 to 1024.
        speeds: of the threads relative to each other, such as ``sparsecc.target.Target.speeds``; None: alike.
        processors: numbers of those that the threads keep to where the system allows it, such as
            ``sparsecc.target.host_processors()``; the calling thread does while it waits for a result. None: any.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: a wrong count, speeds that are not above 0, or not as many as threads.
    """

    _family = "threads"

    def __init__(
        self, count: int, speeds: Sequence[float] | None = None, processors: Sequence[int] | None = None
    ) -> None:
        super().__init__(algebra_library())
        self.count = count
        for name, items in (("speeds", speeds), ("processors", processors)):
            if items is not None and len(items) != count:
                raise UsageError(f"{len(items)} {name} for {count} threads: give one for each")
        fast = None if speeds is None else np.array(speeds, np.float64)
        places = None if processors is None else np.array(processors, np.int32)
        arrays = (None if array is None else array.ctypes.data for array in (fast, places))
        self._call("create_unequal", count, *arrays, ctypes.byref(self._handle))

    def shares(self, tasks: int) -> NDArray[np.int64]:
        """Return how many of so many tasks lie before those that each thread begins with: ``[count + 1]``."""
        before = np.zeros(self.count + 1, np.int64)
        self._library.sparsecc_threads_shares(self._handle, tasks, before.ctypes.data)
        return before

    def busy(self) -> NDArray[np.float64]:
        """Return the seconds that each thread has spent on parts since this was last asked, and start again."""
        seconds = np.zeros(self.count)
        self._library.sparsecc_threads_busy(self._handle, seconds.ctypes.data)
        return seconds

    @property
    def executor(self) -> int:
        """The ``sparsecc_executor``, for functions of the library."""
        return int(self._library.sparsecc_threads_executor(self._handle))


def _executor(threads: Threads | None) -> int | None:
    return threads.executor if threads is not None else None


def _integers(array: NDArray[Any], dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    return np.ascontiguousarray(array, dtype)


def _index_type(levels: Sequence[Any]) -> type[np.signedinteger[Any]]:
    """int32 where all integers of the levels are that already."""
    arrays = [array for level in levels if (array := getattr(level, "pos", None)) is not None]
    arrays += [level.crd for level in levels if getattr(level, "pos", None) is not None]
    return np.int32 if arrays and all(array.dtype == np.int32 for array in arrays) else np.int64


def _describe(levels: Sequence[Level]) -> Any:
    """An array of ``sparsecc_level``."""
    described = (_Level * len(levels))()
    for to, level in zip(described, levels, strict=True):
        to.size = level.size
        if level.pos is not None and level.crd is not None:
            to.pos, to.pos_count, to.pos_bytes = level.pos.ctypes.data, len(level.pos), level.pos.itemsize
            to.crd, to.crd_count, to.crd_bytes = level.crd.ctypes.data, len(level.crd), level.crd.itemsize
    return described


class NativeTensor:
    """A tensor as the library reads it.

    Args:
        levels: from the root on; compressed ones with unique coordinates.
        values: one per node of the last level.
        index_type: of positions and coordinates, int32 or int64; by default int32 if they all are.
        check: look at all positions and coordinates. False only for what the library or ``sparsecc.algebra`` made.

    Attributes:
        levels: the levels.
        values: the values.

    Raises:
        ModelError: positions do not fit, or coordinates are out of range, unsorted or there twice.
        RuntimeMissingError: the library is missing or cannot be loaded.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        values: NDArray[Any],
        *,
        index_type: type[np.signedinteger[Any]] | None = None,
        check: bool = True,
    ) -> None:
        index = index_type or _index_type(levels)
        self.levels = tuple(
            Level(int(level.size))
            if level.pos is None or level.crd is None
            else Level(int(level.size), _integers(level.pos, index), _integers(level.crd, index))
            for level in levels
        )
        self.values = np.ascontiguousarray(
            values, values.dtype if values.dtype in (np.float32, np.float64) else np.float64
        )
        self._levels = _describe(self.levels)
        self._desc = _Tensor(
            ctypes.sizeof(_Tensor), ctypes.addressof(self._levels), len(self.levels), self.values.itemsize,
            self.values.ctypes.data, self.values.size,
        )  # fmt: skip
        if check:
            call(algebra_library().sparsecc_tensor_check, self.desc, fault=ModelError)

    @classmethod
    def of(
        cls, tensor: TensorLike | NativeTensor, index_type: type[np.signedinteger[Any]] | None = None
    ) -> NativeTensor:
        """Return the tensor itself if it is one with such indices, else make it; errors as the constructor."""
        if isinstance(tensor, NativeTensor) and index_type in (None, tensor.index_type):
            return tensor
        levels = [
            Level(level.size, getattr(level, "pos", None), getattr(level, "crd", None))
            for level in tensor.levels
        ]
        if any(level.crd is not None and level.pos is None for level in levels) or not all(
            getattr(level, "unique", True) for level in tensor.levels
        ):
            raise ModelError("levels must have unique coordinates: use tree() of a COO tensor")
        return cls(levels, tensor.values, index_type=index_type)

    @property
    def index_type(self) -> type[np.signedinteger[Any]]:
        """Of positions and coordinates."""
        return _index_type(self.levels)

    @property
    def desc(self) -> Any:
        """``sparsecc_tensor``, by reference; it lives as long as this object."""
        return ctypes.byref(self._desc)

    @property
    def struct(self) -> Any:
        """``sparsecc_tensor`` itself, to be copied."""
        return self._desc

    @property
    def rows(self) -> int:
        """Nodes of the level above the last."""
        last = self.levels[-1]
        return len(last.pos) - 1 if last.pos is not None else len(self.values) // max(last.size, 1)

    @property
    def result_rows(self) -> int:
        """How many rows products with dense operands have: for DCSR those of the mode, else those of the tensor."""
        first = self.levels[0]
        return first.size if len(self.levels) == 2 and first.pos is not None else self.rows


def find_splits(
    walks: Sequence[WalkLike], targets: NDArray[np.int64], threads: Threads | None = None
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Return the cuts at rising targets, as ``sparsecc.algebra.find_splits`` does.

    Args:
        walks: of the operands.
        targets: each between 0 and all work.
        threads: for many targets.

    Returns:
        Per operand ``[levels, n]`` coordinates before the cut, and paths ``[n, loops]``.

    Raises:
        UsageError: walks of different sizes, too much work for 64 bits, or targets out of range.
    """
    targets = np.ascontiguousarray(targets, np.int64)
    held, described = [], (_Walk * len(walks))()
    for to, walk in zip(described, walks, strict=True):
        levels = [
            Level(level.size, getattr(level, "pos", None), getattr(level, "crd", None))
            for level in walk.levels
        ]
        arrays = [
            Level(level.size, *(_native_integers(array) for array in (level.pos, level.crd)))
            for level in levels
        ]
        costs = np.asarray(walk.costs, np.int64)
        described_levels = _describe(arrays)
        held.append((arrays, costs, described_levels))
        to.levels, to.costs, to.level_count = (
            ctypes.addressof(described_levels),
            costs.ctypes.data,
            len(levels),
        )
    count = len(targets)
    cursors = np.zeros((sum(len(walk.levels) for walk in walks), count), np.int64)
    paths = np.full((count, max((len(walk.levels) for walk in walks), default=0)), -1, np.int64)
    call(
        algebra_library().sparsecc_split, described, len(walks), targets.ctypes.data, count, cursors.ctypes.data,
        paths.ctypes.data, _executor(threads),
    )  # fmt: skip
    ends = np.cumsum([len(walk.levels) for walk in walks])
    return np.split(cursors, ends[:-1]) if len(walks) else [], paths


def _native_integers(array: NDArray[Any] | None) -> NDArray[Any] | None:
    if array is None:
        return None
    return np.ascontiguousarray(array, np.int32 if array.dtype == np.int32 else np.int64)


def _dense(array: NDArray[Any], tensor: NativeTensor, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """The operand as the kernels read it; -1 in the shape is any size."""
    found = np.ascontiguousarray(array, tensor.values.dtype)
    if found.ndim != len(shape) or any(
        want not in (-1, have) for want, have in zip(shape, found.shape, strict=True)
    ):
        wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise UsageError(f"{name} has shape {found.shape}, expected ({wanted})")
    return found


def native_spmv(
    a: TensorLike | NativeTensor, x: NDArray[Any], *, threads: Threads | None = None, isa: str | None = None
) -> NDArray[Any]:
    """Return ``y(i) = A(i, j) * x(j)`` of a CSR or DCSR matrix, or of each fibre of the last level of a tensor (TTV).

    Args:
        a: a tensor whose last level is compressed.
        x: ``[size of the last mode]``.
        threads: to run on; None is the calling one.
        isa: one of ``isas()``; None is the best (or ``SPARSECC_ISA``).

    Returns:
        ``[rows]``, or one number per node of the level above the last if there are more than two levels.

    Raises:
        ModelError: the tensor is malformed.
        UsageError: x does not fit.
    """
    tensor = NativeTensor.of(a)
    x = _dense(x, tensor, (tensor.levels[-1].size,), "x")
    y = np.empty(tensor.result_rows, tensor.values.dtype)
    call(
        algebra_library().sparsecc_spmv,
        tensor.desc,
        x.ctypes.data,
        y.ctypes.data,
        encoded(isa),
        _executor(threads),
    )
    return y


def native_spmm(
    a: TensorLike | NativeTensor, x: NDArray[Any], *, threads: Threads | None = None, isa: str | None = None
) -> NDArray[Any]:
    """Return ``y(i, n) = A(i, j) * x(j, n)``, also of each fibre of a tensor (TTM); otherwise as ``native_spmv``."""
    tensor = NativeTensor.of(a)
    x = _dense(x, tensor, (tensor.levels[-1].size, -1), "x")
    y = np.empty((tensor.result_rows, x.shape[1]), tensor.values.dtype)
    call(
        algebra_library().sparsecc_spmm, tensor.desc, x.ctypes.data, x.shape[1], y.ctypes.data, encoded(isa),
        _executor(threads),
    )  # fmt: skip
    return y


def native_sddmm(
    s: TensorLike | NativeTensor,
    u: NDArray[Any],
    v: NDArray[Any],
    *,
    threads: Threads | None = None,
    isa: str | None = None,
) -> NDArray[Any]:
    """Return the values of ``y(i, j) = S(i, j) * u(i, k) * v(j, k)``, one for each of ``s``, a CSR or DCSR matrix.

    Args:
        s: whose coordinates the result has too.
        u: ``[rows, inner]``.
        v: ``[columns, inner]``: both operands have the inner index last.
        threads: as in ``native_spmv``.
        isa: as in ``native_spmv``.

    Raises:
        ModelError: the tensor is malformed.
        UsageError: u or v do not fit.
    """
    tensor = NativeTensor.of(s)
    u = _dense(u, tensor, (tensor.result_rows, -1), "u")
    v = _dense(v, tensor, (tensor.levels[-1].size, u.shape[1]), "v")
    out = np.empty(len(tensor.values), tensor.values.dtype)
    call(
        algebra_library().sparsecc_sddmm, tensor.desc, u.ctypes.data, v.ctypes.data, u.shape[1], out.ctypes.data,
        encoded(isa), _executor(threads),
    )  # fmt: skip
    return out


def native_mttkrp(
    a: TensorLike | NativeTensor,
    factors: Sequence[NDArray[Any]],
    *,
    threads: Threads | None = None,
    isa: str | None = None,
) -> NDArray[Any]:
    """Return ``y(i, n) = A(i, k, l, ...) * B(k, n) * C(l, n) * ...``, for 2 to 16 modes.

    Args:
        a: levels below the first are compressed (CSF). The first level is the mode of the result.
        factors: ``[size, columns]``, one for each mode but the first, in the order of the levels.
        threads: as in ``native_spmv``.
        isa: as in ``native_spmv``.

    Returns:
        ``[size of the first mode, columns]``.

    Raises:
        ModelError: the tensor is malformed.
        UsageError: factors do not fit, or a level below the first is dense.
    """
    tensor = NativeTensor.of(a)
    if not factors or len(factors) != len(tensor.levels) - 1:
        raise UsageError(f"{len(factors)} factors for {len(tensor.levels)} modes: there must be one less")
    columns = int(np.shape(factors[0])[-1]) if np.ndim(factors[0]) else -1
    held = [
        _dense(factor, tensor, (level.size, columns), f"factor {number}")
        for number, (factor, level) in enumerate(zip(factors, tensor.levels[1:], strict=True))
    ]
    y = np.empty((tensor.levels[0].size, columns), tensor.values.dtype)
    pointers = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
    call(
        algebra_library().sparsecc_mttkrp, tensor.desc, pointers, columns, y.ctypes.data, encoded(isa),
        _executor(threads),
    )  # fmt: skip
    return y


def native_inner(operands: Sequence[TensorLike | NativeTensor], *, threads: Threads | None = None) -> float:
    """Return the sum over all entries of the element-wise product of tensors; errors as ``native_add``."""
    return float(native_multiply(operands, threads=threads).values.sum())


def native_add(
    operands: Sequence[TensorLike | NativeTensor], *, threads: Threads | None = None
) -> NativeTensor:
    """Return the sum of tensors in one go, whatever their number; numbers that add up to zero stay.

    Args:
        operands: of one shape and format: dense levels, then compressed ones.
        threads: to run on; None is the calling one.

    Raises:
        ModelError: a tensor is malformed.
        UsageError: shapes or formats differ, or a dense level is below a compressed one.
    """
    return _join(operands, 0, threads)


def native_multiply(
    operands: Sequence[TensorLike | NativeTensor], *, threads: Threads | None = None
) -> NativeTensor:
    """Return the element-wise product of tensors; as ``native_add``. Nodes with nothing below them are left out."""
    return _join(operands, 1, threads)


#: Positions that 32 bits can count.
_MOST_NARROW = (1 << 31) - 1


def _join(operands: Sequence[TensorLike | NativeTensor], kind: int, threads: Threads | None) -> NativeTensor:
    if not operands:
        raise UsageError("there must be at least one operand")
    tensors = _of_one_type(operands, sum if kind == 0 else min)
    first = tensors[0]
    room, parents = [], 1
    for number, level in enumerate(first.levels):
        if level.crd is None:
            room.append(Level(level.size))
            parents *= level.size
            continue
        counts = [_stored(tensor, number) for tensor in tensors]
        most = sum(counts) if kind == 0 else min(counts)
        room.append(
            Level(level.size, np.empty(parents + 1, first.index_type), np.empty(most + 1, first.index_type))
        )
        parents = most
    values = np.empty(parents + 1, first.values.dtype)
    descs = (_Tensor * len(tensors))(*(tensor.struct for tensor in tensors))
    return _filled(
        room, values, lambda result: call(
            algebra_library().sparsecc_join, descs, len(tensors), kind, result, _executor(threads)
        )
    )  # fmt: skip


def _stored(tensor: NativeTensor, number: int) -> int:
    """Coordinates of a compressed level; 0 if it is none, which the library will refuse."""
    crd = tensor.levels[number].crd if number < len(tensor.levels) else None
    return 0 if crd is None else len(crd)


def _of_one_type(
    operands: Sequence[TensorLike | NativeTensor], together: Callable[[Iterable[int]], int]
) -> list[NativeTensor]:
    """The operands with values and integers of one type, which can count what there will be ``together``."""
    tensors = [NativeTensor.of(operand) for operand in operands]
    dtype = np.result_type(*(tensor.values for tensor in tensors))
    narrow = all(tensor.index_type == np.int32 for tensor in tensors)
    index = np.int32 if narrow and together(len(t.values) for t in tensors) < _MOST_NARROW else np.int64
    return [
        tensor
        if tensor.index_type == index and tensor.values.dtype == dtype
        else NativeTensor(tensor.levels, tensor.values.astype(dtype), index_type=index, check=False)
        for tensor in tensors
    ]


def _filled(room: Sequence[Level], values: NDArray[Any], fill: Callable[[Any], None]) -> NativeTensor:
    """Let ``fill`` write a result into arrays that are large enough, and return what it wrote."""
    levels = (_ResultLevel * len(room))()
    for to, level in zip(levels, room, strict=True):
        if level.pos is not None and level.crd is not None:
            to.pos, to.crd = level.pos.ctypes.data, level.crd.ctypes.data
    result = _Result(ctypes.sizeof(_Result), ctypes.addressof(levels), len(room), values.ctypes.data)
    fill(ctypes.byref(result))
    made = [
        level
        if level.pos is None or level.crd is None
        else Level(level.size, level.pos[: written.pos_count], level.crd[: written.crd_count])
        for level, written in zip(room, levels, strict=True)
    ]
    return NativeTensor(made, values[: result.value_count], check=False)


class _Product(NativeHandle):
    _family = "product"

    def __init__(self, tensors: Sequence[NativeTensor], threads: Threads | None) -> None:
        super().__init__(algebra_library())
        mask = tensors[2].desc if len(tensors) > 2 else None
        self._executor = _executor(threads)
        self._call(
            "create", tensors[0].desc, tensors[1].desc, mask, ctypes.byref(self._handle), self._executor
        )

    def fetch(self, rows: int, index: type[np.signedinteger[Any]], dtype: Any) -> list[NDArray[Any]]:
        """Positions, coordinates and values."""
        entries = self._library.sparsecc_product_entries(self._handle)
        arrays = [np.empty(rows + 1, index), np.empty(entries, index), np.empty(entries, dtype)]
        self._call("fetch", self._handle, *(array.ctypes.data for array in arrays), self._executor)
        return arrays


def native_matmul(
    a: TensorLike | NativeTensor,
    b: TensorLike | NativeTensor,
    mask: TensorLike | NativeTensor | None = None,
    *,
    threads: Threads | None = None,
) -> NativeTensor:
    """Return ``y(i, j) = A(i, k) * B(k, j)``, or that times ``mask(i, j)``, in the format of ``a``.

    Args:
        a: CSR; without a mask it may be DCSR. Rows of the result with nothing in them are left out in DCSR.
        b: CSR.
        mask: CSR; only entries in its pattern are computed.
        threads: to run on; None is the calling one.

    Raises:
        ModelError: a tensor is malformed.
        UsageError: sizes do not fit, or another format, or the result needs int64 positions.
    """
    tensors = _of_one_type([a, b] if mask is None else [a, b, mask], max)
    first, dtype = tensors[0], tensors[0].values.dtype
    with _Product(tensors, threads) as product:
        pos, crd, values = product.fetch(first.rows, first.index_type, dtype)
    rows, last = first.levels[0], Level(tensors[1].levels[-1].size, pos, crd)
    if rows.crd is not None:
        kept = np.diff(pos) > 0
        stored = rows.crd[kept]
        rows = Level(rows.size, np.array([0, len(stored)], first.index_type), stored)
        last = Level(last.size, np.append(pos[:-1][kept], pos[-1]), crd)
    return NativeTensor((rows, last), values, check=False)
