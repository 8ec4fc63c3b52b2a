"""Parts of a run document that a planner and the command line fill in; all plain values."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

import sparsecc
from sparsecc.plan.costs import machine_facts
from sparsecc.plan.guard import Attempt, Limits, Verdict
from sparsecc.plan.items import Candidate, Choice, Item
from sparsecc.plan.planner import Planner

__all__ = [
    "command_line",
    "curve_rows",
    "front_rows",
    "guard_steps",
    "item_rows",
    "planned_parts",
    "provenance",
]

_FEW = 3  # items of one step that are named
_MOST_ERROR = 0.5  # of a form on a curve, if it is not the chosen one


def planned_parts(
    planner: Planner,
    choice: Choice,
    limits: Limits,
    asked: Mapping[str, str],
    verdict: Verdict | None = None,
) -> dict[str, Any]:
    """The parts that a planner fills in; times and sizes are those of the whole model.

    Args:
        planner: that chose.
        choice: what is written, or would be.
        limits: of the budget.
        asked: the limits as the user wrote them, by ``ms``, ``bytes`` and ``drop``.
        verdict: the end of the search; None where nothing was made.
    """
    misses = None if verdict is None else verdict.misses
    best = None if verdict is None else verdict.best

    def whole(own: Choice) -> Choice:
        return replace(
            own,
            ms=planner.predicted_ms(own),
            bytes=planner.predicted_bytes(own),
            damage=planner.predicted_drop(own),
        )

    predicted = whole(choice)
    return {
        "items": item_rows(planner.items, choice),
        "front": front_rows([whole(point) for point in planner.points], predicted),
        "front_bytes": []
        if limits.bytes is None
        else front_rows([whole(point) for point in planner.points_by_size], predicted),
        "predicted": {
            "ms": predicted.ms,
            "bytes": predicted.bytes,
            "damage": predicted.damage,
        },
        "budgets": [
            {
                "kind": kind,
                "limit": limit,
                "asked": asked.get(kind, ""),
                "met": None if misses is None else kind not in misses,
            }
            for kind, limit in (("ms", limits.ms), ("bytes", limits.bytes), ("drop", limits.drop))
            if limit is not None
        ],
        "metric": {
            "name": planner.metric.name,
            "before": planner.score_before,
            "after": None if best is None else best.score,
            "max_drop": limits.drop,
            "higher_is_better": planner.metric.higher_is_better,
            "held": None if misses is None or limits.drop is None else "drop" not in misses,
            "steps": [] if verdict is None else guard_steps(planner.items, verdict.attempts, limits),
        },
        "sensitivity": curve_rows(planner.items, choice),
        "effort": planner.effort.to_json(),
    }


def item_rows(items: Sequence[Item], choice: Choice | None) -> list[dict[str, Any]]:
    """What a planner chose between, and what it took: rows of the part ``items``; what is not known is None.

    Args:
        items: all.
        choice: what was taken; None where nothing is chosen yet.
    """
    return [
        {
            "name": item.name,
            "sites": list(item.sites),
            "chosen": None if choice is None else choice.chosen[item.name],
            "candidates": [_candidate_row(item, candidate) for candidate in item.candidates],
            "dropped": [_candidate_row(item, candidate) for candidate in item.dropped],
        }
        for item in items
    ]


def _candidate_row(item: Item, candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "ms": _known(candidate.time.ms),
        "source": candidate.time.source,
        "spread": _known(candidate.time.spread),
        "bytes": candidate.bytes,
        "error": _known(candidate.error),
        "damage": _known(item.damage(candidate)),
        "custom_ops": candidate.custom_ops,
        "note": candidate.note,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def curve_rows(
    items: Sequence[Item], choice: Choice | None, replacements: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Damage to the metric over error, for the forms of each item: rows of the part ``sensitivity``.

    Forms of a very large error are left out, for they would press the others into a corner.

    Args:
        items: with sensitivities.
        choice: what was taken; None where nothing is chosen yet.
        replacements: by name of an item the form it was replaced by when its sensitivity was measured.
    """
    rows = []
    for item in items:
        taken = None if choice is None else item.candidates[choice.chosen[item.name]]
        most = _MOST_ERROR if taken is None else max(_MOST_ERROR, taken.error)
        forms = [form for form in item.candidates if form.error <= most]
        measured = (replacements or {}).get(item.name)
        points = [
            {
                "error": form.error,
                "drop": item.damage(form),
                "label": form.name,
                "measured": form.name == measured,
            }
            for form in sorted(forms, key=lambda form: form.error)
            if math.isfinite(form.error) and math.isfinite(item.damage(form))
        ]
        if len(points) > 1:
            rows.append(
                {"name": item.name, "points": points, "chosen_error": None if taken is None else taken.error}
            )
    return rows


