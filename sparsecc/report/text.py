"""Numbers and names for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["base_name", "change", "format_bytes", "number", "percent", "plain", "shorten", "sides", "times"]


def format_bytes(count: float) -> str:
    """``count`` bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to so many significant digits, as a power of ten only where it is far from 1; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if -4 <= power < 6:
        rounded = f"{value:.{max(0, digits - 1 - power)}f}"
        return rounded.replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def plain(value: float | None) -> str:
    """``value`` without zeros at its end: for ticks and limits, which are round numbers."""
    digits, power, exponent = number(value).partition("e")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + power + exponent


def percent(share: float | None) -> str:
    """A share as a percentage; 0 and 100 only where it is exactly that."""
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < share < 0.0005:
        return "<0.1 %"
    text = f"{100 * share:.3g}" if abs(share) < 10 else f"{100 * share:.0f}"
    return f"{'99.9' if share < 1 and text == '100' else text} %"


def times(before: float | None, after: float | None) -> float | None:
    """How many times smaller ``after`` is than ``before``; None where that has no meaning."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return None
    return before / after if after > 0 and before > 0 else None


def change(before: float | None, after: float | None) -> str:
    """The difference with its sign."""
    if before is None or after is None or not math.isfinite(after - before):
        return "–"
    step = after - before
    return f"+{number(step, 2)}" if step > 0 else number(step, 2) if step else "±0"


def sides(shape: Sequence[int]) -> str:
    """A shape such as ``768 × 256``."""
    return " × ".join(map(str, shape))


def shorten(text: str, length: int) -> str:
    """``text`` with its middle left out where it is longer: names differ at their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def base_name(path: str) -> str:
    """The last part of a path of any system: a report tells nothing about the folders of the machine."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]
