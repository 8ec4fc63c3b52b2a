"""The charts of a report: SVG, colours by CSS class so that light, dark and print differ only in the style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from sparsecc.report.schema import Curve, FrontPoint, Spectrum, Spread
from sparsecc.report.svg import Html, Scale, element, figure, ticks
from sparsecc.report.text import format_bytes, number, percent, plain, shorten

__all__ = ["balance", "curve", "front", "latency", "pair", "share_bar", "spectrum", "thumbnail"]

_LEVELS = 5  # of grey in thumbnails
_MOST_BARS = 128
_DECADES = 4  # below the largest singular value that are drawn


def _label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> Html:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _axes(
    x: Scale, y: Scale, names: tuple[str, str], *, count: int = 4, as_bytes: bool = False
) -> list[Html]:
    """Grid lines with their values, the two axes, and what they are."""
    drawn: list[Html] = []
    for value in ticks(y.low, y.high, count):
        drawn += [
            _line(x.start, y(value), x.end, y(value), "grid"),
            _label(x.start - 6, y(value) + 4, plain(value), "end"),
        ]
    for value in ticks(x.low, x.high, count):
        text = format_bytes(value).replace(".00", "") if as_bytes else plain(value)
        drawn += [
            _line(x(value), y.start, x(value), y.start + 4, "axis"),
            _label(x(value), y.start + 17, text),
        ]
    drawn.append(_line(x.start, y.start, x.end, y.start, "axis"))
    drawn.append(_label((x.start + x.end) / 2, y.start + 34, names[0], kind="name"))
    drawn.append(_label(x.start - 34, y.end - 10, names[1], "start", "name"))
    return drawn


def front(
    points: Sequence[FrontPoint], by: str, limit: float | None, metric: str, allowed: float | None = None
) -> Html | None:
    """Predicted damage against time or bytes, the chosen point, the input, the budget.

    The line joins the points that no other beats in both; a front by time may hold others that are larger for it.

    Args:
        points: any order.
        by: ``ms`` or ``bytes``.
        limit: the budget in that unit.
        metric: what is damaged.
        allowed: most that it may lose.

    Returns:
        Nothing if fewer than two points have both numbers.
    """
    places = [
        (float(getattr(point, by)), float(point.damage), point)
        for point in points
        if point.damage is not None and math.isfinite(point.damage)
        and getattr(point, by) is not None and math.isfinite(getattr(point, by))
    ]  # fmt: skip
    if len(places) < 2:
        return None
    places.sort(key=lambda place: place[:2])
    wide, most = max(place[0] for place in places), max(place[1] for place in places)
    wide = max(wide, limit or 0.0)
    unit = (lambda value: f"{number(value)} ms") if by == "ms" else format_bytes
    x = Scale(0.0, 1.05 * wide or 1.0, 52, 448)
    y = Scale(0.0, 1.1 * most or 1.0, 262, 34)
    names = (
        "predicted time of one run, ms" if by == "ms" else "predicted bytes of the constants",
        f"predicted loss of {shorten(metric, 40)}",
    )
    drawn = _axes(x, y, names, as_bytes=by == "bytes")
    if limit is not None:
        drawn += [
            _line(x(limit), y.start, x(limit), y.end, "limit"),
            _label(x(limit) - 5, y.end + 10, "budget", "end"),
        ]
    if allowed is not None and 0 < allowed <= most:
        drawn += [
            _line(x.start, y(allowed), x.end, y(allowed), "limit"),
            _label(x.start + 3, y(allowed) - 5, "allowed", "start"),
        ]
    least = itertools.accumulate((place[1] for place in places), min, initial=math.inf)
    best = [place for place, before in zip(places, least, strict=False) if place[1] < before]
    path = "".join(
        f"{'L' if at else 'M'}{x(value):.2f} {y(loss):.2f}" for at, (value, loss, _) in enumerate(best)
    )
    drawn.append(element("path", d=path, class_="front"))
    chosen: list[Html] = []
    for value, loss, point in places:
        told = element("title", f"{unit(value)}, loss {number(loss)}")
        at = (x(value), y(loss))
        if point.chosen:
            chosen += [
                element("path", told, d=f"M{at[0]:.2f} {at[1] - 8:.2f}l8 8l-8 8l-8 -8z", class_="chosen"),
                _label(at[0] + 11, at[1] - 8, "chosen", "start", "mark"),
            ]
        elif point.input:
            chosen += [
                element("rect", told, x=at[0] - 5, y=at[1] - 5, width=10, height=10, class_="input"),
                _label(at[0], at[1] - 12, "input", "middle", "mark"),
            ]
        else:
            drawn.append(element("circle", told, cx=at[0], cy=at[1], r=3, class_="point"))
    taken = next((place for place in places if place[2].chosen), None)
    told_text = f"{len(places)} choices from {unit(places[0][0])} to {unit(places[-1][0])}" + (
        f"; chosen: {unit(taken[0])} at a loss of {number(taken[1])}" if taken else ""
    )
    title = f"Pareto front: loss against {'time' if by == 'ms' else 'bytes'}"
    return figure(460, 306, title, told_text, *drawn, *chosen)


def latency(before: Spread, after: Spread) -> Html | None:
    """Two boxes over one axis of time: range, quartiles, median."""
    spreads = (("input", before), ("output", after))
    if not all(math.isfinite(value) for _, spread in spreads for value in (spread.min, spread.max)):
        return None
    x = Scale(0.0, 1.05 * max(before.max, after.max) or 1.0, 60, 448)
    drawn: list[Html] = []
    for value in ticks(x.low, x.high, 5):
        drawn += [_line(x(value), 8, x(value), 96, "grid"), _label(x(value), 112, plain(value))]
    drawn.append(_label(254, 130, "time of one run, ms", kind="name"))
    told = []
    for row, (name, spread) in enumerate(spreads):
        y, kind = 30 + 44 * row, ("before", "after")[row]
        drawn += [
            _label(52, y + 4, name, "end", "mark"),
            _line(x(spread.min), y, x(spread.max), y, "whisker"),
        ]
        drawn += [_line(x(end), y - 7, x(end), y + 7, "whisker") for end in (spread.min, spread.max)]
        if spread.q1 is not None and spread.q3 is not None:
            wide = max(x(spread.q3) - x(spread.q1), 1.5)
            drawn.append(element("rect", x=x(spread.q1), y=y - 11, width=wide, height=22, class_=kind))
        if spread.median is not None:
            drawn.append(_line(x(spread.median), y - 14, x(spread.median), y + 14, "median"))
        told.append(
            f"{name} {number(spread.min)} to {number(spread.max)} ms, median {number(spread.median)} ms"
        )
    return figure(460, 138, "Latency of the input and the output", "; ".join(told), *drawn)


def pair(before: float | None, after: float | None, most: float, told: str) -> Html:
    """Two thin bars, one above the other: before and after, as shares of ``most``."""
    drawn = []
    for row, (value, kind) in enumerate(((before, "before"), (after, "after"))):
        if value is not None and math.isfinite(value) and most > 0:
            wide = max(100 * min(value / most, 1.0), 0.4)
            drawn.append(element("rect", x=0, y=1 + 6 * row, width=wide, height=5, class_=kind))
    return figure(100, 13, told, told, *drawn, stretch=True)


def share_bar(parts: Sequence[tuple[str, float, str]], whole: float, told: str) -> Html:
    """One stacked bar: name, value and CSS class of each part, as shares of ``whole``."""
    drawn, at = [], 0.0
    for name, value, kind in parts:
        wide = 1000 * value / whole if whole > 0 else 0.0
        title = element("title", f"{name}: {number(value)}")
        drawn.append(
            element("rect", title, x=at, y=0, width=wide - min(1.2, wide / 5), height=26, class_=kind)
        )
        at += wide
    return figure(1000, 26, told, told, *drawn, stretch=True)


def curve(item: Curve, most_error: float, most_drop: float) -> Html | None:
    """Drop of the metric against the error of one item, on axes that all curves share."""
    points = sorted(
        (point.error, point.drop, point.label, point.measured)
        for point in item.points
        if math.isfinite(point.error) and math.isfinite(point.drop)
    )
    if not points:
        return None
    least = min(0.0, min(drop for _, drop, *_ in points))
    x, y = Scale(0.0, 1.05 * most_error or 1.0, 40, 232), Scale(least, 1.1 * most_drop or 1.0, 112, 24)
    drawn = _axes(x, y, ("relative error", "drop"), count=3)
    if item.chosen_error is not None and math.isfinite(item.chosen_error):
        drawn.append(_line(x(item.chosen_error), y.start, x(item.chosen_error), y.end, "limit"))
    path = "".join(f"{'L' if at else 'M'}{x(e):.2f} {y(d):.2f}" for at, (e, d, *_) in enumerate(points))
    drawn.append(element("path", d=path, class_="curve"))
    for error, drop, label, measured in points:
        text = f"{label + ': ' if label else ''}error {number(error)}, drop {number(drop)}"
        told = element("title", f"{text}, measured" if measured else text)
        radius, kind = (4.5, "input") if measured else (2.8, "point")
        drawn.append(element("circle", told, cx=x(error), cy=y(drop), r=radius, class_=kind))
    worst = max(points, key=lambda point: point[1])
    text = f"largest drop {number(worst[1])} at a relative error of {number(worst[0])}"
    return figure(240, 152, f"Sensitivity of {shorten(item.name, 60)}", text, *drawn)


def spectrum(item: Spectrum) -> Html | None:
    """Singular values over a logarithmic axis, with the rank that was kept."""
    values = [value for value in item.values if math.isfinite(value) and value >= 0]
    if len(values) < 2 or values[0] <= 0:
        return None
    count = max(item.count or len(values), 2)
    x, y = Scale(1, count, 40, 232), Scale(-float(_DECADES), 0.0, 112, 24)
    heights = [math.log10(value / values[0]) if value > 0 else -float(_DECADES) for value in values]
    drawn = []
    for power in range(-_DECADES, 1, 2):
        text = "1" if power == 0 else f"1e−{-power}"
        drawn += [_line(x.start, y(power), x.end, y(power), "grid"), _label(34, y(power) + 4, text, "end")]
    step = (count - 1) / (len(values) - 1)
    places = [(x(1 + at * step), y(height)) for at, height in enumerate(heights)]
    path = f"M{x.start} {y.start}" + "".join(f"L{px:.2f} {py:.2f}" for px, py in places) + f"V{y.start}z"
    drawn += [element("path", d=path, class_="area"), _line(x.start, y.start, x.end, y.start, "axis")]
    drawn += [_label(x.start, 129, "1", "start"), _label(x.end, 129, str(count), "end")]
    drawn.append(_label(136, 146, "singular value, number", kind="name"))
    text = f"{count} singular values, the last {number(values[-1] / values[0])} of the first"
    if item.rank is not None and item.rank > 0:
        drawn.append(_line(x(item.rank), y.start, x(item.rank), y.end, "limit"))
        right = item.rank > count / 2
        drawn.append(
            _label(x(item.rank) + (-5 if right else 5), 34, f"rank {item.rank}", "end" if right else "start")
        )
        text += f"; rank {item.rank} is kept"
    return figure(240, 152, f"Singular values of {shorten(item.site, 60)}", text, *drawn)


def thumbnail(grid: Sequence[Sequence[float]], title: str, side: float = 112.0) -> Html | None:
    """A matrix of densities from 0 to 1 as shades; runs of one shade are one rectangle."""
    rows = len(grid)
    columns = len(grid[0]) if rows else 0
    if not columns:
        return None
    cell = side / max(rows, columns)
    most = max((value for row in grid for value in row if math.isfinite(value)), default=0.0)
    paths: list[list[str]] = [[] for _ in range(_LEVELS + 1)]
    for y, row in enumerate(grid):
        shades = [_shade(value, most) for value in row]
        x = 0
        while x < columns:
            start = x
            while x < columns and shades[x] == shades[start]:
                x += 1
            if shades[start]:
                paths[shades[start]].append(f"M{start} {y}h{x - start}v1h-{x - start}z")
    drawn = [element("rect", x=0, y=0, width=columns, height=rows, class_="paper")]
    drawn += [element("path", d="".join(runs), class_=f"level{at}") for at, runs in enumerate(paths) if runs]
    inner = element("g", *drawn, transform=f"scale({cell:.4f})", shape_rendering="crispEdges")
    text = f"{rows} by {columns} cells, the fullest {percent(most)} full"
    return figure(max(columns * cell, 6), max(rows * cell, 6), title, text, inner)


def _shade(value: float, most: float) -> int:
    """Level of grey; anything that is not zero can be seen."""
    if not (math.isfinite(value) and value > 0 and most > 0):
        return 0
    return max(1, min(_LEVELS, round(_LEVELS * (value / most))))


def balance(work: Sequence[float], title: str) -> Html | None:
    """Work of each part, or the most of each run of parts where they are many, and the mean as a line."""
    finite = [max(value, 0.0) for value in work if math.isfinite(value)]
    if not finite or not max(finite):
        return None
    most, mean = max(finite), sum(finite) / len(finite)
    shown = min(len(finite), _MOST_BARS)
    borders = [at * len(finite) // shown for at in range(shown + 1)]
    y, step = Scale(0.0, most, 40, 2), 200 / shown
    drawn = []
    for at in range(shown):
        top = y(max(finite[borders[at] : borders[at + 1]]))
        drawn.append(
            element(
                "rect",
                x=at * step,
                y=top,
                width=step * (0.86 if shown < 64 else 1),
                height=40 - top,
                class_="after",
            )
        )
    drawn += [_line(0, y(mean), 200, y(mean), "limit"), _line(0, 40, 200, 40, "axis")]
    text = f"{len(finite)} parts, largest {number(most)}, mean {number(mean)}"
    return figure(200, 42, title, text, *drawn)
