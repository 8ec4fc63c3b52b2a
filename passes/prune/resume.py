"""Solved sites in a folder, so that a long pruning run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.ir.replacing import replacing

__all__ = ["Kept", "Solved"]


class Kept(NamedTuple):
    """What is kept of a site: its pruned weight, the relative error of its outputs, the share of scores kept."""

    weight: NDArray[Any]
    error: float
    kept_score: float


class Solved:
    """Arrays in files named by what they depend on; a damaged or foreign file counts as none.

    Args:
        folder: is created.
        key: what all solutions depend on beside the weight itself: the model, the options, the calibration data.

    Raises:
        UsageError: the folder cannot be created.
    """

    def __init__(self, folder: str, key: str) -> None:
        self._folder = Path(folder)
        self._key = key
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot create the folder '{folder}' to resume from: {error.strerror}"
            ) from error

    def get(self, name: str, weight: NDArray[Any]) -> Kept | None:
        """Return what was kept for the site ``name`` with this dense weight."""
        try:
            with self._path(name, weight).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = Kept(archive["weight"], float(archive["error"]), float(archive["kept_score"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        fits = found.weight.shape == weight.shape and found.weight.dtype == weight.dtype
        return found if fits else None

    def put(self, name: str, weight: NDArray[Any], kept: Kept) -> None:
        """Keep ``kept``; a run that is killed leaves the whole file or none.

        Raises:
            UsageError: it cannot be written.
        """
        path = self._path(name, weight)
        try:
            with replacing(path) as file:
                np.savez(file, **kept._asdict())
        except OSError as reason:
            raise UsageError(
                f"cannot write {path}: {reason.strerror}; free space or leave out resume"
            ) from reason

    def _path(self, name: str, weight: NDArray[Any]) -> Path:
        digest = hashlib.sha256(f"{self._key}|{name}|{weight.dtype}|{weight.shape}|".encode())
        digest.update(np.ascontiguousarray(weight).tobytes())
        return self._folder / f"{digest.hexdigest()[:32]}.npz"
