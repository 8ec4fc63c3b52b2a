"""Deals one budget of parameters to the sites, for the factor pass that follows."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.factor.base import FactorPass
from sparsecc.passes.factor.candidates import Candidates, Outlines, find_candidates
from sparsecc.passes.factor.knapsack import allowed, capped, knapsack, total
from sparsecc.passes.factor.spectra import spread, tail_errors, threshold_ranks, whitened_spectrum
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.effect import OutputChange
from sparsecc.passes.prune.gram import Matrix, check_fit, damped, quadratic_error
from sparsecc.passes.prune.walk import group_moments, solutions
from sparsecc.pm import MomentsLike, Pass, PassContext, PassReport, Pipeline, SiteOverride, select_sites

__all__ = ["AllocateParameters"]


@dataclass(frozen=True)
class Curve:
    """What is known of a site: its candidates and its spectrum.

    Attributes:
        candidates: what it may become.
        spectrum: singular values of its whitened weight.
        weight: error of the model's outputs per relative error of the site's.
    """

    candidates: Candidates
    spectrum: NDArray[np.float64]
    weight: float = 1.0

    def errors(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the relative errors on the outputs of the best factors that hold so many numbers."""
        rows, columns = self.candidates.site.shape
        tail = tail_errors(self.spectrum)
        return np.asarray(np.interp(numbers / (rows + columns), np.arange(len(tail)), tail))


