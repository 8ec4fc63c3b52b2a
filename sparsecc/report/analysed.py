"""Run documents of analyses, in which nothing is chosen yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsecc.errors import UsageError
from sparsecc.plan.analysis import Analysis
from sparsecc.report.planned import curve_rows, item_rows

__all__ = ["analysis_document", "is_analysis"]

#: Keys that no other document has together.
_KEYS = {"format", "additivity", "items", "metric"}


def is_analysis(value: object) -> bool:
    """Whether JSON values look like what ``sparsecc analyze`` printed or saved."""
    return isinstance(value, Mapping) and value.keys() >= _KEYS


def analysis_document(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run document of an analysis: parts with their forms, sensitivities, notes.

    Raises:
        UsageError: a part is malformed.
    """
    try:
        found = Analysis.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UsageError(f"no analysis of this version: {type(error).__name__}: {error}") from None
    if any(not item.candidates for item in found.items):
        raise UsageError("no analysis of this version: a part without forms")
    notes = list(found.notes)
    if found.additivity is not None:
        notes.append(f"all parts replaced at once lose {found.additivity:.2f} times what was predicted")
    return {
        "model": value.get("name"),
        "items": item_rows(found.items, None),
        "metric": {"name": found.metric, "before": found.score},
        "sensitivity": curve_rows(found.items, None),
        "notes": notes,
        "effort": value.get("effort"),
    }
