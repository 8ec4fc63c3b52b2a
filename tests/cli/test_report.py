"""``sparsecc report``: from what ``optimize --json`` printed to a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="reports need Jinja2: pip install 'sparsecc[report]'")

Run = Callable[..., Any]
LOWER = "tidy,prune-magnitude{pattern=16x1 sparsity=0.75},choose-layout{layout=16x1},lower-sparse"


@pytest.fixture
def run(sparsecc: Run, mlp: Path, tmp_path: Path) -> Path:
    """What a real run printed."""
    done = sparsecc(
        "optimize", mlp, "-o", tmp_path / "o.onnx", "--pipeline", LOWER, "--keep-slower", "--json"
    )
    assert done.code == 0, done.err
    path = tmp_path / "run.json"
    path.write_text(done.out)
    return path


def test_page_of_a_run(sparsecc: Run, run: Path, tmp_path: Path) -> None:
    done = sparsecc("report", run)
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "run.html").read_text("utf-8")
    assert done.out.startswith(f"{tmp_path / 'run.html'}: ")
    for text in ("<!DOCTYPE html>", "fc1", "16x1", "2 of 2 layers took another form", "o.onnx", "verified"):
        assert text in page, text
    assert str(tmp_path) not in page
    done = sparsecc("report", run, "-o", tmp_path / "other.html", "--json")
    assert json.loads(done.out) == {"output": str(tmp_path / "other.html"), "nbytes": len(page.encode())}
    assert (tmp_path / "other.html").read_text("utf-8") == page


def test_bad_documents_are_one_line(sparsecc: Run, run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content in ("", "[]", '{"sites": [{"site": 1}]}', '{"a": "\\n"}'):
        bad.write_text(content)
        done = sparsecc("report", bad)
        assert done.code == 2, content
        assert done.err.count("\n") == 1
        assert "bad.json" in done.err
    assert sparsecc("report", tmp_path / "absent.json").code == 2
    assert not (tmp_path / "bad.html").exists()
    before = run.read_bytes()
    assert sparsecc("report", run, "-o", run).code == 2
    assert sparsecc("report", run, "-o", tmp_path).code == 2
    assert sparsecc("report", run, "-o", tmp_path / "absent" / "run.html").code == 2
    assert run.read_bytes() == before


def test_without_jinja_the_exit_code_is_6(sparsecc: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    done = sparsecc("report", run)
    assert done.code == 6
    assert done.err == "sparsecc: error: reports need Jinja2: pip install 'sparsecc[report]'\n"
