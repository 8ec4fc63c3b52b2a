"""Confirm the chosen layouts on the whole model: a gain of one operator can be lost at its borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from sparsecc.errors import UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.lower.choose_layout import GAIN_KEY, LAYOUT_KEY, unmark
from sparsecc.passes.lower.recurrent import leads
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["ConfirmLayout", "best_subset"]

#: Subsets tried first: the sites whose own gain is at least this.
_GAIN_STEPS = (0.0, 1.0, 1.2, 1.5, 2.0, 3.0)
#: A site that gains this much alone has gained in the model wherever it was measured.
_SAFE_GAIN = 3.0


def best_subset(
    gains: Mapping[str, float], relative_time: Callable[[frozenset[str]], float], max_trials: int
) -> tuple[frozenset[str], float]:
    """The set of sites that makes the whole model fastest, found in at most about ``max_trials`` measurements.

    First the sets of all sites whose own gain reaches a step, then a descent from the best of them in which runs
    of neighbouring sites (halved each round) are switched on or off together: what one operator gains alone, it
    can lose where its neighbours are in another memory layout. Sites that gain a lot alone are not doubted.

    Args:
        gains: dense time / sparse time of each site alone, in graph order.
        relative_time: measured time of the model with that set lowered / time of the dense model.
        max_trials: most sets measured after the first steps.

    Returns:
        The best set and its relative time.
    """
    names = list(gains)
    tried: dict[frozenset[str], float] = {frozenset(): relative_time(frozenset())}
    for step in _GAIN_STEPS:
        subset = frozenset(name for name in names if gains[name] >= step)
        if subset not in tried:
            tried[subset] = relative_time(subset)
    best = min(tried, key=lambda chosen: (tried[chosen], len(chosen)))
    doubtful = [name for name in names if gains[name] < _SAFE_GAIN]
    run = len(doubtful) // 2
    while run >= 1 and max_trials > 0:
        for start in range(0, len(doubtful), run):
            neighbours = frozenset(doubtful[start : start + run])
            for candidate in (best | neighbours, best - neighbours):
                if candidate in tried or max_trials <= 0:
                    continue
                tried[candidate] = relative_time(candidate)
                max_trials -= 1
                if tried[candidate] < tried[best]:
                    best = candidate
        run //= 2
    return best, tried[best]


@dataclass(frozen=True)
class ConfirmLayout(Pass):
    """Keep only those layout marks with which the whole model is measured fastest.

    Changes: removes ``sparsecc.layout`` marks (metadata only). Runs between ``choose-layout`` and ``lower-sparse``.

    Sample: ``confirm-layout{max-trials=8}``

    Attributes:
        min_gain: dense time / new time the whole model must reach, else every mark goes.
        max_trials: most subsets measured beyond the first few; 0 tries only those.
    """

    name: ClassVar[str] = "confirm-layout"
    lossless: ClassVar[bool] = True

    min_gain: float = 1.02
    max_trials: int = 12

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Measure subsets of the marked sites and unmark what the fastest leaves out."""
        report = PassReport(self.name)
        marked = {
            site.name: site
            for site in model.sites()
            if LAYOUT_KEY in site.nodes[0].metadata_props and leads(site)
        }
        if not marked:
            report.note("no site is marked: the model stays dense")
            return report
        costs = ctx.costs
        if costs is None:
            raise UsageError(
                "confirm-layout needs a source of measured costs; run it through sparsecc.optimize"
            )
        gains = {name: float(site.nodes[0].metadata_props[GAIN_KEY]) for name, site in marked.items()}
        trials = 0

        def relative_time(chosen: frozenset[str]) -> float:
            nonlocal trials
            trials += 1
            ctx.progress("timing whole models", trials, trials + 1)
            return costs.relative_time(model, chosen, ctx.quantization)

        best, relative = best_subset(gains, relative_time, self.max_trials)
        ctx.progress("timing whole models", trials, trials)
        if relative * self.min_gain > 1:
            best = frozenset()
        self._unmark({name: site for name, site in marked.items() if name not in best}, report)
        if best:
            report.note(
                f"{len(best)} of {len(marked)} sites lowered: {1 / relative:.2f}x the dense model's speed"
            )
        else:
            report.note(f"no set of sites makes the whole model {self.min_gain}x faster: it stays dense")
        return report

    def _unmark(self, sites: Mapping[str, Site], report: PassReport) -> None:
        for name, site in sites.items():
            marks = site.node.metadata_props
            layout, gain = marks[LAYOUT_KEY], float(marks[GAIN_KEY])
            unmark(site)
            report.change(
                name, f"dense after all: {layout} gains {gain:.2f}x alone but costs the whole model time"
            )