def front_rows(choices: Sequence[Choice], chosen: Choice) -> list[dict[str, Any]]:
    """The choices on a Pareto front, and the one that was taken: rows of the part ``front``.

    The choice that leaves every item as it is counts as the input. ``chosen`` is drawn also where it is not on the
    front, which happens when the guard took single items back.
    """
    known = list(choices)
    if all(choice.chosen != chosen.chosen for choice in known):
        known.append(chosen)
    return [
        {
            "ms": choice.ms,
            "bytes": choice.bytes,
            "damage": choice.damage,
            "chosen": choice.chosen == chosen.chosen,
            "input": not any(choice.chosen.values()),
        }
        for choice in known
    ]


def guard_steps(items: Sequence[Item], attempts: Sequence[Attempt], limits: Limits) -> list[dict[str, Any]]:
    """The models that were assembled and measured, in order: rows of the part ``metric.steps``."""
    steps = []
    before: Choice | None = None
    for attempt in attempts:
        steps.append(
            {
                "change": _changed(items, before, attempt.choice),
                "ms": attempt.ms,
                "bytes": attempt.bytes,
                "value": attempt.score if math.isfinite(attempt.score) else None,
                "held": not limits.misses(attempt),
            }
        )
        before = attempt.choice
    return steps


def _changed(items: Sequence[Item], before: Choice | None, after: Choice) -> str:
    """Which items differ from the attempt before, or from the input."""
    forms = {item.name: [candidate.name for candidate in item.candidates] for item in items}
    old = {name: 0 for name in forms} if before is None else before.chosen
    told = [
        f"{name}: {names[old[name]]} → {names[after.chosen[name]]}"
        for name, names in forms.items()
        if old[name] != after.chosen[name]
    ]
    if before is None:
        return f"{len(told)} of {len(forms)} layers in another form"
    rest = f" and {len(told) - _FEW} more" if len(told) > _FEW else ""
    return "; ".join(told[:_FEW]) + rest or "the same once more"


def provenance(arguments: Sequence[str], seed: int, digests: Mapping[str, str]) -> dict[str, Any]:
    """The part ``provenance``: how to get the same result again, and on which machine it was measured.

    Args:
        arguments: the command, from its name on.
        seed: of everything random.
        digests: SHA-256 of what was read, by what it is.
    """
    facts = machine_facts()
    libraries = {"onnxruntime": facts.pop("onnxruntime"), "operator library": facts.pop("sparsecc")}
    return {
        "version": sparsecc.__version__,
        "seed": seed,
        "command": command_line(arguments),
        "digests": dict(digests),
        "machine": facts,
        "libraries": {**libraries, "onnx": onnx.__version__, "numpy": np.__version__},
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command of a run as text, files by their names only: nothing is told about the folders of a machine."""
    return shlex.join(_without_folder(argument) for argument in arguments)


def _without_folder(argument: str) -> str:
    """The argument with the folder left out where it, or what is behind its ``=``, is an absolute path."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = os.path.expanduser(value)
    if os.path.isabs(path) and os.path.isdir(os.path.dirname(path)) and os.path.dirname(path) != os.sep:
        value = os.path.basename(path) or os.path.basename(os.path.dirname(path))
    return f"{option}{equals}{value}"
