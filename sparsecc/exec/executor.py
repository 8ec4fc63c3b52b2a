"""Executors: the same function on many tasks, results as they are ready.

A task holds all that the function needs and can be pickled, as can the function, which is one of a module. Who starts
tasks keeps each result as soon as it comes, by the content of the task (``sparsecc.plan.Results``), so that a run that
was ended goes on where it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, Self, TypeVar

from sparsecc.errors import UsageError

__all__ = ["Executor", "Threads", "open_executor"]

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Variables that say how many threads BLAS libraries start.
_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Executor(Protocol):
    """Runs tasks; a context manager that lets go of what it runs them on."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in the order in which they end.

        ``tasks`` are taken one by one, only some more than can run at once, so that a generator may make large ones.

        Raises:
            Exception: of a task, as soon as it ends; tasks that have not begun are dropped.
        """

    def __enter__(self) -> Self:
        """Return the executor."""

    def __exit__(self, *error: object) -> None:
        """Let go of what tasks run on."""


class Threads:
    """Tasks in threads of this process.

    Functions that spend their time in NumPy or onnxruntime run at the same time. The BLAS library under NumPy has
    threads of its own: with as many threads here as there are cores, give it one (``OMP_NUM_THREADS=1`` before Python
    starts); with one thread here, which starts none, it has all cores.

    Args:
        threads: that run tasks.

    Raises:
        UsageError: less than one.
    """

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise UsageError(f"tasks need at least one thread, got {threads}")
        self.threads = threads

    def __enter__(self) -> Self:
        """Return the executor."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: threads end with ``map``."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """As ``Executor.map``; with one thread in the order of the tasks."""
        if self.threads == 1:
            for task in tasks:
                yield task, function(task)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            running: dict[Future[Result], Task] = {}
            try:
                for task in tasks:
                    running[pool.submit(function, task)] = task
                    if len(running) > self.threads:
                        yield from _ended(running)
                while running:
                    yield from _ended(running)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _ended(running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    """Wait for some tasks, and yield those that have ended."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def open_executor(text: str | None = None, threads: int | None = None) -> Executor:
    """Return the executor that ``text`` names.

    Args:
        text: None or ``threads``: this process; ``dask://HOST:PORT``: the cluster whose scheduler listens there.
        threads: of this process. By default one, whose BLAS has all cores; all cores where the environment gives BLAS
            one thread.

    Raises:
        UsageError: another text.
        MissingExtraError: Dask is not installed.
        RuntimeMissingError: there is no cluster, or its workers have no sparsecc of this version.
    """
    if text is None or text == "threads":
        alone = any(os.environ.get(name) == "1" for name in _BLAS_THREADS)
        return Threads(threads if threads is not None else (os.cpu_count() or 1) if alone else 1)
    if not re.fullmatch(r"dask://[^/\s]+:\d+", text):
        raise UsageError(f"unknown executor '{text}': give threads or dask://HOST:PORT")
    from sparsecc.exec.dask_cluster import DaskCluster

    return DaskCluster(f"tcp://{text.removeprefix('dask://')}")
