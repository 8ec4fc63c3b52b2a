"""Models of one sparse operator, sessions with and without the library."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsecc import emit, runtime
from sparsecc.ir import Model
from sparsecc.sparse import Pattern, SparseTensor, keep_mask


def _packed(shape: tuple[int, ...], pattern: str, sparsity: float = 0.7, seed: int = 0) -> SparseTensor:
    """A random matrix [shape[0], product of the rest], pruned and packed."""
    parsed = Pattern.parse(pattern)
    dense = (
        np.random.default_rng(seed).standard_normal((shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    )
    dense *= keep_mask(np.abs(dense), parsed, sparsity if parsed.needs_sparsity else None)
    return SparseTensor.encode(dense, parsed)


def _session(
    proto: onnx.ModelProto, *, library: bool, threads: int = 1, optimized: str | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # expected failures would be printed
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if library:
        runtime.register(options)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="session")
def packed() -> Callable[..., SparseTensor]:
    return _packed


@pytest.fixture(scope="session")
def session() -> Callable[..., onnxruntime.InferenceSession]:
    return _session


def _all_references(model: Model, x: np.ndarray) -> tuple[np.ndarray, ...]:
    node = next(iter(model.onnx.graph))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    constants = [value.const_value.numpy() for value in node.inputs[1:]]
    return emit.operators()[node.op_type].reference([x, *constants], attributes)


def _single_op_reference(model: Model, x: np.ndarray) -> np.ndarray:
    (y,) = _all_references(model, x)
    return y


def _check_single_op(model: Model, x: np.ndarray, tolerance: float) -> None:
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    references = _all_references(model, x)
    for library in (True, False):
        results = _session(proto, library=library).run(None, {"x": x})
        for y, expected in zip(results, references, strict=True):
            assert y.dtype == np.float32
            assert y.shape == expected.shape
            error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
            assert error <= tolerance, f"library={library}: relative L2 {error}"


@pytest.fixture(scope="session")
def single_op_reference() -> Callable[[Model, np.ndarray], np.ndarray]:
    """Gives the result of a model of one linear operator as NumPy computes it."""
    return _single_op_reference


@pytest.fixture(scope="session")
def check_single_op() -> Callable[[Model, np.ndarray, float], None]:
    """Compares a model of one operator, with and without the library, with NumPy."""
    return _check_single_op


_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, _TASK, ctypes.c_void_p)


class _Executor(ctypes.Structure):
    _fields_ = (("context", ctypes.c_void_p), ("threads", ctypes.c_int32), ("parallel_for", _PARALLEL_FOR))


@pytest.fixture
def pool_executor() -> Iterator[Callable[..., Any]]:
    """Makes pointers to executors of the C interface that run on four threads, whatever number they name.

    Numbers of tasks go into a list, if one is given.
    """
    with ThreadPoolExecutor(4) as pool:

        def make(threads: int, log: list[int] | None = None) -> Any:
            def parallel_for(_context: int, tasks: int, call: Any, argument: int) -> None:
                _note(log, tasks)
                list(pool.map(lambda task: call(argument, task), range(tasks)))

            return ctypes.pointer(_Executor(None, threads, _PARALLEL_FOR(parallel_for)))

        yield make


@pytest.fixture(scope="session")
def shuffled_executor() -> Callable[..., Any]:
    """The same on the calling thread, tasks in random order."""

    def make(threads: int, log: list[int] | None = None) -> Any:
        order = np.random.default_rng(threads)

        def parallel_for(_context: int, tasks: int, call: Any, argument: int) -> None:
            _note(log, tasks)
            for task in order.permutation(tasks):
                call(argument, int(task))

        return ctypes.pointer(_Executor(None, threads, _PARALLEL_FOR(parallel_for)))

    return make


def _note(log: list[int] | None, tasks: int) -> None:
    if log is not None:
        log.append(tasks)


#: Where the auxiliary vector of a process says what an ARM processor can do: kind of entry, bit.
_ARM_BITS = {"asimd": (16, 1), "asimddp": (16, 20), "i8mm": (26, 13)}


@pytest.fixture(scope="session")
def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the names of /proc/cpuinfo; under an emulator that file is the host's."""
    if platform.machine() == "aarch64":
        entry = ctypes.CDLL(None).getauxval
        entry.restype, entry.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
        return frozenset(flag for flag, (kind, bit) in _ARM_BITS.items() if entry(kind) >> bit & 1)
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("flags"):
                return frozenset(line.split(":")[1].split())
    pytest.skip("/proc/cpuinfo has no flags")
