"""Tiles of a weight dense or N:M, chosen by what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.passes.hybrid.rewriting import PART_KEY, Rewriter, refusal
from sparsecc.passes.hybrid.tile_selection import Tile, TileSelection
from sparsecc.passes.prune.base import Work
from sparsecc.passes.prune.gram import Matrix, inverse_factor
from sparsecc.passes.prune.gram_pass import GramPass, Problem
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.selection import Mask
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import PassContext, PassReport, Range, SiteSettings
from sparsecc.sparse import Pattern

__all__ = ["PruneTiles"]


@dataclass(frozen=True)
class PruneTiles(GramPass):
    """Make the tiles of a weight N:M that lose least by it, keep the others dense, then fit what stays.

    A reading of PATCH (2025) without training: what a tile costs is the sum of what its dropped weights
    do, on the calibration data, to the outputs; the weights of both kinds of tiles are then fitted by least squares.
    So any sparsity between none and that of N:M can be asked for. Tiles at the edges may be smaller than the others.

    Changes: values of weights and biases. With ``shape=ends`` also the graph: the sparse outputs become a product of
    their own, which has the name of the site, and Concat puts them before or behind the others. Both are sites.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-tiles{sparsity=0.3 shape=ends}``

    Attributes:
        pattern: ``N:M`` of the sparse tiles (N kept of every M inputs).
        sparsity: fraction of all weights to remove, from 0 to 1 - N/M; none means half of that.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare tiles over the whole ``layer`` or within each ``row`` of tiles.
        caps: not for tiles.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw).
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already pruned, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit biases, where sites have one, together with the weights.
        resume: folder that keeps each solved site, so that the same run goes on there after a stop.
        tile: size ``RxC`` of a tile, outputs x inputs; C is a multiple of M.
        shape: ``tiles`` may be sparse anywhere; ``ends``: the first or the last outputs are, in whole rows of tiles,
            so that they can run as a sparse product beside a dense one.
        score: what dropping a weight costs: ``diagonal`` as if inputs were uncorrelated, ``obs`` when the other
            weights of its row make up for it.
    """

    name: ClassVar[str] = "prune-tiles"
    search: ClassVar[tuple[Range, ...]] = (Range.of("sparsity", (0.2, 0.3, 0.4)),)
    by_rows: ClassVar[bool] = False  # tiles are compared over all rows

    pattern: Pattern = Pattern("nm", n=2, m=4)  # noqa: RUF009  a frozen value, safe to share
    scope: Literal["layer", "row"] = "layer"
    tile: Tile = Tile(16, 64)  # noqa: RUF009
    shape: Literal["tiles", "ends"] = "tiles"
    score: Literal["diagonal", "obs"] = "diagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind != "nm":
            raise SpecError(f"{self.name}: the pattern of sparse tiles is N:M, got {self.pattern}")
        if self.tile.cols % self.pattern.m:
            raise SpecError(
                f"{self.name}: tiles of {self.tile.cols} inputs cut groups of {self.pattern.m}; choose a multiple"
            )

    def _check_sparsity(self, sparsity: float) -> None:
        most = 1 - self.pattern.n / self.pattern.m
        if not 0 <= sparsity <= most + 1e-9:
            raise SpecError(
                f"{self.name}: sparsity must be in [0, {most:g}], what {self.pattern} everywhere gives, "
                f"got {sparsity:g}"
            )

    def selection_of(self, site: Site, settings: SiteSettings) -> TileSelection:
        """Return how much of ``site`` stays, in which tiles."""
        pattern = settings.pattern
        assert pattern is not None  # the base has refused that
        sparsity = (1 - pattern.n / pattern.m) / 2 if self.sparsity is None else self.sparsity
        return TileSelection(pattern, sparsity, self.scope, (), self.tile, self.shape == "ends")

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        pattern = settings.pattern
        if pattern is not None and pattern.kind == "nm":
            if self.tile.cols % pattern.m:
                return f"tiles of {self.tile.cols} inputs cut groups of {pattern.m}"
            if (self.sparsity or 0) > 1 - pattern.n / pattern.m + 1e-9:
                return f"{pattern} everywhere removes less than sparsity {self.sparsity:g}"
        elif pattern is not None and pattern.kind != "dense":
            return f"the pattern of sparse tiles is N:M, an override says {pattern}"
        if PART_KEY in site.node.metadata_props:
            return "it is part of a layer that was rewritten already"
        return super()._refusal(site, settings)

    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Return the least-squares weights on the mask of the cheapest tiles."""
        if self.score == "diagonal":
            mask = problem.wanda_mask()
        else:
            variance = np.square(inverse_factor(problem.gram)).sum(0)
            mask = problem.choose(np.square(problem.target) / variance)
        return refit_rows(problem.target, mask, problem.gram), mask

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Run: only the fit knows which tiles stay dense."""
        return self.run(model, ctx)

    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Prune front to back, then give sparse ends a product of their own."""
        super().prune(model, work, ctx, report)
        pruned = {change.site for change in report.changed}
        if self.shape == "tiles" or not pruned:
            return
        rewriter = Rewriter(model)
        for item in work:
            if item.site.name in pruned:
                reason = refusal(item.site) or rewriter.split_outputs(item.site, self._sparse_rows(item))
                if reason is not None:
                    report.note(f"{item.site.name} stays one product: {reason}")
        remove_dead(model.onnx)
        model.infer_shapes()

    @staticmethod
    def _sparse_rows(item: Work) -> slice:
        """Return which outputs of a pruned site are N:M."""
        assert isinstance(item.selection, TileSelection)
        present = (item.ordered(item.site.numpy()) != 0).astype(np.float32)
        return item.selection.sparse_rows(present)
