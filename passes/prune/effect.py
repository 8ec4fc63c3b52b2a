"""What changing weights does to the outputs of a model."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model

__all__ = ["OutputChange"]

#: Batches that are compared.
_BATCHES = 4

#: Share of the squares below which what is left of them without the mean is rounding.
_ROUNDING = 1e-9


class OutputChange:
    """Compares outputs with those of one model on the first few calibration batches.

    Args:
        model: compared with, as it is now.
        calibration: where the inputs come from.
        centred: what all entries along the last axis have in common does not count, nor do means over all rows: scores
            of classes are the same without the one, and the other makes large what carries nothing.
    """

    def __init__(self, model: Model, calibration: Calibration, *, centred: bool = False) -> None:
        self._session = open_session(model)
        self._calibration = calibration
        self._centred = centred

    def of(self, changed: Model) -> float:
        """Return the squared distance of the floating-point outputs of ``changed``, as a share of their squares."""
        session = open_session(changed)
        found: dict[tuple[str, int], _Sums] = {}  # of each length of rows
        for batch in islice(self._calibration, _BATCHES):
            before, after = self._session.run(batch), session.run(batch)
            for name, value in before.items():
                if value.dtype.kind == "f":
                    length = value.shape[-1] if value.ndim else 1
                    sums = found.setdefault((name, length), _Sums(length, self._centred))
                    sums.add(value.reshape(-1, length), after[name].reshape(-1, length))
        total = sum(item.energy for item in found.values())
        return sum(item.distance for item in found.values()) / total if total else 0.0


class _Sums:
    """Running sums over rows of one length of one output."""

    def __init__(self, length: int, centred: bool) -> None:
        self._centred = centred
        self._rows, self._squares = 0, 0.0
        self._sum = np.zeros(length)
        self.distance = 0.0

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Count some rows."""
        rows, other = before.astype(np.float64), after.astype(np.float64)
        if self._centred and rows.shape[1] > 1:
            rows, other = (value - value.mean(1, keepdims=True) for value in (rows, other))
        self.distance += float(np.square(rows - other).sum())
        self._squares += float(np.square(rows).sum())
        self._sum += rows.sum(0)
        self._rows += len(rows)

    @property
    def energy(self) -> float:
        """Squares of the outputs, less those of their mean if that does not count and is not all there is."""
        left = self._squares - float(np.square(self._sum).sum()) / max(1, self._rows)
        return left if self._centred and left > _ROUNDING * self._squares else self._squares
