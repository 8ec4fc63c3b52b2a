"""Run documents come from anybody: what is missing is left out, what is malformed is one line that says where."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecc.api import OptimizeResult
from sparsecc.errors import UsageError
from sparsecc.plan import Latency, SiteDecision
from sparsecc.pm import PassReport
from sparsecc.report import RunDocument, parse_document, read_document

Document = Callable[[], dict[str, Any]]


def test_all_that_optimize_prints_is_read() -> None:
    report = PassReport("choose-layout", "choose-layout", notes=["a note"], seconds=0.5)
    report.change("fc1", "16x1", dense_ms=1.0, sparse_ms=0.25)
    report.skip("fc2", "too few zeros")
    result = OptimizeResult(
        output=Path("out.onnx"), pipeline="tidy", sites=[SiteDecision("fc1", "MatMul", (8, 4), 0.5, "16x1", "why")],
        reports=[report], bytes_before=100, bytes_after=40, latency=Latency(2.0, 1.0, 2.0, 1), max_rel_l2=1e-7,
        rel_l2_to_input=math.inf, notes=["synthetic"], not_sites=[("scores", "computed")], library=True,
    )  # fmt: skip
    document = parse_document(result.to_json())
    told = set(result.to_json()) - {field.name for field in dataclasses.fields(RunDocument)}
    assert not told, f"parts of optimize --json that no report reads: {told}"
    assert document.sites[0].shape == (8, 4)
    assert document.latency is not None
    assert document.latency.speedup == 2.0
    assert document.passes[0].name == "choose-layout"
    assert document.passes[0].changed[0].numbers == {"dense_ms": 1.0, "sparse_ms": 0.25}
    assert document.passes[0].skipped[0].reason == "too few zeros"
    assert document.not_sites[0].name == "scores"
    assert document.rel_l2_to_input == math.inf


def test_every_part_survives(document: Document) -> None:
    read = parse_document(document())
    for field in dataclasses.fields(RunDocument):
        assert getattr(read, field.name) not in (None, (), ""), field.name
    assert read.partition[0].balance == 1.25


def test_unknown_keys_nulls_and_numbers_as_text_are_fine() -> None:
    document = parse_document(
        {"output": "o.onnx", "future": {"a": 1}, "latency": None, "sites": [{"site": "s", "new": []}],
         "max_rel_l2": "nan", "rel_l2_to_input": "inf"}
    )  # fmt: skip
    assert document.latency is None
    assert document.sites[0].density is None
    assert document.rel_l2_to_input == math.inf
    assert math.isnan(document.max_rel_l2 or 0.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sites", {}, "sites is an object, expected a list"),
        ("sites.0.shape", [1, "x"], "sites[0].shape[1] is 'x', expected a whole number"),
        ("sites.0.density", True, "sites[0].density is True, expected a number"),
        ("sites.0.density", "0.5", "sites[0].density is '0.5', expected a number"),
        ("sites.0.site", None, "sites[0].site is missing"),
        ("latency", [1, 2], "latency is a list, expected an object"),
        ("latency.before_ms", None, "latency.before_ms is missing"),
        ("bytes_before", 1.5, "bytes_before is 1.5, expected a whole number"),
        ("bytes_before", "inf", "bytes_before is 'inf', expected a whole number"),
        ("notes", [1], "notes[0] is 1, expected a text"),
        ("operator_library", "yes", "operator_library is 'yes', expected true or false"),
        ("passes.0.changed.0.numbers", {"a": [1]}, "passes[0].changed[0].numbers.a is a list"),
        ("items.0.chosen", 9, "items[0].chosen is 9, of 3 candidates"),
        ("items.0.chosen", -1, "items[0].chosen is -1, of 3 candidates"),
        ("thumbnails.0.grid", [[1, 0], [1]], "thumbnails[0].grid has rows of different lengths"),
        ("thumbnails.0.corner", [[0] * 129], "thumbnails[0].corner has more than 128 cells"),
        ("output", "x" * 10, None),
    ],
)
def test_malformed_parts_are_named(document: Document, path: str, value: object, message: str | None) -> None:
    whole = document()
    at: Any = whole
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in steps:
        at = at[step]
    at[last] = value
    if message is None:
        parse_document(whole)
        return
    with pytest.raises(UsageError) as caught:
        parse_document(whole)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"models": []}, "text"])
def test_other_documents_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="no run document"):
        parse_document(value)


def test_text_is_cleaned() -> None:
    document = parse_document(json.loads('{"notes": ["a\\u0000b\\ud800c\\u001bd\\ne"]}'))
    assert document.notes == ("a\ufffdb\ufffdc\ufffdd\ne",)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"seed": 1' + b"0" * 5000 + b"}"]
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.json is no JSON") as caught:
        read_document(path)
    assert len(str(caught.value)) < 300


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json", Path("/dev/null")):
        with pytest.raises(UsageError, match="is no file"):
            read_document(path)
