"""What a user allows a model to take and to lose, as text and as numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsecc.errors import UsageError

__all__ = ["Amount", "parse_drop", "parse_latency", "parse_size"]

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?"
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Amount:
    """A number of something, or a share of what the input model has.

    Attributes:
        value: the number, positive; for a drop 0 or more.
        relative: whether it is a share.
    """

    value: float
    relative: bool

    def of(self, whole: float) -> float:
        """The number itself, where the input model has ``whole``."""
        return self.value * abs(whole) if self.relative else self.value


def parse_latency(text: str) -> Amount:
    """Return what ``--budget-latency`` allows: ``5ms``, ``800us``, ``1.5s``, or ``0.5x`` of the input's time.

    Raises:
        UsageError: a text of another form, or nothing allowed.
    """
    return _parse(text, "--budget-latency", {**_MILLISECONDS, "x": None}, "5ms or 0.5x")


def parse_size(text: str) -> Amount:
    """Return what ``--budget-size`` allows, in bytes: ``20MB``, ``8MiB``, or ``0.5x`` of the input's size.

    Raises:
        UsageError: a text of another form, or nothing allowed.
    """
    return _parse(text, "--budget-size", {**_BYTES, "x": None}, "20MB or 0.5x")


def parse_drop(text: str) -> Amount:
    """Return what ``--max-drop`` allows: ``1%`` of the input's score, or ``0.01`` in the unit of the metric.

    Raises:
        UsageError: a text of another form.
    """
    match = re.fullmatch(rf"{_NUMBER}\s*(%?)", text.strip())
    if match is None:
        raise UsageError(f"--max-drop {text}: expected 1% (of the input's score) or 0.01 (in its unit)")
    value = float(f"{match[1]}e{match[2] or 0}")
    if not math.isfinite(value):
        raise UsageError(f"--max-drop {text}: expected 1% (of the input's score) or 0.01 (in its unit)")
    return Amount(value / 100, True) if match[3] else Amount(value, False)


def _parse(text: str, option: str, units: dict[str, float | None], example: str) -> Amount:
    """A number with one of ``units``; the one that stands for None makes it a share."""
    match = re.fullmatch(rf"{_NUMBER}\s*([a-zA-Z]*)", text.strip())
    unit = None if match is None else match[3].lower()
    if match is None or unit not in units:
        raise UsageError(f"{option} {text}: expected a number with a unit, such as {example}")
    value = float(f"{match[1]}e{match[2] or 0}") * (units[unit] or 1)
    if not 0 < value < math.inf:
        raise UsageError(f"{option} {text}: must be more than nothing")
    return Amount(value, units[unit] is None)
