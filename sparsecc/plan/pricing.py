"""Forms of parts and what they take, timed before anything is fitted."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import sparsecc
from sparsecc.errors import SparseccError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.lower.recurrent import is_recurrent
from sparsecc.passes.prune.base import PrunePass
from sparsecc.passes.quantize.round_weights import RoundWeights
from sparsecc.plan.items import Candidate, Estimate
from sparsecc.plan.part_data import PartCalibration
from sparsecc.plan.part_forms import Passes, sketched
from sparsecc.plan.parts import Part
from sparsecc.plan.results import Results
from sparsecc.pm import PassContext, Pipeline, RewriteCost, get_pass, pass_names, search_families
from sparsecc.sparse import Floats, Layout, Pattern, density

__all__ = ["FAMILIES", "Family", "PartCosts", "Priced", "PricedForm", "Pricing", "Resource", "form_families"]

#: Passes whose forms are tried where nothing else is asked for: of forms that take the same time, the best fit.
FAMILIES = (
    "prune-structured", "factor-rrr", "factor-tucker", "factor-spatial-svd", "prune-sparsegpt", "quantize",
    "round-weights", "quantize-embedding",
)  # fmt: skip

#: Passes that change tables, which are items of their own, and no part.
_OF_TABLES = ("quantize-embedding",)

Resource = Literal["ms", "bytes"]

#: Version of what is kept of earlier runs.
_FORMAT = 1
#: Share of the time, or of the bytes, of its rivals that a form may take and still be worth fitting.
_WORTH = 0.98
#: Density up to which a weight may be faster in a sparse operator as it is.
_SPARSE = 0.85


class PartCosts(Protocol):
    """Times of parts of a model by themselves."""

    def part_rewritten(
        self,
        part: Model,
        rewrite: Callable[[Model], None],
        key: str,
        *,
        custom_ops: bool,
        layout: Layout | None = None,
    ) -> tuple[RewriteCost, bool]:
        """See ``MeasuredCosts.part_rewritten``."""


@dataclass(frozen=True)
class Family:
    """Forms of one kind, mildest first.

    Attributes:
        specs: passes of each.
        rivals: passes of forms that lose less and that each of these must beat.
    """

    specs: tuple[Passes, ...]
    rivals: tuple[Passes, ...] = ()


def form_families(families: Collection[str], *, convolutions: bool, fine: bool = False) -> list[Family]:
    """Return all forms that the passes named declare, alone and followed by those that narrow the type of values.

    Args:
        families: names of passes with search ranges.
        convolutions: whether the model has any: its values are quantised with ranges of the calibration data then,
            else with ranges found at run time. Mixtures do not exist.
        fine: whether amounts between those of the ranges are tried too.

    Raises:
        UsageError: a pass without a search range.
    """
    forms: list[tuple[Passes, ...]] = []
    values: list[str] = []
    for name in families:
        pass_type = get_pass(name)
        if not pass_type.search:
            raise UsageError(f"{name} declares no search range; those that do: {', '.join(_searched())}")
        if name in _OF_TABLES:
            continue
        for family in search_families(pass_type, fine=fine):
            if not pass_type.narrows:
                forms.append(tuple((spec,) for spec in family))
            elif name != "quantize" or convolutions == ("activations=static" in family[0]):
                values += family
    found = [Family(((value,),)) for value in values]
    for form in forms:  # those with the same passes in front one after another
        found.append(Family(form))
        found += [Family(tuple((*spec, value) for spec in form), ((value,),)) for value in values]
    return found


def _searched() -> list[str]:
    return [name for name in pass_names() if get_pass(name).search]


@dataclass(frozen=True)
class PricedForm:
    """A form that was timed."""

    passes: tuple[str, ...]
    cost: RewriteCost
    sparse: bool

    def share(self, resource: Resource) -> float:
        """What it takes as a share of what the dense form takes."""
        cost = self.cost
        own, dense = (cost.ms, cost.dense_ms) if resource == "ms" else (cost.bytes, cost.dense_bytes)
        return own / dense if dense else math.inf


@dataclass(frozen=True)
class Priced:
    """Forms of a part.

    Attributes:
        dense: milliseconds and bytes of the part as it is, and the spread of the former.
        source: of its time; see ``Estimate``.
        forms: worth fitting.
        dropped: by passes, why others are not.
        families: all passes, by family, mildest first.
        reason: why there are none.
        before: the part with the zeros it has, where sparse operators make it faster than dense.
    """

    dense: tuple[float, int, float]
    forms: tuple[PricedForm, ...] = ()
    dropped: tuple[Candidate, ...] = ()
    families: tuple[tuple[Passes, ...], ...] = ()
    reason: str = ""
    before: PricedForm | None = None
    source: str = "measured"


class Pricing:
    """Times the forms of parts.

    Args:
        costs: where times come from.
        resources: what counts.
        custom_ops: whether sparse operators may be used.
        results: where it is kept which forms parts do not have.
        seed: of everything random.
    """

    def __init__(
        self, costs: PartCosts, resources: Sequence[Resource], custom_ops: bool, results: Results, seed: int
    ) -> None:
        self._costs = costs
        self._resources = resources
        self._custom_ops = custom_ops
        self._results = results
        self._seed = seed

    def priced(self, part: Part, shape: tuple[int, ...] | None, families: Sequence[Family]) -> Priced:
        """Time the forms of a part, as far as they can be worth it."""
        nothing = (0.0, sum(site.numpy().nbytes for site in part.sites), 0.0)
        if part.reason is not None or shape is None:
            return Priced(nothing, reason=part.reason or "not timed: the inputs given do not reach it")
        alone = part.timed(shape)
        key = _shape_key(alone)
        timed: dict[Passes, PricedForm | str] = {}
        sparse = any(density(site.numpy()) <= _SPARSE for site in alone.sites())
        if self._custom_ops and (sparse or part.recurrent is not None):
            timed[()] = self._timed(alone, key, ())
        before = timed.get(())
        kept: list[PricedForm] = []
        dropped: list[Candidate] = []
        for family in families:
            said = ""
            for number, passes in reversed(list(enumerate(family.specs))):
                if isinstance(timed.get(passes[:-1]), str):
                    continue  # what it begins with does not exist
                found = timed[passes] = self._timed(alone, key, passes)
                if isinstance(found, str):
                    if found != said:  # once for all of a family
                        dropped.append(_dropped(passes, found, found))
                    said = found
                    continue
                why = self._not_worth(found, family.rivals, timed)
                if why is None:
                    kept.append(found)
                    continue
                dropped.append(_dropped(passes, found, why))
                stronger = ",".join(passes)
                dropped += [
                    _dropped(other, "", f"milder than {stronger}, which does not pay")
                    for other in family.specs[:number]
                ]
                break
        known = [item.cost for item in timed.values() if isinstance(item, PricedForm)]
        if not known:
            return Priced(nothing, dropped=tuple(dropped), reason="none of its forms could be timed")
        dense = [cost.dense_ms for cost in known]
        middle = statistics.median(dense)
        spread = statistics.median(abs(ms - middle) for ms in dense) * 2.44 / middle if middle else 0.0
        spread = max(spread, min(cost.spread for cost in known))
        return Priced(
            (middle, known[0].dense_bytes, spread), tuple(kept), tuple(dropped),
            tuple(family.specs for family in families),
            before=before if isinstance(before, PricedForm) and before.share("ms") < 1 else None,
            source="measured" if any(cost.source == "measured" for cost in known) else "interpolated",
        )  # fmt: skip

    def _timed(self, alone: Model, key: str, passes: Passes) -> PricedForm | str:
        """Time and bytes of a form, or why there is none."""
        refused: list[str] = []
        recurrent = any(is_recurrent(site) for site in alone.sites())
        name = f"{key} {','.join(passes) or 'as it is'}"

        def rewrite(own: Model) -> None:
            reason = sketched(own, passes, self._sketch_context(own))
            if reason is not None:
                refused.append(reason)
                raise _NoFormError(reason)

        known = self._results.get("refused", f"{_FORMAT} {sparsecc.__version__} {name}")
        if known is not None:
            return str(known["reason"])
        try:
            cost, sparse = self._costs.part_rewritten(
                alone,
                rewrite,
                name,
                custom_ops=self._custom_ops,
                layout=_layout(passes, whole=recurrent),
            )
        except SparseccError as error:
            if refused:
                self._results.put(
                    "refused", f"{_FORMAT} {sparsecc.__version__} {name}", {"reason": refused[0]}
                )
            return str(error)
        return PricedForm(passes, cost, sparse)

    def _sketch_context(self, own: Model) -> PassContext:
        return PassContext(seed=self._seed, calibration=PartCalibration.of_noise(own), threads=1)

    def _not_worth(
        self,
        form: PricedForm,
        rivals: Sequence[Passes],
        timed: Mapping[Passes, PricedForm | str],
    ) -> str | None:
        """Why a form is not fitted; None where it takes less of some resource than all its rivals."""
        before = [*rivals, form.passes[:-1]]
        against = [found for passes in before if isinstance(found := timed.get(passes), PricedForm)]
        reasons = []
        for resource in self._resources:
            own, dense = (
                form.share(resource),
                form.cost.dense_ms if resource == "ms" else form.cost.dense_bytes,
            )
            best = min([1.0, *(item.share(resource) for item in against)])
            if own < best * _WORTH:
                return None
            rival = "dense" if best == 1.0 else "with less of it"
            unit = "ms" if resource == "ms" else "bytes"
            reasons.append(f"{own * dense:.4g} {unit}, {rival} {best * dense:.4g} {unit}")
        return "not fitted, it does not pay: " + "; ".join(reasons)


class _NoFormError(SparseccError):
    """A part has no such form."""


def _layout(passes: Sequence[str], *, whole: bool) -> Layout | None:
    """The layout of the zeros that these passes make; None where they make none, or not everywhere.

    With ``whole`` weights without zeros have one too.
    """
    pattern = Pattern.parse("16x1") if whole else None
    values: Floats = "fp32"
    for pass_ in Pipeline.parse(",".join(passes)).passes:
        if isinstance(pass_, PrunePass):
            pattern = pass_.pattern if type(pass_).sketch is PrunePass.sketch else None
        elif isinstance(pass_, RoundWeights):
            values = pass_.values
    return None if pattern is None else Layout(pattern, values)


def _dropped(passes: Passes, found: PricedForm | str, why: str) -> Candidate:
    if isinstance(found, str):
        return Candidate(passes, math.nan, Estimate(math.nan, "measured"), 0, note=why)
    return Candidate(
        passes, math.nan, Estimate(found.cost.ms, found.cost.source), found.cost.bytes, found.sparse, note=why
    )


def _shape_key(alone: Model) -> str:
    """What forms and times of a part depend on: opset, operators, attributes, shapes; zeros where there are many."""
    graph = alone.onnx.graph
    lines = [f"opset {alone.opset}", *(f"{value.shape} {value.type}" for value in graph.inputs)]
    numbers = {value: number for number, value in enumerate(graph.inputs)}
    for node in graph:
        names = []
        for value in node.inputs:
            tensor = None if value is None else value.const_value
            if value is None or tensor is None:
                names.append("" if value is None else str(numbers.get(value)))
                continue
            small = tensor.numpy().tolist() if tensor.size <= 8 else ""
            names.append(f"{tensor.dtype.name}{list(tensor.shape.numpy())}{small}")
        for value in node.outputs:
            numbers[value] = len(numbers)
        attributes = sorted(f"{key}={item}" for key, item in node.attributes.items())
        lines.append(f"{node.op_type}({','.join(names)}){attributes}")
    zeros = [round(density(site.numpy()), 2) for site in alone.sites()]
    digest = hashlib.sha256("\n".join([*lines, str(zeros)]).encode()).hexdigest()[:16]
    shapes = "+".join("x".join(map(str, site.shape)) for site in alone.sites())
    return f"{shapes} {digest}"
