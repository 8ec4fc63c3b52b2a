"""What all recovery passes share: the model they aim at, the data, the end metric that may not get worse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import open_session
from sparsecc.errors import UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.recover.lineage import counterpart
from sparsecc.pm import CalibrationSource, Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import density

__all__ = [
    "RecoverPass",
    "change_numbers",
    "output_error",
    "reference_of",
    "sites_to_recover",
]


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


def change_numbers(before: NDArray[Any], after: NDArray[Any]) -> dict[str, float]:
    """Densities of a constant before and after, and ``||after - before|| / ||before||``."""
    wide = before.astype(np.float64)
    norm = float(np.linalg.norm(wide)) or 1.0
    return {
        "density_before": density(before),
        "density_after": density(after),
        "relative_error": float(np.linalg.norm(after.astype(np.float64) - wide)) / norm,
    }


def output_error(model: Model, reference: Model, calibration: CalibrationSource, threads: int) -> float:
    """Return ``||y - y_dense||**2 / ||y_dense||**2`` over the calibration inputs, the mean over float outputs."""
    ours, theirs = open_session(model, threads=threads), open_session(reference, threads=threads)
    apart: dict[str, float] = {}
    energy: dict[str, float] = {}
    for batch in calibration:
        found = ours.run(batch)
        for name, wanted in theirs.run(batch).items():
            if wanted.dtype.kind == "f" and found[name].shape == wanted.shape:
                wide = wanted.astype(np.float64)
                apart[name] = apart.get(name, 0.0) + float(np.square(found[name] - wide).sum())
                energy[name] = energy.get(name, 0.0) + float(np.square(wide).sum())
    return float(np.mean([apart[name] / (energy[name] or 1.0) for name in apart])) if apart else 0.0


@dataclass(frozen=True)
class RecoverPass(Pass):
    """Base of passes that change a pruned model towards the dense one, tensor by tensor."""

    requires_calibration: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    recovers: ClassVar[bool] = True

    match: str = "*"

    @abstractmethod
    def recover(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        """Change ``model`` in place; its tensors are those that ``reference`` has under the same names.

        Where units were removed in this run, they have fewer rows and columns; ``ctx.lineage`` says which are left.
        """

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Recover, measure the outputs before and after, and take everything back if they got worse."""
        report = PassReport(self.name)
        calibration = ctx.calibration_for(self.name)
        reference = reference_of(model, ctx, report)
        if reference is None:
            return report
        beside = counterpart(model, reference, ctx.lineage)
        if isinstance(beside, str):
            report.note(f"{beside}, so that tensors cannot be compared one by one: it stays as it is")
            return report
        before, backup = output_error(model, reference, calibration, ctx.threads), model.copy()
        self.recover(model, beside, ctx, report)
        after = output_error(model, reference, calibration, ctx.threads)
        report.note(
            f"relative squared error of the outputs on the calibration inputs: {before:.4g} -> {after:.4g}"
        )
        if not after <= before:
            model.onnx = backup.onnx
            report.changed.clear()
            report.note("the outputs got worse: everything was taken back")
        ctx.recovered = ctx.recovered or bool(report.changed)
        return report


def sites_to_recover(
    model: Model, pass_: RecoverPass, ctx: PassContext, report: PassReport
) -> Iterator[Site]:
    """Yield the sites that match and that no override leaves alone."""
    for site in select_sites(model, pass_.match, report):
        if ctx.settings_for(site, pass_).skip:
            report.skip(site.name, "left alone by an override")
        elif ctx.lineage is not None and site.name in ctx.lineage.stand_ins:
            report.skip(site.name, "it stands in for a block that was removed")
        else:
            yield site
