"""Results of slow work, kept on disk by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecc.ir.replacing import replacing
from sparsecc.plan.costs import cache_directory

__all__ = ["Results"]


class Results:
    """JSON documents by kind and key, each in a file of its own that is written whole or not at all.

    A file that cannot be read or written counts as missing: then the work is done again.

    Args:
        folder: where the files are; None keeps all in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[tuple[str, str], dict[str, Any]] = {}

    @classmethod
    def open(cls) -> Results:
        """The results in the folder for cached data."""
        return cls(cache_directory() / "results")

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what was put there, or None."""
        path = self._path(kind, key)
        if (kind, key) in self._held or path is None:
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
