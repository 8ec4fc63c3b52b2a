"""What all masking passes share: which sites, which settings, which refusals, what is reported."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.ir.mapped import Scratch
from sparsecc.passes.prune.scores import Pruned, is_pruned, prune_matrix
from sparsecc.passes.prune.selection import Cap, Selection
from sparsecc.pm import Pass, PassContext, PassReport, Range, SiteSettings, get_pass, select_sites
from sparsecc.sparse import Pattern, Scope, density

__all__ = ["DEFAULT_SPARSITY", "PrunePass", "ScorePass", "Scorer", "Work"]

DEFAULT_SPARSITY = 0.5

Scorer = Callable[[Site, NDArray[Any]], NDArray[Any] | str]
"""Gives the scores ``[N, K]`` of a site's weight, or the reason why it cannot."""


@dataclass(frozen=True)
class Work:
    """A site to prune, and how.

    Attributes:
        site: where the weight is.
        selection: how much of it stays, in which pattern.
        order: order of its columns in which the pattern holds; None for the order they have.
        protected: entries ``[N, K]`` that stay while there is room, in the order of the weight; None for none.
        scratch: where the pruned weight goes if the weight is in a file.
    """

    site: Site
    selection: Selection
    order: NDArray[np.intp] | None
    protected: NDArray[np.bool_] | None
    scratch: Scratch = field(default_factory=Scratch)

    def ordered(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return ``matrix`` with the columns in the order of the pattern."""
        return matrix if self.order is None else matrix[:, self.order]

    def restored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return ``matrix``, which is in the order of the pattern, in the order of the weight."""
        return matrix if self.order is None else matrix[:, np.argsort(self.order)]

    def describe(self) -> str:
        """Pattern and sparsity."""
        return self.selection.describe()

    def record(self, report: PassReport, pruned: Pruned, **numbers: float) -> None:
        """Store the pruned weight, which is in the order of the pattern, and report it."""
        self.site.release()  # the old one, which nobody reads any more
        self.site.replace(self.restored(pruned.weight), self.scratch)
        kept = {} if self.protected is None else {"protected": int(np.count_nonzero(self.protected))}
        report.change(
            self.site.name,
            f"{self.describe()}: density {pruned.density_before:.4g} -> {pruned.density_after:.4g}",
            pattern=str(self.selection.pattern),
            density_before=pruned.density_before,
            density_after=pruned.density_after,
            relative_error=pruned.relative_error,
            kept_score=pruned.kept_score,
            **numbers,
            **kept,
        )


@dataclass(frozen=True)
class PrunePass(Pass):
    """Base of passes that set weights to zero: options, refusals, reports. Subclasses say how."""

    lossless: ClassVar[bool] = False
    search: ClassVar[tuple[Range, ...]] = (
        Range.of("sparsity", (0.5, 0.7, 0.8, 0.9), pattern="16x1"),
        Range.of("sparsity", (0.3, 0.5, 0.7, 0.85), pattern="16x4"),
        Range.of(pattern="2:4"),
        Range.of("sparsity", (0.5, 0.7, 0.8, 0.9)),
    )

    pattern: Pattern = Pattern("unstructured")  # noqa: RUF009  a frozen value, safe to share
    sparsity: float | None = None
    match: str = "*"
    scope: Literal["layer", "row"] = "layer"
    caps: tuple[Cap, ...] = ()
    min_elements: int = 1024
    min_reduction: int = 16
    by_channel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind == "dense":
            raise SpecError(f"{self.name}: pattern dense prunes nothing; leave the pass out")
        if self.caps and self.pattern.kind != "unstructured":
            raise SpecError(f"{self.name}: caps go with pattern unstructured, not with {self.pattern}")
        if self.sparsity is not None:
            self._check_sparsity(self.sparsity)

    def _check_sparsity(self, sparsity: float) -> None:
        """Raise ``SpecError`` where it does not fit the pattern."""
        if not 0 <= sparsity < 1:
            raise SpecError(f"{self.name}: sparsity must be in [0, 1), got {sparsity}")
        implied = 1 - self.pattern.n / self.pattern.m if self.pattern.kind == "nm" else sparsity
        if abs(sparsity - implied) > 1e-9:
            raise SpecError(
                f"{self.name}: pattern {self.pattern} implies sparsity {implied:g}, got {sparsity:g}; "
                "leave sparsity out"
            )

    @abstractmethod
    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Prune the sites of ``work`` in place; each one is recorded or skipped with a reason."""

    def scope_of(self, site: Site) -> Scope:
        """Return what the weights of ``site`` are compared over."""
        return self.scope

    def selection_of(self, site: Site, settings: SiteSettings) -> Selection:
        """Return how much of ``site`` stays, in which pattern."""
        assert settings.pattern is not None  # _refusal
        caps = self.caps if settings.pattern.kind == "unstructured" else ()
        return Selection(settings.pattern, settings.sparsity, self.scope_of(site), caps)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Prune every matching site in place; each one left alone is reported with the reason."""
        report = PassReport(self.name)
        work: list[Work] = []
        scratch = Scratch()
        for site in select_sites(model, self.match, report):
            item = self._work(site, ctx, scratch)
            site.release()
            if isinstance(item, Work):
                work.append(item)
            else:
                report.skip(site.name, item)
        self.prune(model, work, ctx, report)
        ctx.progress(self.name, len(work), len(work))
        return report

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Prune by magnitude instead, which leaves as many zeros in the same pattern."""
        shared = {item.name: getattr(self, item.name) for item in fields(PrunePass)}
        return get_pass("prune-magnitude")(**shared).run(model, ctx)

    def _work(self, site: Site, ctx: PassContext, scratch: Scratch) -> Work | str:
        """Return what to do with ``site``, or why it stays as it is."""
        settings = self._settings(site, ctx)
        reason = self._refusal(site, settings)
        if reason is not None:
            return reason
        selection = self.selection_of(site, settings)
        order = _column_order(site) if self.by_channel else None
        work = Work(site, selection, order, ctx.protected.get(site.name), scratch)
        weight = site.numpy()
        if reason := _unusable(weight):
            return reason
        if is_pruned(work.ordered(weight), selection, site.groups):
            return f"already {work.describe()} or sparser: density {density(weight):.4g}"
        return work

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
        if pattern.needs_sparsity and self._keeps_nothing(site, settings):
            return f"sparsity {settings.sparsity:g} in pattern {pattern} would leave nothing of it"
        return None

    def _keeps_nothing(self, site: Site, settings: SiteSettings) -> bool:
        assert settings.pattern is not None  # the caller refused that
        grid_rows, grid_columns = settings.pattern.grid((site.shape[0] // site.groups, site.shape[1]))
        units = grid_columns if self.scope_of(site) == "row" else grid_rows * grid_columns
        return settings.pattern.keep_count(units, settings.sparsity) == 0


@dataclass(frozen=True)
class ScorePass(PrunePass):
    """Base of passes that drop the weights of lowest score and leave the others as they are."""

    by_outputs: ClassVar[bool] = True

    @abstractmethod
    def scorer(self, model: Model, sites: Sequence[Site], ctx: PassContext) -> Scorer:
        """Return the score function for these sites; the slow part (statistics) happens here, once."""

    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Score and mask the sites one by one."""
        score = self.scorer(model, [item.site for item in work], ctx)
        for done, item in enumerate(work):
            ctx.progress(self.name, done, len(work))
            weight = item.site.numpy()
            scores = score(item.site, weight)
            if isinstance(scores, str):
                report.skip(item.site.name, scores)
                continue
            protected = None if item.protected is None else item.ordered(item.protected)
            item.record(
                report,
                prune_matrix(
                    item.ordered(weight), item.ordered(scores), item.selection, item.site.groups, protected
                ),
            )


def _column_order(site: Site) -> NDArray[np.intp] | None:
    """From the order (cin, kernel) of a convolution's columns to (kernel, cin); None where it is the same."""
    kernel = site.kernel_size
    return None if kernel == 1 else np.arange(site.shape[1]).reshape(-1, kernel).T.reshape(-1)


def _unusable(weight: NDArray[Any]) -> str | None:
    bad = weight.size - int(np.count_nonzero(np.isfinite(weight)))
    return f"{bad} of its {weight.size} weights are NaN or infinite" if bad else None
