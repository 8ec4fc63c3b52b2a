"""Times on a machine that is elsewhere, from a cost table that was profiled there; nothing is measured here."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.passes.lower.linear_form import LinearForm
from sparsecc.passes.tidy.tidy import Tidy
from sparsecc.plan.alone import constant_bytes, random_inputs
from sparsecc.plan.cost_model import CostModel
from sparsecc.plan.items import Estimate
from sparsecc.plan.part_costs import Inputs, SiteCosts, has_sparse_ops, rewritten_part, runs_of_sites
from sparsecc.plan.profile import workload_of_site
from sparsecc.plan.whole_model import ModelFit
from sparsecc.plan.workload import Workload
from sparsecc.pm import PassContext, Requantizer, RewriteCost
from sparsecc.sparse import INT8_DENSE, Layout, density

__all__ = ["PredictedCosts"]

_DENSE = "dense"
_LOW_RANK = "low-rank"


@dataclass(frozen=True)
class _Timed:
    """A site in a form, and what it takes there."""

    form: str
    work: Workload
    time: Estimate


@dataclass(frozen=True)
class _Input:
    """The input model: its time on the target, it tidied, and its sites as far as the table can tell."""

    ms: float
    model: Model
    known: Mapping[str, _Timed]

    def leaves_out(self, site: Site) -> bool:
        """Whether nothing is known of ``site``, which it has as it is."""
        own = _site(self.model, site.name)
        return site.name not in self.known and own is not None and own.shape == site.shape


class PredictedCosts(SiteCosts):
    """Times of sites, parts and whole models by a cost model.

    A part takes what its products take: rewritten by passes, it takes what the new ones do. A whole model takes what
    was measured of the input model there, with the times of its changed products exchanged.

    Args:
        times: of the machine that the model is for.
        inputs: of the whole model; their shapes decide the shapes of sites.
        seed: of the random activations whose shapes parts are traced with.
        activations: by name of a site, the activation behind it, where it is known.
    """

    def __init__(
        self, times: CostModel, inputs: Inputs, seed: int = 0, activations: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(inputs)
        self.times = times
        self._seed = seed
        self._activations = dict(activations or {})
        self._input: _Input | None = None
        self._runs: dict[str, int] = {}
        self._rewritten: dict[tuple[str, str, bool], tuple[RewriteCost, bool]] = {}

    def open_model(self, original: Model) -> float:
        """Take ``original`` as the input model and return its time there in ms.

        Raises:
            UsageError: the table does not have it on inputs of these shapes, or none of its products.
        """
        ms = self.times.model_ms(original, self.inputs)
        if ms is None:
            shapes = " ".join(
                f"--input-shapes {name}:{','.join(map(str, array.shape))}"
                for name, array in self.inputs.items()
            )
            raise UsageError(
                "the cost table has no time of this model on these inputs; measure it where it will run: "
                f"sparsecc targets profile -o FILE --threads {self.times.threads} --model MODEL {shapes}"
            )
        model = original.copy()
        Tidy().run(model, PassContext())
        self._runs = runs_of_sites(model, self.inputs)
        known: dict[str, _Timed] = {}
        for site in model.sites():
            with contextlib.suppress(MeasurementError):  # recurrent, or in a branch that is not taken
                known[site.name] = self._timed(model, site, ())
        if not known:
            raise UsageError(
                "the cost table has no times of the products of this model; profile with --model"
            )
        self._input = _Input(ms, model, known)
        return ms

    @property
    def input_ms(self) -> float:
        """The time of the input model."""
        assert self._input is not None, "the input model was opened"
        return self._input.ms

    def model_ms(
        self, model: Model, lowered: Collection[str] | None = None, base: Model | None = None
    ) -> Estimate:
        """The time of a whole model that passes made of the input model.

        Args:
            model: its sites may be marked with layouts.
            lowered: names of the marked sites that count as lowered; None: all of them.
            base: the model before it was quantised: sites that are not in ``lowered`` count as they are there.

        Raises:
            MeasurementError: it has operators of which there are no times.
        """
        assert self._input is not None, "the input model was opened"
        ms, before = self._input.ms, self._input.known
        others = model.unsupported_sites()
        if len(others) > len(self._input.model.unsupported_sites()):
            raise MeasurementError(f"no times of {others[-1][0]} on the target: {others[-1][1]}")
        now = self._timed_sites(model, lowered, base, self._input.model)
        gone = [timed.time for name, timed in before.items() if now.get(name) != timed]
        new = [timed.time for name, timed in now.items() if before.get(name) != timed]
        if not gone and not new:
            return Estimate(ms, "measured")
        share = ModelFit.of([(math.fsum(timed.time.ms for timed in before.values()), ms)]).share
        added = math.fsum(time.ms for time in new)
        total = max(ms - share * math.fsum(time.ms for time in gone) + added, added)
        unsure = math.fsum(share * time.ms * time.spread for time in gone)
        unsure += math.fsum(time.ms * time.spread for time in new)
        return Estimate(total, "interpolated", unsure / total)

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> dict[str, float]:
        """See ``CostSource.site_times_ms``; layouts that were not profiled take for ever.

        Raises:
            MeasurementError: the dense form, or all of the layouts, were not profiled for such products.
        """
        before = _site(base, site.name) or site
        where = model if base is None or before is site else base
        found = {_DENSE: self._time(where, before, _own_form(before)).ms}
        reasons = []
        for layout in layouts:
            try:
                times = (
                    self._time(model, site, _form_of(site, str(layout)))
                    if layout.int8
                    else self._time(where, before, str(layout))
                )
                found[str(layout)] = times.ms
            except MeasurementError as error:
                reasons.append(str(error))
                found[str(layout)] = math.inf
        if len(reasons) == len(layouts) > 0:
            raise MeasurementError(reasons[0])
        return found

    def recurrent_times_ms(
        self, model: Model, site: Site, layouts: Sequence[tuple[Layout, Layout]]
    ) -> dict[str, float]:
        """Cost tables have no times of LSTM and GRU.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError(f"no times of {site.op} on the target: profiles have none")

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        """See ``CostSource.relative_time``."""
        if not sites:
            return 1.0
        base = None if quantization is None else quantization.base
        without = self.model_ms(model, (), base)
        return self.model_ms(model, sites, base).ms / without.ms

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        """What operators other than products take is in no cost table.

        Raises:
            MeasurementError: always.
        """
        raise MeasurementError("whole models cannot be timed here for another machine: left as it is")

    def part_rewritten(
        self,
        part: Model,
        rewrite: Callable[[Model], None],
        key: str,
        *,
        custom_ops: bool,
        layout: Layout | None = None,
    ) -> tuple[RewriteCost, bool]:
        """See ``MeasuredCosts.part_rewritten``; times come from the table.

        Raises:
            MeasurementError: it has no times of these products, or of other operators that do their work.
        """
        known = (key, str(layout), custom_ops)
        if known not in self._rewritten:  # parts of one shape are asked about again and again
            self._rewritten[known] = self._priced(part, lambda own, _: rewrite(own), custom_ops, layout)
        return self._rewritten[known]

    def _together(
        self,
        own: Model,
        parts: Sequence[tuple[Site, LinearForm]],
        shape: tuple[int, ...],
        rewrite: Callable[[Model, Sequence[Site]], None],
        key: str,
        custom_ops: bool,
    ) -> RewriteCost:
        return self._priced(own, rewrite, custom_ops, None)[0]

    def _priced(
        self,
        part: Model,
        rewrite: Callable[[Model, Sequence[Site]], None],
        custom_ops: bool,
        layout: Layout | None,
    ) -> tuple[RewriteCost, bool]:
        inner = PredictedCosts(
            self.times, random_inputs(part, self._seed), self._seed, self._activations_of(part)
        )
        marked, ready = rewritten_part(part, rewrite, inner if custom_ops else None, layout)
        return inner._compared(part, marked, ready), has_sparse_ops(ready)

    def _compared(self, part: Model, marked: Model, ready: Model) -> RewriteCost:
        """What a part and a rewritten one take."""
        others = marked.unsupported_sites()
        if others:
            raise MeasurementError(f"no times of {others[0][0]} on the target: {others[0][1]}")
        before = [timed.time for timed in self._timed_sites(part, (), None, part).values()]
        after = [timed.time for timed in self._timed_sites(marked, None, None, part).values()]
        if not before or not after:
            raise MeasurementError("no times on the target: it computes with other operators than products")
        source = "measured" if {time.source for time in (*before, *after)} == {"measured"} else "interpolated"
        dense_ms, ms = (math.fsum(time.ms for time in times) for times in (before, after))
        unsure = [
            math.fsum(time.ms * time.spread for time in times) / total
            for times, total in ((before, dense_ms), (after, ms))
        ]
        return RewriteCost(dense_ms, ms, constant_bytes(part), constant_bytes(ready), source, max(unsure))

    def _timed_sites(
        self, model: Model, lowered: Collection[str] | None, base: Model | None, dense: Model
    ) -> dict[str, _Timed]:
        """Times of the sites by name; two factors of one of ``dense`` as that in low rank, where this is known.

        Left out are sites that stay as they are in the input model, of which nothing is known.
        """
        found: dict[str, _Timed] = {}
        factors: dict[str, list[Site]] = defaultdict(list)
        for site in model.sites():
            where, own = model, site
            if base is not None and lowered is not None and site.name not in lowered:
                before = _site(base, site.name)
                where, own = (model, site) if before is None else (base, before)
            if self._input is not None and self._input.leaves_out(site):
                continue
            found[site.name] = self._timed(where, own, lowered)
            whole = own.node.metadata_props.get(PART_KEY)
            if whole is not None and found[site.name].form == _DENSE:
                factors[whole].append(own)
        for whole, pair in factors.items():
            origin = _site(dense, whole)
            if origin is None or len(pair) != 2:
                continue
            share = sum(math.prod(site.shape) for site in pair) / math.prod(origin.shape)
            with contextlib.suppress(MeasurementError):
                together = self._time(dense, origin, _LOW_RANK, share)
                for site in pair:
                    del found[site.name]
                found[whole] = _Timed(_LOW_RANK, self._work(dense, origin), together)
        return found

    def _timed(self, model: Model, site: Site, lowered: Collection[str] | None) -> _Timed:
        mark = site.node.metadata_props.get(LAYOUT_KEY)
        form = _own_form(site)
        if mark is not None and (lowered is None or site.name in lowered):
            form = _form_of(site, mark)
        return _Timed(form, self._work(model, site), self._time(model, site, form))

    def _time(self, model: Model, site: Site, form: str, share: float | None = None) -> Estimate:
        """What a site takes in a form, for all its nodes and in all rounds of a loop."""
        left = density(site.numpy()) if share is None and not form.endswith(_DENSE) else share or 1.0
        one = self.times.estimate(self._work(model, site), form, max(left, 1 / math.prod(site.shape)))
        whole = site.node.metadata_props.get(PART_KEY, site.name)
        return replace(one, ms=one.ms * len(site.nodes) * self._runs.get(whole, 1))

    def _work(self, model: Model, site: Site) -> Workload:
        work = workload_of_site(model, site, self.input_shape(model, site))
        if _is_static(site) and work.op != "Conv":  # what follows bytes is computed by another operator
            return work
        known = self._activations.setdefault(site.name, work.activation)
        return work if work.activation else replace(work, activation=known)

    def _activations_of(self, part: Model) -> dict[str, str]:
        """Activations behind the sites of a part, some of which quantisation hides."""
        inner = PredictedCosts(self.times, random_inputs(part, self._seed), self._seed)
        return {site.name: inner._work(part, site).activation for site in part.sites()}


def _site(model: Model | None, name: str) -> Site | None:
    return None if model is None else next((site for site in model.sites() if site.name == name), None)


def _is_static(site: Site) -> bool:
    """Whether it is quantised with ranges of activations that were fixed before."""
    return site.quantization is not None and site.node.op_type != "MatMulInteger"


def _own_form(site: Site) -> str:
    return _DENSE if site.quantization is None else _form_of(site, str(INT8_DENSE))


def _form_of(site: Site, layout: str) -> str:
    """The name in cost models of a layout of a site."""
    return f"static {layout}" if _is_static(site) and layout.startswith("int8") else layout
