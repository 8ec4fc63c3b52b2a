"""Tasks for the tests: workers of a cluster import them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sparsecc.errors import UsageError


def squared(number: int) -> int:
    return number * number


def waited(task: tuple[float, int]) -> int:
    time.sleep(task[0])
    return task[1]


def noted(task: tuple[str, int]) -> int:
    """Leave a file that says which process began the task, wait, and return the number."""
    folder, number = task
    Path(folder, f"{number}-{os.getpid()}").touch()
    time.sleep(0.2)
    return number


def refused(number: int) -> int:
    if number == 3:
        raise UsageError("three is too many")
    return number


def ended(number: int) -> int:
    os._exit(1)
