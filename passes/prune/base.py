"""What all masking passes share: which sites, which settings, which refusals, what is reported."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.passes.prune.scores import is_pruned, prune_matrix
from sparsecc.pm import Pass, PassContext, PassReport, SiteSettings, select_sites
from sparsecc.sparse import Pattern, density

__all__ = ["DEFAULT_SPARSITY", "PrunePass", "Scorer"]

DEFAULT_SPARSITY = 0.5

Scorer = Callable[[Site, NDArray[Any]], NDArray[Any] | str]
"""Gives the scores ``[N, K]`` of a site's weight, or the reason why it cannot."""


Reorder = Callable[[NDArray[Any]], NDArray[Any]]
"""Another order of the columns of a matrix ``[N, K]``."""


@dataclass(frozen=True)
class PrunePass(Pass):
    """Base of passes that set the weights of lowest score to zero. Subclasses say what the score is."""

    lossless: ClassVar[bool] = False

    pattern: Pattern = Pattern("unstructured")  # noqa: RUF009  a frozen value, safe to share
    sparsity: float | None = None
    match: str = "*"
    scope: Literal["layer", "row"] = "layer"
    min_elements: int = 1024
    min_reduction: int = 16
    by_channel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind == "dense":
            raise SpecError(f"{self.name}: pattern dense prunes nothing; leave the pass out")
        if self.sparsity is None:
            return
        if not 0 <= self.sparsity < 1:
            raise SpecError(f"{self.name}: sparsity must be in [0, 1), got {self.sparsity}")
        implied = 1 - self.pattern.n / self.pattern.m if self.pattern.kind == "nm" else self.sparsity
        if abs(self.sparsity - implied) > 1e-9:
            raise SpecError(
                f"{self.name}: pattern {self.pattern} implies sparsity {implied:g}, got {self.sparsity:g}; "
                "leave sparsity out"
            )

    @abstractmethod
    def scorer(self, model: Model, sites: Sequence[Site], ctx: PassContext) -> Scorer:
        """Return the score function for these sites; the slow part (statistics) happens here, once."""

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Prune every matching site in place; each one left alone is reported with the reason."""
        report = PassReport(self.name)
        work: list[tuple[Site, SiteSettings]] = []
        for site in select_sites(model, self.match, report):
            settings = self._settings(site, ctx)
            reason = self._refusal(site, settings)
            if reason is None:
                work.append((site, settings))
            else:
                report.skip(site.name, reason)
        score = self.scorer(model, [site for site, _ in work], ctx)
        for done, (site, settings) in enumerate(work):
            ctx.progress(self.name, done, len(work))
            self._prune(site, settings, score, report)
        ctx.progress(self.name, len(work), len(work))
        return report

    def _settings(self, site: Site, ctx: PassContext) -> SiteSettings:
        found = ctx.settings_for(site, self)
        sparsity = found.sparsity
        if sparsity is None and found.pattern is not None and found.pattern.needs_sparsity:
            sparsity = DEFAULT_SPARSITY
        return SiteSettings(found.pattern, sparsity, found.skip)

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        """Return why the site stays as it is, judged by shape and settings alone."""
        pattern, (rows, columns) = settings.pattern, site.shape
        if settings.skip or pattern is None or pattern.kind == "dense":
            return "left alone by an override"
        if site.depthwise:
            return f"depthwise: each output reads only {columns} inputs"
        if columns < self.min_reduction:
            return f"only {columns} inputs per output (min-reduction={self.min_reduction})"
        if rows * columns < self.min_elements:
            return f"only {rows * columns} weights (min-elements={self.min_elements})"
        group_rows = rows // site.groups
        needed = (1, pattern.m) if pattern.kind == "nm" else (pattern.rows, pattern.cols)
        if group_rows < needed[0] or columns < needed[1]:
            return f"pattern {pattern} does not fit {group_rows} outputs x {columns} inputs"
        if pattern.needs_sparsity and self._keeps_nothing(group_rows, columns, settings):
            return f"sparsity {settings.sparsity:g} in pattern {pattern} would leave nothing of it"
        return None

    def _keeps_nothing(self, group_rows: int, columns: int, settings: SiteSettings) -> bool:
        assert settings.pattern is not None  # the caller refused that
        grid_rows, grid_columns = settings.pattern.grid((group_rows, columns))
        units = grid_columns if self.scope == "row" else grid_rows * grid_columns
        return settings.pattern.keep_count(units, settings.sparsity) == 0

    def _prune(self, site: Site, settings: SiteSettings, score: Scorer, report: PassReport) -> None:
        reorder, restore = _column_orders(site, self.by_channel)
        weight, pattern = reorder(site.numpy()), settings.pattern
        assert pattern is not None  # _refusal
        reason = _unusable(weight)
        if reason is None and is_pruned(weight, pattern, settings.sparsity, self.scope, site.groups):
            reason = f"already {_describe(settings)} or sparser: density {density(weight):.4g}"
        if reason is not None:
            report.skip(site.name, reason)
            return
        scores = score(site, site.numpy())
        if isinstance(scores, str):
            report.skip(site.name, scores)
            return
        pruned = prune_matrix(weight, reorder(scores), pattern, settings.sparsity, self.scope, site.groups)
        site.replace(restore(pruned.weight))
        report.change(
            site.name,
            f"{_describe(settings)}: density {pruned.density_before:.4g} -> {pruned.density_after:.4g}",
            pattern=str(pattern),
            density_before=pruned.density_before,
            density_after=pruned.density_after,
            relative_error=pruned.relative_error,
            kept_score=pruned.kept_score,
        )


def _column_orders(site: Site, by_channel: bool) -> tuple[Reorder, Reorder]:
    """From the order (cin, kernel) of a convolution's columns to (kernel, cin), and back."""
    kernel = 1 if site.conv is None else int(np.prod(site.conv.kernel_shape))
    if not by_channel or kernel == 1:
        return (lambda matrix: matrix), (lambda matrix: matrix)
    channels = site.shape[1] // kernel

    def swap(matrix: NDArray[Any], inner: int) -> NDArray[Any]:
        cube = matrix.reshape(matrix.shape[0], -1, inner).swapaxes(1, 2)
        return np.ascontiguousarray(cube).reshape(matrix.shape)

    return (lambda matrix: swap(matrix, kernel)), (lambda matrix: swap(matrix, channels))


def _unusable(weight: NDArray[Any]) -> str | None:
    bad = weight.size - int(np.count_nonzero(np.isfinite(weight)))
    return f"{bad} of its {weight.size} weights are NaN or infinite" if bad else None


def _describe(settings: SiteSettings) -> str:
    return str(settings.pattern) + (
        "" if settings.sparsity is None else f" at sparsity {settings.sparsity:g}"
    )
