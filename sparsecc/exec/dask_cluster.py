"""Tasks on the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import sparsecc
from sparsecc.errors import MissingExtraError, RuntimeMissingError, SparseccError, UsageError

__all__ = ["DaskCluster"]

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Seconds to wait for the scheduler.
_PATIENCE = 10

#: Tasks that are sent for each thread of the workers.
_AHEAD = 2


def _version() -> str:
    return sparsecc.__version__


class DaskCluster:
    """Tasks on a cluster that runs already; those of a worker that dies are given to another.

    A cluster runs what anybody sends who reaches its scheduler: use one on a network that you trust.

    Args:
        address: of the scheduler, for instance ``tcp://localhost:8786``.

    Raises:
        MissingExtraError: Dask is not installed.
        RuntimeMissingError: nothing answers, there are no workers, or they have no sparsecc.
        UsageError: they have another version of it.
    """

    def __init__(self, address: str) -> None:
        try:
            import distributed
        except ImportError as error:
            raise MissingExtraError(
                "a Dask cluster needs the package distributed: pip install 'sparsecc[dask]'"
            ) from error
        self._dask = distributed
        self._address = address
        try:
            self._client = distributed.Client(address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RuntimeMissingError(
                f"no Dask scheduler answers at {address}; start one with 'dask scheduler', and workers with "
                "'dask worker ADDRESS'"
            ) from error
        try:
            self._check_workers()
        except BaseException:
            self._client.close()
            raise

    def _check_workers(self) -> None:
        if not self._threads():
            raise RuntimeMissingError(
                f"the Dask scheduler at {self._address} has no workers: start some with 'dask worker ADDRESS'"
            )
        try:
            versions: dict[str, str] = self._client.run(_version)
        except Exception as error:  # whatever a worker raises that cannot import it
            raise RuntimeMissingError(
                f"a worker of {self._address} cannot import sparsecc: install it there too"
            ) from error
        others = sorted(set(versions.values()) - {sparsecc.__version__})
        if others:
            raise UsageError(
                f"workers of {self._address} have sparsecc {', '.join(others)}, this is {sparsecc.__version__}: "
                "install the same everywhere"
            )

    def _threads(self) -> int:
        return sum(self._client.nthreads().values())

    def __enter__(self) -> Self:
        """Return the executor."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connection; the cluster stays."""
        self._client.close()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """As ``Executor.map``.

        Raises:
            RuntimeMissingError: the cluster is gone, or a task has ended several workers.
        """
        running: dict[Any, Task] = {}
        ended = self._dask.as_completed(loop=self._client.loop)
        most = _AHEAD * self._threads()
        try:
            for task in tasks:
                future = self._sent(function, task)
                running[future] = task
                ended.add(future)
                if len(running) > most:
                    future = next(ended)
                    yield running.pop(future), self._result(future)
            while running:
                future = next(ended)
                yield running.pop(future), self._result(future)
        finally:
            for future in running:
                future.cancel()

    def _sent(self, function: Callable[[Task], Result], task: Task) -> Any:
        # Within the call, not scattered: then the scheduler has it still when a worker is gone.
        import dask

        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            return self._client.submit(function, task, pure=False)

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except SparseccError:
            raise
        except self._dask.KilledWorker as error:
            raise RuntimeMissingError(
                f"workers of {self._address} ended during a task, one after another: they may need more memory"
            ) from error
        except (self._dask.CancelledError, self._dask.comm.CommClosedError) as error:
            raise RuntimeMissingError(
                f"the Dask cluster at {self._address} is gone; what was finished is kept, run again"
            ) from error
