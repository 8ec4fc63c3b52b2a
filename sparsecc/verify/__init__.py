"""Running models: sessions with readable errors, comparing outputs, and timing in turns."""

from __future__ import annotations

from sparsecc.calib import Arrays, ModelLike, Session, synthetic_inputs, tap, tensor_shapes, value_shapes
from sparsecc.verify.compare import OutputDiff, compare, compare_arrays, worst_rel_l2
from sparsecc.verify.inputs import make_inputs
from sparsecc.verify.session import runner, session
from sparsecc.verify.timing import Benchmark, Spread, Timing, benchmark, time_interleaved

__all__ = [
    "Arrays",
    "Benchmark",
    "ModelLike",
    "OutputDiff",
    "Session",
    "Spread",
    "Timing",
    "benchmark",
    "compare",
    "compare_arrays",
    "make_inputs",
    "runner",
    "session",
    "synthetic_inputs",
    "tap",
    "tensor_shapes",
    "time_interleaved",
    "value_shapes",
    "worst_rel_l2",
]
