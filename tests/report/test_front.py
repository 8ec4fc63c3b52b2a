"""The line of a Pareto front joins only what is on it."""

from __future__ import annotations

import re

from sparsecc.report import charts
from sparsecc.report.schema import FrontPoint


def test_the_line_leaves_out_what_another_beats() -> None:
    points = [
        FrontPoint(ms=4.0, bytes=400, damage=0.0, input=True),
        FrontPoint(ms=3.0, bytes=100, damage=0.1),
        FrontPoint(ms=2.0, bytes=300, damage=0.2, chosen=True),
        FrontPoint(ms=1.0, bytes=50, damage=0.3),
    ]
    joined = {}
    for by in ("ms", "bytes"):
        drawn = str(charts.front(points, by, None, "accuracy"))
        line = re.search(r'<path d="([^"]*)" class="front"', drawn) or re.search(
            r'class="front" d="([^"]*)"', drawn
        )
        assert line is not None
        joined[by] = len(re.findall("[ML]", line[1]))
    assert joined == {"ms": 4, "bytes": 3}


def test_what_may_be_lost_is_a_line_where_it_is_within_the_chart() -> None:
    points = [FrontPoint(ms=2.0, damage=0.0, input=True), FrontPoint(ms=1.0, damage=0.3, chosen=True)]
    for allowed, drawn in ((0.1, True), (0.3, True), (0.5, False), (0.0, False), (None, False)):
        assert (">allowed<" in str(charts.front(points, "ms", None, "accuracy", allowed))) == drawn
