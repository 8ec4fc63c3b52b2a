"""Calibration inputs and streamed statistics of what each weight is multiplied with."""

from __future__ import annotations

from sparsecc.calib.calibration import Calibration

__all__ = ["Calibration"]
