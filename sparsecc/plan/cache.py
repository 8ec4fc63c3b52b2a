"""What is in the folder for cached data, and clearing it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsecc.errors import UsageError
from sparsecc.plan.costs import cache_directory
from sparsecc.plan.results import RESULTS

__all__ = ["KINDS", "CachedFile", "cached_files", "older", "parse_age", "remove"]

#: Kinds of files, and what they hold.
KINDS = {
    "costs": "measured times of this machine",
    "run": "which models and data were worked on",
    "part": "what parts of models are, by content",
    "errors": "errors of the forms of parts",
    "refused": "forms that parts do not have",
    "damage": "what models lose when one part is replaced",
    "joint": "what models lose when all parts are replaced",
    "attempt": "time, size and score of models that were made",
    "pace": "how long planning takes on this machine",
    "unfinished": "files of runs that were killed while they wrote",
}

_COSTS = re.compile(r"costs-[0-9a-f]{16}\.json")
_RESULT = re.compile(r"[0-9a-f]{64}\.json")
_TEMPORARY = re.compile(r"(costs-[0-9a-f]{16}|[0-9a-f]{64})\.json\.[0-9a-f]{16}\.tmp")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class CachedFile:
    """One file.

    Attributes:
        path: of it.
        kind: one of ``KINDS``, or the name of its folder of results.
        nbytes: its size.
        changed: when it was written, in seconds since 1970.
    """

    path: Path
    kind: str
    nbytes: int
    changed: float


def cached_files(folder: Path | None = None) -> list[CachedFile]:
    """Return the files that sparsecc has left in the folder for cached data, sorted by name; others are not told.

    Args:
        folder: by default that which is used.
    """
    root = cache_directory() if folder is None else folder
    found = []
    for path, kind in _files(root):
        try:
            status = path.lstat()
        except OSError:  # gone meanwhile
            continue
        found.append(CachedFile(path, kind, status.st_size, status.st_mtime))
    return sorted(found, key=lambda item: item.path)


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    for path in _inside(root):
        if _COSTS.fullmatch(path.name):
            yield path, "costs"
        elif _TEMPORARY.fullmatch(path.name):
            yield path, "unfinished"
    for folder in _inside(root / RESULTS):
        for path in _inside(folder):
            if _RESULT.fullmatch(path.name):
                yield path, folder.name
            elif _TEMPORARY.fullmatch(path.name):
                yield path, "unfinished"


def _inside(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is none, or a link out of the cache."""
    try:
        return [] if folder.is_symlink() else list(folder.iterdir())
    except OSError:
        return []


def remove(files: list[CachedFile]) -> None:
    """Delete these files, and folders of results that are empty then.

    Raises:
        OSError: one cannot be deleted.
    """
    for item in files:
        item.path.unlink(missing_ok=True)
    for folder in {item.path.parent for item in files if item.path.parent.parent.name == RESULTS}:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def parse_age(text: str) -> float:
    """Return the seconds that ``30d``, ``12h``, ``10m`` or ``2w`` stand for.

    Raises:
        UsageError: a text of another form.
    """
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if match is None:
        raise UsageError(f"--older-than {text}: expected a number with m, h, d or w, such as 30d")
    return float(int(match[1]) * _SECONDS[match[2]])


def older(files: list[CachedFile], seconds: float) -> list[CachedFile]:
    """Those that were written so long ago."""
    now = time.time()
    return [item for item in files if now - item.changed > seconds]
