"""What the template shows: every part of a document as charts and text, ready to be laid out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sparsecc
from sparsecc.report import charts
from sparsecc.report.layers import Form, Layer, forms, layers
from sparsecc.report.schema import Effort, Latency, Metric, RunDocument, Spectrum
from sparsecc.report.svg import Html
from sparsecc.report.text import base_name, change, format_bytes, number, percent, plain, sides, times

__all__ = ["view"]

_T = TypeVar("_T")

_FEW = 12  # small charts that are shown at once
_MOST = 120  # that are drawn at all
_LONG = 30  # rows from which on a table scrolls by itself


def view(document: RunDocument) -> dict[str, Any]:
    """The variables of the template; a part that is missing is None or empty."""
    rows = layers(document)
    summed = forms(rows)
    metric = document.metric.name if document.metric else "the metric"
    parts: dict[str, Any] = {
        "title": _title(document),
        "file": json.dumps(base_name(document.output), ensure_ascii=False) if document.output else "",
        "lead": _lead(document, rows),
        "tiles": _tiles(document),
        "notes": document.notes,
        "fronts": _fronts(document, metric),
        "latency": _latency(document.latency),
        "overview": _overview(rows, summed),
        "forms": [] if _undecided(document) else [_form(item) for item in summed],
        "layers": _table(rows),
        "undecided": _undecided(document),
        "curves": _curves(document),
        "spectra": _charts(_largest(document.spectra), charts.spectrum, lambda item: (item.site, "")),
        "thumbnails": _thumbnails(document),
        "balance": _balance(document),
        "balance_long": len(document.partition) > _LONG,
        "metric": document.metric,
        "steps": _steps(document.metric),
        "elsewhere": _is_predicted(document.latency),
        "passes": _passes(document),
        "not_sites": document.not_sites,
        "provenance": _provenance(document),
        "version": sparsecc.__version__,
    }
    parts["sections"] = _sections(parts)
    return parts


def _is_predicted(latency: Latency | None) -> bool:
    return latency is not None and latency.source == "predicted"


def _sections(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors and names of the sections that are there."""
    names = (
        ("trade-off", "Trade-off", "fronts"),
        ("latency", "Latency", "latency"),
        ("guard", "Accuracy guard", "steps"),
        ("layers", "Layers", "layers"),
        ("sensitivity", "Sensitivity", "curves"),
        ("spectra", "Spectra", "spectra"),
        ("patterns", "Patterns", "thumbnails"),
        ("balance", "Balance", "balance"),
        ("passes", "Passes", "passes"),
        ("provenance", "Provenance", "provenance"),
        ("deploy", "Deploy", "file"),
    )
    return [(anchor, name) for anchor, name, part in names if parts[part]]


def _title(document: RunDocument) -> str:
    names = [base_name(name) for name in (document.model, document.output) if base_name(name)]
    if names and not document.output and _undecided(document):
        return f"Analysis of {names[0]}"
    return " → ".join(dict.fromkeys(names)) or "sparsecc run"


def _undecided(document: RunDocument) -> bool:
    """Whether it is an analysis: there are forms to choose from, and nothing is chosen."""
    return any(item.candidates for item in document.items) and all(
        item.chosen is None for item in document.items
    )


