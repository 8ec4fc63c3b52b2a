"""Fewer channels, neurons and heads: smaller dense layers that run faster everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site, name_matches
from sparsecc.ir.axes import AxisGraph, Orbit, remove
from sparsecc.ir.names import value_names
from sparsecc.passes.prune.scarcity import Scarcity
from sparsecc.passes.structure.biases import biased
from sparsecc.passes.structure.flops import Flops, keep_ratio, ratio_before
from sparsecc.passes.structure.obs import Consumer, Curve, compensate, removal_curve
from sparsecc.passes.structure.units import cut_lineage, unit_columns
from sparsecc.passes.tidy.linear import Linear
from sparsecc.pm import Lineage, MomentsLike, Pass, PassContext, PassReport, Range
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["PruneStructured"]

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Class:
    """Units that may be removed, what that costs, and how many of them go."""

    orbit: Orbit
    curve: Curve
    step: int

    def gone(self, count: int) -> Index:
        """Return the ``count`` units that leave first."""
        return np.asarray(self.orbit.units[self.curve.order[:count]], np.int64)


#: Share of a weight that must have been zeros filled by a fit to be worth a note.
_FILLED = 0.05


@dataclass(frozen=True)
class PruneStructured(Pass):
    """Remove neurons, channels and attention heads, and let the layers behind them make up for it.

    Units come from the graph of coupled axes (``docs/adr/0024-coupled-axes.md``): hidden neurons (gate and up
    together), channels of convolutions through depthwise layers and residuals, one of each group of a grouped
    convolution, whole heads, groups of queries with their key and value head. Each unit costs what the layers that
    read it lose at best (group-OBS on the moments of their inputs; Kurtic et al., "ZipLM", 2023), relative to the
    variance of their outputs; units are removed by
    falling multiplications saved per cost, over the whole model. The layers behind are then refitted by least squares
    with a bias, front to back on what the smaller model really computes, towards the outputs of the whole one.

    Changes: shapes of weights, sizes in Reshape, Split, Slice, Gather and Pad; a MatMul without an Add gets a bias.
    Only standard operators, no masks; outputs keep their shapes.
    Skips with the reason: units that the graph of coupled axes freezes, readers that cannot be measured or refitted.

    With ``keep`` every class of units keeps the same share instead, and only those classes are touched of which all
    layers match, those that make the units and those that read them.

    Sample: ``prune-structured{flops-ratio=0.6 multiple=16}``

    Attributes:
        flops_ratio: share of the multiplications of MatMul, Gemm and Conv to keep, in (0, 1), of those before the
            first such pass.
        match: which producers: a glob on the name of the node that makes the units, or ``re:`` and an expression.
        max_removed: most of the units of one class to remove.
        multiple: what is left of a class of channels or neurons is a multiple of this, for speed.
        compensation: ``affine``: least squares and bias; ``linear``: without bias; ``none``: only cut.
        refit: layers to refit: those ``cut``, or ``all`` that follow, which then make up for what came before too.
        damping: ridge of the least squares, relative to the mean of the diagonal.
        steps: most steps of the search per class.
        keep: share of the units of each class to keep, in (0, 1), in the place of ``flops-ratio``.
    """

    name: ClassVar[str] = "prune-structured"
    requires_calibration: ClassVar[bool] = True
    search: ClassVar[tuple[Range, ...]] = (Range.of("keep", (0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),)

    flops_ratio: float = 0.7
    match: str = "*"
    max_removed: float = 0.75
    multiple: int = 8
    compensation: Literal["affine", "linear", "none"] = "affine"
    refit: Literal["cut", "all"] = "cut"
    damping: float = 0.01
    steps: int = 64
    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low, high in (("flops_ratio", 0, 1), ("max_removed", 0, 1), ("damping", 0, 10)):
            value = getattr(self, option)
            if not low < value < high:
                name = option.replace("_", "-")
                raise SpecError(f"prune-structured: {name} must be in ({low}, {high}), got {value}")
        if self.multiple < 1 or self.steps < 1:
            raise SpecError("prune-structured: multiple and steps must be 1 or more")
        if self.keep is not None and not 0 < self.keep < 1:
            raise SpecError(f"prune-structured: keep must be in (0, 1), got {self.keep:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Choose, refit and cut.

        Raises:
            UsageError: there is no calibration source, ``match`` matches nothing, or ``protect`` has run.
        """
        ctx.refuse_protected(self.name)
        calibration = ctx.calibration_for(self.name)
        report = PassReport(self.name)
        axes = AxisGraph(model)
        sites = {site.weight: site for site in model.sites() if site.in_main_graph}
        orbits = self._free_orbits(axes, sites, report)
        self._tell_others(model, axes, report)
        if not orbits:
            report.note("no units of the model can be removed")
            return report
        classes = list(self._measured(model, axes, orbits, sites, ctx, report))
        inputs = next(iter(calibration), None)
        flops = Flops(model, axes, list(sites.values()), inputs)
        counts, ratio = self._counts(axes, classes, flops, ratio_before(model))
        cut = [item.gone(count) for item, count in zip(classes, counts, strict=True)]
        gone = np.concatenate([np.empty(0, np.int64), *cut])
        for item, count in zip(classes, counts, strict=True):
            _tell(report, item, count, self._next(item, 0) is None)
        report.note(f"{100 * ratio:.1f} % of the multiplications of linear layers are left")
        if self.keep is None and ratio > self.flops_ratio + 1e-9:
            report.note(
                f"flops-ratio {self.flops_ratio:g} was not reached: raise max-removed or lower multiple"
            )
        if not len(gone):
            return report
        if self.compensation != "none":
            axes, gone = self._refit(model, axes, gone, ctx, report)
        ctx.lineage = cut_lineage(ctx.lineage or Lineage(), model, axes, gone)
        remove(model, axes, gone)
        keep_ratio(model, ratio)
        return report

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """With ``keep``, cut the first units of each class and fit nothing; else run."""
        if self.keep is None:
            return self.run(model, ctx)
        report = PassReport(self.name)
        axes = AxisGraph(model)
        sites = {site.weight: site for site in model.sites() if site.in_main_graph}
        cut = [np.empty(0, np.int64)]
        for orbit in self._free_orbits(axes, sites, report):
            item = _Class(orbit, Curve(np.arange(len(orbit.units)), np.empty(0)), self._step(axes, orbit))
            cut.append(item.gone(self._share(item)))
            if len(cut[-1]):
                report.change(orbit.name, f"{len(orbit.units)} -> {len(orbit.units) - len(cut[-1])} units")
        gone = np.concatenate(cut)
        if len(gone):
            remove(model, axes, gone)
        return report

    def _free_orbits(
        self, axes: AxisGraph, sites: dict[onnx_ir.Value, Site], report: PassReport
    ) -> list[Orbit]:
        found = [
            orbit for orbit in axes.orbits("removal") if any(part.role == "rows" for part in orbit.parts)
        ]
        names = [*(orbit.name for orbit in found), *(site.name for site in sites.values())]
        refuse_unmatched(self.match, names, "match")
        free = []
        for orbit in found:
            if not name_matches(self.match, orbit.name):
                continue
            reason = orbit.reason or self._unmatched(orbit) or self._refusal(orbit, sites)
            if reason is not None:
                report.skip(orbit.name, reason)
            else:
                free.append(orbit)
        return free

    def _tell_others(self, model: Model, axes: AxisGraph, report: PassReport) -> None:
        """Reasons for linear layers that produce no units at all."""
        followed = {part.value for part in axes.parts if part.role != "columns"}
        for site in model.sites():
            if site.weight not in followed and name_matches(self.match, site.name):
                report.skip(
                    site.name, "its outputs are not followed: quantised, recurrent, or in a body or function"
                )
        for name, reason in model.unsupported_sites():
            if name_matches(self.match, name):
                report.skip(name, reason)

    def _refusal(self, orbit: Orbit, sites: dict[onnx_ir.Value, Site]) -> str | None:
        if len(orbit.units) < 2:
            return "there is only one of it"
        if not orbit.consumers():
            return "no layer with a constant weight reads it"
        for part in orbit.consumers():
            site = sites.get(part.value)
            if site is None or site.quantization is not None or site.op not in ("MatMul", "Gemm", "Conv"):
                return f"{part.value.name!r} reads it, which is no plain weight of a linear layer"
            if len(site.nodes) > 1:
                return f"{part.value.name!r} reads it, a weight of several layers"
            if not np.isfinite(site.numpy()).all():
                return f"{part.value.name!r} reads it and holds NaN or infinity"
        return None

    def _unmatched(self, orbit: Orbit) -> str | None:
        """With ``keep``, a layer with these units that does not match."""
        if self.keep is None:
            return None
        names = [part.node.name or "" for part in orbit.parts if part.role != "vector"]
        other = next((name for name in names if not name_matches(self.match, name)), None)
        return None if other is None else f"{other!r} has these units too and does not match"

    def _measured(
        self,
        model: Model,
        axes: AxisGraph,
        orbits: Sequence[Orbit],
        sites: dict[onnx_ir.Value, Site],
        ctx: PassContext,
        report: PassReport,
    ) -> Iterator[_Class]:
        """Curves of all orbits; moments of a layer are dropped when the last orbit that needs them is done."""
        calibration = ctx.calibration_for(self.name)
        needed = {part.value: sites[part.value] for orbit in orbits for part in orbit.consumers()}
        grams: dict[str, NDArray[np.float64]] = {}
        broken: dict[str, str] = {}
        waiting = list(orbits)
        for step in calibration.walk(model, list(needed.values())):
            for name, moments in step.items():
                gram = moments.mean[..., :, None] * moments.mean[..., None, :]
                np.subtract(moments.gram, gram, out=gram)
                if np.isfinite(gram).all():
                    grams[name] = gram
                else:
                    broken[name] = "its input is NaN or infinite on the calibration data"
            for orbit in list(waiting):
                readers = [sites[part.value] for part in orbit.consumers()]
                if any(site.name not in grams for site in readers):
                    continue
                waiting.remove(orbit)
                curve = ctx.once(
                    (self.name, orbit.name, self.steps, self.damping),
                    partial(self._curve, axes, orbit, sites, grams),
                )
                yield _Class(orbit, curve, self._step(axes, orbit))
            wanted = {sites[part.value].name for orbit in waiting for part in orbit.consumers()}
            grams = {name: gram for name, gram in grams.items() if name in wanted}
        for orbit in waiting:
            names = [sites[part.value].name for part in orbit.consumers()]
            reasons = {**calibration.unavailable, **broken}
            reason = next((f"{name}: {reasons[name]}" for name in names if name in reasons), None)
            report.skip(orbit.name, f"not measured: {reason or 'calibration does not reach what reads it'}")

    def _curve(
        self,
        axes: AxisGraph,
        orbit: Orbit,
        sites: dict[onnx_ir.Value, Site],
        grams: dict[str, NDArray[np.float64]],
    ) -> Curve:
        consumers = []
        for part in orbit.consumers():
            site = sites[part.value]
            atoms = part.atoms[0] if part.atoms.ndim > 1 else part.atoms
            places = unit_columns(axes.units(atoms, "removal"), orbit.units, site.shape[1])
            gram = grams[site.name].reshape(site.groups, *grams[site.name].shape[-2:])
            weights = np.split(site.numpy().astype(np.float64), site.groups)
            consumers += [
                Consumer(weight, inner, places, 1 / site.groups)
                for weight, inner in zip(weights, gram, strict=True)
            ]
        return removal_curve(consumers, self.steps, self.damping)

    def _step(self, axes: AxisGraph, orbit: Orbit) -> int:
        """How many units leave at a time, so that what is left is a multiple."""
        width = int(np.isin(axes.units(orbit.parts[0].atoms, "removal"), orbit.units).sum()) // len(
            orbit.units
        )
        return self.multiple // int(np.gcd(self.multiple, width))

    def _counts(
        self, axes: AxisGraph, classes: Sequence[_Class], flops: Flops, before: float
    ) -> tuple[list[int], float]:
        """How many units of each class go, and the share of the multiplications that is left."""
        if self.keep is None:
            return self._allocate(axes, classes, flops, before)
        counts = [self._share(item) for item in classes]
        dead = np.zeros(len(axes.removal), bool)
        whole = flops.total(dead) / before
        for item, count in zip(classes, counts, strict=True):
            dead[item.gone(count)] = True
        return counts, flops.total(dead) / whole if whole else 1.0

    def _share(self, item: _Class) -> int:
        """Units of a class to remove so that the share ``keep`` of them stays, rounded up to a multiple."""
        assert self.keep is not None, "_counts saw to that"
        units = len(item.orbit.units)
        return max(0, units - item.step * math.ceil(self.keep * units / item.step - 1e-9))

    def _allocate(
        self, axes: AxisGraph, classes: Sequence[_Class], flops: Flops, before: float
    ) -> tuple[list[int], float]:
        """Greedy by cost per multiplication saved; returns units to remove per class and the ratio reached."""
        dead = np.zeros(len(axes.removal), bool)
        left = flops.total(dead)
        whole = left / before
        counts = [0] * len(classes)
        while left > self.flops_ratio * whole:
            best: tuple[float, int, int, float] | None = None
            for number, item in enumerate(classes):
                count = self._next(item, counts[number])
                if count is None:
                    continue
                units = item.gone(count)[counts[number] :]
                saved = flops.saved(dead, units)
                error = float(item.curve.error[count] - item.curve.error[counts[number]])
                if saved > 0 and (best is None or error / saved < best[0]):
                    best = (error / saved, number, count, saved)
            if best is None:
                break
            _, number, count, saved = best
            dead[classes[number].gone(count)] = True
            counts[number], left = count, left - saved
        return counts, left / whole if whole else 1.0

    def _next(self, item: _Class, count: int) -> int | None:
        """The next number of removed units that leaves a multiple, or None."""
        left = len(item.orbit.units) - count
        smaller = left - (left % item.step or item.step)
        least = max(1, int(np.ceil(len(item.orbit.units) * (1 - self.max_removed))))
        return len(item.orbit.units) - smaller if smaller >= least else None

    def _refit(
        self, model: Model, axes: AxisGraph, gone: Index, ctx: PassContext, report: PassReport
    ) -> tuple[AxisGraph, Index]:
        """Least squares of the layers behind, front to back, towards the outputs of the whole model.

        Returns the coupled axes, and the units to remove, of the model with the biases that this needs.
        """
        assert ctx.calibration is not None, "run looked"
        dead = {
            part.value: np.isin(axes.units(np.atleast_2d(part.atoms)[0], "removal"), gone)
            for part in axes.parts
            if part.role == "columns"
        }
        used = value_names(model.onnx)
        linears: dict[str, tuple[Linear, NDArray[np.bool_] | None]] = {}
        for site in model.sites():
            cut = site.weight in dead and bool(dead[site.weight].any())
            if not cut and self.refit != "all":
                continue
            plain = site.op in ("MatMul", "Gemm", "Conv") and site.in_main_graph
            if not plain or len(site.nodes) > 1 or site.quantization is not None:
                report.skip(site.name, "not refitted: recurrent, shared, quantised or in a body")
                continue
            known, product = set(used), site.node.outputs[0]
            found = biased(site.node, used)
            if isinstance(found, str):
                report.skip(site.name, f"not refitted: {found}")
            else:
                linears[site.name] = (found, dead.get(site.weight))
                names = str(product.name), str(found.output.name)
                if not {*names} <= known:
                    ctx.lineage = (ctx.lineage or Lineage()).biased(*names, known)
        reference = model.copy()
        wanted = [site for site in model.sites() if site.name in linears]
        left = {site.name for site in wanted}
        scarcity, filled = Scarcity(), []
        for step in ctx.calibration.walk(model, wanted, reference):
            for site in wanted:
                if site.name in step:
                    linear, dropped = linears[site.name]
                    zeros = site.numpy() == 0
                    if self._refit_site(site, linear, dropped, step[site.name], used):
                        left.discard(site.name)
                        scarcity.count(site, step[site.name])
                        if np.count_nonzero(site.numpy()[zeros]) > _FILLED * zeros.size:
                            filled.append(site.name)
        for name in sorted(left):
            reason = ctx.calibration.unavailable.get(name, "its fit is not finite")
            report.skip(name, f"not refitted: {reason}")
        scarcity.tell(report)
        if filled:
            report.note(
                f"{len(filled)} sites were sparse and the fit filled their zeros (as {filled[0]}): prune afterwards, "
                "or keep them by compensation=none"
            )
        return _found_again(model, axes, gone)

    def _refit_site(
        self,
        site: Site,
        linear: Linear,
        dead: NDArray[np.bool_] | None,
        moments: MomentsLike,
        used: set[str],
    ) -> bool:
        weight = site.numpy().astype(np.float64)
        kept = np.ones(site.shape[1], bool)
        if dead is not None:
            kept = np.repeat(~dead, site.shape[1] // len(dead))
        groups = site.groups
        gram, cross = (item.reshape(groups, *item.shape[-2:]) for item in (moments.gram, moments.cross))
        mean, dense_mean = (item.reshape(groups, -1) for item in (moments.mean, moments.reference_mean))
        if self.compensation == "affine":
            gram = gram - mean[:, :, None] * mean[:, None, :]
            cross = cross - dense_mean[:, :, None] * mean[:, None, :]
        parts = np.split(weight, groups)
        found = [
            compensate(part, kept, gram[group], cross[group], self.damping)
            for group, part in enumerate(parts)
        ]
        fitted = np.concatenate(found)
        if not np.isfinite(fitted).all():
            return False
        if self.compensation == "affine":
            bias = linear.bias()
            assert bias is not None, "biased() looked"
            moved = [
                part @ dense_mean[group] - found[group] @ mean[group] for group, part in enumerate(parts)
            ]
            linear.set_bias(bias + np.concatenate(moved), used)
        site.replace(fitted)
        return True


def _found_again(model: Model, axes: AxisGraph, gone: Index) -> tuple[AxisGraph, Index]:
    """Coupled axes of the model as it is now, and the same units in them."""
    now = AxisGraph(model)
    before = {(part.value, part.axis): part for part in axes.parts}
    found = [np.empty(0, np.int64)]
    for part in now.parts:
        known = before.get((part.value, part.axis))
        if known is not None:
            flags = np.isin(axes.units(known.atoms, "removal"), gone)
            found.append(now.units(part.atoms, "removal")[flags])
    return now, np.unique(np.concatenate(found))


def _tell(report: PassReport, item: _Class, count: int, bound: bool) -> None:
    units = len(item.orbit.units)
    if not count:
        why = (
            "max-removed and multiple leave none to remove"
            if bound
            else "others cost less per multiplication saved"
        )
        report.skip(item.orbit.name, f"all {units} units stay: {why}")
        return
    error = float(item.curve.error[count])
    report.change(
        item.orbit.name,
        f"{units} -> {units - count} units; predicted relative error of the layers behind {error:.4g}",
        units_before=units,
        units_after=units - count,
        density_before=1.0,
        density_after=(units - count) / units,
        relative_error=error,
    )
