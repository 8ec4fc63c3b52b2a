"""What became of each site, and why, from the reports of the passes."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.ir.packed import packed_sites
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.plan.rounds import Outcome
from sparsecc.pm import PassReport
from sparsecc.sparse import INT8_DENSE, density

__all__ = ["SiteDecision", "decisions"]

#: What the passes that make numbers narrower did not do, by name.
_NARROWED = {"quantize": "not quantised", "round-weights": "not rounded"}

#: Share of zeros of a dense part from which on they are told: some numbers are zero by chance.
_ODD_ZEROS = 0.05


@dataclass(frozen=True)
class SiteDecision:
    """What became of one site, and why.

    Attributes:
        site: its name.
        op: MatMul, Gemm, Conv, LSTM or GRU.
        shape: (outputs N, reduction length K).
        density: numbers that stand for its weights in the emitted model, zeros not counted, as a share of all.
        layout: ``dense`` or the layout of the sparse operator, with ``int8`` in front of it if quantised; for a site
            that was factorised the form of its factors.
        reason: the numbers or the reason behind the choice.
    """

    site: str
    op: str
    shape: tuple[int, int]
    density: float
    layout: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def decisions(
    dense: Model, result: Model, outcome: Outcome, *, kept: bool, original: Model | None = None
) -> list[SiteDecision]:
    """Return one line per site of the dense model: the layout it got in ``result`` and the last reason given for it.

    Sites that were factorised are one line, and one for each part of them that became sparse or narrow.

    Args:
        dense: the model before its sites were lowered.
        result: the model that is written.
        outcome: the run of the pipeline that made it.
        kept: whether ``result`` is what that run made, not what stands in for it because it was slower.
        original: the input model, if sites that read less than in it shall say so.
    """
    lowered = {
        name: packed.layout for packed in packed_sites(result) for name in packed.members or (packed.name,)
    }
    reasons = _reasons(outcome.reports)
    for name, reports in outcome.left_out.items():
        if name not in lowered:
            reasons[name] = f"not pruned, which would gain nothing: {_reasons(reports)[name]}"
    changes = [] if kept else [change for report in outcome.reports for change in report.changed]
    told = {
        change.site for change in changes if change.detail and change.detail in reasons.get(change.site, "")
    }
    reasons |= {name: f"not used, the model was slower with it: {reasons[name]}" for name in told}
    found: list[SiteDecision] = []
    inputs = {} if original is None else {site.name: _inputs(site) for site in original.sites()}
    rewritten = _with_zeros(_rewritten(outcome.reports), dense, lowered)
    for site in dense.sites():
        layout = lowered.get(site.name, "dense" if site.quantization is None else str(INT8_DENSE))
        whole = rewritten.get(site.node.metadata_props.get(PART_KEY, ""))
        if whole is not None and whole not in found:
            found.append(whole)
        if whole is None or layout != "dense":  # dense parts of a rewritten site are told by what it became
            reason = reasons.get(site.name, "no pass chose otherwise")
            if _inputs(site) < inputs.get(site.name, 0):
                reason = f"{inputs[site.name]} -> {_inputs(site)} inputs; {reason}"
            found.append(SiteDecision(site.name, site.op, site.shape, density(site.numpy()), layout, reason))
    if kept:  # what a session unpacks is no site any more
        found += [whole for whole in rewritten.values() if whole not in found]
    return found + [
        SiteDecision(
            packed.name,
            packed.op,
            packed.tensor.shape,
            packed.tensor.nnz / (packed.tensor.shape[0] * packed.tensor.shape[1]),
            packed.layout,
            reasons.get(packed.name, "it was sparse already"),
        )
        for packed in packed_sites(dense)
    ]


def _inputs(site: Site) -> int:
    """How many channels or numbers a site reads."""
    return site.shape[1] // site.kernel_size


def _rewritten(reports: Sequence[PassReport]) -> dict[str, SiteDecision]:
    """What became of sites that were factorised: all of each one's parts together."""
    changes = [
        item for report in reports if report.pass_name.startswith("factor-") for item in report.changed
    ]
    return {
        change.site: SiteDecision(
            change.site,
            str(change.numbers["op"]),
            (int(change.numbers["outputs"] or 0), int(change.numbers["inputs"] or 0)),
            float(change.numbers["parameters"] or 0),
            str(change.numbers["form"]),
            change.detail.removeprefix(f"{change.numbers['form']}: "),
        )
        for change in changes
        if "form" in change.numbers
    }


def _with_zeros(
    rewritten: dict[str, SiteDecision], dense: Model, lowered: Container[str]
) -> dict[str, SiteDecision]:
    """Count the zeros of sparse parts that are stored dense after all, which the pass that made them did not count."""
    told = dict(rewritten)
    for site in dense.sites():
        whole = told.get(site.node.metadata_props.get(PART_KEY, ""))
        if whole is None or site.name in lowered:
            continue
        weight = site.numpy()
        zeros = weight.size - int(np.count_nonzero(weight))
        if zeros > _ODD_ZEROS * weight.size:
            share = whole.density + zeros / math.prod(whole.shape)
            reason = (
                f"{whole.reason}; its sparse part is faster dense in this model: {share:.3g} with the zeros"
            )
            told[whole.site] = replace(whole, density=share, reason=reason)
    return told


def _reasons(reports: Sequence[PassReport]) -> dict[str, str]:
    """Why each site is as it is: the last choice, after what made it smaller or why it was not pruned, if so."""
    unpruned: dict[str, str] = {}
    wider: dict[str, str] = {}
    chosen: dict[str, str] = {}
    for report in reports:
        for skip in report.skipped:
            if report.pass_name.startswith(("prune-", "sparse-")):
                unpruned[skip.site] = f"not pruned: {skip.reason}; "
            elif report.pass_name.startswith("factor-"):
                unpruned[skip.site] = f"not factorised: {skip.reason}; "
            elif report.pass_name in _NARROWED:
                wider[skip.site] = f"{wider.get(skip.site, '')}{_NARROWED[report.pass_name]}: {skip.reason}; "
            elif report.pass_name not in ("lower-sparse", "restore-dense"):
                chosen[skip.site] = skip.reason
            else:
                chosen.setdefault(skip.site, skip.reason)
        for change in report.changed:
            if report.pass_name == "restore-dense":
                chosen[change.site] = f"{chosen.get(change.site, '')}; {change.detail}".removeprefix("; ")
            elif report.pass_name.startswith("factor-") or report.pass_name == "prune-structured":
                unpruned[change.site] = f"{change.detail}; "  # whatever becomes of the smaller weight then
            elif report.pass_name != "lower-sparse":
                chosen[change.site] = change.detail
    return {
        site: (unpruned.get(site, "") + wider.get(site, "") + chosen.get(site, "")).removesuffix("; ")
        for site in {**unpruned, **wider, **chosen}
    }