def _lead(document: RunDocument, rows: Sequence[Layer]) -> str:
    """One sentence on what was done, of facts that are there."""
    changed = sum(row.form not in ("dense", "–") for row in rows)
    said = []
    undecided = _undecided(document)
    if undecided:
        several = sum(len(item.candidates) > 1 for item in document.items)
        said.append(f"{several} of {len(rows)} parts may take other forms, none is chosen yet")
    elif rows:
        said.append(f"{changed} of {len(rows)} layer{'s' if len(rows) > 1 else ''} took another form")
    if document.target:
        said.append(f"target {document.target}")
    if document.latency and document.latency.threads:
        threads = document.latency.threads
        said.append(f"{threads} thread{'s' if threads > 1 else ''}")
    if document.operator_library is not None:
        said.append(f"operator library {'loaded' if document.operator_library else 'missing'}")
    if not document.output and not undecided:
        said.append("nothing was written: figures are predictions")
    text = ", ".join(said)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _tiles(document: RunDocument) -> list[dict[str, str]]:
    """The headline: value, what it is, and the figures behind it."""
    tiles = []
    latency = document.latency
    if latency is not None:
        ratio = latency.speedup or times(latency.before_ms, latency.after_ms)
        more = f"{number(latency.before_ms)} → {number(latency.after_ms)} ms"
        words = ("faster", "slower")
        if _is_predicted(latency):
            words, more = ("predicted faster", "predicted slower"), f"{more}, not measured"
        tiles.append(_ratio_tile(ratio, words, more))
    elif document.predicted is not None and document.predicted.ms is not None:
        tiles.append(
            {"value": f"{number(document.predicted.ms)} ms", "name": "predicted", "more": "time of one run"}
        )
    if document.bytes_before is not None and document.bytes_after is not None:
        ratio = times(document.bytes_before, document.bytes_after)
        more = f"{format_bytes(document.bytes_before)} → {format_bytes(document.bytes_after)}"
        tiles.append(_ratio_tile(ratio, ("smaller", "larger"), more))
    elif document.predicted is not None and document.predicted.bytes is not None:
        tiles.append(
            {"value": format_bytes(document.predicted.bytes), "name": "predicted", "more": "constants"}
        )
    if document.metric is not None and (document.metric.after is not None or document.metric.before):
        tiles.append(_metric_tile(document.metric))
    elif document.rel_l2_to_input is not None:
        more = "relative L2 distance to the input model"
        tiles.append({"value": number(document.rel_l2_to_input, 2), "name": "output change", "more": more})
    verdict = _verdict(document)
    return [*tiles, verdict] if verdict else tiles


def _ratio_tile(ratio: float | None, words: tuple[str, str], more: str) -> dict[str, str]:
    if ratio is None or not (math.isfinite(ratio) and ratio > 0):
        return {"value": "–", "name": words[0], "more": more}
    if abs(ratio - 1) < 0.005:
        return {"value": "1.00×", "name": f"as {'fast' if words[0] == 'faster' else 'large'}", "more": more}
    word = words[0] if ratio > 1 else words[1]
    return {"value": f"{number(max(ratio, 1 / ratio))}×", "name": word, "more": more}


def _metric_tile(metric: Metric) -> dict[str, str]:
    if metric.after is None:
        return {"value": number(metric.before, 4), "name": metric.name, "more": "of the input"}
    value = number(metric.after, 4)
    more = f"{number(metric.before, 4)} before, {change(metric.before, metric.after)}"
    return {"value": value, "name": metric.name, "more": more}


def _verdict(document: RunDocument) -> dict[str, str] | None:
    """The guard's word where there is one, else that of the comparison with the pruned dense model."""
    metric = document.metric
    if metric is not None and metric.held is not None:
        allowed = "" if metric.max_drop is None else f"largest drop allowed {plain(metric.max_drop)}"
        word = ("✓ held", "good") if metric.held else ("✗ missed", "bad")
        return {"value": word[0], "name": "accuracy guard", "more": allowed, "kind": word[1]}
    unmet = [item for item in document.budgets if item.met is False]
    if unmet:
        return {
            "value": "✗ missed",
            "name": "budget",
            "more": ", ".join(_asked(item) for item in unmet),
            "kind": "bad",
        }
    if document.budgets and all(item.met for item in document.budgets):
        more = ", ".join(_asked(item) for item in document.budgets)
        return {"value": "✓ kept", "name": "budget", "more": more, "kind": "good"}
    if document.max_rel_l2 is not None:
        more = f"relative L2 {number(document.max_rel_l2, 2)} to the dense form of the same weights"
        return {"value": "✓ verified", "name": "", "more": more, "kind": "good"}
    return None


def _asked(item: Any) -> str:
    return item.asked or f"{plain(item.limit)} {item.kind}"


def _fronts(document: RunDocument, metric: str) -> list[Html]:
    limits = {item.kind: item.limit for item in document.budgets}
    fronts = {"ms": document.front, "bytes": document.front_bytes or document.front}
    drawn = [
        charts.front(points, by, limits.get(by), metric, limits.get("drop")) for by, points in fronts.items()
    ]
    return [chart for chart in drawn if chart is not None]


