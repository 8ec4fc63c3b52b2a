"""Deals one sparsity to the sites, for the prune pass that follows."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.prune.allocation import bounded, by_curves, erk, lamp, outlier_share, owl
from sparsecc.passes.prune.base import PrunePass, Work
from sparsecc.passes.prune.effect import OutputChange
from sparsecc.passes.prune.scores import magnitude_score, prune_matrix, wanda_score
from sparsecc.passes.prune.selection import Selection
from sparsecc.pm import PassContext, PassReport, Range, SiteOverride

__all__ = ["Allocate"]

#: Densities at which errors of a layer are known, equal steps on a logarithmic scale below the first.
_DENSITIES = np.concatenate([[1.0], np.geomspace(0.9, 0.02, 24)])


@dataclass(frozen=True)
class Allocate(PrunePass):
    """Deal one sparsity to the sites, for the prune pass that follows.

    Nothing is pruned yet: each site gets a sparsity of its own, as an override of a recipe would give it (those of
    the recipe win), so that all of them together reach ``sparsity``.

    Changes: nothing.
    Skips with the reason: what prune passes skip.

    Sample: ``allocate{sparsity=0.7 method=sensitivity}``

    Attributes:
        pattern: ``unstructured`` or blocks ``RxC``; N:M has one sparsity only.
        sparsity: fraction of all weights of these sites to remove, in [0, 1); none means 0.5.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: what the prune pass will compare weights over.
        caps: limits of the prune pass.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: as in the prune pass.
        method: ``erk`` by shapes (Evci et al. 2020); ``lamp`` by weights (Lee et al. 2021), or by weights and inputs
            where there is calibration data; ``owl`` keeps more of sites with more outliers (Yin et al. 2024), weights
            that with their inputs count ``outlier`` times as much as the mean of the site; ``sensitivity``: what
            dropping weights of a site alone does to the outputs of the model on calibration data, summed up and made
            smallest (it knows nothing of weights fitted afterwards, with which ``lamp`` did better where that was
            measured).
        most: highest sparsity of a site, in (0, 1).
        outlier: with ``owl``, how many times the mean score of its site a weight needs to count, above 0.
        spread: with ``owl``, how far sparsities of sites may be from that of all, in [0, 0.5].
    """

    name: ClassVar[str] = "allocate"
    search: ClassVar[tuple[Range, ...]] = ()
    lossless: ClassVar[bool] = True

    method: Literal["erk", "lamp", "owl", "sensitivity"] = "lamp"
    most: float = 0.95
    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind == "nm":
            raise SpecError(f"{self.name}: pattern {self.pattern} has one sparsity: there is nothing to deal")
        if not 0 < self.most < 1:
            raise SpecError(f"{self.name}: most must be in (0, 1), got {self.most:g}")
        if not self.outlier > 0:
            raise SpecError(f"{self.name}: outlier must be above 0, got {self.outlier:g}")
        if not 0 <= self.spread <= 0.5:
            raise SpecError(f"{self.name}: spread must be in [0, 0.5], got {self.spread:g}")

    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Find the sparsities and hand them on as overrides.

        Raises:
            UsageError: ``sensitivity`` or ``owl`` without calibration data, or inputs or outputs on it are not finite.
        """
        if not work:
            return
        sizes = np.array([item.site.shape[0] * item.site.shape[1] for item in work])
        wanted = 1 - float(np.average([item.selection.sparsity or 0.0 for item in work], weights=sizes))
        found = self._densities(model, work, sizes, wanted, ctx, report)
        densities = bounded(found, sizes.tolist(), wanted, 1 - self.most)
        given = []
        for item, density in zip(work, densities, strict=True):
            sparsity = round(float(np.clip(1 - density, 0.0, self.most)), 4)
            given.append(SiteOverride(glob.escape(item.site.name), sparsity=sparsity))
            report.note(f"{item.site.name}: sparsity {sparsity:g}")
        ctx.overrides = (*given, *ctx.overrides)

    def _densities(
        self,
        model: Model,
        work: Sequence[Work],
        sizes: NDArray[np.int64],
        wanted: float,
        ctx: PassContext,
        report: PassReport,
    ) -> NDArray[np.float64]:
        if self.method == "erk":
            shapes = [(item.site.shape[0], *_inner_shape(item.site)) for item in work]
            return erk(shapes, wanted)
        squares = [np.square(score.astype(np.float64)) for score in self._scores(model, work, ctx, report)]
        if self.method == "lamp":
            return lamp(squares, wanted)
        if self.method == "owl":
            shares = [outlier_share(np.sqrt(square), self.outlier) for square in squares]
            return owl(sizes.tolist(), shares, wanted, self.spread)
        if not isinstance(ctx.calibration, Calibration):
            raise UsageError(
                f"{self.name}: method=sensitivity needs calibration inputs; give --calibration-data PATH"
            )
        errors = []
        change = OutputChange(model, ctx.calibration)
        for done, (item, square) in enumerate(zip(work, squares, strict=True)):
            ctx.progress(self.name, done, len(work))
            curve = _curve(item, square)
            middle = int(np.argmin(np.abs(_DENSITIES - wanted)))
            effect = change.of(_pruned(model, item, square, 1 - _DENSITIES[middle]))
            if not np.isfinite(effect):
                raise UsageError(
                    f"{self.name}: outputs are NaN or infinite on the calibration data: give other inputs, or "
                    "method=lamp"
                )
            errors.append(curve * (effect / curve[middle] if curve[middle] else 0.0))
        return by_curves(sizes.tolist(), _DENSITIES, errors, wanted)

    def _scores(
        self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport
    ) -> Iterator[NDArray[np.float64]]:
        """Yield the scores of each site, in the order of its pattern; those that are not measured go by weights."""
        measured: Mapping[str, NDArray[np.float64]] = {}
        if ctx.calibration is not None or self.method == "owl":
            measured = ctx.calibration_for(self.name).mean_square(model, [item.site for item in work])
        for item in work:
            site, weight = item.site, item.site.numpy()
            known = measured.get(site.name)
            if known is not None and not np.isfinite(known).all():
                raise UsageError(
                    f"{self.name}: the input of '{site.name}' is NaN or infinite on the calibration data: give other "
                    "inputs, or method=erk"
                )
            if known is None and measured:
                report.note(f"{site.name} is not measured: its weights alone count")
            score = magnitude_score(weight) if known is None else wanda_score(weight, known, site.groups)
            yield np.asarray(item.ordered(score))


def _inner_shape(site: Site) -> tuple[int, ...]:
    return site.weight_shape[1:] if site.conv is not None else site.shape[1:]


def _curve(item: Work, squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the squares that is dropped at each density."""
    return np.array([_dropped(item, squares, 1 - density) for density in _DENSITIES])


def _dropped(item: Work, squares: NDArray[np.float64], sparsity: float) -> float:
    chosen = Selection(item.selection.pattern, float(sparsity), item.selection.scope)
    return 1 - prune_matrix(squares, np.sqrt(squares), chosen, item.site.groups).kept_score


def _pruned(model: Model, item: Work, squares: NDArray[np.float64], sparsity: float) -> Model:
    """A copy of ``model`` in which this site alone is pruned."""
    copy = model.copy()
    (site,) = (site for site in copy.sites() if site.name == item.site.name)
    chosen = Selection(item.selection.pattern, float(sparsity), item.selection.scope)
    pruned = prune_matrix(item.ordered(site.numpy()), np.sqrt(squares), chosen, site.groups).weight
    site.replace(item.restored(pruned))
    return copy
