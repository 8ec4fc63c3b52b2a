"""What a pass did: one entry per site it changed, one reason per site it left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Change", "Number", "PassReport", "Skip"]


Number = float | int | str | bool | None


@dataclass(frozen=True)
class Change:
    """A site that a pass changed.

    Attributes:
        site: name of the site or node.
        detail: what was done, in a few words.
        numbers: measured figures by name; the name carries the unit (``nbytes_before``, ``time_us``).
    """

    site: str
    detail: str
    numbers: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A site that a pass left alone, and why."""

    site: str
    reason: str


@dataclass
class PassReport:
    """What one run of one pass did, in the order it did it.

    Attributes:
        pass_name: registered name of the pass.
        spec: text form of the pass with its options; the pipeline fills it in.
        changed: sites that changed. Empty means that the model is as it was, byte for byte.
        skipped: sites left alone, each with its reason.
        notes: remarks about the run as a whole.
        seconds: wall time of the pass itself; the pipeline fills it in.
    """

    pass_name: str
    spec: str = ""
    changed: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def change(self, site: str, detail: str, **numbers: Number) -> None:
        """Record that ``site`` changed."""
        self.changed.append(Change(site, detail, numbers))

    def skip(self, site: str, reason: str) -> None:
        """Record that ``site`` was left alone."""
        self.skipped.append(Skip(site, reason))

    def note(self, text: str) -> None:
        """Record a remark about the whole run."""
        self.notes.append(text)

    def to_json(self, *, timings: bool = True) -> dict[str, Any]:
        """Return plain values in a stable order; ``timings=False`` leaves out what differs between runs."""
        document: dict[str, Any] = {
            "pass": self.pass_name,
            "spec": self.spec or self.pass_name,
            "changed": [
                {"site": item.site, "detail": item.detail, "numbers": _plain_numbers(item.numbers)}
                for item in self.changed
            ],
            "skipped": [{"site": item.site, "reason": item.reason} for item in self.skipped],
            "notes": list(self.notes),
        }
        if timings:
            document["seconds"] = round(self.seconds, 6)
        return document


def _plain_numbers(numbers: dict[str, Number]) -> dict[str, Number]:
    return {name: _plain(value) for name, value in numbers.items()}


def _plain(value: Any) -> Number:
    """Return a value JSON can hold: numpy scalars as Python ones, NaN and infinities as text."""
    plain: Number = value.item() if hasattr(value, "item") else value
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain
