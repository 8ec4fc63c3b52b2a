"""MoBE: experts of a mixture whose first layers share a few bases, so that a token meets those once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.collect import Tapped
from sparsecc.errors import MeasurementError, SpecError
from sparsecc.ir import Model, name_matches
from sparsecc.passes.factor.expert_bases import Bases, affordable_width, fitted_bases
from sparsecc.passes.factor.expert_layers import ExpertLayer, Rewriting, layer_of
from sparsecc.passes.prune.gram import check_fit, damped
from sparsecc.passes.structure.expert_axes import Cut, array_in
from sparsecc.passes.structure.experts import mixture_of
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["FactorMobe"]


@dataclass(frozen=True)
class FactorMobe(Pass):
    """Write the weights of experts that read the same tokens as mixtures of a few shared bases.

    After MoBE (Chen et al., "Mixture-of-Basis-Experts for Compressing MoE-based LLMs", 2025) without training:
    ``W_e = A_e sum_m alpha_em B_m`` with no activation between. Experts whose leading inputs span nearly the same space
    start with one basis; A, B and alpha are then the exact least squares of each other in turns, on the outputs for the
    second moments of what the experts read where there is calibration data, else on the weights.

    Changes: a product with stacked weights becomes one product with all bases, a small one that mixes them, and one
    of the experts with what is their own, in standard operators. Gate and up projections, which read the tokens.
    Understood: stacked weights in MatMul, Einsum, or looked up by Gather; run ``tidy``, and ``prune-experts``, before.
    Skips with the reason: projections that read rows of each expert's own, branches of single experts,
    ``com.microsoft.MoE``, and everything where the whole model is measured slower.

    Sample: ``factor-mobe{param-ratio=0.5}``

    Attributes:
        param_ratio: share of the numbers of each such layer to keep, in (0, 1).
        match: which mixtures: a glob on the name of the router, or ``re:`` and an expression.
        bases: how many per layer; by default the best of one, a quarter and half as many as experts.
        multiple: the width of a basis is a multiple of this, for speed.
        turns: most rounds of least squares.
        damping: added to the second moments, relative to the mean of their diagonal.
        keep_slower: keep the result where the whole model is measured slower with it.
    """

    name: ClassVar[str] = "factor-mobe"

    param_ratio: float = 0.7
    match: str = "*"
    bases: int | None = None
    multiple: int = 8
    turns: int = 10
    damping: float = 0.01
    keep_slower: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping)
        if not 0 < self.param_ratio < 1:
            raise SpecError(f"{self.name}: param-ratio must be in (0, 1), got {self.param_ratio:g}")
        self.require_at_least(bases=1, multiple=1, turns=1)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Find the mixtures, fit the bases, rewrite.

        Raises:
            UsageError: ``match`` matches nothing.
        """
        report = PassReport(self.name)
        work = model.copy()
        work.infer_shapes()
        layers = list(self._layers(work, report))
        moments = self._moments(work, layers, ctx, report)
        fitted: list[tuple[ExpertLayer, Bases, float]] = []
        for layer in layers:
            if layer.name not in moments:
                continue
            found = self._fit(layer, moments[layer.name])
            if isinstance(found, str):
                report.skip(layer.name, found)
            else:
                fitted.append((layer, *found))
        if not fitted:
            report.note("no layer of experts was rewritten")
            return report
        numbers = [layer.weights().size for layer, _, _ in fitted]
        rewriting = Rewriting(work)
        for layer, bases, _ in fitted:
            rewriting.put(layer, bases)
        remove_dead(work.onnx)
        work.infer_shapes()
        slower = self._slower(model, work, ctx)
        for (layer, bases, error), before in zip(fitted, numbers, strict=True):
            if slower is not None:
                report.skip(layer.name, slower)
                continue
            count, width, _ = bases.shared.shape
            report.change(
                layer.name,
                f"{len(bases.own)} experts share {count} bases of width {width}; error {error:.4g}",
                density_before=1.0,
                density_after=bases.numbers / before,
                relative_error=error,
                parameters_before=before,
                parameters_after=bases.numbers,
            )
        if slower is None:
            model.onnx = work.onnx
        return report

    def _slower(self, model: Model, work: Model, ctx: PassContext) -> str | None:
        """Why the smaller model does not pay, or None."""
        if ctx.costs is None or self.keep_slower:
            return None
        try:
            relative = ctx.costs.relative_time_of(model, work)
        except MeasurementError as error:
            return str(error)
        if relative < 1:
            return None
        return (
            f"the whole model takes {relative:.3f} times as long with shared bases (keep-slower keeps them)"
        )

    def _layers(self, work: Model, report: PassReport) -> Iterator[ExpertLayer]:
        sites = work.sites()
        refuse_unmatched(self.match, [site.name for site in sites], "match")
        seen: set[str] = set()
        for site in sites:
            if not name_matches(self.match, site.name):
                continue
            mixture = mixture_of(site, 0)
            if isinstance(mixture, str):
                report.skip(site.name, mixture)
                continue
            stacked = [cut for cut in mixture.axes.cuts if _rank(cut) > 2]
            if not stacked:
                report.skip(site.name, "its experts are branches with weights of their own")
            for cut in stacked:
                layer = layer_of(cut, mixture.axes)
                if isinstance(layer, str):
                    report.skip(str(cut.node.name or cut.node.outputs[0].name), layer)
                elif layer.name not in seen:
                    seen.add(layer.name)
                    yield layer

    def _moments(
        self, work: Model, layers: Sequence[ExpertLayer], ctx: PassContext, report: PassReport
    ) -> dict[str, NDArray[np.float64]]:
        """Second moments of what each layer reads, those that are not finite told and left out."""
        sizes = {str(layer.source.name): layer.weights().shape[2] for layer in layers}
        sums = {name: np.zeros((size, size)) for name, size in sizes.items()}
        rows = dict.fromkeys(sizes, 0)
        if ctx.calibration is not None and sizes:
            tapped = Tapped(work, list(sizes), ctx.threads)
            for batch in ctx.calibration:
                for name, array in tapped.run(dict(batch)).items():
                    flat = array.reshape(-1, sizes[name]).astype(np.float64)
                    sums[name] += flat.T @ flat if np.isfinite(flat).all() else np.nan
                    rows[name] += len(flat)
        found = {}
        for layer in layers:
            name = str(layer.source.name)
            if not np.isfinite(sums[name]).all():
                report.skip(layer.name, "its input is NaN or infinite on the calibration data")
                continue
            gram = sums[name] / rows[name] if rows[name] else np.eye(sizes[name])
            found[layer.name] = damped(gram, self.damping)[0]
        return found

    def _fit(self, layer: ExpertLayer, gram: NDArray[np.float64]) -> tuple[Bases, float] | str:
        """The bases with the least error, and that relative to the outputs; or why there are none."""
        weights = layer.weights()
        experts, outputs, inputs = weights.shape
        counts = (
            [self.bases]
            if self.bases is not None
            else sorted({1, max(1, experts // 4), max(1, experts // 2)})
        )
        best: Bases | None = None
        for count in counts:
            width = affordable_width(experts, outputs, inputs, count, self.param_ratio, self.multiple)
            if width and count <= experts:
                found = fitted_bases(weights, gram, count, width, self.turns)
                if best is None or found.errors[-1] < best.errors[-1]:
                    best = found
        if best is None:
            return f"no width that is a multiple of {self.multiple} fits into {self.param_ratio:g} of its numbers"
        energy = float(np.einsum("enk,kl,enl->", weights, gram, weights, optimize=True))
        return best, best.errors[-1] / energy if energy else 0.0


def _rank(cut: Cut) -> int:
    array = array_in(cut.node.inputs[cut.index])
    return 0 if array is None else array.ndim
