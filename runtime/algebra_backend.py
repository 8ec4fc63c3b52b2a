"""Kernels of the operator library as a backend of ``sparsecc.algebra.einsum``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.runtime.capi_algebra import (
    MOST_MODES,
    Level,
    NativeTensor,
    TensorLike,
    Threads,
    algebra_library,
    native_add,
    native_inner,
    native_matmul,
    native_mttkrp,
    native_multiply,
    native_sddmm,
    native_spmm,
    native_spmv,
)

__all__ = ["NativeBackend", "Result"]


class Result(NamedTuple):
    """A sparse result.

    Attributes:
        levels: as those of its operand, from the root on.
        values: one per node of the last level.
    """

    levels: tuple[Any, ...]
    values: NDArray[Any]


class NativeBackend:
    """What the operator library computes of ``sparsecc.algebra.patterns.KERNELS``.

    Use as a context manager, or call ``close``. Each method takes the number of threads, for which a pool is made once.
    It returns None where the library has no kernel for such operands: values that are not all float32 or all float64,
    or other levels. Results are the same bits for any number of threads and any speeds.

    Args:
        speeds: of the cores relative to each other where they are not alike, such as
            ``sparsecc.target.Target.host().speeds``; the threads are for the fastest of them. None: alike.
        processors: numbers of these cores, such as ``sparsecc.target.host_processors()``, which the threads keep to
            where the system allows it; None: any.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: speeds that are not above 0, not as many processors, or more threads than cores.
    """

    def __init__(
        self, speeds: Sequence[float] | None = None, processors: Sequence[int] | None = None
    ) -> None:
        algebra_library()
        if speeds is not None and processors is not None and len(speeds) != len(processors):
            raise UsageError(f"{len(speeds)} speeds for {len(processors)} processors: give one for each")
        self._speeds, self._processors = speeds, processors
        self._pools: dict[int, Threads] = {}

    def spmv(self, matrix: TensorLike, x: NDArray[Any], *, threads: int) -> NDArray[Any] | None:
        """Return ``y(i) = A(i,j) * x(j)``."""
        return self._run(native_spmv, threads, matrix, x) if _is_matrix(matrix) else None

    def spmm(self, matrix: TensorLike, x: NDArray[Any], *, threads: int) -> NDArray[Any] | None:
        """Return ``y(i,n) = A(i,j) * x(j,n)``."""
        return self._run(native_spmm, threads, matrix, x) if _is_matrix(matrix) else None

    def sddmm(self, matrix: TensorLike, u: NDArray[Any], v: NDArray[Any], *, threads: int) -> Result | None:
        """Return ``S(i,j) * u(i,n) * v(j,n)``."""
        values = self._run(native_sddmm, threads, matrix, u, v) if _is_matrix(matrix) else None
        return None if values is None else Result(tuple(matrix.levels), values)

    def ttv(self, tensor: TensorLike, x: NDArray[Any], *, threads: int) -> Result | None:
        """Return ``S(i,j) = T(i,j,k) * x(k)``."""
        values = self._run(native_spmv, threads, tensor, x) if _ends_compressed(tensor) else None
        return None if values is None else Result(tuple(tensor.levels[:-1]), values)

    def ttm(self, tensor: TensorLike, x: NDArray[Any], *, threads: int) -> Result | None:
        """Return ``S(i,j,n) = T(i,j,k) * x(k,n)``."""
        values = self._run(native_spmm, threads, tensor, x) if _ends_compressed(tensor) else None
        if values is None:
            return None
        return Result((*tensor.levels[:-1], Level(values.shape[1])), values.reshape(-1))

    def mttkrp(self, tensor: TensorLike, *factors: NDArray[Any], threads: int) -> NDArray[Any] | None:
        """Return ``Y(i,n) = T(i,j,k,…) * x(j,n) * z(k,n) * …``."""
        suits = len(tensor.levels) <= MOST_MODES and not any(map(_is_dense, tensor.levels[1:]))
        return self._run(_with_factors, threads, tensor, *factors) if suits else None

    def spgemm(self, left: TensorLike, right: TensorLike, *, threads: int) -> NativeTensor | None:
        """Return ``Y(i,k) = A(i,j) * B(j,k)``."""
        suits = _is_matrix(left) and _is_csr(right)
        return self._run(native_matmul, threads, left, right) if suits else None

    def masked_spgemm(
        self, mask: TensorLike, left: TensorLike, right: TensorLike, *, threads: int
    ) -> NativeTensor | None:
        """Return ``Y(i,k) = C(i,k) * A(i,j) * B(j,k)``."""
        suits = all(map(_is_csr, (mask, left, right)))
        return self._run(native_matmul, threads, left, right, mask) if suits else None

    def add(self, tensors: Sequence[TensorLike], *, threads: int) -> NativeTensor | None:
        """Return the sum of tensors whose levels are alike."""
        return self._run(_of_several(native_add), threads, *tensors) if _alike(tensors) else None

    def multiply(self, tensors: Sequence[TensorLike], *, threads: int) -> NativeTensor | None:
        """Return the element-wise product of tensors whose levels are alike."""
        return self._run(_of_several(native_multiply), threads, *tensors) if _alike(tensors) else None

    def inner(self, tensors: Sequence[TensorLike], *, threads: int) -> NDArray[Any] | None:
        """Return the sum of the element-wise product of tensors whose levels are alike."""
        found = self._run(_of_several(native_inner), threads, *tensors) if _alike(tensors) else None
        return None if found is None else np.asarray(found, tensors[0].values.dtype)

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pool(self, threads: int) -> Threads | None:
        if threads <= 1:
            return None
        if threads not in self._pools:
            self._pools[threads] = Threads(threads, *self._fastest(threads))
        return self._pools[threads]

    def _fastest(self, threads: int) -> tuple[list[float] | None, list[int] | None]:
        """Speeds and processors of so many cores, the fastest first: the calling thread has most to do."""
        speeds, processors = self._speeds, self._processors
        known = len(speeds or processors or ())
        if known and threads > known:
            raise UsageError(f"{threads} threads, but {known} cores are known: ask for {known} at most")
        order = sorted(range(known), key=lambda core: -speeds[core] if speeds else 0)[:threads]
        return (
            [speeds[core] for core in order] if speeds else None,
            [processors[core] for core in order] if processors else None,
        )

    def _run(self, kernel: Callable[..., Any], threads: int, *operands: TensorLike | NDArray[Any]) -> Any:
        types = {item.dtype if isinstance(item, np.ndarray) else item.values.dtype for item in operands}
        if len(types) > 1 or types.pop() not in (np.float32, np.float64):
            return None
        return kernel(*operands, threads=self._pool(threads))


def _with_factors(tensor: TensorLike, *factors: NDArray[Any], threads: Threads | None) -> NDArray[Any]:
    return native_mttkrp(tensor, factors, threads=threads)


def _of_several(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors, threads: kernel(tensors, threads=threads)


def _alike(tensors: Sequence[TensorLike]) -> bool:
    """Whether all have the same levels, dense ones, then compressed ones."""
    kinds = {tuple(map(_is_dense, tensor.levels)) for tensor in tensors}
    form = list(next(iter(kinds)))
    return len(kinds) == 1 and not form[-1] and form == sorted(form, reverse=True)


def _is_dense(level: Any) -> bool:
    return getattr(level, "pos", None) is None


def _ends_compressed(tensor: TensorLike) -> bool:
    return not _is_dense(tensor.levels[-1])


def _is_matrix(tensor: TensorLike) -> bool:
    return len(tensor.levels) == 2 and _ends_compressed(tensor)


def _is_csr(tensor: TensorLike) -> bool:
    return _is_matrix(tensor) and _is_dense(tensor.levels[0])
