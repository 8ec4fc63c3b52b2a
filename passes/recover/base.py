"""What all recovery passes share: the model they aim at, the calibration they need, the numbers they report."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.pm import CalibrationSource, PassContext, PassReport
from sparsecc.sparse import density

__all__ = ["calibration_of", "change_numbers", "reference_of"]


def reference_of(model: Model, ctx: PassContext, report: PassReport) -> Model | None:
    """The dense model, or None with a note where there is nothing to recover from.

    Raises:
        UsageError: a reference was given that takes other inputs.
    """
    dense = ctx.dense
    if dense is None or dense.fingerprint() == model.fingerprint():
        report.note(
            "the model is as it was before the first lossy pass: there is nothing to recover (give the dense model "
            "as reference where it was pruned before)"
        )
        return None
    theirs, ours = ([spec.name for spec in item.input_specs()] for item in (dense, model))
    if theirs != ours:
        raise UsageError(
            f"the reference model reads {', '.join(theirs)}, the model {', '.join(ours)}: give the dense model that "
            "this one was made from"
        )
    return dense


def calibration_of(ctx: PassContext, name: str) -> CalibrationSource:
    """The calibration source.

    Raises:
        UsageError: there is none.
    """
    if ctx.calibration is None:
        raise UsageError(f"{name} needs calibration inputs; give --calibration-data PATH")
    return ctx.calibration


def change_numbers(before: NDArray[Any], after: NDArray[Any]) -> dict[str, float]:
    """Densities of a constant before and after, and ``||after - before|| / ||before||``."""
    wide = before.astype(np.float64)
    norm = float(np.linalg.norm(wide)) or 1.0
    return {
        "density_before": density(before),
        "density_after": density(after),
        "relative_error": float(np.linalg.norm(after.astype(np.float64) - wide)) / norm,
    }
