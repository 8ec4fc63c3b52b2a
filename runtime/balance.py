"""How evenly operators are dealt to threads, and how long threads really work."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from sparsecc.errors import UsageError
from sparsecc.runtime.capi import NativeMatMul, declare, open_library
from sparsecc.runtime.capi_int8 import NativeInt8MatMul
from sparsecc.runtime.native import get_library_path

__all__ = ["BusyNode", "measure_busy", "part_work"]

_LABEL = re.compile(r"node '(.*)' \((\w+)\)")
_MOST_PARTS = 64
_measuring = threading.Lock()


@dataclass(frozen=True)
class BusyNode:
    """One of our nodes while it was measured.

    Attributes:
        name: of the node; names of more than 200 characters are cut short.
        op: its operator.
        runs: how often it ran.
        seconds: from start to end, all runs added up.
        threads: seconds that each thread worked on it, 0 for those that did not. Threads are those of all nodes.
    """

    name: str
    op: str
    runs: int
    seconds: float
    threads: tuple[float, ...]

    @property
    def balance(self) -> float:
        """Busiest thread over the mean of all; 1 where nobody worked."""
        whole = sum(self.threads)
        return max(self.threads) * len(self.threads) / whole if whole else 1.0


@contextmanager
def measure_busy() -> Iterator[list[BusyNode]]:
    """Measure our operators in all sessions of this process; the list is filled when the block ends.

    Raises:
        RuntimeMissingError: the library is missing, cannot be loaded, or is too old to measure.
        UsageError: it is measured already.
    """
    library = _library(get_library_path())
    if not _measuring.acquire(blocking=False):
        raise UsageError("the operators are being measured already: end that first")
    found: list[BusyNode] = []
    try:
        library.sparsecc_busy_start()
        try:
            yield found
        finally:
            text = library.sparsecc_busy_stop().decode(errors="replace")
        found += _nodes(text)
    finally:
        _measuring.release()


def part_work(op: NativeMatMul | NativeInt8MatMul, rows: int, parts: int) -> tuple[int, ...]:
    """Return the work of each part when so many rows of x are dealt to ``parts`` threads.

    Work is stored weights, and what a group of outputs costs beside them. There are a power of two of parts, at most
    64. Weights in bytes are dealt alike for any number of rows.
    """
    library = _library(op._library._name)
    work = (ctypes.c_int64 * _MOST_PARTS)()
    parts = min(parts, _MOST_PARTS)
    if isinstance(op, NativeInt8MatMul):
        count = library.sparsecc_int8_matmul_part_work(op._handle, parts, work, _MOST_PARTS)
    else:
        count = library.sparsecc_matmul_part_work(op._handle, rows, parts, work, _MOST_PARTS)
    if not count:
        raise MemoryError
    return tuple(work[:count])


def _nodes(text: str) -> list[BusyNode]:
    whole: dict[str, tuple[int, float]] = {}
    busy: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        thread, count, nanoseconds, label = line.split("\t", 3)
        seconds = 1e-9 * int(nanoseconds)
        if int(thread) < 0:
            whole[label] = int(count), seconds
        else:
            busy.setdefault(label, {})[int(thread)] = seconds
    threads = 1 + max((thread for each in busy.values() for thread in each), default=0)
    nodes = []
    for label, (runs, seconds) in whole.items():
        match = _LABEL.fullmatch(label)
        name, op = match.groups() if match else (label, "")
        each = busy.get(label, {})
        nodes.append(BusyNode(name, op, runs, seconds, tuple(each.get(at, 0.0) for at in range(threads))))
    return nodes


@cache
def _library(path: str) -> ctypes.CDLL:
    library = open_library(path)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    declare(
        library,
        {
            "sparsecc_busy_start": (None, ()),
            "sparsecc_busy_stop": (ctypes.c_char_p, ()),
            "sparsecc_matmul_part_work": (count, (pointer, count, count, pointer, count)),
            "sparsecc_int8_matmul_part_work": (count, (pointer, count, pointer, count)),
        },
    )
    return library
