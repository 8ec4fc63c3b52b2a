"""Solved sites in a folder, so that a long pruning run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.ir.replacing import replacing

__all__ = ["Solution", "Solved"]


@dataclass(frozen=True)
class Solution:
    """What a site becomes.

    Attributes:
        weight: pruned, ``[N, K]`` in the order of the pattern.
        bias: ``[N]``; None where it stays.
        kept_score: share of the squared scores that stays.
        numbers: more for the report.
    """

    weight: NDArray[Any]
    bias: NDArray[np.float64] | None
    kept_score: float
    numbers: Mapping[str, float]


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

    def get(self, name: str, weight: NDArray[Any]) -> Solution | None:
        """Return what was kept for the site ``name`` with this dense weight."""
        try:
            with self._path(name, weight).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found, bias = archive["weight"], archive["bias"].astype(np.float64)
                score = float(archive["kept_score"])
                numbers = dict(zip(archive["names"].tolist(), archive["numbers"].tolist(), strict=True))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if found.shape != weight.shape or found.dtype != weight.dtype or bias.size not in (0, len(weight)):
            return None
        return Solution(found, bias if bias.size else None, score, numbers)

    def put(self, name: str, weight: NDArray[Any], solution: Solution) -> None:
        """Keep the solution of a site; a run that is killed leaves the whole file or none.

        Raises:
            UsageError: it cannot be written.
        """
        path = self._path(name, weight)
        try:
            with replacing(path) as file:
                np.savez(
                    file,
                    weight=solution.weight,
                    bias=np.empty(0) if solution.bias is None else solution.bias,
                    kept_score=np.float64(solution.kept_score),
                    names=np.array(list(solution.numbers)),
                    numbers=np.array(list(solution.numbers.values()), np.float64),
                )
        except OSError as reason:
            raise UsageError(
                f"cannot write {path}: {reason.strerror}; free space or leave out resume"
            ) from reason

    def _path(self, name: str, weight: NDArray[Any]) -> Path:
        digest = hashlib.sha256(f"{self._key}|{name}|{weight.dtype}|{weight.shape}|".encode())
        digest.update(np.ascontiguousarray(weight).tobytes())
        return self._folder / f"{digest.hexdigest()[:32]}.npz"
