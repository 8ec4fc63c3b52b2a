"""MoDeGPT: fewer neurons and fewer dimensions per head, fitted module by module, without anything added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsecc.errors import MeasurementError, SpecError
from sparsecc.ir import Model, Site, name_matches
from sparsecc.ir.axes import AxisGraph, remove
from sparsecc.ir.names import value_names
from sparsecc.passes.lower.known_sizes import infer_more_shapes
from sparsecc.passes.prune.gram import check_fit
from sparsecc.passes.prune.scarcity import Scarcity
from sparsecc.passes.structure.biases import biased
from sparsecc.passes.structure.blocks import find_blocks
from sparsecc.passes.structure.head_rewriting import rewrite
from sparsecc.passes.structure.heads import find_attentions
from sparsecc.passes.structure.influence import block_scores
from sparsecc.passes.structure.modegpt_budget import cheapest, dials_of, shared, spread
from sparsecc.passes.structure.modegpt_curves import error_curves
from sparsecc.passes.structure.modegpt_fit import HeadsFit, NeuronsFit, Reader
from sparsecc.passes.structure.modegpt_modules import Module, Neurons, find_modules, keep_before
from sparsecc.passes.structure.units import cut_lineage
from sparsecc.pm import Lineage, Pass, PassContext, PassReport
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["FactorModegpt"]


@dataclass(frozen=True)
class FactorModegpt(Pass):
    """Reduce the modules of transformers: neurons of MLPs, dimensions of the heads of attention.

    After Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression" (2024), front to back on
    what the smaller model really computes. MLP (type I): neurons leave by group-OBS, the layer behind is refitted.
    Queries and keys (type II): their product per head becomes the best one of fewer dimensions for the second moments
    of both; with rotary positions pairs of dimensions are selected. Values and outputs (type III): the best product of
    fewer dimensions for what attention gives to the output layer, which is then refitted with its bias.

    Changes: shapes of the weights; attention is written anew in standard operators, with the factor of its scores in
    the weight of q, the bias of v in that of the output layer. Nothing is added, only sizes fall.
    Skips with the reason: attention in another form (caches, normalised queries or keys, shared weights, float16),
    neurons that the graph of coupled axes freezes or that several layers read.

    Sample: ``factor-modegpt{param-ratio=0.6}``

    Attributes:
        param_ratio: share of the weights of attention and MLP to keep, in (0, 1), of those before the first such pass.
        match: which modules: a glob on the name of one of its layers, or ``re:`` and an expression.
        modules: which kinds of modules.
        allocation: ``errors``: sizes, those of q and k apart from those of v, with the least errors of what modules
            give to the stream; ``uniform``: the same share of all; ``influence``: modules whose residual block turns
            the stream more keep more (as the paper has it).
        temperature: of the softmax over influences; high is uniform.
        max_removed: most of one module to remove.
        multiple: widths of layers inside modules become a multiple of this, for speed.
        damping: ridge of the least squares, relative to the mean of the diagonal.
        correction: share of what was lost in front that a fitted layer makes up for; default: as for fitted weights.
        keep_slower: keep the result where the whole model is measured slower with it.
    """

    name: ClassVar[str] = "factor-modegpt"
    requires_calibration: ClassVar[bool] = True

    param_ratio: float = 0.7
    match: str = "*"
    modules: Literal["all", "attention", "mlp"] = "all"
    allocation: Literal["errors", "uniform", "influence"] = "errors"
    temperature: float = 0.1
    max_removed: float = 0.8
    multiple: int = 8
    damping: float = 0.01
    correction: float | None = None
    keep_slower: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, correction=self.correction)
        for option in ("param_ratio", "max_removed"):
            value = getattr(self, option)
            if not 0 < value < 1:
                raise SpecError(f"{self.name}: {option.replace('_', '-')} must be in (0, 1), got {value:g}")
        if self.temperature <= 0:
            raise SpecError(f"{self.name}: temperature must be above 0, got {self.temperature:g}")
        self.require_at_least(multiple=1)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Find the modules, deal the budget, fit front to back and cut.

        Raises:
            UsageError: there is no calibration source, ``match`` matches nothing, or ``protect`` has run.
        """
        ctx.refuse_protected(self.name)
        ctx.calibration_for(self.name)
        report = PassReport(self.name)
        refuse_unmatched(self.match, [site.name for site in model.sites()], "match")
        work = model.copy()
        infer_more_shapes(work.onnx)
        modules = list(find_modules(work, self.modules, lambda sites: self._wanted(sites, ctx), report))
        sizes = self._sizes(work, modules, ctx, report) if modules else {}
        modules = [item for item in modules if item.name in sizes]
        if not modules:
            report.note("no module was reduced")
            return report
        used = value_names(work.onnx)
        lineage, readers = self._readers(work, modules, ctx.lineage or Lineage(), used, report)
        infer_more_shapes(work.onnx)
        axes = AxisGraph(work)
        fits = self._fits(work, axes, modules, readers, sizes, report)
        self._walk(work, fits, ctx, used, report)
        done = [fit for fit in fits if fit.fault is None]
        if not done:
            report.note("no module was reduced")
            return report
        gone = np.concatenate([np.empty(0, np.int64), *(f.gone for f in done if isinstance(f, NeuronsFit))])
        lineage = cut_lineage(lineage, work, axes, gone)
        remove(work, axes, gone)
        reduced = [fit.reduced(used) for fit in done if isinstance(fit, HeadsFit)]
        added, changed = rewrite(work, reduced)
        slower = None if self.keep_slower else _slower(model, work, ctx)
        if slower is not None:
            for fit in done:
                report.skip(fit.name, slower)
            return report
        for name in changed:
            lineage = lineage.standing_in(name)
        ctx.lineage = lineage.with_added(added)
        self._tell(report, modules, done, sizes, work)
        model.onnx = work.onnx
        return report

    def _wanted(self, sites: Sequence[Site], ctx: PassContext) -> bool:
        matched = any(name_matches(self.match, site.name) for site in sites)
        return matched and not any(ctx.settings_for(site, self).skip for site in sites)

    # ---- budget

    def _sizes(
        self, work: Model, modules: Sequence[Module], ctx: PassContext, report: PassReport
    ) -> dict[str, tuple[int, ...]]:
        """Return by name the new sizes of each module that becomes smaller; others are told."""
        if self.allocation == "errors":
            assert ctx.calibration is not None, "run looked"
            curves = error_curves(work, modules, ctx.calibration, self.damping)
            unmeasured = [item for item in modules if item.name not in curves]
            for item in unmeasured:
                reason = ctx.calibration.unavailable.get(
                    item.out.name, "its inputs are NaN or infinite, or missing"
                )
                report.skip(item.name, f"not measured: {reason}")
            modules = [item for item in modules if item.name in curves]
            dials = dials_of(modules, self.multiple)
            flat = [curve for item in modules for curve in curves[item.name]]
            found = cheapest(dials, flat, self.param_ratio, self.max_removed)
        else:
            dials = dials_of(modules, self.multiple)
            found = shared(dials, self._shares(work, modules, ctx, report), self.max_removed)
        sizes: dict[str, tuple[int, ...]] = {}
        for dial, size in zip(dials, found, strict=True):
            sizes[dial.module] = (*sizes.get(dial.module, ()), size)
        kept = sum(size * dial.weights for dial, size in zip(dials, found, strict=True))
        whole = sum(dial.before * dial.weights for dial in dials)
        report.note(f"{100 * kept / max(whole, 1):.1f} % of the weights of these modules are left")
        for item in modules:
            if sizes[item.name] == item.now:
                report.skip(item.name, f"it keeps its sizes: {', '.join(map(str, item.now))}")
                del sizes[item.name]
        return sizes

    def _shares(
        self, work: Model, modules: Sequence[Module], ctx: PassContext, report: PassReport
    ) -> list[float]:
        """What to remove of each size."""
        weights = [float(np.dot(item.before, item.weights)) for item in modules]
        influence = None
        if self.allocation == "influence":
            influence = self._influence(work, modules, ctx, report)
        shares = spread(
            weights,
            influence or [0.0] * len(modules),
            1 - self.param_ratio,
            self.temperature,
            self.max_removed,
        )
        return [share for item, share in zip(modules, shares, strict=True) for _ in item.now]

    def _influence(
        self, work: Model, modules: Sequence[Module], ctx: PassContext, report: PassReport
    ) -> list[float] | None:
        """Return for each module how much the residual block around it turns the stream, or None if that is unknown."""
        assert ctx.calibration is not None, "run looked"
        blocks, _ = find_blocks(work)
        around = [
            min((b for b in blocks if item.out.node in b.nodes), key=lambda b: len(b.nodes), default=None)
            for item in modules
        ]
        known = [block for block in around if block is not None]
        scores = block_scores(work, known, "influence", ctx.calibration, ctx.threads)
        found = [score for score in scores if isinstance(score, float)]
        if len(found) < len(modules):
            report.note("the influence of some modules is not known: all get the same share")
            return None
        return found

    # ---- fit

    def _readers(
        self, work: Model, modules: Sequence[Module], lineage: Lineage, used: set[str], report: PassReport
    ) -> tuple[Lineage, dict[str, Reader]]:
        """Give the layer behind each module a bias of its own; returns them by the names of the modules."""
        readers = {}
        for item in modules:
            site = item.out
            known, product = set(used), site.node.outputs[0]
            linear = biased(site.node, used)
            if isinstance(linear, str):
                report.skip(item.name, f"{site.name}: {linear}")
                continue
            names = str(product.name), str(linear.output.name)
            if not {*names} <= known:
                lineage = lineage.biased(*names, known)
            readers[item.name] = Reader(site, linear, self.damping, self.correction)
        return lineage, readers

    def _fits(
        self,
        work: Model,
        axes: AxisGraph,
        modules: Sequence[Module],
        readers: Mapping[str, Reader],
        sizes: Mapping[str, tuple[int, ...]],
        report: PassReport,
    ) -> list[HeadsFit | NeuronsFit]:
        """Look for the modules again in the model with the biases."""
        attentions = dict(find_attentions(work))
        orbits = {orbit.name: orbit for orbit in axes.orbits("removal") if orbit.consumers()}
        fits: list[HeadsFit | NeuronsFit] = []
        for item in modules:
            if item.name not in readers:
                continue
            if isinstance(item, Neurons):
                fits.append(NeuronsFit(orbits[item.name], axes, readers[item.name], sizes[item.name][0]))
                continue
            found = attentions[item.name]
            q, v = sizes[item.name]
            if isinstance(found, str):
                report.skip(item.name, found)
            else:
                fits.append(HeadsFit(found, readers[item.name], (q, v)))
        return fits

    def _walk(
        self,
        work: Model,
        fits: Sequence[HeadsFit | NeuronsFit],
        ctx: PassContext,
        used: set[str],
        report: PassReport,
    ) -> None:
        """Fit all modules, towards the model as it is now."""
        assert ctx.calibration is not None, "run looked"
        wanted = {name for fit in fits for name in fit.sites}
        sites = [site for site in work.sites() if site.name in wanted]
        reference, scarcity = work.copy(), Scarcity()
        seen: set[str] = set()
        for step in ctx.calibration.walk(work, sites, reference):
            for site in sites:
                if site.name in step:
                    scarcity.count(site, step[site.name])
            for fit in fits:
                fit.take(step, used)
            seen |= step.keys()
        for fit in fits:
            missing = next((name for name in fit.sites if name not in seen), None)
            if missing is not None:
                reason = ctx.calibration.unavailable.get(missing, "calibration does not reach it")
                fit.fault = f"{missing} is not measured: {reason}"
            if fit.fault is not None:
                report.skip(fit.name, fit.fault)
        scarcity.tell(report)

    def _tell(
        self,
        report: PassReport,
        modules: Sequence[Module],
        done: Sequence[HeadsFit | NeuronsFit],
        sizes: Mapping[str, tuple[int, ...]],
        work: Model,
    ) -> None:
        by_name = {item.name: item for item in modules}
        for fit in done:
            item, after = by_name[fit.name], sizes[fit.name]
            if isinstance(fit, HeadsFit):
                detail = (
                    f"heads of q and k {item.now[0]} -> {after[0]} dimensions, of v {item.now[-1]} -> {after[-1]}; "
                    f"error of scores {fit.scores_error:.4g}, of outputs {fit.error:.4g}"
                )
            else:
                detail = f"{item.now[0]} -> {after[0]} neurons; error {fit.error:.4g}"
            keep_before(work, item)
            numbers = [int(np.dot(size, item.weights)) for size in (item.now, after)]
            report.change(
                item.name,
                detail,
                density_before=1.0,
                density_after=numbers[1] / numbers[0],
                relative_error=fit.error,
                parameters_before=numbers[0],
                parameters_after=numbers[1],
            )


def _slower(model: Model, work: Model, ctx: PassContext) -> str | None:
    """Why the reduced model does not pay, or None."""
    if ctx.costs is None:
        return None
    try:
        relative = ctx.costs.relative_time_of(model, work)
    except MeasurementError as error:
        return str(error)
    if relative < 1:
        return None
    return f"the whole model takes {relative:.3f} times as long with smaller modules (keep-slower keeps them)"
