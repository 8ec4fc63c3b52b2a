"""Parts of a document that a planner fills in: items, front, steps of the guard, provenance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsecc.errors import UsageError
from sparsecc.plan.analysis import Analysis
from sparsecc.plan.guard import Attempt, Limits
from sparsecc.plan.items import Candidate, Choice, Estimate, Item
from sparsecc.report import parse_document, read_document, render
from sparsecc.report.planned import command_line, curve_rows, front_rows, guard_steps, item_rows, provenance

DENSE = Candidate((), 0.0, Estimate(1.0, "measured", 0.02), 100)
SMALL = Candidate(
    ("prune-alps{pattern=16x1 sparsity=0.5}",), 0.5, Estimate(0.5, "interpolated"), 50, True, "a note"
)
ITEMS = [Item(name, (name, f"{name}.tied"), (DENSE, SMALL), sensitivity=2.0) for name in "abcde"]


def _choice(*taken: str) -> Choice:
    chosen = {item.name: int(item.name in taken) for item in ITEMS}
    return Choice(chosen, 5 - 0.5 * len(taken), 500 - 50 * len(taken), 0.5 * len(taken))


def _attempt(choice: Choice, score: float) -> Attempt:
    return Attempt(choice, choice.ms, score, 0.9 - score, choice.bytes)


def test_items_of_a_plan() -> None:
    document = parse_document({"items": item_rows(ITEMS, _choice("a"))})
    row = document.items[0]
    assert (row.name, row.sites, row.chosen) == ("a", ("a", "a.tied"), 1)
    assert [item.chosen for item in document.items] == [1, 0, 0, 0, 0]
    assert row.candidates[0].name == "dense"
    assert row.candidates[1].damage == 0.5
    assert row.candidates[1].source == "interpolated"
    assert row.candidates[1].custom_ops
    assert row.candidates[1].note == "a note"


def test_curves_of_items() -> None:
    spec = SMALL.name
    rows = curve_rows(ITEMS, _choice("a"), {"b": spec})
    curves = parse_document({"sensitivity": rows}).sensitivity
    assert [curve.name for curve in curves] == list("abcde")
    assert curves[0].chosen_error == 0.5
    assert curves[1].chosen_error == 0
    assert [(point.error, point.drop, point.measured) for point in curves[1].points] == [
        (0, 0, False),
        (0.5, 0.5, True),
    ]
    huge = Candidate(("factor-svd",), 3.0, Estimate(float("inf"), "measured"), 1)
    lost = Candidate(("factor-rrr",), float("inf"), Estimate(1.0, "measured"), 1)
    item = Item("z", ("z",), (DENSE, SMALL, huge, lost))
    (row,) = curve_rows([item], Choice({"z": 0}, 1, 1, 0))
    assert len(row["points"]) == 2
    (row,) = curve_rows([item], Choice({"z": 2}, 1, 1, 0))
    assert [point["error"] for point in row["points"]] == [0, 0.5, 3.0]
    assert curve_rows([Item("y", ("y",), (DENSE,))], Choice({"y": 0}, 1, 1, 0)) == []
    candidates = item_rows([item], Choice({"z": 0}, 1, 1, 0))[0]["candidates"]
    assert candidates[2]["ms"] is None
    assert candidates[3]["error"] is candidates[3]["damage"] is None


def test_front_has_the_input_and_the_chosen_point() -> None:
    front = [_choice(), _choice("a"), _choice("a", "b")]
    rows = parse_document({"front": front_rows(front, _choice("a"))}).front
    assert [(row.input, row.chosen) for row in rows] == [(True, False), (False, True), (False, False)]
    assert [row.ms for row in rows] == [5, 4.5, 4]
    rows = parse_document({"front": front_rows(front, _choice("e"))}).front
    assert [(row.input, row.chosen) for row in rows][-1] == (False, True)
    assert len(rows) == 4


def test_steps_say_what_changed() -> None:
    choices = [_choice("a", "b", "c", "d"), _choice("a", "b", "c"), _choice(), _choice()]
    attempts = [_attempt(choice, score) for choice, score in zip(choices, (0.8, 0.85, 0.9, 0.9), strict=True)]
    rows = guard_steps(ITEMS, attempts, Limits(drop=0.06))
    document = parse_document({"metric": {"name": "accuracy", "steps": rows}})
    assert document.metric is not None
    steps = document.metric.steps
    spec = SMALL.name
    assert [step.change for step in steps] == [
        "4 of 5 layers in another form",
        f"d: {spec} → dense",
        f"a: {spec} → dense; b: {spec} → dense; c: {spec} → dense",
        "the same once more",
    ]
    assert [step.held for step in steps] == [False, True, True, True]
    assert [step.value for step in steps] == [0.8, 0.85, 0.9, 0.9]
    (first, *_) = guard_steps(ITEMS, [_attempt(_choice(), 0.9), _attempt(_choice(*"abcd"), 0.9)], Limits())[
        1:
    ]
    assert first["change"].endswith(" and 1 more")


def test_provenance_is_plain() -> None:
    part = json.loads(json.dumps(provenance(["sparsecc", "optimize", "m.onnx"], 3, {"model": "ab" * 32})))
    known = parse_document({"provenance": part}).provenance
    assert known is not None
    assert (known.seed, known.command, known.digests) == (3, "sparsecc optimize m.onnx", {"model": "ab" * 32})
    assert {"cpu", "cores", "isa", "machine"} <= known.machine.keys()
    assert {"onnxruntime", "onnx", "numpy", "operator library"} == known.libraries.keys()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{folder}/my model.onnx", "'my model.onnx'"),
        ("--costs={folder}/c.json", "--costs=c.json"),
        ("{folder}/", "{name}"),
        ("/layers.0/*", "'/layers.0/*'"),
        ("relative/model.onnx", "relative/model.onnx"),
        ("--match=re:^/a$", "'--match=re:^/a$'"),
    ],
)
def test_command_lines_tell_no_folders(tmp_path: Path, given: str, told: str) -> None:
    names = {"folder": str(tmp_path), "name": tmp_path.name}
    assert command_line(["sparsecc", given.format(**names)]) == f"sparsecc {told.format(**names)}"


def analysis() -> dict[str, Any]:
    lost = Candidate(("factor-svd",), float("nan"), Estimate(0.9, "measured"), 90, note="does not pay")
    items = tuple(replace(item, dropped=(lost,)) for item in ITEMS)
    shapes = {site: (4, 4) for item in items for site in item.sites}
    return Analysis("m", "d", "accuracy", 0.9, 2.0, 1.25, items, shapes, ("one note",)).to_json()


def test_an_analysis_makes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"name": "input.onnx", **analysis()}))
    document = read_document(path)
    assert (document.model, document.notes[0]) == ("input.onnx", "one note")
    assert document.metric is not None
    assert (document.metric.name, document.metric.before, document.metric.after) == ("accuracy", 0.9, None)
    assert [item.chosen for item in document.items] == [None] * 5
    assert [(row.note, row.error) for row in document.items[0].dropped] == [("does not pay", None)]
    assert len(document.sensitivity) == 5
    page = render(document)
    assert "1 dropped: does not pay" in page
    assert "Sensitivity" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 9), ("items", [1]), ("items", 3), ("metric", None), ("additivity", "much"),
     ("items", [{"name": "a", "sites": [], "sensitivity": 1, "groups": None, "candidates": [], "dropped": []}])],
)  # fmt: skip
def test_a_damaged_analysis_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({**analysis(), key: value}))
    with pytest.raises(UsageError, match="no analysis of this version"):
        read_document(path)