@dataclass(frozen=True)
class AllocateParameters(Pass):
    """Deal one budget of parameters to the sites, for the factor pass that follows.

    Nothing is factorised yet: each site gets a share of its own, as an override of a recipe would give it (those of
    the recipe win), so that all of them together keep ``param-ratio`` of their bytes. Some stay dense. Judged by the
    spectra of weights behind their inputs, which tell the error of the best factors of every rank; without calibration
    data by those of the weights alone. Where times are measured, no site gets a share at which it is not faster.

    Changes: nothing.
    Skips with the reason: what the factor pass skips, sites for which the recipe gives a share.

    Sample: ``allocate-parameters{param-ratio=0.6 method=welore}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the bytes of all these sites to keep, in (0, 1].
        multiple: as in the factor pass.
        min_elements: as in the factor pass.
        form: the factor pass that follows, with its other options: it says what a share of a site may become.
        method: ``knapsack`` makes the sum of errors smallest by dynamic programming (as ROCKET, but a site may stay
            dense and costs are bytes); ``welore`` cuts all spectra, scaled to [0, 1], at one threshold (Jaiswal et al.
            2024); ``compot`` likewise, scaled to length 1.
        measured: with ``knapsack``, weigh the error of each site by what factorising it alone does to the outputs of
            the model on a few calibration batches.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
    """

    name: ClassVar[str] = "allocate-parameters"
    lossless: ClassVar[bool] = True

    match: str = "*"
    param_ratio: float = 0.7
    multiple: int = 8
    min_elements: int = 4096
    form: str = "factor-rrr"
    method: Literal["knapsack", "welore", "compot"] = "knapsack"
    measured: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping)
        if not 0 < self.param_ratio <= 1:
            raise SpecError(f"{self.name}: param-ratio must be in (0, 1], got {self.param_ratio:g}")
        self._follower()  # a wrong one is refused here

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Find the shares and hand them on as overrides.

        Raises:
            UsageError: outputs of the model are not finite on the calibration data.
        """
        report, follower = PassReport(self.name), self._follower()
        work = self._work(model, follower, ctx, report)
        curves = self._curves(model, work, ctx, report)
        if not curves:
            return report
        shares = self._shares(curves, report)
        for curve, share in zip(curves, shares, strict=True):
            site = curve.candidates.site
            lost = (
                float(curve.errors(np.array([share * site.shape[0] * site.shape[1]]))[0])
                if share < 1
                else 0.0
            )
            report.note(f"{site.name}: {share:.3g} of the numbers, output error {lost:.3g}")
        given = [
            SiteOverride(glob.escape(curve.candidates.site.name), param_ratio=share)
            for curve, share in zip(curves, shares, strict=True)
        ]
        ctx.overrides = (*given, *ctx.overrides)
        return report

    def _follower(self) -> FactorPass:
        """The factor pass that follows, with the options that both have."""
        try:
            (follower,) = Pipeline.parse(self.form).passes
        except ValueError:
            raise SpecError(f"{self.name}: form must be one pass, got '{self.form}'") from None
        if not isinstance(follower, FactorPass):
            raise SpecError(f"{self.name}: form must be a pass that factorises, such as factor-rrr")
        return replace(
            follower,
            match=self.match,
            param_ratio=self.param_ratio,
            multiple=self.multiple,
            min_elements=self.min_elements,
        )

    def _work(
        self, model: Model, follower: FactorPass, ctx: PassContext, report: PassReport
    ) -> list[Candidates]:
        """The sites that may be factorised, with what each may become."""
        work = []
        inferred = model.copy()
        inferred.infer_shapes()
        shaped = {site.name: site for site in inferred.sites()}
        sites = select_sites(model, self.match, report)
        known: dict[object, Outlines] = {}
        for done, site in enumerate(sites):
            ctx.progress(f"{self.name}: timing", done, len(sites))
            given = any(item.applies_to(site.name) and item.param_ratio is not None for item in ctx.overrides)
            reason = "its share is given" if given else follower.left_alone(site, ctx)
            if reason is None:
                work.append(find_candidates(follower, model, site, shaped[site.name], ctx, known))
                reason = work[-1].reason
            if reason is not None:
                report.skip(site.name, reason)
            site.release()
        ctx.progress(f"{self.name}: timing", len(sites), len(sites))
        return work

    def _curves(
        self, model: Model, work: Sequence[Candidates], ctx: PassContext, report: PassReport
    ) -> list[Curve]:
        """The spectra of the sites, and how much each counts."""
        if ctx.calibration is None:
            report.note("no calibration data: the weights alone count")
            weights = [np.asarray(item.site.numpy(), np.float64) for item in work]
            return [
                Curve(item, whitened_spectrum(weight, np.eye(weight.shape[1])))
                for item, weight in zip(work, weights, strict=True)
            ]
        change = None
        if self.measured and self.method == "knapsack" and isinstance(ctx.calibration, Calibration):
            change = OutputChange(model, ctx.calibration, centred=True)

        def solve(item: Candidates, moments: MomentsLike) -> tuple[Curve, Matrix] | str:
            weight = np.asarray(item.site.numpy(), np.float64)
            gram = group_moments(moments, 0, 1, None, affine=True)[
                0
            ]  # means carry nothing, and can be most of it
            try:
                spectrum = whitened_spectrum(weight, damped(gram, self.damping)[0])
            except np.linalg.LinAlgError as failure:
                return f"its spectrum cannot be found ({failure}): raise damping"
            return Curve(item, spectrum), moments.gram

        curves = []
        for item, (curve, gram) in solutions(
            self.name, model, model, work, solve, ctx, report, sequential=False
        ):
            if change is not None:
                energy = float(np.sum(curve.spectrum**2))
                curve = replace(curve, weight=energy * self._effect(model, item.site, gram, change))
            curves.append(curve)
        return curves

    def _effect(self, model: Model, site: Site, gram: Matrix, change: OutputChange) -> float:
        """Error of the model's outputs per squared error of the site's, from factors with the share of all."""
        weight = np.asarray(site.numpy(), np.float64)
        rows, columns = weight.shape
        rank = int(self.param_ratio * rows * columns / (rows + columns))
        matrix = damped(gram, self.damping)[0]
        factors = best_factors(weight, matrix, max(1, min(rank, rows - 1, columns - 1))).product()
        lost = quadratic_error(weight - factors, matrix)
        copy = model.copy()
        (own,) = (other for other in copy.sites() if other.name == site.name)
        own.replace(factors.astype(site.dtype))
        found = change.of(copy)
        if not np.isfinite(found):
            raise UsageError(
                f"{self.name}: outputs are NaN or infinite on the calibration data: give other inputs, or "
                "measured=false"
            )
        return found / lost if lost > 0 else 0.0

    def _shares(self, curves: Sequence[Curve], report: PassReport) -> list[float]:
        """The share of its numbers that each site keeps; 1 is dense."""
        if self.method == "knapsack":
            return self._by_knapsack(curves, report)
        shapes = [curve.candidates.site.shape for curve in curves]
        levels = [
            spread(curve.spectrum)
            if self.method == "welore"
            else curve.spectrum / (float(np.linalg.norm(curve.spectrum)) or 1.0)
            for curve in curves
        ]
        limits = [curve.candidates.most // sum(curve.candidates.site.shape) for curve in curves]
        budget = self.param_ratio * sum(rows * columns for rows, columns in shapes)
        ranks = threshold_ranks(levels, shapes, budget, self.multiple, limits)
        return [
            1.0 if rank is None else _share(rank * (rows + columns), rows * columns)
            for rank, (rows, columns) in zip(ranks, shapes, strict=True)
        ]

    def _by_knapsack(self, curves: Sequence[Curve], report: PassReport) -> list[float]:
        sizes = [float(np.prod(curve.candidates.site.shape)) for curve in curves]
        costs = [
            np.array([*item.candidates.bytes, item.candidates.dense_bytes], np.float64) for item in curves
        ]
        lost = [
            np.append(curve.errors(np.array(curve.candidates.numbers, np.float64)), 0.0) for curve in curves
        ]
        budget = self.param_ratio * sum(item.candidates.dense_bytes for item in curves)
        alike = float(np.mean([
            curve.errors(np.array([self.param_ratio * size]))[0]
            for curve, size in zip(curves, sizes, strict=True)
        ]))  # fmt: skip
        cap = capped(lost, costs, budget, alike)
        if cap is None:
            report.note(
                f"some site loses more than twice what all would lose alike ({alike:.3g} of its outputs)"
            )
        within = [allowed(item, np.inf if cap is None else cap) for item in lost]
        found = knapsack(
            [own[keep] for own, keep in zip(costs, within, strict=True)],
            [curve.weight * item[keep] for curve, item, keep in zip(curves, lost, within, strict=True)],
            budget,
        )
        if found is None:
            least = total(costs, lost, [int(own.argmin()) for own in costs])
            report.note(f"the least is {least.cost / (budget / self.param_ratio):.3g} of the bytes")
        picks = [
            int(own.argmin()) if found is None else int(np.flatnonzero(keep)[found.chosen[at]])
            for at, (own, keep) in enumerate(zip(costs, within, strict=True))
        ]
        return [
            1.0
            if pick == len(curve.candidates.numbers)
            else _share(curve.candidates.numbers[pick], int(size))
            for curve, pick, size in zip(curves, picks, sizes, strict=True)
        ]


def _share(numbers: int, size: int) -> float:
    """The share that stands for so many numbers, rounded up so that it is not fewer."""
    return min(1.0, (numbers + 0.5) / size)