def _latency(latency: Latency | None) -> dict[str, Any] | None:
    """The boxes, and the same as rows of a table."""
    if latency is None or latency.before is None or latency.after is None:
        return None
    rows = [
        (name, *(number(value) for value in (spread.min, spread.q1, spread.median, spread.q3, spread.max)))
        for name, spread in (("input", latency.before), ("output", latency.after))
    ]
    return {"chart": charts.latency(latency.before, latency.after), "rows": rows}


def _overview(rows: Sequence[Layer], summed: Sequence[Form]) -> list[dict[str, Any]]:
    """Time of all layers before and after as stacked bars; empty where a time is unknown for most of it."""
    known = [row for row in rows if row.before_ms is not None and row.after_ms is not None]
    before, after = (
        math.fsum(_positive(getattr(row, name)) for row in known) for name in ("before_ms", "after_ms")
    )
    if not known or before <= 0:
        return []
    kinds = {item.name: item.kind for item in summed}
    bars = []
    for name, total, field in (("before", before, "before_ms"), ("after", after, "after_ms")):
        parts = [
            (
                row.name,
                _positive(getattr(row, field)),
                kinds.get(row.form, "kind8") if name == "after" else "kind0",
            )
            for row in known
        ]
        told = f"{number(total)} ms {name}, {len(known)} layers"
        bars.append(
            {
                "name": name,
                "total": f"{number(total)} ms",
                "bar": charts.share_bar(parts, max(before, after), told),
            }
        )
    return bars


