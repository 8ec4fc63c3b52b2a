"""The pass ``recover-ols``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.gram import (
    Matrix,
    check_fit,
    correction_for,
    damped,
    quadratic_error,
    shifted_target,
)
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.scarcity import Scarcity
from sparsecc.passes.recover.base import RecoverPass, change_numbers, sites_to_recover
from sparsecc.passes.recover.moved import Moved, moved_refusal
from sparsecc.pm import Lineage, MomentsLike, PassContext, PassReport

__all__ = ["RecoverOls"]


@dataclass(frozen=True)
class RecoverOls(RecoverPass):
    """Fit the weights that pruning left to the dense model's outputs by least squares, front to back.

    For the zeros there are, each output gets the weights of least squared error against what the dense model's
    weights make of the dense model's inputs, measured on the inputs that the already fitted front gives. So it does
    for any mask, whoever made it, what ``prune-wanda-ols`` does for its own. If the outputs of the model get worse,
    everything is taken back.

    Where channels or blocks were removed instead, all that is left is fitted so, each site with its bias.

    Changes: values of weights, never zeros or the graph; behind removed units and blocks biases too.
    Skips with the reason: sites without zeros where no units or blocks are gone, quantised ones, those that calibration
    does not reach or whose fit would be no better.

    Sample: ``recover-ols{correction=1.0}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        correction: share of the difference between the dense model's inputs and those there are now that weights make
            up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
    """

    name: ClassVar[str] = "recover-ols"

    damping: float = 0.01
    correction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, correction=self.correction)

    def recover(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        """Fit site by site; the moments of each are those that the fitted sites before it give."""
        assert ctx.calibration is not None  # RecoverPass.run
        own = {site.name: site for site in reference.sites()}
        sites: dict[str, Site] = {}
        moved: dict[str, Moved] = {}
        for site in sites_to_recover(model, self, ctx, report):
            dense = own.get(site.name)
            reason = _refusal(site, dense, ctx.lineage)
            if reason is not None or dense is None:
                report.skip(site.name, str(reason))
                continue
            sites[site.name] = site
            if ctx.lineage is not None:
                moved[site.name] = Moved.of(model, site, reference, dense, ctx.lineage.kept.get(site.name))
        if not sites:
            return
        done, scarcity = 0, Scarcity()
        for step in ctx.calibration.walk(model, list(sites.values()), reference):
            for name, moments in step.items():
                site = sites.pop(name)
                scarcity.count(site, moments)
                if name in moved:
                    self._fit_moved(site, moved[name], moments, report)
                else:
                    self._fit(site, own[name], moments, report)
                done += 1
            ctx.progress(self.name, done, done + len(sites))
        for name in sites:
            reason = ctx.calibration.unavailable.get(name, "calibration does not reach it")
            report.skip(name, f"not measured: {reason}")
        scarcity.tell(report)

    def _fit(self, site: Site, dense: Site, moments: MomentsLike, report: PassReport) -> None:
        if not (np.isfinite(moments.gram).all() and np.isfinite(moments.cross).all()):
            report.skip(site.name, "its input is NaN or infinite on the calibration data")
            return
        before = site.numpy()
        fitted, costs = [], np.zeros(3)
        for target, weight, gram in self._groups(site, dense, moments):
            values = refit_rows(target, weight != 0, gram, start=weight)
            fitted.append(values)
            errors = (weight - target, values - target, target)
            costs += [quadratic_error(error, gram) for error in errors]
        after = np.concatenate(fitted).astype(before.dtype)
        if not costs[1] < costs[0]:
            report.skip(site.name, "its weights are the best for their zeros already")
            return
        after[(after == 0) & (before != 0)] = np.finfo(
            before.dtype
        ).tiny  # a mask has no more zeros than it had
        site.replace(after)
        report.change(
            site.name,
            "weights fitted to the dense model's outputs",
            **change_numbers(before, after),
            output_error_before=float(costs[0] / costs[2]) if costs[2] else 0.0,
            output_error_after=float(costs[1] / costs[2]) if costs[2] else 0.0,
        )

    def _fit_moved(self, site: Site, moved: Moved, moments: MomentsLike, report: PassReport) -> None:
        before = site.numpy()
        fitted = moved.fitted(moments, self.damping, correction_for(site.op, self.correction))
        if isinstance(fitted, str):
            report.skip(site.name, fitted)
            return
        moved.store(fitted)
        report.change(
            site.name,
            "weights and bias fitted to the dense model's outputs",
            **change_numbers(before, site.numpy()),
            output_error_before=fitted.error_before,
            output_error_after=fitted.error_after,
        )

    def _groups(
        self, site: Site, dense: Site, moments: MomentsLike
    ) -> Iterator[tuple[Matrix, Matrix, Matrix]]:
        """Yield target, weight and damped Gram matrix of each group of rows."""
        groups, columns = site.groups, site.shape[1]
        share = correction_for(site.op, self.correction)
        grams, crosses = (
            matrix.reshape(groups, columns, columns) for matrix in (moments.gram, moments.cross)
        )
        weights, targets = (np.split(item.numpy().astype(np.float64), groups) for item in (site, dense))
        for number in range(groups):
            target = shifted_target(targets[number], grams[number], crosses[number], self.damping, share)
            yield target, weights[number], damped(grams[number], self.damping)[0]


def _refusal(site: Site, dense: Site | None, lineage: Lineage | None) -> str | None:
    if site.quantization is not None:
        return "it is quantised: recover before quantize"
    kept = None if lineage is None else lineage.kept.get(site.name)
    left = site.shape if kept is None else (len(kept.rows), len(kept.columns))
    if dense is None or site.shape != left or (kept is None and dense.shape != site.shape):
        return "it has another shape in the dense model"
    weight = site.numpy()
    if not (np.isfinite(weight).all() and np.isfinite(dense.numpy()).all()):
        return "a weight is NaN or infinite"
    if lineage is not None:
        return moved_refusal(site)
    return "it has no zeros" if weight.all() else None
