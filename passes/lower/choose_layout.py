"""Choose, per site, the layout that is fastest on this machine, or dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.ir.sparse_ops import BF16_OPSET
from sparsecc.passes.lower.linear_form import LinearForm, Refusal, linear_form
from sparsecc.passes.lower.recurrent import (
    candidate_pairs,
    check_pair_layout,
    is_recurrent,
    kept_whole,
    leads,
    pair_text,
    recurrent_form,
    weight_pair,
)
from sparsecc.passes.lower.siblings import Timed, agreed
from sparsecc.pm import CostSource, Number, Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import INT8_DENSE, Floats, Layout, Pattern, density, detect, holds, matches

__all__ = ["GAIN_KEY", "LAYOUT_KEY", "ChooseLayout", "candidate_patterns", "fastest", "mark", "unmark"]

#: Metadata key on a node: the layout its weight shall be lowered to.
LAYOUT_KEY = "sparsecc.layout"
#: Metadata key on a marked node: dense time / sparse time of the site alone.
GAIN_KEY = "sparsecc.gain"

#: Above this density no kernel but those of LSTM and GRU has ever won over dense, so nothing is measured.
_MAX_DENSITY = 0.85

#: A site whose tensors are held in bytes may be this much slower alone: its neighbours would pay for going back to
#: floats between them. The whole model decides.
_MIN_STATIC_GAIN = 0.5

#: Share by which two measurements of the same thing may differ.
_NOISE = 0.03

_NO_CUSTOM_OPS = "sparse operators are not allowed (custom-ops=false)"

#: Block shapes timed per site.
_MAX_BLOCKS = 2


def mark(site: Site, layout: str, gain: float) -> None:
    """Mark all nodes of ``site``: lower it to ``layout``, which alone makes it ``gain`` times as fast."""
    for node in site.nodes:
        node.metadata_props[LAYOUT_KEY] = layout
        node.metadata_props[GAIN_KEY] = f"{gain:.4f}"


def unmark(site: Site) -> None:
    """Take the mark from ``site``, if there is one."""
    for node in site.nodes:
        node.metadata_props.pop(LAYOUT_KEY, None)
        node.metadata_props.pop(GAIN_KEY, None)


def candidate_patterns(weight: npt.NDArray[np.float32]) -> tuple[Pattern, ...]:
    """The layouts worth timing for the zeros of ``weight`` [N, K], most structured first.

    Every weight that is 16x1 is 8x1 and 4x1 too: of each family only the most structured ones are worth the time.
    """
    found = detect(weight)
    blocks = [pattern for pattern in found if pattern.kind == "block"][:_MAX_BLOCKS]
    groups = [pattern for pattern in found if pattern.kind == "nm"][:1]
    return (*blocks, *groups, Pattern("unstructured"))


def fastest(names: Sequence[str], times_ms: Mapping[str, float]) -> str:
    """The fastest of ``names``, most structured first; a less structured one must win by more than noise."""
    best = names[0]
    for name in names[1:]:
        if times_ms[name] < times_ms[best] * (1 - _NOISE):
            best = name
    return best


def _site_before(ctx: PassContext, site: Site) -> Site | None:
    """The site as it was before ``quantize``, if that changed it."""
    if ctx.quantization is None or site.quantization is None:
        return None
    found = (other for other in ctx.quantization.base.sites() if other.name == site.name)
    base = next(found, None)
    return base if base is not None and base.quantization is None else None


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Mark every site with its fastest layout, measured against dense onnxruntime on this machine.

    Changes: metadata of nodes only (``sparsecc.layout``), read by ``lower-sparse``.
    Keeps dense: sites whose zeros are too few, whose best sparse form is not faster than dense by ``min_gain``,
    or that have no sparse operator; each with the reason and the times. LSTM and GRU are timed without zeros too: their
    operator is often faster than the dense one.
    After ``quantize`` dense means float32: the marks ``int8 dense`` (as it is in the graph) and ``int8 16x4``
    compete with it and with sparse float32.

    Products that read the same value get the same layout where all together lose at most a tenth by it: one call
    can compute them then (``fuse-transformer``).

    Sample: ``choose-layout{min-gain=1.05}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        min_gain: dense time / sparse time that a site must reach to be marked.
        keep_slower: mark the fastest sparse form even where dense is faster (for experiments).
        layout: mark this layout without timing anything, where the zeros obey it; none: choose by timing.
        values: a narrower type in which float values may be stored, ``fp16`` or ``bf16``, where every weight is such a
            number (see ``round-weights``); timed beside float32.
        custom_ops: consider sparse operators; without them only ``int8 dense`` can win.
    """

    name: ClassVar[str] = "choose-layout"
    lossless: ClassVar[bool] = True

    match: str = "*"
    min_gain: float = 1.0
    keep_slower: bool = False
    layout: Pattern | None = None
    values: Floats = "fp32"
    custom_ops: bool = True

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Time the candidates of each matching site and mark the winners."""
        report = PassReport(self.name)
        sites = select_sites(model, self.match, report)
        timed: list[Timed] = []
        for done, site in enumerate(sites):
            ctx.progress("choosing layouts", done, len(sites))
            try:
                if is_recurrent(site):
                    self._choose_pair(model, site, sites, ctx, report)
                else:
                    self._choose(model, site, ctx, report, timed)
            except (Refusal, MeasurementError) as refusal:
                report.skip(site.name, str(refusal))
        sparse = frozenset(name for item in timed for name in item.times) - {"dense", str(INT8_DENSE)}
        for item, layout in agreed(timed, sparse):
            gain = item.times["dense"] / item.times[layout]
            mark(item.site, layout, gain)
            report.note(f"{item.site.name}: {layout} ({gain:.2f}x), as others that read the same")
        return report

    def _choose(
        self, model: Model, site: Site, ctx: PassContext, report: PassReport, timed: list[Timed]
    ) -> None:
        base = _site_before(ctx, site)
        try:
            form = linear_form(model, site, site.nodes[0])
        except Refusal:
            if base is None:
                raise
            self._choose_dense(model, site, ctx, report)
            return
        kept = density(form.weight)
        if base is None and kept > _MAX_DENSITY and not (self.keep_slower and kept < 1):
            raise Refusal(f"too few zeros to gain from: density {kept:.3f}")
        numbers: dict[str, Number] = {"density": round(kept, 6)}
        if self.layout:
            if not matches(form.weight, self.layout):
                raise Refusal(f"its zeros do not obey {self.layout}")
            layout = Layout(self.layout, "int8" if form.int8 else self._floats(model, form.weight)[0])
            choice, detail, gain = str(layout), f"{layout}, as asked", 1.0
        else:
            layouts = self._candidates(model, form, kept, base)
            times = _costs(ctx).site_times_ms(model, site, layouts, _base(ctx))
            choice, detail, gain = self._compared([str(layout) for layout in layouts], times, numbers)
            timed.append(Timed(site, times, choice))
        mark(site, choice, gain)
        report.change(site.name, detail, **numbers)

    def _choose_dense(self, model: Model, site: Site, ctx: PassContext, report: PassReport) -> None:
        """Choose between float32 and int8 for a site that has no sparse int8 operator."""
        numbers: dict[str, Number] = {}
        times = _costs(ctx).site_times_ms(model, site, [INT8_DENSE], _base(ctx))
        choice, detail, gain = self._compared([str(INT8_DENSE)], times, numbers, _MIN_STATIC_GAIN)
        mark(site, choice, gain)
        report.change(site.name, detail, **numbers)

    def _floats(self, model: Model, weight: npt.NDArray[np.float32]) -> tuple[Floats, ...]:
        """The types in which ``weight`` can be stored, the one asked for first."""
        if self.values == "fp32" or not holds(weight, self.values):
            return ("fp32",)
        if self.values == "bf16" and model.opset < BF16_OPSET:
            return ("fp32",)
        return (self.values, "fp32")

    def _candidates(self, model: Model, form: LinearForm, kept: float, base: Site | None) -> list[Layout]:
        """The layouts to time, those to be preferred among equals first."""
        found = [] if base is None else [INT8_DENSE]
        if self.custom_ops and (kept <= _MAX_DENSITY or self.keep_slower):
            if form.int8 is not None:
                found += [Layout(pattern, "int8") for pattern in candidate_patterns(form.weight)]
            if form.int8 is None or base is not None:
                weight = form.weight if base is None else base.numpy()
                types = self._floats(model, weight)
                found += [Layout(p, floats) for p in candidate_patterns(weight) for floats in types]
        if not found:
            raise Refusal(_NO_CUSTOM_OPS)
        return found

    def _choose_pair(
        self, model: Model, site: Site, sites: Sequence[Site], ctx: PassContext, report: PassReport
    ) -> None:
        """Choose for both weights of an LSTM or GRU, when the first of them comes by."""
        pair = weight_pair(model, site)
        if not leads(site) and pair[0].name in {other.name for other in sites}:
            chosen = site.node.metadata_props.get(LAYOUT_KEY)
            if chosen is None:
                raise Refusal(f"decided together with {pair[0].name}")
            report.change(site.name, f"{chosen}, with {pair[0].name}")
            return
        form = recurrent_form(model, pair, site.nodes[0])
        few = form.density > _MAX_DENSITY and not (self.keep_slower and form.density < 1)
        if few and not kept_whole(form):  # else the operator is often faster without any zeros
            raise Refusal(f"too few zeros to gain from: density {form.density:.3f}")
        numbers: dict[str, Number] = {"density": round(form.density, 6)}
        if self.layout:
            for weight in (form.input_weight, form.state_weight):
                check_pair_layout(weight, self.layout, form.hidden)
            w, r = (
                Layout(self.layout, self._floats(model, weight)[0])
                for weight in (form.input_weight, form.state_weight)
            )
            choice, detail, gain = pair_text((w, r)), f"{pair_text((w, r))}, as asked", 1.0
        elif not self.custom_ops:
            raise Refusal(_NO_CUSTOM_OPS)
        else:
            allowed = self.values != "bf16" or model.opset >= BF16_OPSET
            candidates = candidate_pairs(form, self.values if allowed else "fp32")
            times = _costs(ctx).recurrent_times_ms(model, pair[0], candidates)
            names = [pair_text(candidate) for candidate in candidates]
            choice, detail, gain = self._compared(names, times, numbers)
        mark(pair[0], choice, gain)
        report.change(site.name, detail, **numbers)

    def _compared(
        self,
        names: Sequence[str],
        times: Mapping[str, float],
        numbers: dict[str, Number],
        least: float | None = None,
    ) -> tuple[str, str, float]:
        """The fastest of ``names``, what to say about it, and its gain over dense, which must be ``least``.

        By default it must be ``min_gain`` and more than 1.
        """
        dense = times["dense"]
        best = fastest(names, times)
        gain = dense / times[best]
        if str(INT8_DENSE) in times:
            numbers["int8_dense_ms"] = times[str(INT8_DENSE)]
        numbers.update(dense_ms=dense, sparse_ms=times[best], gain=round(gain, 4))
        detail = f"{best} {times[best]:.4g} ms, dense {dense:.4g} ms ({gain:.2f}x)"
        if (gain < self.min_gain or gain <= 1) if least is None else gain < least:
            if not self.keep_slower:
                raise Refusal(f"dense is faster: {detail}")
            detail += ", kept although slower"
        return best, detail, gain


def _base(ctx: PassContext) -> Model | None:
    """The model before ``quantize``, if that ran."""
    return None if ctx.quantization is None else ctx.quantization.base


def _costs(ctx: PassContext) -> CostSource:
    if ctx.costs is None:
        raise UsageError(
            "choose-layout needs a source of measured costs; run it through sparsecc.optimize "
            "or give layout=, for instance choose-layout{layout=unstructured}"
        )
    return ctx.costs
