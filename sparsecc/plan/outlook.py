"""What planning will take, told before it begins, and what it took."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsecc.plan.parts import Part
from sparsecc.plan.pricing import Family
from sparsecc.plan.results import Results

__all__ = ["Effort", "Outlook", "Pace", "duration", "outlook_of", "peak_bytes"]

#: Seconds that timing one form of one shape takes, most of them for the clock; of many it is found that they need none.
_FORM_SECONDS = 0.3
#: Seconds per multiplication of fitting a form, and share of that which a form takes where all are fitted in a trial.
_FIT_SECONDS = 3e-10
_FITTED = 0.1
#: Seconds per part beside that: it is cut out, fed, and replaced in the model.
_PART_SECONDS = 1.0
#: Seconds for timing a model that was made, and checking it.
_MODEL_SECONDS = 10.0
#: Copies of the model that are in memory at once: as it is, tidied, with parts replaced, in the session.
_COPIES = 4
#: Bytes that sessions and libraries take once parts are fitted.
_BASE = 180e6
#: Paces that say more than a busy machine does are bounded.
_PACES = (0.05, 20.0)


@dataclass(frozen=True)
class Outlook:
    """What an analysis will take.

    Attributes:
        parts: of the model that may have other forms.
        new: those of them that no earlier run has worked on.
        forms: that are tried of each.
        seconds: of the analysis.
        model_seconds: for making a model and measuring it.
        bytes: most memory of the process.
    """

    parts: int
    new: int
    forms: int
    seconds: float
    model_seconds: float
    bytes: int

    def __str__(self) -> str:
        return (
            f"planning takes about {duration(self.seconds)} and {self.bytes / 1e6:.0f} MB of memory: {self.parts} "
            f"parts, {self.new} of them new, up to {self.forms} forms each"
        )


@dataclass(frozen=True)
class Effort:
    """What was predicted of planning, and what it took.

    Attributes:
        predicted: before it began; None where an analysis was given.
        planning: seconds until there was something to choose from.
        making: seconds for making models and measuring them.
        models: how many were made; those that an earlier run made count not.
    """

    predicted: Outlook | None = None
    planning: float = 0.0
    making: float = 0.0
    models: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the most memory that the process has had so far."""
        own = self.predicted
        return {
            "planning_seconds": self.planning,
            "planning_predicted": None if own is None else own.seconds,
            "making_seconds": self.making if self.models else None,
            "model_predicted": None if own is None else own.model_seconds,
            "models": self.models,
            "bytes": peak_bytes(),
            "bytes_predicted": None if own is None else own.bytes,
        }


class Pace:
    """How long work takes on this machine compared with what is reckoned, as earlier runs found it.

    Args:
        results: where it is kept.
        facts: the machine.
    """

    def __init__(self, results: Results, facts: Mapping[str, str]) -> None:
        self._results = results
        self._key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()

    def get(self, stage: str) -> float:
        """The factor of a stage of work; 1 where nothing is known."""
        known = (self._results.get("pace", self._key) or {}).get(stage)
        if not isinstance(known, int | float) or not known > 0:
            return 1.0
        return min(max(float(known), _PACES[0]), _PACES[1])

    def of(self, found: Outlook) -> Outlook:
        """The same at this pace."""
        return replace(
            found,
            seconds=found.seconds * self.get("planning"),
            model_seconds=found.model_seconds * self.get("making"),
        )

    def learn(self, stage: str, predicted: float, seconds: float) -> None:
        """Move the factor towards what the last prediction was off by; short work says little."""
        if predicted > 1 and seconds > 1:
            known = self._results.get("pace", self._key) or {}
            factor = self.get(stage) * math.sqrt(seconds / predicted)
            self._results.put("pace", self._key, {**known, stage: factor})


def outlook_of(
    parts: Sequence[Part],
    families: Sequence[Family],
    shapes: Mapping[str, tuple[int, ...]],
    known: Collection[str],
) -> Outlook:
    """Return what finding the forms of parts will take on a machine of the usual pace.

    Args:
        parts: all of a model.
        families: of the forms that are tried.
        shapes: of the inputs of sites that are reached.
        known: names of parts that an earlier run has worked on.
    """
    reached = [part for part in parts if part.reason is None and part.name in shapes]
    new = [part for part in reached if part.name not in known]
    forms = sum(len(family.specs) for family in families)
    kinds = {(shapes[part.name], tuple((site.op, site.shape) for site in part.sites)) for part in new}
    fits = _FIT_SECONDS * sum(map(_multiplications, reached))
    seconds = len(kinds) * forms * _FORM_SECONDS + len(new) * _PART_SECONDS
    seconds += _FIT_SECONDS * sum(map(_multiplications, new)) * forms * _FITTED
    weights = sum(4 * math.prod(site.shape) for part in parts for site in part.sites)
    gram = 8 * max((site.shape[1] for part in new for site in part.sites), default=0) ** 2
    memory = peak_bytes() + _COPIES * weights + 4 * gram + (_BASE if new else 0)
    return Outlook(len(reached), len(new), forms, seconds, _MODEL_SECONDS + fits, int(memory))


def _multiplications(part: Part) -> float:
    """Of one fit: a factorisation of the Gram matrix, and its application to each output."""
    return sum(site.shape[1] ** 3 / 3 + site.shape[0] * site.shape[1] ** 2 for site in part.sites)


def peak_bytes() -> int:
    """Most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """``seconds`` for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
