"""The page in a real browser: nothing loaded, nothing complained of, nothing wider than the window."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsecc.report import write_report

pytest.importorskip("jinja2", reason="reports need Jinja2: pip install 'sparsecc[report]'")

Document = Callable[[], dict[str, Any]]
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
HOSTILE = "</script></title><script>window.taken=1</script><img src=x onerror='window.taken=1'>" + "w" * 400


def _requests(events: Sequence[dict[str, Any]]) -> list[str]:
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def _background(browser: Any) -> int:
    """Sum of the red, green and blue of the page's paper."""
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_in_a_window(browser: Any, document: Document, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "run.html"
    write_report(document(), path)
    browser.open(path, width, dark=dark)
    assert [event for event in browser.events if event["method"] in COMPLAINTS] == []
    assert _requests(browser.events) == [path.as_uri()]
    wide = browser.run("document.documentElement.scrollWidth")
    assert wide <= width
    assert (_background(browser) < 200) == dark
    browser.run("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    picture = browser.screenshot()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24])[0] == wide
    unseen = "[...document.querySelectorAll('svg')].filter((item) => item.getBoundingClientRect().height < 2).length"
    assert browser.run(unseen) == 0


def test_columns_are_sorted_by_a_click(browser: Any, document: Document, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    write_report(document(), path)
    browser.open(path, 1280)
    names = "[...document.querySelectorAll('.layers tbody th .name')].map((item) => item.textContent)"
    at_first = browser.run(names)
    assert at_first == ["/layers.0/fc1/MatMul", "/layers.0/fc2/MatMul", "head"]
    button = "document.querySelector('.layers .of-time button').click()"
    browser.run(button)
    assert browser.run(names)[-1] == "head"
    browser.run(button)
    assert browser.run(names)[0] == "head"
    assert browser.run("document.querySelector('.layers .of-time').getAttribute('aria-sort')") == "ascending"


def test_print_has_no_navigation(browser: Any, document: Document, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    write_report(document(), path)
    browser.open(path, 800, dark=True, media="print")
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert _background(browser) == 3 * 255


def test_hostile_names_do_nothing(browser: Any, document: Document, tmp_path: Path) -> None:
    whole = document()
    whole["model"] = whole["notes"][0] = whole["items"][0]["name"] = whole["metric"]["name"] = HOSTILE
    whole["spectra"][0]["site"] = whole["partition"][0]["name"] = whole["provenance"]["command"] = HOSTILE
    path = tmp_path / "run.html"
    write_report(whole, path)
    browser.open(path, 390)
    assert browser.run("window.taken === undefined") is True
    assert _requests(browser.events) == [path.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_long_pages_keep_their_width(browser: Any, tmp_path: Path) -> None:
    sites = [{"site": f"/layer.{at}/MatMul", "layout": "dense", "reason": "r" * at} for at in range(500)]
    path = tmp_path / "run.html"
    write_report({"sites": sites}, path)
    browser.open(path, 390)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.documentElement.scrollHeight") < 3000
