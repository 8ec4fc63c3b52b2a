"""Choices that stay within int8, and the planner's search through them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sparsecc.plan import Candidate, Choice, Estimate, Item, Planner
from sparsecc.plan.guard import Attempt, Limits
from sparsecc.plan.space import Space, with_regions

INT8 = "quantize{activations=static}"


def item(number: int, *forms: tuple[str, float, float]) -> Item:
    """An item of 10 ms; ``forms``: passes with commas between them, ms, error."""
    found = [Candidate((), 0.0, Estimate(10.0, "measured"), 1000)]
    found += [
        Candidate(tuple(passes.split(",")), error, Estimate(ms, "measured"), 500)
        for passes, ms, error in forms
    ]
    return Item(f"i{number}", (f"i{number}",), tuple(found))


def items() -> list[Item]:
    """Three items with int8, in one of which a float form is predicted to be better; one without."""
    return [
        item(0, (INT8, 5.0, 0.1), (f"prune-structured{{keep=0.5}},{INT8}", 3.0, 0.3)),
        item(1, ("factor-rrr", 4.0, 0.05), (INT8, 5.0, 0.1)),
        item(2, (INT8, 5.0, 0.1), (f"prune-structured{{keep=0.5}},{INT8}", 3.0, 0.2)),
        item(3, ("factor-rrr", 8.0, 0.1)),
    ]


def test_a_region_holds_int8_wherever_there_is_any() -> None:
    own = with_regions(items())
    added = own[3].candidates[2]
    assert (added.passes, added.error, added.time.ms) == ((INT8,), 0.1, 5.0)
    assert own[:3] == tuple(items())[:3]
    space = Space.regions(own)
    assert space is not None
    assert space.points[0].chosen == {"i0": 1, "i1": 2, "i2": 1, "i3": 2}
    assert space.points[-1].chosen == {"i0": 2, "i1": 2, "i2": 2, "i3": 2}
    assert [point.ms for point in space.points] == sorted((p.ms for p in space.points), reverse=True)
    seen = [space.points[-1]]
    while (choice := space.safer(seen[-1])) is not None:
        seen.append(choice)
    assert seen[-1] == space.points[0]
    assert all(one.chosen["i1"] == 2 for one in seen)


def test_ranges_found_at_run_time_make_no_regions() -> None:
    dynamic = [item(0, ("quantize", 5.0, 0.1))]
    assert with_regions(dynamic) == tuple(dynamic)
    assert Space.regions(dynamic) is None
    assert Space.regions([]) is None
    whole = Space.whole(items())
    assert whole.points[0].chosen == dict.fromkeys(("i0", "i1", "i2", "i3"), 0)


def planner(monkeypatch: pytest.MonkeyPatch, drop_of_int8: float) -> Planner:
    """A planner whose models are slower where int8 and float meet, as those of onnxruntime are."""
    own = items()
    setting = cast("Any", SimpleNamespace(original=None))
    metric = cast("Any", SimpleNamespace(score=lambda model: 1.0))
    made = Planner(setting, own, metric, {}, ms=40.0, nbytes=4000, destination=Path("out.onnx"))

    def measured(choice: Any) -> Attempt:
        forms = [each.candidates[choice.chosen[each.name]] for each in own[:3]]
        quantised = [INT8 in form.passes for form in forms]
        borders = sum(a != b for a, b in itertools.pairwise(quantised))
        drop = drop_of_int8 * any(quantised) + 0.1 * choice.damage
        return Attempt(choice, choice.ms + 3.0 * borders, 1 - drop, drop, choice.bytes)

    monkeypatch.setattr(made._attempts, "get", measured)
    monkeypatch.setattr(made._attempts, "made", lambda choice: True)
    monkeypatch.setattr(made._attempts, "keep_only", lambda choice: None)
    return made


def test_int8_throughout_beats_what_parts_by_themselves_say(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = planner(monkeypatch, 0.0).search(Limits(drop=0.01), 6)
    assert verdict is not None
    assert not verdict.misses
    assert verdict.best.choice.chosen["i1"] == 2
    held = [attempt.ms for attempt in verdict.attempts if attempt.drop <= 0.01]
    assert verdict.best.ms == min(held) == 18.0
    assert len(verdict.attempts) <= 6


def test_where_int8_loses_too_much_all_choices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = planner(monkeypatch, 0.5).search(Limits(drop=0.01), 6)
    assert verdict is not None
    assert not verdict.misses
    assert {name: at for name, at in verdict.best.choice.chosen.items() if name != "i3"} == {
        "i0": 0,
        "i1": 1,
        "i2": 0,
    }


def test_int8_that_gains_nothing_does_not_hold_the_search_back(monkeypatch: pytest.MonkeyPatch) -> None:
    own = planner(monkeypatch, 0.0)
    measured = own._attempts.get
    int8 = Space.regions(own.items)
    assert int8 is not None

    def slow(choice: Choice) -> Attempt:
        found = measured(choice)
        return replace(found, ms=39.9) if choice == int8.points[0] else found

    monkeypatch.setattr(own._attempts, "get", slow)
    verdict = own.search(Limits(drop=0.01), 6)
    assert verdict is not None
    assert verdict.best.ms < 39.0
    assert any(INT8 not in form.passes for form in chosen_forms(own, verdict.best.choice))


def test_within_a_budget_int8_throughout_is_tried_where_the_safest_choice_loses_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = planner(monkeypatch, 0.0)
    measured = own._attempts.get

    def lossy(choice: Choice) -> Attempt:
        found = measured(choice)
        float_forms = any(form.passes == ("factor-rrr",) for form in chosen_forms(own, choice))
        return replace(found, drop=0.5) if float_forms else found

    monkeypatch.setattr(own._attempts, "get", lossy)
    verdict = own.search(Limits(bytes=2500, drop=0.05), 6)
    assert verdict is not None
    assert not verdict.misses
    assert verdict.attempts[0].drop == 0.5
    assert all(INT8 in form.passes for form in chosen_forms(own, verdict.best.choice)[:3])


def chosen_forms(own: Planner, choice: Choice) -> list[Candidate]:
    return [item.candidates[choice.chosen[item.name]] for item in own.items]
