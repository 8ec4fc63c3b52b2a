"""An analysis of a model: what each part may become, at which error and time, and how much the model cares."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsecc.errors import UsageError
from sparsecc.exec import Executor
from sparsecc.ir import Model
from sparsecc.ir.replacing import replacing
from sparsecc.plan.candidates import FAMILIES, find_items
from sparsecc.plan.items import Candidate, Estimate, Item
from sparsecc.plan.making import Setting
from sparsecc.plan.metric import Metric
from sparsecc.plan.outlook import Effort, Outlook, Pace
from sparsecc.plan.pricing import Resource
from sparsecc.plan.results import Results
from sparsecc.plan.sensitivity import measure_sensitivity
from sparsecc.plan.tables import table_shapes
from sparsecc.pm import PassContext, Pipeline

__all__ = ["Analysis", "analyze", "read_analysis", "tidied", "write_analysis"]

_FORMAT = 2

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """What was found; holds for one model and one set of calibration data.

    Attributes:
        model: fingerprint of the tidied model.
        data: fingerprint of the calibration data.
        metric: its name.
        score: of the model as it is.
        scale: damage to the metric per squared error of the outputs.
        additivity: measured over predicted damage of replacing all parts at once; None where nothing was replaced.
        items: with sensitivities.
        shapes: by name of a site, outputs and inputs of its weight; of a table rows and columns.
        notes: what the user should know.
        effort: what it took.
    """

    model: str
    data: str
    metric: str
    score: float
    scale: float
    additivity: float | None
    items: tuple[Item, ...]
    shapes: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    effort: Effort = field(default_factory=Effort)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what was not measured is null."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "data": self.data,
            "metric": {"name": self.metric, "score": self.score, "per_squared_output_error": self.scale},
            "additivity": self.additivity,
            "items": [_item_json(item, self.shapes) for item in self.items],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Analysis:
        """Return what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, expected {_FORMAT}")
        metric, additivity = document["metric"], document["additivity"]
        return cls(
            str(document["model"]),
            str(document["data"]),
            str(metric["name"]),
            float(metric["score"]),
            float(metric["per_squared_output_error"]),
            None if additivity is None else float(additivity),
            tuple(_item(entry) for entry in document["items"]),
            {
                str(site["name"]): (int(site["shape"][0]), int(site["shape"][1]))
                for entry in document["items"]
                for site in entry["sites"]
            },
            tuple(str(note) for note in document["notes"]),
        )


def tidied(setting: Setting) -> Model:
    """A copy of the model in the form that is analysed."""
    model = setting.original.copy()
    Pipeline.parse("tidy").run(model, PassContext(seed=setting.context.seed))
    return model


def analyze(
    setting: Setting,
    metric: Metric | None = None,
    *,
    custom_ops: bool = True,
    families: Collection[str] = FAMILIES,
    fine: bool = False,
    resources: Sequence[Resource] = ("ms",),
    results: Results | None = None,
    executor: Executor | None = None,
) -> Analysis:
    """Find what each part of the model of ``setting`` may become, and measure how much the model cares.

    Args:
        setting: with calibration data.
        metric: what counts; None: the error of the outputs.
        custom_ops: whether sparse operators may be used.
        families: names of the passes whose search ranges are tried.
        fine: whether amounts between those of the ranges are tried too.
        resources: what a form must take less of to be tried; one of them is enough.
        results: where results are kept; None: in memory.
        executor: where forms are fitted; None: in this thread.

    Raises:
        UsageError: there is no calibration data, or a family without a search range.
    """
    context = setting.context
    calibration = context.calibration_for("analyze")
    model = tidied(setting)
    pace, predicted = Pace(results or Results(None), setting.table.facts), list[Outlook]()
    started = time.monotonic()

    def told(outlook: Outlook) -> None:
        predicted.append(pace.of(outlook))
        _LOG.info("%s", predicted[0])
        context.progress(str(predicted[0]), 0, 1)

    items = find_items(
        model,
        calibration,
        setting.costs,
        inputs=setting.timed,
        target=context.target,
        custom_ops=custom_ops and setting.library,
        families=families,
        fine=fine,
        resources=resources,
        executor=executor,
        results=results,
        seed=context.seed,
        threads=context.threads,
        progress=context.progress,
        told=told,
    )
    found = measure_sensitivity(
        model,
        items,
        calibration,
        metric,
        results=results,
        seed=context.seed,
        threads=context.threads,
        progress=context.progress,
    )
    seconds = time.monotonic() - started
    pace.learn("planning", predicted[0].seconds, seconds)
    context.progress(str(predicted[0]), 1, 1)
    return Analysis(
        model.fingerprint(),
        calibration.fingerprint(),
        "output-error" if metric is None else metric.name,
        0.0 if metric is None else metric.score(setting.original),
        found.scale,
        found.additivity,
        found.items,
        table_shapes(model) | {site.name: site.shape for site in model.sites()},
        (*found.notes, *setting.table.keep()),
        Effort(predicted[0], seconds),
    )


def write_analysis(analysis: Analysis, path: Path) -> None:
    """Write it to a JSON file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(json.dumps(analysis.to_json(), indent=1, allow_nan=False).encode())


def read_analysis(path: Path, model: Model, data: str) -> Analysis:
    """Return the analysis in a file, made for this model and data.

    Args:
        path: the file.
        model: tidied.
        data: fingerprint of the calibration data.

    Raises:
        UsageError: it cannot be read, or was made for another model or data.
    """
    try:
        found = Analysis.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no analysis of sparsecc ({error})"
        raise UsageError(f"{path}: {reason}; make one by 'sparsecc analyze MODEL -o {path.name}'") from error
    for what, own, theirs in (("model", model.fingerprint(), found.model), ("data", data, found.data)):
        if own != theirs:
            raise UsageError(
                f"{path} is of other {what}; make one by 'sparsecc analyze MODEL -o {path.name}'"
            )
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _real(value: Any) -> float:
    return math.nan if value is None else float(value)


def _item_json(item: Item, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        "name": item.name,
        "sites": [{"name": name, "shape": list(shapes[name])} for name in item.sites],
        "sensitivity": item.sensitivity,
        "groups": None if item.groups is None else dict(item.groups),
        "candidates": [_candidate_json(candidate) for candidate in item.candidates],
        "dropped": [_candidate_json(candidate) for candidate in item.dropped],
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "passes": list(candidate.passes),
        "error": _number(candidate.error),
        "error_spread": candidate.error_spread,
        "ms": _number(candidate.time.ms),
        "ms_source": candidate.time.source,
        "ms_spread": candidate.time.spread,
        "bytes": candidate.bytes,
        "custom_ops": candidate.custom_ops,
        "note": candidate.note,
    }


def _item(entry: Mapping[str, Any]) -> Item:
    groups = entry["groups"]
    plain = Item(
        str(entry["name"]),
        tuple(str(site["name"]) for site in entry["sites"]),
        tuple(_candidate(candidate) for candidate in entry["candidates"]),
        float(entry["sensitivity"]),
        None if groups is None else {str(key): str(value) for key, value in groups.items()},
    )
    return replace(plain, dropped=tuple(_candidate(candidate) for candidate in entry["dropped"]))


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    return Candidate(
        tuple(str(spec) for spec in entry["passes"]),
        _real(entry["error"]),
        Estimate(_real(entry["ms"]), str(entry["ms_source"]), float(entry["ms_spread"])),
        int(entry["bytes"]),
        bool(entry["custom_ops"]),
        str(entry["note"]),
        float(entry["error_spread"]),
    )
