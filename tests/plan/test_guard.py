"""The search for a model that keeps its promises, on models that are only numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.plan.guard import Attempt, Limits, fastest_within, verdict, within_budget
from sparsecc.plan.items import Choice

ITEMS = 8
STEPS = 4  # candidates of each item; the later the faster, and the more they cost


def choice_of(steps: tuple[int, ...]) -> Choice:
    chosen = {f"i{at}": step for at, step in enumerate(steps)}
    damage = sum((at + 1) * step**2 for at, step in enumerate(steps))
    return Choice(chosen, 100.0 - sum(steps), 1000 - 10 * sum(steps), float(damage))


#: What time and size are predicted to be.
PREDICTED = (lambda choice: choice.ms, lambda choice: choice.bytes)


def front() -> list[Choice]:
    """One item after the other takes a step, the one that costs least first."""
    steps, points = [0] * ITEMS, [choice_of((0,) * ITEMS)]
    while min(steps) < STEPS - 1:
        at = min(
            (at for at in range(ITEMS) if steps[at] < STEPS - 1),
            key=lambda at: (at + 1) * ((steps[at] + 1) ** 2 - steps[at] ** 2),
        )
        steps[at] += 1
        points.append(choice_of(tuple(steps)))
    return points


def safer(choice: Choice) -> Choice | None:
    steps = list(choice.chosen.values())
    for at in reversed(range(ITEMS)):
        if steps[at]:
            steps[at] -= 1
            return choice_of(tuple(steps))
    return None


def assembler(drop: Callable[[Choice], float], slower: float = 1.0) -> tuple[Any, list[Choice]]:
    made: list[Choice] = []

    def assemble(choice: Choice) -> Attempt:
        made.append(choice)
        return Attempt(choice, choice.ms * slower, 1 - drop(choice), drop(choice), choice.bytes)

    return assemble, made


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 1e-1), st.floats(0.5, 2.0), st.floats(0.0, 5.0), st.integers(1, 8))
def test_what_is_written_keeps_the_limit(scale: float, power: float, limit: float, most: int) -> None:
    assemble, made = assembler(lambda choice: scale * choice.damage**power)
    verdict = fastest_within(front(), assemble, safer, lambda choice: choice.damage, Limits(drop=limit), most)
    assert not verdict.misses
    assert verdict.best.drop <= limit
    assert len(made) <= most + 1
    assert verdict.best.ms == min(a.ms for a in verdict.attempts if a.drop <= limit)


def test_an_unhelpful_prediction_is_corrected() -> None:
    """The fastest point that holds is found, to items, although damage is wrong by a factor of a thousand."""
    points = front()
    limit = 1e-3 * points[15].damage
    assemble, made = assembler(lambda choice: 1e-3 * choice.damage)
    verdict = fastest_within(points, assemble, safer, lambda choice: choice.damage, Limits(drop=limit), 10)
    assert verdict.best.choice == points[15]
    assert len(made) <= 10


def test_a_gain_is_no_drop() -> None:
    assemble, _ = assembler(lambda choice: -choice.damage)
    verdict = fastest_within(front(), assemble, safer, lambda choice: choice.damage, Limits(drop=0.0), 8)
    assert verdict.best.choice == front()[-1]


def test_nan_is_a_miss() -> None:
    assemble, _ = assembler(lambda choice: float("nan") if choice.damage else 0.0)
    verdict = fastest_within(front(), assemble, safer, lambda choice: choice.damage, Limits(drop=1.0), 4)
    assert verdict.best.choice == front()[0]
    assert not verdict.misses


def test_a_score_that_is_no_number_keeps_no_budget_and_is_never_the_closest() -> None:
    choice = front()[-1]
    unknown = Attempt(choice, 1.0, float("nan"), float("nan"), 10)
    known = Attempt(choice, 1.0, 0.0, 5.0, 10)
    assert Limits(bytes=100).misses(unknown) == ("drop",)
    assert Limits(bytes=100).misses(known) == ()
    assert verdict([unknown, known], Limits(drop=1.0)).best is known
    assert verdict([known, unknown], Limits(drop=1.0)).best is known


def test_items_are_taken_back_one_by_one() -> None:
    """One item breaks the model: what is written has all the others."""
    points = [front()[0], front()[-1]]
    assemble, _ = assembler(lambda choice: 1.0 if choice.chosen[f"i{ITEMS - 1}"] else 0.0)
    verdict = fastest_within(points, assemble, safer, lambda choice: choice.damage, Limits(drop=0.1), 8)
    assert not verdict.misses
    assert sum(verdict.best.choice.chosen.values()) >= (ITEMS - 2) * (STEPS - 1)


def test_a_model_slower_than_predicted_gets_a_smaller_budget() -> None:
    points = front()

    def choose(ms: float | None, size: float | None) -> Choice | None:
        fitting = [point for point in points if ms is None or point.ms <= ms]
        return min(fitting, key=lambda point: point.damage) if fitting else None

    assemble, _ = assembler(lambda choice: choice.damage, slower=1.05)
    verdict = within_budget(choose, assemble, Limits(ms=90.0), *PREDICTED, 4)
    assert verdict is not None
    assert not verdict.misses
    assert verdict.best.ms <= 90.0 * 1.02
    assert within_budget(choose, assemble, Limits(ms=1.0), *PREDICTED, 4) is None


def test_a_model_larger_than_predicted_gets_a_smaller_choice_although_the_predicted_size_was_well_within() -> (
    None
):
    points = front()

    def choose(ms: float | None, size: float | None) -> Choice | None:
        fitting = [point for point in points if size is None or point.bytes <= size]
        return min(fitting, key=lambda point: point.damage) if fitting else None

    def assemble(choice: Choice) -> Attempt:
        return Attempt(choice, choice.ms, 1.0, 0.0, int(choice.bytes * 1.01))

    verdict = within_budget(choose, assemble, Limits(bytes=857), *PREDICTED, 4)
    assert verdict is not None
    assert (verdict.misses, [attempt.bytes for attempt in verdict.attempts]) == ((), [858, 848])


def test_the_closest_is_named_where_nothing_holds() -> None:
    points = front()
    assemble, _ = assembler(lambda choice: choice.damage, slower=1.5)
    verdict = within_budget(lambda ms, size: points[-1], assemble, Limits(ms=90.0, drop=0.0), *PREDICTED, 4)
    assert verdict is not None
    assert set(verdict.misses) == {"ms", "drop"}
    assert len(verdict.attempts) == 1


def test_a_size_has_no_tolerance_and_a_time_has() -> None:
    assemble, _ = assembler(lambda choice: 0.0)
    attempt = assemble(front()[3])
    assert Limits(bytes=attempt.bytes).misses(attempt) == ()
    assert Limits(bytes=attempt.bytes - 1).misses(attempt) == ("bytes",)
    assert Limits(ms=attempt.ms / 1.01).misses(attempt) == ()
    assert Limits(ms=attempt.ms / 1.05).misses(attempt) == ("ms",)


def test_attempts_that_are_left_go_on_between_what_holds_and_what_does_not() -> None:
    """Only the ends of the front are given: the search comes as close to the limit as single items allow."""
    points = [front()[0], front()[-1]]
    limit = 0.5 * points[-1].damage
    assemble, made = assembler(lambda choice: choice.damage)
    verdict = fastest_within(points, assemble, safer, lambda choice: choice.damage, Limits(drop=limit), 8)
    assert not verdict.misses
    better = [choice for choice in made if verdict.best.choice.damage < choice.damage <= limit]
    assert not better
    assert verdict.best.choice.damage > 0.8 * limit
