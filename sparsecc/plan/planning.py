"""Opening a planner: what the model may become, what each change does to its metric, and what it takes now."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsecc import verify
from sparsecc.errors import UsageError
from sparsecc.exec import open_executor
from sparsecc.ir.files import file_bytes
from sparsecc.plan.analysis import analyze, read_analysis, tidied
from sparsecc.plan.budget import parse_drop, parse_latency, parse_size
from sparsecc.plan.candidates import FAMILIES
from sparsecc.plan.making import Setting
from sparsecc.plan.metric import OutputError, open_metric, read_labels
from sparsecc.plan.planner import Budget, Planner
from sparsecc.plan.results import begin

__all__ = ["DEFAULT_DROP", "Asked", "open_planner"]

#: What the metric may lose where nothing is asked.
DEFAULT_DROP = "1%"
#: Most seconds spent on timing the input model.
_INPUT_SECONDS = 6.0


@dataclass(frozen=True)
class Asked:
    """What a user asks of a planner, as text where it comes from a command line.

    Attributes:
        budget_latency: ``5ms``, or ``0.5x`` of the time of the input.
        budget_size: ``20MB``, or ``0.5x`` of the size of the input.
        max_drop: ``1%`` of the input's score, or a number in the unit of the metric.
        metric: as for ``open_metric``; by default how much the outputs change.
        families: names of passes whose forms are tried, with commas between them; by default ``FAMILIES``.
        analysis: file that ``sparsecc analyze`` wrote, instead of a new analysis.
        executor: where forms are fitted: ``dask://HOST:PORT``; by default threads.
        attempts: how many models are made and measured, at most; by default ``ATTEMPTS``.
        fine: whether amounts between those of the search ranges are tried too; by default not.
        resume: True: an earlier run on the model and data must have left results; False: they are not used; by default
            they are used if they are there.
        allow_partial: write the closest model also where it misses the budget of time or size.
    """

    budget_latency: str | None = None
    budget_size: str | None = None
    max_drop: str | None = None
    metric: str | None = None
    families: str | None = None
    analysis: str | os.PathLike[str] | None = None
    executor: str | None = None
    attempts: int | None = None
    fine: bool | None = None
    resume: bool | None = None
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise UsageError(f"attempts must be 1 or more, got {self.attempts}")
        if self.analysis is not None and (self.families is not None or self.fine):
            raise UsageError(
                "what may be chosen is in the analysis: leave out --analysis, or give --families and --fine to "
                "'sparsecc analyze'"
            )
        self.budget()

    def budget(self) -> Budget:
        """The limits; a drop of 1 % of the score where nothing else is asked.

        Raises:
            UsageError: a limit that cannot be read.
        """
        latency = None if self.budget_latency is None else parse_latency(self.budget_latency)
        size = None if self.budget_size is None else parse_size(self.budget_size)
        if self.max_drop is None:
            return Budget(latency, size, None if latency or size else parse_drop(DEFAULT_DROP))
        return Budget(latency, size, parse_drop(self.max_drop))

    @property
    def texts(self) -> dict[str, str]:
        """The limits as they were asked for, by kind."""
        found = {"ms": self.budget_latency, "bytes": self.budget_size, "drop": self.max_drop}
        return {kind: text for kind, text in found.items() if text is not None}


def open_planner(
    setting: Setting,
    asked: Asked,
    *,
    source: Path,
    destination: Path,
    calibration_data: str | os.PathLike[str] | None,
    standard_ops_only: bool = False,
) -> Planner:
    """Return a planner for the model of ``setting``.

    Args:
        setting: of the run; it has calibration data.
        asked: by the user.
        source: the model's file.
        destination: where the result will go.
        calibration_data: where the inputs of ``setting`` are from: labels are looked for there.
        standard_ops_only: use no custom operators.

    Raises:
        UsageError: there is no calibration data, or the metric does not suit the model.
    """
    if setting.data is None:
        raise UsageError(
            "planning needs inputs to see what a change does: give --calibration-data PATH, or synthetic for a trial"
        )
    context = setting.context
    metric = open_metric(
        asked.metric or OutputError.name,
        setting.original,
        setting.data,
        labels=None if calibration_data is None else read_labels(calibration_data),
        threads=context.threads,
        library=setting.library,
    )
    results = begin(
        setting.original.fingerprint(), setting.data.fingerprint(), context.seed, resume=asked.resume
    )
    custom_ops = setting.library and not standard_ops_only
    if asked.analysis is not None:
        if setting.elsewhere is not None:
            raise UsageError(
                "an analysis holds times of this machine: leave out --analysis for another target"
            )
        found = read_analysis(Path(asked.analysis), tidied(setting), setting.data.fingerprint())
    else:
        with open_executor(asked.executor) as workers:
            found = analyze(
                setting,
                None if isinstance(metric, OutputError) else metric,
                custom_ops=custom_ops,
                families=FAMILIES if asked.families is None else tuple(asked.families.split(",")),
                fine=bool(asked.fine),
                resources=("ms",) if asked.budget_size is None else ("ms", "bytes"),
                results=results,
                executor=workers,
            )
    return Planner(
        setting,
        found.items,
        metric,
        {"standard_ops_only": not custom_ops, "calibrated": True},
        ms=_time_of_input(setting),
        nbytes=file_bytes(source),
        destination=destination,
        notes=found.notes,
        results=results,
        effort=found.effort,
        score=found.score if asked.analysis is None else None,
    )


def _time_of_input(setting: Setting) -> float:
    """Median ms of one run of the input model."""
    if setting.elsewhere is not None:
        return setting.elsewhere.input_ms
    shapes = json.dumps({name: list(array.shape) for name, array in sorted(setting.timed.items())})
    digest = hashlib.sha256(f"{setting.original.fingerprint()} {shapes}".encode()).hexdigest()[:16]

    def measure() -> Mapping[str, float]:
        result = verify.benchmark(
            [setting.original], setting.timed, threads=setting.context.threads, max_seconds=_INPUT_SECONDS
        )
        return {"ms": result.models[0].median_ms}

    key = f"input {digest} threads={setting.context.threads}"
    return setting.table.get_or_measure(key, ["ms"], measure)["ms"]
