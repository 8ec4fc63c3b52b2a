"""Models within a budget: choosing, making, measuring, and what is told of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc.errors import BudgetError, VerificationError
from sparsecc.ir.files import file_sha256, model_files
from sparsecc.ir.outputs import check_output
from sparsecc.plan import (
    Asked,
    Choice,
    Limits,
    Made,
    PlanFile,
    Planner,
    Setting,
    Verdict,
    open_planner,
    pipeline_of,
    plan_of,
)
from sparsecc.pm import Pipeline
from sparsecc.report.planned import planned_parts

__all__ = ["Planned", "Prospect", "plan_and_make", "prospect"]


@dataclass(frozen=True)
class Planned:
    """A choice that was made real.

    Attributes:
        planner: that made it.
        limits: that it had to keep.
        asked: what the user asked for.
        verdict: the end of the search.
        made: the model.
    """

    planner: Planner
    limits: Limits
    asked: Asked
    verdict: Verdict
    made: Made

    @property
    def pipeline(self) -> Pipeline:
        """What made the model."""
        return pipeline_of(self.planner.items, self.verdict.best.choice, **self.planner.options)

    def to_json(self) -> dict[str, Any]:
        """Parts of a run document."""
        return planned_parts(
            self.planner, self.verdict.best.choice, self.limits, self.asked.texts, self.verdict
        )


@dataclass(frozen=True)
class Prospect:
    """A choice that was not made real.

    Attributes:
        planner: that made it.
        limits: that it is predicted to keep.
        asked: what the user asked for.
        choice: one candidate for each item.
        notes: what the user should know.
    """

    planner: Planner
    limits: Limits
    asked: Asked
    choice: Choice
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A run document without an output."""
        return {
            "bytes_before": self.planner.bytes_before,
            **planned_parts(self.planner, self.choice, self.limits, self.asked.texts),
            "notes": list(self.notes),
        }

    def plan_file(self, source: Path) -> PlanFile:
        """The choice as a recipe that can be edited and run."""
        setting = self.planner.setting
        about: dict[str, str | int | float] = {
            "model": file_sha256(source),
            "data": setting.context.calibration_for("plan").fingerprint(),
            "seed": setting.context.seed,
            "metric": self.planner.metric.name,
            **{f"budget_{kind}": text for kind, text in self.asked.texts.items()},
        }
        return plan_of(self.planner.items, self.choice, about=about, **self.planner.options)


def prospect(
    setting: Setting,
    asked: Asked,
    source: Path,
    calibration_data: str | os.PathLike[str] | None,
    *,
    standard_ops_only: bool,
) -> Prospect:
    """Choose within the budget by what is predicted; nothing is made.

    Raises:
        BudgetError: no choice is predicted to keep it.
        UsageError: there is no calibration data, or the metric does not suit the model.
    """
    planner = open_planner(
        setting,
        asked,
        source=source,
        destination=source,
        calibration_data=calibration_data,
        standard_ops_only=standard_ops_only,
    )
    limits = planner.limits(asked.budget())
    choice = planner.choose(limits)
    if choice is None:
        raise BudgetError(f"{_wanted(limits)} cannot be reached: {_least(planner)}; ask for more")
    return Prospect(planner, limits, asked, choice, (*planner.notes, *setting.table.keep()))


def plan_and_make(
    setting: Setting,
    asked: Asked,
    source: Path,
    destination: Path,
    calibration_data: str | os.PathLike[str] | None,
    *,
    standard_ops_only: bool,
) -> Planned:
    """Choose, make and measure until the budget is kept.

    Raises:
        BudgetError: it cannot be, in time or size.
        VerificationError: it cannot be, in the metric; the best model is beside the output.
        UsageError: the input lies where that would go.
    """
    aside = destination.with_name(f"{destination.stem}.rejected{destination.suffix}")
    if asked.budget().drop is not None:
        check_output(aside, model_files(source))
    planner = open_planner(
        setting,
        asked,
        source=source,
        destination=destination,
        calibration_data=calibration_data,
        standard_ops_only=standard_ops_only,
    )
    limits = planner.limits(asked.budget())
    verdict = planner.search(limits, asked.attempts)
    if verdict is None:
        raise BudgetError(f"{_wanted(limits)} cannot be reached: {_least(planner)}; ask for more")
    best, made = verdict.best, planner.made(verdict)
    if "drop" in verdict.misses:
        made.model.save(aside)
        lost = "is no score" if limits.drop is None else f"loses more than {limits.drop:.3g}"
        raise VerificationError(
            f"{planner.metric.name} {planner.score_before:.6g} -> {best.score:.6g} {lost} "
            f"({len(verdict.attempts)} models made); the best is {aside.name} ({best.ms:.4g} ms): allow more with "
            "--max-drop, or a larger budget"
        )
    if verdict.misses and not asked.allow_partial:
        raise BudgetError(
            f"{_wanted(limits)} was not reached: {best.ms:.4g} ms, {best.bytes} bytes after {len(verdict.attempts)} "
            "models; ask for more, or for the closest with --allow-partial"
        )
    return Planned(planner, limits, asked, verdict, made)


def _wanted(limits: Limits) -> str:
    told = [] if limits.ms is None else [f"{limits.ms:.4g} ms"]
    return " and ".join([*told, *([] if limits.bytes is None else [f"{limits.bytes:.0f} bytes"])])


def _least(planner: Planner) -> str:
    """The least that is predicted, of time and of size."""
    found = []
    for quantity, unit in (("ms", "ms"), ("bytes", "bytes")):
        choice = planner.fastest if quantity == "ms" else planner.smallest
        value = planner.predicted_ms(choice) if quantity == "ms" else planner.predicted_bytes(choice)
        found.append(f"{value:.4g} {unit}" if quantity == "ms" else f"{value} {unit}")
    return f"the least predicted are {' or '.join(found)}"
