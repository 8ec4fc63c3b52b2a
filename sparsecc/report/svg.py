"""Elements of SVG and HTML in which all text is escaped, scales, ticks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Html", "Scale", "breakable", "element", "figure", "ticks"]


class Html(str):
    """Markup that is safe as it is; templates and :func:`element` escape every other text."""

    __slots__ = ()

    def __html__(self) -> str:
        """What a template puts in."""
        return self


def element(name: str, *children: str, **attributes: str | float | None) -> Html:
    """One element. Children that are not :class:`Html` and all attributes are escaped.

    A trailing underscore of an attribute goes away and others become dashes: ``class_``, ``stroke_width``; None
    leaves the attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{given}>{inside}</{name}>" if inside else f"<{name}{given}/>")


def breakable(text: str) -> Html:
    """A name that may be broken behind its separators; escaped."""
    return Html("<wbr>".join(escape(part) for part in re.split(r"(?<=[/.,_={}|])(?=\w)", text)))


def _text(value: str | float) -> str:
    """Coordinates to a hundredth, which keeps files small and equal."""
    if isinstance(value, str):
        return value
    rounded = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if rounded == "-0" else rounded


def figure(
    width: float, height: float, title: str, description: str, *children: Html, stretch: bool = False
) -> Html:
    """An SVG with a title and a description for those who do not see it.

    Args:
        width: in its own units, which are pixels unless the page scales it.
        height: in the same units.
        title: a few words.
        description: what is to be seen, with its figures.
        children: what is drawn.
        stretch: whether it may be stretched without keeping its proportions (bars without text).
    """
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        role="img",
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        width=None if stretch else width,
        height=None if stretch else height,
        preserveAspectRatio="none" if stretch else None,
        class_="stretch" if stretch else "chart",
    )


@dataclass(frozen=True)
class Scale:
    """A straight line from values to coordinates; what lies outside is moved to the end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``."""
        width = self.high - self.low
        share = (value - self.low) / width if width > 0 else 0.5
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def ticks(low: float, high: float, count: int = 5) -> Sequence[float]:
    """About ``count`` round values from ``low`` to ``high``, both inside."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        return [low] if math.isfinite(low) else []
    raw = width / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1)]
