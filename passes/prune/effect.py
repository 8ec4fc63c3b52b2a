"""What changing weights does to the outputs of a model."""

from __future__ import annotations

from itertools import islice

import numpy as np

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model

__all__ = ["OutputChange"]

#: Batches that are compared.
_BATCHES = 4


class OutputChange:
    """Compares outputs with those of one model on the first few calibration batches.

    Args:
        model: compared with, as it is now.
        calibration: where the inputs come from.
    """

    def __init__(self, model: Model, calibration: Calibration) -> None:
        self._session = open_session(model)
        self._calibration = calibration

    def of(self, changed: Model) -> float:
        """Return the squared distance of the floating-point outputs of ``changed``, as a share of their squares."""
        session = open_session(changed)
        distance, total = 0.0, 0.0
        for batch in islice(self._calibration, _BATCHES):
            before, after = self._session.run(batch), session.run(batch)
            for name, value in before.items():
                if value.dtype.kind == "f":
                    distance += float(np.square(value.astype(np.float64) - after[name]).sum())
                    total += float(np.square(value.astype(np.float64)).sum())
        return distance / total if total else 0.0
