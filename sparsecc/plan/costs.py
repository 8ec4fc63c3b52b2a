"""The measured cost table: what one operator takes on one machine, kept between runs.

An entry is a time in milliseconds under a text key that says everything the time depends on (operator, shapes,
layout, digest of the zeros, threads). A table belongs to one machine; its file can be exported, edited and given
back with ``--costs``, which makes the decisions that follow from it repeatable byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsecc.errors import RuntimeMissingError, UsageError
from sparsecc.ir.replacing import replacing

__all__ = ["CostTable", "cache_directory", "machine_facts"]

_FORMAT = 1
#: Seconds after which what was measured meanwhile is saved, so that a run that is killed loses no more.
_SAVE_EVERY = 5.0


def cache_directory() -> Path:
    """The folder for measured costs: ``SPARSECC_CACHE_DIR``, else the XDG cache folder."""
    explicit = os.environ.get("SPARSECC_CACHE_DIR")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sparsecc"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_facts() -> dict[str, str]:
    """What a measured time depends on besides the operator: processor, instruction set, library versions."""
    import onnxruntime

    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "onnxruntime": onnxruntime.__version__,
        **_library_facts(),
    }


def _library_facts() -> dict[str, str]:
    from sparsecc import runtime

    try:
        usable = runtime.isas()  # refuses a wrong SPARSECC_ISA
        return {"isa": os.environ.get("SPARSECC_ISA") or usable[0], "sparsecc": runtime.library_version()}
    except RuntimeMissingError:
        return {"isa": "none", "sparsecc": "none"}


class CostTable:
    """Times in milliseconds by key, loaded from and saved to one JSON file.

    Args:
        path: the file; a missing one is an empty table. ``None`` keeps the table in memory only.
        facts: the machine the table is for; a file made on another machine is refused.

    Raises:
        UsageError: the file is not a cost table, or was measured on another machine.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, str]) -> None:
        self.path = path
        self.facts = dict(facts)
        self._times: dict[str, dict[str, float]] = {}
        self._dirty = False
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    @classmethod
    def open(cls, path: Path | None = None) -> CostTable:
        """The table in ``path``, else the one cached for this machine and these library versions."""
        facts = machine_facts()
        if path is not None:
            return cls(path, facts)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(cache_directory() / f"costs-{digest}.json", facts)

    @classmethod
    def read(cls, path: Path) -> CostTable:
        """The table in ``path``, of whatever machine: to plan for that one; what is added stays in memory.

        Raises:
            UsageError: the file is missing or is no cost table.
        """
        if not path.exists():
            raise UsageError(f"{path} does not exist; 'sparsecc targets profile -o {path}' measures one")
        table = cls(None, {})
        table._read(path, anywhere=True)
        return table

    def differing(self, facts: Mapping[str, str]) -> list[str]:
        """Names of the facts in which the machine of this table differs from ``facts``."""
        return sorted(k for k in {*facts, *self.facts} if facts.get(k) != self.facts.get(k))

    @property
    def target(self) -> str:
        """The machine of the table as ``--target`` names it."""
        return self._target(self.facts)

    @staticmethod
    def _target(facts: Mapping[str, str]) -> str:
        name = "arm64" if facts.get("machine") in ("aarch64", "arm64") else "cpu"
        options = " ".join(f"{key}={facts[key]}" for key in ("isa", "cores") if facts.get(key))
        return f"{name}{{{options}}}" if options else name

    def _read(self, path: Path, *, anywhere: bool = False) -> None:
        try:
            document = json.loads(path.read_text())
            version = document["format"]
            facts = {str(key): str(value) for key, value in document["machine"].items()}
            times = document["times_ms"]
            entries = {
                str(key): {str(name): float(ms) for name, ms in row.items()} for key, row in times.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: not a sparsecc cost table ({error}); delete it or export a new one"
            ) from error
        if version != _FORMAT:
            raise UsageError(f"{path}: cost table format {version}, expected {_FORMAT}; export it again")
        if anywhere:
            self.facts = facts
        elif facts != self.facts:
            raise UsageError(
                f"{path}: measured on another machine or version (differs in {', '.join(self.differing(facts))}); "
                f"measure again, or plan for that machine with --target '{self._target(facts)}'"
            )
        self._times = entries

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Key and times in ms of each entry, keys sorted."""
        return iter(sorted(self._times.items()))

    def get(self, key: str, names: Iterable[str]) -> dict[str, float] | None:
        """The times in ms of all ``names`` under ``key``, or ``None`` if one is missing."""
        row = self._times.get(key, {})
        wanted = list(names)
        return {name: row[name] for name in wanted} if all(name in row for name in wanted) else None

    def put(self, key: str, times_ms: Mapping[str, float]) -> None:
        """Add or replace times in ms under ``key``."""
        self._times.setdefault(key, {}).update(times_ms)
        self._dirty = True

    def get_or_measure(
        self, key: str, names: Iterable[str], measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """The times under ``key``; ``measure`` is called, and its result kept, when one of ``names`` is missing."""
        wanted = list(names)
        known = self.get(key, wanted)
        if known is None:
            self.put(key, measure())
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self.keep()
            known = self.get(key, wanted)
            assert known is not None, f"measuring {key} gave no {wanted}"
        return known

    def document(self) -> dict[str, Any]:
        """The table as a JSON document with sorted keys."""
        return {
            "format": _FORMAT,
            "machine": dict(sorted(self.facts.items())),
            "times_ms": {key: dict(sorted(row.items())) for key, row in sorted(self._times.items())},
        }

    def keep(self) -> list[str]:
        """Save the table to its own file; where that cannot be written, return a note instead of failing."""
        try:
            self.save()
        except OSError as error:
            return [
                f"measured costs could not be kept in {self.path} ({error.strerror}): the next run measures again"
            ]
        return []

    def save(self, path: Path | None = None) -> None:
        """Write the table to ``path`` (default: its own file), atomically. No-op when nothing changed."""
        self._saved = time.monotonic()
        target = path or self.path
        if target is None or (path is None and not self._dirty):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as stream:
            stream.write(json.dumps(self.document(), indent=1).encode())
        if path is None:
            self._dirty = False
