"""Where independent tasks run: in threads of this process, or on a Dask cluster that is there already."""

from __future__ import annotations

from sparsecc.exec.executor import Executor, Threads, open_executor

__all__ = ["Executor", "Threads", "open_executor"]
