"""Results of slow work, kept on disk by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sparsecc
from sparsecc.errors import UsageError
from sparsecc.ir.replacing import replacing
from sparsecc.plan.costs import cache_directory

__all__ = ["RESULTS", "Results", "begin"]

#: Name of the folder within that for cached data.
RESULTS = "results"


class Results:
    """JSON documents by kind and key, each in a file of its own that is written whole or not at all.

    A file that cannot be read or written counts as missing: then the work is done again.

    Args:
        folder: where the files are; None keeps all in memory only.
        fresh: what earlier runs left counts as missing, and is replaced.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self._folder = folder
        self._fresh = fresh
        self._held: dict[tuple[str, str], dict[str, Any]] = {}

    @classmethod
    def open(cls, *, fresh: bool = False) -> Results:
        """The results in the folder for cached data."""
        return cls(cache_directory() / RESULTS, fresh=fresh)

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what was put there, or None."""
        path = self._path(kind, key)
        if (kind, key) in self._held or path is None or self._fresh:
            return self._held.get((kind, key))
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) else None

    def put(self, kind: str, key: str, document: Mapping[str, Any]) -> None:
        """Keep a document of plain values."""
        self._held[kind, key] = dict(document)
        path = self._path(kind, key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(json.dumps(document).encode())
        except OSError:
            return

    def _path(self, kind: str, key: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def begin(model: str, data: str, seed: int, *, resume: bool | None = None) -> Results:
    """Return the results for work on a model and data, and note there that it has begun.

    Results are found by content, so that a run goes on where another one was ended, whatever ended it.

    Args:
        model: fingerprint of the model.
        data: fingerprint of the calibration data.
        seed: of the run.
        resume: True: there must be an earlier run to go on from; False: what it left is not used; None: it is used if
            it is there.

    Raises:
        UsageError: there is no earlier run.
    """
    results = Results.open(fresh=resume is False)
    key = f"{sparsecc.__version__} {model} {data} {seed}"
    if resume and results.get("run", key) is None:
        raise UsageError(
            f"nothing to resume: no run on this model, data and seed left results in {cache_directory()}; leave out "
            "--resume"
        )
    results.put("run", key, {"model": model, "data": data, "seed": seed})
    return results
