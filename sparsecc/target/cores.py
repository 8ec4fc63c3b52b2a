"""Which processors this process may use, and how fast they are relative to each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

__all__ = ["core_processors", "core_speeds"]

_SYSTEM = "/sys/devices/system/cpu"
_SPEED_FILES = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")  # best first: ARM counts work per cycle in
_ALIKE = (
    0.9  # x86 cores may differ by a few per cent in their highest clock, which is not worth unequal parts
)

Read = Callable[[str], str]


def core_processors(cpuinfo: str) -> tuple[int, ...]:
    """Return the first processor of each physical core this process may use: hyper-threads share one.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: dict[tuple[str, str], int] = {}
    for block in cpuinfo.split("\n\n"):
        entry = dict(re.findall(r"^(processor|physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE))
        processor = int(entry.get("processor", -1))
        if "core id" in entry and processor in allowed:
            cores.setdefault((entry.get("physical id", "0"), entry["core id"]), processor)
    return tuple(sorted(cores.values() or allowed))


def core_speeds(processors: Sequence[int], read: Read) -> tuple[int, ...] | None:
    """Return how fast the processors are relative to each other; None: all alike, or the system does not say.

    Linux on ARM gives each a capacity, of which the fastest has 1024; elsewhere it is the highest clock.

    Args:
        processors: their numbers.
        read: the text of a file, empty if there is none.
    """
    for name in _SPEED_FILES:
        found = [read(f"{_SYSTEM}/cpu{number}/{name}").strip() for number in processors]
        if found and all(text.isdecimal() and int(text) > 0 for text in found):
            speeds = tuple(map(int, found))
            return None if min(speeds) >= _ALIKE * max(speeds) else speeds
    return None
