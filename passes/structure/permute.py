"""Channels in another order, so that a pattern of zeros costs less; what the model computes stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.ir.axes import AxisGraph, Orbit, Part, permute
from sparsecc.passes.prune.scores import magnitude_score, wanda_score
from sparsecc.passes.structure.regroup import BlockTerm, GroupTerm, Term, regroup
from sparsecc.pm import Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import Pattern

__all__ = ["Permute"]

_Scores = dict[onnx_ir.Value, tuple[Site, NDArray[np.float32]]]


@dataclass(frozen=True)
class Permute(Pass):
    """Reorder channels so that a prune pass after it keeps more of the scores; outputs stay the same.

    The order of hidden neurons, of channels and of the dimensions of a head is free: producers (rows, biases,
    parameters of normalisations) and consumers (columns) are reordered together, through residuals, Concat and
    grouped convolutions, as the graph of coupled axes allows (``docs/adr/0024-coupled-axes.md``). For N:M the columns
    are searched as in Pool and Yu, "Channel Permutations for N:M Sparsity" (2021), by exchanges of pairs; for RxC
    blocks, rows and columns of similar scores are brought together by turns of mask and exchanges. The share of
    squared scores kept never falls below that of the present order.

    Changes: the order of values inside constants, never a node; no cost at run time.
    Skips with the reason: orders that are fixed (outputs, rotary halves, what is not followed), layers that find no
    better order, and those whose pattern no order changes.

    Sample: ``permute{pattern=16x1 sparsity=0.7}``

    Attributes:
        pattern: the pattern to be pruned to: ``N:M`` or ``RxC``.
        sparsity: of blocks; give what the prune pass gets.
        match: which sites count: a glob on the name, or ``re:`` and a regular expression.
        score: ``magnitude``, ``wanda`` (needs calibration data), or ``auto``: wanda where there is such data.
        scope: what one count of blocks spans in the prune pass.
        rounds: most rounds of exchanges per order, which bounds the time.
        min_elements: smaller weights do not count.
        min_reduction: weights with fewer inputs per output do not count.
        by_channel: as for the prune pass: N:M and columns of blocks then mean neighbouring channels in
            convolutions too; without it only convolutions of one kernel entry count.
    """

    name: ClassVar[str] = "permute"
    lossless: ClassVar[bool] = True

    pattern: Pattern = Pattern("nm", n=2, m=4)  # noqa: RUF009  a frozen value, safe to share
    sparsity: float = 0.5
    match: str = "*"
    score: Literal["auto", "magnitude", "wanda"] = "auto"
    scope: Literal["layer", "row"] = "row"
    rounds: int = 60
    min_elements: int = 1024
    min_reduction: int = 16
    by_channel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind not in ("nm", "block"):
            raise SpecError(f"permute: no order matters to pattern {self.pattern}; give N:M or RxC")
        if not 0 < self.sparsity < 1:
            raise SpecError(f"permute: sparsity must be in (0, 1), got {self.sparsity}")
        self.require_at_least(rounds=1)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Search and apply an order for every orbit that touches a matching site.

        Raises:
            UsageError: ``score`` is ``wanda`` and there is no calibration source, ``match`` matches nothing, or
                ``protect`` has run.
        """
        ctx.refuse_protected(self.name)
        report = PassReport(self.name)
        scores = self._scores(model, select_sites(model, self.match, report), ctx, report)
        axes = AxisGraph(model)
        orbits = [
            orbit
            for orbit in axes.orbits("order")
            if len(orbit.units) > 1 and any(part.value in scores for part in orbit.parts)
        ]
        followed = {part.value for orbit in orbits for part in orbit.parts}
        for value, (site, _) in scores.items():
            if value not in followed:
                report.skip(site.name, "no axis of it is followed")
        for done, orbit in enumerate(orbits):
            ctx.progress(self.name, done, len(orbits))
            self._search(axes, orbit, scores, report)
        ctx.progress(self.name, len(orbits), len(orbits))
        return report

    def _scores(self, model: Model, sites: Sequence[Site], ctx: PassContext, report: PassReport) -> _Scores:
        """Squared scores of each weight, as shares of its sum, by constant; in the order given by ``by_channel``."""
        wanda = self.score == "wanda" or (self.score == "auto" and ctx.calibration is not None)
        wanted = []
        for site in sites:
            reason = self._refusal(site)
            if reason is None:
                wanted.append(site)
            else:
                report.skip(site.name, reason)
        columns: Mapping[str, NDArray[np.float64]] = {}
        if wanda:
            columns = ctx.calibration_for("permute{score=wanda}").mean_square(model, wanted)
        found: _Scores = {}
        for site in wanted:
            weight = site.numpy()
            if wanda and site.name not in columns:
                assert ctx.calibration is not None, "calibration_for looked"
                report.skip(
                    site.name, ctx.calibration.unavailable.get(site.name, "calibration does not reach it")
                )
                continue
            raw = wanda_score(weight, columns[site.name], site.groups) if wanda else magnitude_score(weight)
            squares = np.square(raw.astype(np.float64))
            total = float(squares.sum())
            if total > 0 and np.isfinite(total):
                found[site.weight] = (site, (squares / total).astype(np.float32))
            else:
                report.skip(
                    site.name, f"its scores {'are all zero' if total == 0 else 'are NaN or infinite'}"
                )
        return found

    def _refusal(self, site: Site) -> str | None:
        rows, columns = site.shape
        if rows * columns < self.min_elements:
            return f"only {rows * columns} weights (min-elements={self.min_elements})"
        if columns < self.min_reduction:
            return f"only {columns} inputs per output (min-reduction={self.min_reduction})"
        if site.op not in ("MatMul", "Gemm", "Conv") or site.groups > 1:
            return "recurrent, or a grouped convolution: what an order does to it is not searched"
        if site.quantization is not None or not site.in_main_graph:
            return "quantised, or in a body: what an order does to it is not searched"
        return None if np.isfinite(site.numpy()).all() else "a weight is NaN or infinite"

    def _search(self, axes: AxisGraph, orbit: Orbit, scores: _Scores, report: PassReport) -> None:
        if orbit.reason is not None:
            report.skip(orbit.name, orbit.reason)
            return
        terms: list[Term] = []
        for part in orbit.parts:
            if part.value in scores and part.role != "vector":
                term = self._term(axes, orbit, part, *scores[part.value])
                terms += [term] if term is not None else []
        if not terms:
            report.skip(orbit.name, f"no order of it changes what pattern {self.pattern} keeps")
            return
        order, before, after = regroup(terms, len(orbit.units), self.rounds)
        if after <= before:
            report.skip(orbit.name, "no better order was found")
            return
        permute(axes, dict(zip(orbit.units.tolist(), orbit.units[order].tolist(), strict=True)))
        for part in orbit.parts:
            if (
                part.value in scores
                and part.role != "vector"
                and not _follow(axes, orbit, part, order, scores)
            ):
                del scores[part.value]
        report.change(
            orbit.name,
            f"{len(orbit.units)} reordered: {100 * before / len(terms):.2f} -> {100 * after / len(terms):.2f} % of the "
            f"scores kept in {len(terms)} weight{'s' if len(terms) > 1 else ''}",
            units=len(orbit.units),
            kept_before=before / len(terms),
            kept_after=after / len(terms),
        )

    def _term(
        self, axes: AxisGraph, orbit: Orbit, part: Part, site: Site, scores: NDArray[np.float32]
    ) -> Term | None:
        """What the order of these units means to one weight; None if nothing, or in a form that is not searched."""
        places = _places(axes, orbit, part)
        kernel = site.kernel_size
        if places is None:
            return None
        rows = part.role == "rows"
        if rows and (self.pattern.kind == "nm" or self.pattern.rows == 1):
            return None
        if not rows and (self.pattern.cols == 1 or (kernel > 1 and not self.by_channel)):
            return None
        matrix = scores
        if kernel > 1 and self.by_channel:
            matrix = scores.reshape(len(scores), -1, kernel).swapaxes(1, 2).reshape(scores.shape)
        channels = matrix.shape[1] // kernel
        if self.pattern.kind == "nm":
            # Entries of the kernel are rows of their own: groups are of channels at one place of it.
            if channels % self.pattern.m and kernel > 1:
                return None
            return GroupTerm(matrix.reshape(-1, channels), places, self.pattern.n, self.pattern.m)
        return self._block_term(matrix, places, rows, channels)

    def _block_term(
        self, matrix: NDArray[np.float32], places: NDArray[np.int64], rows: bool, channels: int
    ) -> BlockTerm | None:
        high, wide = self.pattern.rows, self.pattern.cols
        if rows:
            features, size = _sum_neighbours(matrix, wide), high
        else:
            if channels % wide and channels != matrix.shape[1]:
                return None
            packed = _sum_neighbours(matrix.T, high).T
            features = np.ascontiguousarray(packed.reshape(-1, channels).T)
            size = wide
        others = np.setdiff1d(np.arange(len(features)), places)
        fixed = np.zeros((-(-len(features) // size), features.shape[1]), np.float32)
        np.add.at(fixed, others // size, features[others])
        return BlockTerm(features[places], fixed, places // size, self.sparsity, self.scope, rows)


def _places(axes: AxisGraph, orbit: Orbit, part: Part) -> NDArray[np.int64] | None:
    """Position of each unit along the part's axis; None if one stands there more than once, or in groups."""
    if part.atoms.ndim > 1:
        return None
    units = axes.units(part.atoms, "order")
    where = np.flatnonzero(np.isin(units, orbit.units))
    if len(where) != len(orbit.units):
        return None
    found = where[np.argsort(units[where], kind="stable")]
    return np.asarray(found[np.argsort(np.argsort(orbit.units))], np.int64)


def _follow(axes: AxisGraph, orbit: Orbit, part: Part, order: NDArray[np.int64], scores: _Scores) -> bool:
    """Bring the scores into the order that the weight has now; return whether that could be done."""
    places = _places(axes, orbit, part)
    if places is None:
        return False
    matrix = scores[part.value][1]
    if part.role == "rows":
        matrix[places] = matrix[places[order]]
    else:
        cube = matrix.reshape(len(matrix), part.atoms.size, -1)
        cube[:, places] = cube[:, places[order]]
    return True


def _sum_neighbours(matrix: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Sums over ``size`` neighbouring columns, the last over what is left."""
    if size == 1:
        return np.ascontiguousarray(matrix, np.float32)
    return np.add.reduceat(matrix, np.arange(0, matrix.shape[1], size), axis=1).astype(np.float32)
