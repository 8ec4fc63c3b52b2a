"""Threads for cores that are not alike: shares by speed, on the processors that are named, and the same bits."""

from __future__ import annotations

import ctypes
import os
import threading
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from sparsecc.algebra import Tensor, Walk, einsum, split
from sparsecc.errors import UsageError
from sparsecc.runtime.algebra_backend import NativeBackend
from sparsecc.runtime.capi_algebra import Threads, native_spmm, native_spmv
from sparsecc.target import host_processors

SPEEDS = [(1,), (3, 1), (1024, 1024, 446, 446), (1, 7, 1, 0.5, 2), (1e-9, 1, 1e12), (1.0,) * 7]

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class Executor(ctypes.Structure):
    _fields_ = (
        ("context", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("parallel_for", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, Task, ctypes.c_void_p)),
    )


def run(threads: Threads, tasks: int, body) -> None:
    """Run ``body(task)`` for every task on the pool, as kernels do."""
    executor = ctypes.cast(threads.executor, ctypes.POINTER(Executor)).contents
    executor.parallel_for(executor.context, tasks, Task(lambda _, task: body(task)), None)


def skewed() -> Tensor:
    """One giant row of many: 64 parts of several thousand steps."""
    rng = np.random.default_rng(0)
    mask = rng.random((300, 2000)) < 0.3
    mask[7] = True
    values = rng.standard_normal(int(mask.sum())).astype(np.float32)
    return Tensor.from_coordinates(np.argwhere(mask), values, mask.shape, "csr")


@pytest.mark.parametrize("speeds", SPEEDS)
@pytest.mark.parametrize("tasks", [0, 1, 5, 64, 4099])
def test_runs_of_tasks_are_in_proportion_to_speed(speeds, tasks):
    exact, total, done = [Fraction(speed) for speed in speeds], sum(map(Fraction, speeds)), Fraction(0)
    with Threads(len(speeds), speeds) as threads:
        before = threads.shares(tasks)
    assert (before[0], before[-1]) == (0, tasks)
    for speed, first, end in zip(exact, before, before[1:], strict=False):
        assert 0 <= first <= end
        assert abs(first - done * tasks / total) <= 1
        done += speed


@pytest.mark.parametrize("speeds", SPEEDS)
def test_work_of_shares_keeps_the_bound(speeds):
    """Runs of the 64 parts: within a part of what exact targets would give (partitioning by cumulative speed)."""
    walk = Walk.of(skewed())
    table, exact = split([walk], 64), split([walk], speeds=speeds)
    with Threads(len(speeds), speeds) as threads:
        before = threads.shares(64)
    work = np.array([table.part_work()[a:b].sum() for a, b in pairwise(before)])
    assert work.sum() == table.work
    assert (abs(work - np.diff(exact.targets)) <= table.bound + exact.header).all()


@pytest.mark.parametrize("speeds", [(3, 1), (1, 4, 2)])
def test_each_thread_does_its_share_before_it_helps(speeds):
    """Counted, not timed: each waits at the last task of its share until all others are there too."""
    tasks, ran, lock = 32, {}, threading.Lock()
    barrier = threading.Barrier(len(speeds))
    with Threads(len(speeds), speeds) as threads:
        before = threads.shares(tasks)

        def body(task):
            with lock:
                ran.setdefault(threading.get_ident(), []).append(task)
            if task + 1 in before:
                barrier.wait(timeout=60)

        run(threads, tasks, body)
    wanted = [list(range(a, b)) for a, b in pairwise(before)]
    assert ran[threading.get_ident()] == wanted[0]
    assert sorted(ran.values()) == sorted(wanted)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound on this system")
def test_threads_keep_to_their_processors_and_the_caller_is_free_again():
    allowed = os.sched_getaffinity(0)
    places = sorted(allowed)[:2] * 2
    seen, lock, barrier = {}, threading.Lock(), threading.Barrier(len(places))

    def body(task):
        with lock:
            seen[task] = os.sched_getaffinity(0)
        barrier.wait(timeout=60)

    with Threads(len(places), processors=places) as threads:
        run(threads, len(places), body)  # one task for each, who all wait for each other
    assert seen == {task: {place} for task, place in enumerate(places)}
    assert os.sched_getaffinity(0) == allowed


def test_processors_that_do_not_exist_are_no_error():
    ran = []
    with Threads(3, processors=[-1, 100_000, 1_000]) as threads:
        run(threads, 20, ran.append)
    assert sorted(ran) == list(range(20))


@pytest.mark.parametrize("speeds", SPEEDS[1:])
def test_speeds_change_no_bit(speeds):
    matrix, rng = skewed(), np.random.default_rng(1)
    x, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2000,), (2000, 5)))
    alone = native_spmv(matrix, x), native_spmm(matrix, b)
    with Threads(len(speeds), speeds) as threads:
        for _ in range(3):
            np.testing.assert_array_equal(native_spmv(matrix, x, threads=threads), alone[0])
            np.testing.assert_array_equal(native_spmm(matrix, b, threads=threads), alone[1])
    count = min(len(speeds), 2)
    with NativeBackend(speeds, [host_processors()[0]] * len(speeds)) as backend:
        found = einsum("y(i) = A(i,j) * x(j)", A=matrix, x=x, threads=count, backend=backend)
    np.testing.assert_array_equal(found, alone[0])


def test_the_fastest_cores_are_taken_first():
    with NativeBackend((1, 4, 2), processors=(5, 6, 7)) as backend:
        assert backend._fastest(2) == ([4, 2], [6, 7])
        assert backend._fastest(3) == ([4, 2, 1], [6, 7, 5])
    with NativeBackend(processors=(5, 6)) as backend:
        assert backend._fastest(2) == (None, [5, 6])
    with NativeBackend() as backend:
        assert backend._fastest(64) == (None, None)


def test_wrong_speeds_are_refused():
    for speeds in ((1, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1, 1e16)):
        with pytest.raises(UsageError, match="speeds must be above 0"):
            Threads(2, speeds)
    with pytest.raises(UsageError, match="3 speeds for 2 threads"):
        Threads(2, (1, 2, 3))
    with pytest.raises(UsageError, match="1 processors for 2 threads"):
        Threads(2, processors=(0,))
    with pytest.raises(UsageError, match="2 speeds for 1 processors"):
        NativeBackend((1, 2), (0,))
    with NativeBackend((1, 2)) as backend, pytest.raises(UsageError, match="ask for 2 at most"):
        backend.spmv(skewed(), np.ones(2000, np.float32), threads=3)
