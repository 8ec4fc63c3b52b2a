"""Running a pipeline on a model and proving what came out: no slower, and what the passes promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparsecc import emit
from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.plan.acceptance import Inputs, Judge, Latency, check_agreement
from sparsecc.plan.costs import CostTable
from sparsecc.plan.decisions import SiteDecision, decisions
from sparsecc.plan.part_costs import has_sparse_ops
from sparsecc.plan.predicted import PredictedCosts
from sparsecc.plan.pricing import PartCosts
from sparsecc.plan.rounds import Outcome, run_where_it_pays
from sparsecc.plan.snapshots import Snapshots
from sparsecc.pm import Instrument, PassContext, Pipeline

__all__ = ["Made", "Setting", "make"]


@dataclass(frozen=True)
class Setting:
    """What stays the same whichever pipeline runs.

    Attributes:
        original: the model as it was read; never changed.
        data: calibration data, if any.
        inputs: those that results are compared on.
        timed: those that models are timed on.
        table: where measured times are kept.
        costs: times of parts by themselves, and of passes.
        context: of the passes; each run gets a copy.
        keep_slower: results that are slower than ``original`` stand.
        library: whether the operator library is there.
        elsewhere: predicts times where the target is not this machine; then it is ``costs`` too.
    """

    original: Model
    data: Calibration | None
    inputs: Inputs
    timed: Inputs
    table: CostTable
    costs: PartCosts
    context: PassContext
    keep_slower: bool
    library: bool
    elsewhere: PredictedCosts | None = None

    def observed(self, instruments: Sequence[Instrument]) -> Setting:
        """The same setting, with these instruments around every pass."""
        return replace(self, context=replace(self.context, instruments=list(instruments)))


@dataclass(frozen=True)
class Made:
    """What came out of a pipeline.

    Attributes:
        model: the result, ready to be written; the input, or its dense form, where the result was slower.
        outcome: the run that made it.
        kept: whether ``model`` is what that run made.
        dense: the model before its sites were lowered.
        sites: one decision per site, in graph order.
        latency: of the input and of ``model``, measured at the end.
        max_rel_l2: largest relative L2 distance between what the passes promised to keep and what they made of it.
        notes: what the user should know.
    """

    model: Model
    outcome: Outcome
    kept: bool
    dense: Model
    sites: list[SiteDecision]
    latency: Latency
    max_rel_l2: float
    notes: tuple[str, ...]


def _predictions(costs: PredictedCosts, marked: Model | None) -> Callable[[Model], Latency]:
    """What predicts the time of a model; with sparse operators it is ``marked``, lowered."""

    def predict(model: Model) -> Latency:
        lowered = marked if marked is not None and has_sparse_ops(model) else None
        time = costs.model_ms(model, ()) if lowered is None else costs.model_ms(lowered)
        before, threads = costs.input_ms, costs.times.threads
        return Latency(
            before, time.ms, before / time.ms, threads, source="predicted", uncertainty=time.spread
        )

    return predict


def make(pipeline: Pipeline, setting: Setting) -> Made:
    """Run ``pipeline`` on a copy of the model, replace a result that is slower, and check every promise.

    Raises:
        UsageError: the passes need what is not there.
        VerificationError: the result does not compute what the pruned dense model computes.
    """
    snapshots, notes = Snapshots(), list[str]()
    context = replace(setting.context, instruments=[*setting.context.instruments, snapshots])
    outcome = run_where_it_pays(pipeline, setting.original, context)
    candidate = outcome.model
    emit.finalize(candidate)
    judge = Judge(
        setting.original, setting.timed, setting.table, context.threads, setting.keep_slower, setting.library,
        None if setting.elsewhere is None else _predictions(setting.elsewhere, snapshots.before_lowering),
    )  # fmt: skip
    lossless = all(item.lossless for item in pipeline.passes)
    work, latency = judge.not_slower(candidate, snapshots.before_lowering if lossless else None, notes)
    kept = work is candidate
    promises = [*snapshots.promises, (snapshots.start or work, work)] if kept else [(setting.original, work)]
    distance = max(
        check_agreement(before, after, setting.inputs, setting.library) for before, after in promises
    )
    dense = snapshots.before_lowering if kept and snapshots.before_lowering is not None else work
    sites = decisions(dense, work, outcome, kept=kept, original=setting.original)
    return Made(work, outcome, kept, dense, sites, latency, distance, tuple(notes))