def _positive(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def _form(item: Form) -> dict[str, Any]:
    return {
        "name": item.name, "kind": item.kind, "count": item.count,
        "ms": None if item.before_ms is None else f"{number(item.before_ms)} → {number(item.after_ms)} ms",
        "bytes": None if item.before_bytes is None or item.after_bytes is None
        else f"{format_bytes(item.before_bytes)} → {format_bytes(item.after_bytes)}",
    }  # fmt: skip


def _table(rows: Sequence[Layer]) -> dict[str, Any] | None:
    """The rows, and which columns have anything in them."""
    if not rows:
        return None
    most_ms = max((_positive(value) for row in rows for value in (row.before_ms, row.after_ms)), default=0)
    most_bytes = max(
        (_positive(value) for row in rows for value in (row.before_bytes, row.after_bytes)), default=0
    )
    drawn = [
        {
            "layer": row,
            "time": row.time_bars(most_ms),
            "time_text": f"{number(row.before_ms)} → {number(row.after_ms)} ms",
            "size": row.byte_bars(most_bytes),
            "size_text": ""
            if row.before_bytes is None or row.after_bytes is None
            else f"{format_bytes(row.before_bytes)} → {format_bytes(row.after_bytes)}",
            "error": number(row.error, 2),
        }
        for row in rows
    ]
    has_time, has_size = (any(row[name] for row in drawn) for name in ("time", "size"))
    has_error = any(row.error is not None for row in rows)
    return {
        "rows": drawn,
        "has_time": has_time,
        "has_size": has_size,
        "has_error": has_error,
        "columns": 3 + sum((has_time, has_size, has_error)),
        "long": len(rows) > _LONG,
    }


def _charts(
    items: Sequence[_T], draw: Callable[[_T], Html | None], name: Callable[[_T], tuple[str, str]]
) -> dict[str, Any] | None:
    """Small charts with captions: the first few, the others, and how many are not drawn."""
    drawn = [
        {"chart": chart, "name": name(item)[0], "more": name(item)[1]}
        for item in items[:_MOST]
        if (chart := draw(item)) is not None
    ]
    if not drawn:
        return None
    few = len(drawn) if len(drawn) <= _FEW + 4 else _FEW
    return {"first": drawn[:few], "rest": drawn[few:], "left_out": max(0, len(items) - _MOST)}


def _largest(spectra: Sequence[Spectrum]) -> list[Spectrum]:
    return sorted(spectra, key=lambda item: -(item.count or len(item.values)))


def _curves(document: RunDocument) -> dict[str, Any] | None:
    """Sensitivity curves on shared axes, the most sensitive first."""
    points = [
        point for item in document.sensitivity for point in item.points
        if math.isfinite(point.error) and math.isfinite(point.drop)
    ]  # fmt: skip
    most_error = max((point.error for point in points), default=0.0)
    most_drop = max((point.drop for point in points), default=0.0)
    ranked = sorted(
        document.sensitivity,
        key=lambda item: -max((p.drop for p in item.points if math.isfinite(p.drop)), default=0.0),
    )
    return _charts(
        ranked, lambda item: charts.curve(item, most_error, most_drop), lambda item: (item.name, "")
    )


def _thumbnails(document: RunDocument) -> dict[str, Any] | None:
    """Whole matrices beside their first entries, the largest first."""
    found = []
    for item in sorted(document.thumbnails, key=lambda item: -math.prod(item.shape)):
        chart = charts.thumbnail(item.grid, "Density over the matrix")
        corner = charts.thumbnail(item.corner, f"First {len(item.corner)} rows, entry by entry")
        about = (
            item.layout,
            sides(item.shape),
            "" if item.density is None else f"{percent(item.density)} kept",
        )
        if chart is not None:
            found.append((item.site, ", ".join(filter(None, about)), Html(chart + (corner or Html()))))
    return _charts(found, lambda item: item[2], lambda item: (item[0], item[1]))


def _balance(document: RunDocument) -> list[dict[str, Any]]:
    rows = []
    for item in document.partition:
        chart = charts.balance(item.part_work, "Work of each part")
        total = math.fsum(item.part_work)
        worst = max(item.part_work, default=0.0)
        ratio = (
            item.balance
            if item.balance is not None
            else worst * len(item.part_work) / total
            if total
            else None
        )
        if chart is not None:
            rows.append(
                {
                    "name": item.name,
                    "op": item.op,
                    "parts": len(item.part_work),
                    "balance": number(ratio, 4),
                    "chart": chart,
                }
            )
    return rows


def _steps(metric: Metric | None) -> list[dict[str, Any]]:
    if metric is None:
        return []
    return [
        {
            "number": at, "change": step.change, "ms": number(step.ms),
            "bytes": "–" if step.bytes is None else format_bytes(step.bytes),
            "value": number(step.value, 4), "difference": change(metric.before, step.value), "held": step.held,
        }
        for at, step in enumerate(metric.steps, 1)
    ]  # fmt: skip


def _passes(document: RunDocument) -> list[dict[str, Any]]:
    return [
        {
            "name": run.name, "spec": run.spec or run.name, "changed": len(run.changed),
            "skipped": len(run.skipped), "seconds": number(run.seconds), "notes": run.notes,
        }
        for run in document.passes
    ]  # fmt: skip


def _effort(effort: Effort | None) -> list[tuple[str, str]]:
    """What planning took beside what was predicted."""
    if effort is None:
        return []

    def told(value: float | None, predicted: float | None, unit: Callable[[float], str]) -> str:
        if value is None:
            return ""
        return unit(value) + ("" if predicted is None else f" ({unit(predicted)} predicted)")

    models = effort.models or 0
    making = None if effort.model_predicted is None else effort.model_predicted * models
    made = told(effort.making_seconds, making, _seconds)
    rows = (
        ("planning", told(effort.planning_seconds, effort.planning_predicted, _seconds)),
        ("models", f"{models} made in {made}" if models and made else ""),
        ("memory", told(effort.bytes, effort.bytes_predicted, format_bytes)),
    )
    return [(name, text) for name, text in rows if text]


def _seconds(value: float) -> str:
    return f"{number(value)} s" if value < 90 else f"{number(value / 60)} min"


def _provenance(document: RunDocument) -> list[tuple[str, str]]:
    """Names and values; the pipeline too, which is half of it."""
    rows = [("pipeline", document.pipeline)]
    known = document.provenance
    if known is not None:
        rows = [("command", known.command), *rows, ("sparsecc", known.version)]
        rows.append(("seed", "" if known.seed is None else str(known.seed)))
        for group in (known.digests, known.machine, known.libraries):
            rows += [(name, str(value)) for name, value in group.items()]
    rows += [(f"budget: {item.kind}", f"{_asked(item)}{_met(item.met)}") for item in document.budgets]
    rows += _effort(document.effort)
    return [(name, value) for name, value in rows if value]


def _met(met: bool | None) -> str:
    return "" if met is None else ", met" if met else ", not met"
