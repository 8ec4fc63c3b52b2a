"""The page: one file, escaped, the same for the same document, without what the document does not have."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsecc.errors import MissingExtraError, UsageError
from sparsecc.report import render, write_report

pytest.importorskip("jinja2", reason="reports need Jinja2: pip install 'sparsecc[report]'")

Document = Callable[[], dict[str, Any]]
ANCHORS = (
    "trade-off", "latency", "guard", "layers", "sensitivity", "spectra", "patterns", "balance", "passes", "provenance",
    "deploy",
)  # fmt: skip
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks nesting and gathers tags, attributes, anchors and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of one kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_part_has_its_section(document: Document) -> None:
    page = Reader(render(document()))
    assert tuple(item["id"] for item in page.all("section")) == ANCHORS
    assert [item["href"] for item in page.all("a")] == [f"#{anchor}" for anchor in ANCHORS]
    for text in ("input.onnx → small.onnx", "2.00× faster", "2.50× smaller", "✓ held", "rank 3", "0.5x, met"):
        assert text in re.sub(r"\s+", " ", page.text), text


def test_times_of_another_machine_are_not_called_measured(document: Document) -> None:
    whole = document()
    here = Reader(render(whole)).text
    assert "made and measured" in here
    assert "predicted faster" not in here
    latency = {"before_ms": 10.0, "after_ms": 5.0, "speedup": 2.0, "threads": 1, "source": "predicted"}
    there = re.sub(r"\s+", " ", Reader(render({**whole, "latency": latency})).text)
    for text in ("predicted faster", "ms, not measured", "times are predicted for another machine"):
        assert text in there
    assert "made and measured" not in there


def test_parts_that_are_missing_are_left_out(document: Document) -> None:
    whole = document()
    parts = {
        "trade-off": "front", "sensitivity": "sensitivity", "spectra": "spectra", "patterns": "thumbnails",
        "balance": "partition", "passes": "passes", "guard": "metric", "deploy": "output",
    }  # fmt: skip
    for anchor, key in parts.items():
        rest = {name: part for name, part in whole.items() if name.removesuffix("_bytes") != key}
        left = {item["id"] for item in Reader(render(rest)).all("section")}
        assert left == {*ANCHORS} - {anchor}, key


@pytest.mark.parametrize(
    "document",
    [
        {"notes": ["nothing else"]},
        {"sites": [{"site": ""}], "passes": [{"pass": ""}]},
        {"items": [{"name": "a"}], "latency": {"before_ms": 0, "after_ms": 0}, "bytes_before": 0, "bytes_after": 0},
        {"latency": {"before_ms": "inf", "after_ms": "nan", "before": {"min": "nan", "max": 1},
                     "after": {"min": 0, "max": "inf"}}},
        {"front": [{"ms": "nan", "damage": 1}, {"ms": 1, "damage": "inf"}, {}]},
        {"front": [{"ms": 0, "damage": 0, "bytes": 0}] * 3, "budgets": [{"kind": "ms"}]},
        {"sensitivity": [{"name": "a"}, {"name": "b", "points": [{"error": 0, "drop": -1}]}]},
        {"spectra": [{"site": "s", "values": []}, {"site": "t", "values": [0, 0]}, {"site": "u", "values": [1, "nan"]},
                     {"site": "v", "values": [1, 0], "rank": -1, "count": -5}]},
        {"thumbnails": [{"site": "s", "grid": []}, {"site": "t", "grid": [[]]}, {"site": "u", "grid": [["nan", -1]]},
                        {"site": "v", "grid": [[1e-9]], "density": "nan", "shape": [0, 0]}]},
        {"items": [{"name": "a", "candidates": [{"name": "}{", "ms": "nan", "bytes": 0, "error": "inf"},
                                                {"name": ""}]}]},
        {"partition": [{"name": "n", "part_work": [0, 0]}, {"name": "m", "part_work": ["inf", 1]}]},
        {"metric": {"name": "m", "before": "nan", "after": "inf", "steps": [{"change": ""}]}},
        {"sites": [{"site": "a", "layout": "16x1"}],
         "passes": [{"pass": "p", "changed": [{"site": "a", "numbers": {"dense_ms": "inf", "sparse_ms": 1e308}}]}]},
    ],
)  # fmt: skip
def test_odd_values_make_a_page(document: dict[str, Any]) -> None:
    page = Reader(render(document))
    drawn = " ".join(
        value or "" for _, given in page.tags for name, value in given.items() if name != "data-value"
    )
    assert not re.search(r"\b(nan|inf)\b", drawn)


def _with_text(value: Any, text: str) -> Any:
    """The document with ``text`` in the place of every text in it, keys of plain objects too."""
    if isinstance(value, dict):
        return {key: _with_text(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_text(item, text) for item in value]
    return text if isinstance(value, str) else value


HOSTILE = (
    "</title></style></script><script>alert(1)</script><img src=x onerror='alert(1)'>\"' onload=\"alert(1)"
    "{{ 7*7 }}{% raw %}&amp;-->"
)


def test_no_text_becomes_markup(document: Document) -> None:
    hostile = _with_text(document(), HOSTILE)
    hostile["provenance"]["digests"] = {HOSTILE: HOSTILE}
    page = Reader(render(hostile))
    plain = Reader(render(document()))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert len(page.all("script")) == 1
    assert len(page.all("style")) == 1
    assert not page.all("img")
    allowed = {name for _, given in plain.tags for name in given}
    assert {name for _, given in page.tags for name in given} <= allowed
    assert "alert(1)" in page.text
    assert "7*7" in page.text


def test_nothing_is_loaded_and_only_our_script_may_run(document: Document) -> None:
    text = render(document())
    page = Reader(text)
    assert not re.search(r"https?://|url\(|@import|@font-face", text)
    for _, given in page.tags:
        assert not {"src", "srcset", "style", "onclick", "onload"} & given.keys()
    (policy,) = (item["content"] for item in page.all("meta") if "http-equiv" in item)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_no_folder_of_the_machine_is_told(document: Document) -> None:
    whole = {**document(), "output": "/home/somebody/models/small.onnx", "model": "C:\\models\\input.onnx"}
    text = render(whole)
    assert "somebody" not in text
    assert "C:\\models" not in text


def test_charts_and_tables_are_accessible(document: Document) -> None:
    page = Reader(render(document()))
    assert page.all("html")[0]["lang"] == "en"
    charts = page.all("svg")
    assert len(charts) > 10
    assert all(item["role"] == "img" for item in charts)
    assert len(page.all("desc")) == len(charts)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(item.get("scope") in ("col", "row") for item in page.all("th"))


def test_the_same_document_gives_the_same_bytes(document: Document) -> None:
    assert render(document()) == render(document())


def test_many_layers_scroll_in_their_table(document: Document) -> None:
    few = render(document())
    sites = [{"site": f"/layer.{at}/MatMul", "layout": "dense"} for at in range(500)]
    many = render({"sites": sites})
    assert 'class="long"' in many
    assert 'class="long"' not in few
    assert many.count('<th scope="row"') == 500


def test_reasons_against_the_other_candidates(document: Document) -> None:
    text = " ".join(Reader(render(document())).text.split())
    assert "slower and larger, though it loses less" in text  # dense, where nothing was said of it
    assert "the budget forbids it" in text
    assert "✓ chosen" in text
    assert "3 forms compared" in text


def test_files_are_whole_or_not_there(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    write_report(document(), path)
    assert path.read_text("utf-8") == render(document())
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UsageError):
        write_report({"sites": 3}, path)
    assert path.read_text("utf-8") == render(document())
    with pytest.raises(UsageError, match="no regular file"):
        write_report(document(), tmp_path)
    with pytest.raises(OSError, match="absent"):
        write_report(document(), tmp_path / "absent" / "run.html")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["plain", "run.html"]


def test_without_jinja_the_command_is_told(document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[report\]'"):
        render(document())


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in _places(item, (*path, key)))]


def test_mutated_documents_make_a_page_or_one_line(document: Document) -> None:
    odd = [
        None,
        True,
        "",
        "inf",
        "-inf",
        "nan",
        0,
        -1,
        1e308,
        -1e308,
        5e-324,
        10**400,
        [],
        [[]],
        {},
        "a" * 3000,
        0.5,
    ]
    rng = random.Random(0)
    refused: list[str] = []
    for _ in range(150):
        whole = document()
        for path in rng.sample(_places(whole)[1:], rng.choice([1, 1, 2])):
            at: Any = whole
            with contextlib.suppress(LookupError, TypeError):  # its place is gone already
                for step in path[:-1]:
                    at = at[step]
                at[path[-1]] = rng.choice(odd)
        try:
            Reader(render(whole))
        except UsageError as error:
            refused.append(str(error))
    assert 20 < len(refused) < 130
    assert all(len(text) < 200 and "\n" not in text for text in refused)


def _luminance(colour: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb`` (WCAG 2)."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast(root: Path) -> None:
    style = (root / "sparsecc" / "report" / "templates" / "style.css").read_text()
    palettes = [
        dict(re.findall(r"--(\w+): (#\w+);", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    light, dark, paper = palettes
    for palette in (light, dark, {**light, **paper}):
        papers = [_luminance(palette[name]) for name in ("paper", "panel")]
        for name, colour in palette.items():
            if name in ("paper", "panel", "rule"):
                continue
            least = 4.5 if name in ("ink", "soft", "link", "good", "bad", "limit") else 3.0
            for ground in papers:
                low, high = sorted((ground, _luminance(colour)))
                assert (high + 0.05) / (low + 0.05) >= least, (name, colour)


def test_what_planning_took(document: Document) -> None:
    page = render(document()).replace("<wbr>", "")
    assert "60.0 s (50.0 s predicted)" in page
    assert "3 made in 30.0 s (36.0 s predicted)" in page
    assert "400.00 MB (300.00 MB predicted)" in page
    del (without := document())["effort"]
    assert "predicted)" not in render(without)


def test_what_was_dropped_says_why(document: Document) -> None:
    page = render(document()).replace("<wbr>", "")
    assert "3 forms compared, 8 dropped before" in page
    assert "8 dropped: as slow as the dense layer" in page
    assert "and 2 more" in page


def test_bytes_have_a_front_of_their_own(document: Document) -> None:
    page = render(document())
    assert "choices from 1.10 ms to 2.00 ms" not in page
    assert "3 choices from 0.700 ms to 2.00 ms" in page
    assert "3 choices from 700.00 kB to 5.00 MB" in page
    del (without := document())["front_bytes"]
    assert "3 choices from 1.00 MB to 5.00 MB" in render(without)


def test_nothing_chosen_yet(document: Document) -> None:
    whole = document()
    for item in whole["items"]:
        del item["chosen"]
    metric = {"name": "accuracy", "before": 0.9}
    page = render(
        {"model": "net.onnx", "items": whole["items"], "sensitivity": whole["sensitivity"], "metric": metric}
    )
    assert "Analysis of net.onnx" in page.replace("<wbr>", "")
    assert "up to 4.00 times as fast or 4.55 times as small" in page
    assert "of the input" in page
    assert "Dashed" not in page
    assert "2 of 2 parts may take other forms, none is chosen yet" in page.lower()
    assert "✓ chosen" not in page
    assert "predictions" not in page


def test_a_budget_that_was_kept(document: Document) -> None:
    whole = document()
    whole["metric"]["held"] = None
    assert "✓ kept" in tile_names(render(whole))
    whole["budgets"][0]["met"] = False
    assert "✗ missed" in tile_names(render(whole))


def tile_names(page: str) -> str:
    return page.split("<nav")[0]
