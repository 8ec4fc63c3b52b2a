"""The pass ``round-weights``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from sparsecc.ir import Model, Site
from sparsecc.ir.sparse_ops import BF16_OPSET
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.recurrent import is_recurrent, kept_whole, recurrent_form, weight_pair
from sparsecc.pm import Pass, PassContext, PassReport, Range, select_sites
from sparsecc.sparse import FLOATS, density, holds, rounded

__all__ = ["RoundWeights"]

#: Rounding one weight of the type's normal range costs at most half of this; an output that loses more has
#: weights that are too small for the type.
_MOST_LOST = {"fp16": 2.0**-10, "bf16": 2.0**-7}


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights of sites that have zeros, and of LSTM and GRU, to 16-bit floating point numbers.

    Sparse operators can store them as such then. Kernels compute in float32 all the same: where few rows are
    multiplied, reading the weights is what takes time, and the file becomes almost half as large.
    ``choose-layout{values=...}`` then compares both.

    Changes: weights of the matching sites, which stay float32 here. Pruned zeros stay zeros.
    Skips with the reason: weights without zeros that no sparse operator takes, weights that are no finite float32,
    weights beyond the range of fp16, and sites of which an output would lose more than ordinary rounding does because
    its weights are too small for fp16.

    Sample: ``round-weights{values=bf16 match=re:.*mlp.*}``

    Attributes:
        values: ``fp16`` has eleven significant bits from 6e-5 to 65504, ``bf16`` eight and the range of float32.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "round-weights"
    search: ClassVar[tuple[Range, ...]] = (Range.of(),)
    narrows: ClassVar[bool] = True
    by_outputs: ClassVar[bool] = True
    lossless: ClassVar[bool] = False

    values: Literal["fp16", "bf16"] = "fp16"
    match: str = "*"

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Round as ``run``, also weights that are such numbers by chance: those of a sketch are not the final ones."""
        report = PassReport(self.name)
        for site in select_sites(model, self.match, report):
            if self._refusal(model, site) is None:
                site.replace(rounded(site.numpy(), self.values))
                report.change(site.name, self.values)
        return report

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Round the matching sites in place."""
        report = PassReport(self.name)
        for site in select_sites(model, self.match, report):
            reason = "left alone by an override" if ctx.settings_for(site, self).skip else None
            reason = reason or self._refusal(model, site)
            if reason is not None:
                report.skip(site.name, reason)
                continue
            weight = site.numpy()
            if holds(weight, self.values):
                report.skip(site.name, f"its weights are {self.values} numbers already")
                continue
            result = rounded(weight, self.values)
            lost = _lost(weight, result)
            reason = self._too_much(weight, result, lost)
            if reason is not None:
                report.skip(site.name, reason)
                continue
            site.replace(result)
            report.change(
                site.name,
                f"rounded to {self.values}",
                density_before=density(weight),
                density_after=density(result),
                relative_error=float(np.linalg.norm(weight - result) / np.linalg.norm(weight)),
                worst_output=float(lost.max()),
            )
        return report

    def _refusal(self, model: Model, site: Site) -> str | None:
        if site.quantization is not None:
            return "it is quantised"
        if site.dtype != np.float32:
            return f"{site.dtype.name} weights: only float32 is rounded"
        if self.values == "bf16" and model.opset < BF16_OPSET:
            return f"opset {model.opset} has no bfloat16; convert the model to opset {BF16_OPSET} or give values=fp16"
        weight = site.numpy()
        if not np.isfinite(weight).all():
            return "a weight is NaN or infinite"
        if not (weight == 0).any() and not _stored_whole(model, site):
            return "it has no zeros: no sparse operator will store it"
        return None

    def _too_much(
        self, weight: npt.NDArray[np.float32], result: npt.NDArray[np.float32], lost: npt.NDArray[np.float64]
    ) -> str | None:
        """Why ``result`` is no rounding of ``weight`` that can be kept, or None."""
        if not np.isfinite(result).all():
            most = float(np.finfo(FLOATS["fp16"]).max)
            return f"its largest weight is {np.abs(weight).max():.4g}, {self.values} ends at {most:g}; use values=bf16"
        worst = int(lost.argmax())
        if lost[worst] > _MOST_LOST[self.values]:
            return (
                f"output {worst} would lose {lost[worst]:.2%}: its weights, at most "
                f"{np.abs(weight[worst]).max():.2g}, are too small for {self.values}; use values=bf16"
            )
        return None


def _stored_whole(model: Model, site: Site) -> bool:
    """Whether a sparse operator stores the weight of an LSTM or GRU although it has no zeros."""
    try:
        pair = weight_pair(model, site) if is_recurrent(site) else None
        return pair is not None and kept_whole(recurrent_form(model, pair, site.node))
    except Refusal:
        return False


def _lost(weight: npt.NDArray[np.float32], result: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Relative error of each output; 0 where all its weights are zero."""
    with np.errstate(invalid="ignore"):  # of what became infinite
        change = np.linalg.norm(weight.astype(np.float64) - result, axis=1)
    size = np.linalg.norm(weight.astype(np.float64), axis=1)
    lost: npt.NDArray[np.float64] = np.divide(change, size, out=np.zeros_like(size), where=size > 0)
    return lost
