"""Plain onnxruntime sessions, inputs for them, and statistics of what each weight is multiplied with."""

from __future__ import annotations

from sparsecc.calib.calibration import MEMORY, Calibration
from sparsecc.calib.engine import Arrays, ModelLike, Session, open_session, run_error
from sparsecc.calib.sequential import Moments
from sparsecc.calib.synthetic import synthetic_inputs
from sparsecc.calib.tap import tap, tensor_shapes, value_rounds, value_shapes

__all__ = [
    "MEMORY",
    "Arrays",
    "Calibration",
    "ModelLike",
    "Moments",
    "Session",
    "open_session",
    "run_error",
    "synthetic_inputs",
    "tap",
    "tensor_shapes",
    "value_rounds",
    "value_shapes",
]
