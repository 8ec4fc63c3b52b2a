"""Choices under budgets against brute force, scipy's MILP and the dual bound; fronts; the way back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from sparsecc.errors import UsageError
from sparsecc.plan import Candidate, Estimate, Item, back_off, bound, choice_of, choose, front

AMOUNTS = {
    "ms": lambda item, own: own.time.ms,
    "bytes": lambda item, own: own.bytes,
    "damage": lambda item, own: item.damage(own),
}


def candidate(number, error, ms, nbytes, custom=False):
    return Candidate((f"p{number}",) if number else (), error, Estimate(ms, "measured"), nbytes, custom)


def items_of(layers, candidates, seed, region=None):
    """Items of very different size and sensitivity; the first candidate is dense."""
    rng = np.random.default_rng(seed)
    items = []
    for layer in range(layers):
        size, keep = rng.lognormal(), rng.random(candidates - 1)
        own = [candidate(0, 0.0, size, int(size * 1e6))]
        for number, share in enumerate(keep.tolist(), 1):
            ms, nbytes = size * (0.2 + 0.8 * share * rng.random()), int(size * 1e6 * (0.1 + 0.9 * share))
            own.append(candidate(number, (1 - share) * rng.random(), ms, nbytes, bool(rng.integers(2))))
        groups = {"region": str(layer // region)} if region else None
        items.append(Item(f"s{layer}", (f"s{layer}",), tuple(own), rng.lognormal(sigma=1.5), groups))
    return items


def everything(items):
    names = [item.name for item in items]
    ways = itertools.product(*(range(len(item.candidates)) for item in items))
    return [choice_of(items, dict(zip(names, way, strict=True))) for way in ways]


def agreed(items, choice):
    sides = {}
    for item in items:
        sides.setdefault(item.groups["region"], set()).add(
            item.candidates[choice.chosen[item.name]].custom_ops
        )
    return all(len(side) == 1 for side in sides.values())


def dense(items):
    return choice_of(items, {item.name: 0 for item in items})


@pytest.mark.parametrize(
    ("limit", "minimise"),
    [("ms", "damage"), ("bytes", "damage"), ("damage", "ms"), ("damage", "bytes"), ("ms", "bytes")],
)
def test_is_the_best_of_all_choices(limit, minimise):
    for seed in range(6):
        items = items_of(1 + seed % 5, 4, seed)
        ways = everything(items)
        amounts = sorted(getattr(way, limit) for way in ways)
        for budget in (amounts[0], amounts[len(ways) // 3], amounts[-1]):
            best = min(getattr(way, minimise) for way in ways if getattr(way, limit) <= budget)
            found = choose(items, limit=limit, budget=budget, minimise=minimise)
            assert getattr(found, limit) <= budget
            assert getattr(found, minimise) == pytest.approx(best, rel=1e-9, abs=1e-15)
            below = bound(items, limit=limit, budget=budget, minimise=minimise)
            assert below <= best * (1 + 1e-9) + 1e-12
        assert choose(items, limit=limit, budget=amounts[0] - 1e-3, minimise=minimise) is None
        assert bound(items, limit=limit, budget=amounts[0] - 1e-3, minimise=minimise) == math.inf


def test_two_limits_are_kept_and_near_the_best():
    for seed in range(6):
        items = items_of(5, 4, seed)
        ways = everything(items)
        whole = dense(items)
        for share, other in ((0.6, 0.6), (0.9, 0.4), (0.4, 0.9), (0.2, 0.2)):
            limits = {"limit": "ms", "budget": share * whole.ms, "also": ("bytes", other * whole.bytes)}
            kept = [
                way.damage for way in ways if way.ms <= limits["budget"] and way.bytes <= limits["also"][1]
            ]
            found = choose(items, minimise="damage", **limits)
            below = bound(items, minimise="damage", **limits)
            if not kept:
                assert found is None
                assert below == math.inf
                continue
            assert found.ms <= limits["budget"]
            assert found.bytes <= limits["also"][1]
            assert below * (1 - 1e-9) <= min(kept) <= found.damage * (1 + 1e-9)
            assert found.damage <= 1.35 * min(kept)


def milp_optimum(items, limit, budget, minimise):
    cells = [(row, item, own) for row, item in enumerate(items) for own in item.candidates]
    matrix = np.zeros((len(items) + 1, len(cells)))
    for at, (row, item, own) in enumerate(cells):
        matrix[row, at], matrix[-1, at] = 1, AMOUNTS[limit](item, own) / budget
    low, high = np.append(np.ones(len(items)), -np.inf), np.ones(len(items) + 1)
    values = np.array([AMOUNTS[minimise](item, own) for _, item, own in cells])
    solved = milp(
        values, integrality=np.ones(len(cells)), bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high), options={"mip_rel_gap": 1e-7},
    )  # fmt: skip
    assert solved.success
    return solved.fun


@pytest.mark.parametrize(("limit", "minimise"), [("ms", "damage"), ("damage", "bytes")])
def test_agrees_with_milp(limit, minimise):
    for seed in range(2):
        items = items_of(30, 12, seed)
        cheapest = sum(min(AMOUNTS[limit](item, own) for own in item.candidates) for item in items)
        dearest = sum(max(AMOUNTS[limit](item, own) for own in item.candidates) for item in items)
        budget = cheapest + 0.2 * (dearest - cheapest)
        found = choose(items, limit=limit, budget=budget, minimise=minimise)
        best = milp_optimum(items, limit, budget, minimise)
        assert getattr(found, minimise) == pytest.approx(best, rel=1e-5)
        assert bound(items, limit=limit, budget=budget, minimise=minimise) <= best * (1 + 1e-6)


def test_regions_agree_on_custom_operators():
    for seed in range(8):
        items = items_of(4, 4, seed, region=2)
        ways = [way for way in everything(items) if agreed(items, way)]
        for budget in (min(way.ms for way in ways), 0.5 * dense(items).ms, 0.7 * dense(items).ms):
            kept = [way.damage for way in ways if way.ms <= budget]
            found = choose(items, limit="ms", budget=budget, minimise="damage", agree="region")
            if not kept:
                assert found is None
                continue
            assert agreed(items, found)
            assert found.damage == pytest.approx(min(kept), rel=1e-9, abs=1e-15)
            assert bound(
                items, limit="ms", budget=budget, minimise="damage", agree="region"
            ) <= found.damage * (1 + 1e-9)
        for way in front(items, agree="region"):
            assert agreed(items, way)
    custom = candidate(1, 0.1, 0.5, 5, custom=True)
    torn = [
        Item("a", ("a",), (custom,), groups={"region": "r"}),
        Item("b", ("b",), (candidate(0, 0, 1, 1),), groups={"region": "r"}),
    ]
    assert choose(torn, limit="ms", budget=9, minimise="damage", agree="region") is None
    assert front(torn, agree="region") == []
    assert choose(torn, limit="ms", budget=9, minimise="damage") is not None


figures = st.tuples(
    st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5]), st.sampled_from([0.0, 0.1, 0.2, 1.0, 3.0]), st.integers(0, 9)
)


@given(
    st.lists(st.lists(figures, min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.floats(0, 16), min_size=2, max_size=5),
)
@settings(max_examples=60)
def test_budgets_hold_and_more_is_never_worse(table, budgets):
    items = [
        Item(f"s{n}", (f"s{n}",), tuple(candidate(at, *own) for at, own in enumerate(rows)))
        for n, rows in enumerate(table)
    ]
    previous = math.inf
    for budget in sorted(budgets):
        found = choose(items, limit="ms", budget=budget, minimise="damage")
        if found is None:
            assert previous == math.inf
            assert sum(min(own[1] for own in rows) for rows in table) > budget * (1 - 1e-9)
            continue
        assert found.ms <= budget
        assert found.damage <= previous
        previous = found.damage
        for uniform in range(min(map(len, table))):
            way = choice_of(items, {item.name: uniform for item in items})
            assert way.ms > budget or found.damage <= way.damage * (1 + 1e-9)


def test_a_budget_without_end_is_none():
    items = items_of(5, 4, 0)
    without = {"limit": "ms", "budget": math.inf, "minimise": "bytes"}
    least = sum(min(own.bytes for own in item.candidates) for item in items)
    assert choose(items, **without).bytes == least == pytest.approx(bound(items, **without))
    assert choose(items, also=("damage", math.inf), **without).bytes == least
    assert choose(items, **{**without, "budget": math.nan}) is None


def test_nothing_to_choose_and_one_way_only():
    assert choose([], limit="ms", budget=0, minimise="damage") == choice_of([], {})
    assert front([]) == [choice_of([], {})]
    one = [Item("a", ("a",), (candidate(0, 0.0, 2.0, 3),))]
    assert choose(one, limit="ms", budget=2, minimise="damage").chosen == {"a": 0}
    assert choose(one, limit="ms", budget=1.9, minimise="damage") is None
    assert front(one) == [dense(one)]


def test_equals_are_settled_by_what_is_left():
    equal = (candidate(0, 0.0, 1.0, 9), candidate(1, 0.0, 1.0, 4), candidate(2, 0.0, 1.0, 4))
    items = [Item("a", ("a",), equal)]
    assert choose(items, limit="ms", budget=5, minimise="damage").chosen == {"a": 1}


def test_figures_that_are_no_numbers_are_never_chosen():
    unknown = candidate(1, 0.0, math.nan, 0), candidate(2, math.inf, 0.0, 0)
    items = [Item("a", ("a",), (candidate(0, 0.0, 1.0, 9), *unknown))]
    assert choose(items, limit="ms", budget=5, minimise="bytes").chosen == {"a": 0}
    assert [way.chosen for way in front(items)] == [{"a": 0}]
    assert back_off(items, choice_of(items, {"a": 0})) is None
    assert choose([Item("b", ("b",), unknown)], limit="ms", budget=5, minimise="damage") is None
    assert bound([Item("b", ("b",), unknown)], limit="ms", budget=5, minimise="damage") == math.inf


def test_questions_without_an_answer_are_refused():
    items = items_of(2, 2, 0)
    with pytest.raises(UsageError, match="different ones of ms, bytes, damage"):
        choose(items, limit="ms", budget=1, minimise="ms")
    with pytest.raises(UsageError, match="different ones"):
        choose(items, limit="ms", budget=1, minimise="watts")
    with pytest.raises(UsageError, match="two items are named 's0'"):
        choose([*items, items[0]], limit="ms", budget=1, minimise="damage")


@pytest.mark.parametrize("by", ["ms", "bytes"])
def test_front_is_what_is_best_for_some_budget(by):
    for seed in range(4):
        items = items_of(4, 4, seed)
        if by == "bytes":  # few different sums, so that steps are exact
            items = [
                Item(item.name, item.sites, tuple(
                    candidate(n, own.error, own.time.ms, own.bytes // 50_000)
                    for n, own in enumerate(item.candidates)
                ), item.sensitivity)
                for item in items
            ]  # fmt: skip
        found = front(items, by, points=10_000)
        amounts = [getattr(way, by) for way in found]
        assert amounts == sorted(set(amounts))
        assert [way.damage for way in found] == sorted({way.damage for way in found}, reverse=True)
        for way in found:
            best = choose(items, limit=by, budget=getattr(way, by), minimise="damage")
            assert best.damage == pytest.approx(way.damage, rel=1e-9 if by == "bytes" else 0.02)
        ways = everything(items)
        assert amounts[0] == pytest.approx(min(getattr(way, by) for way in ways))
        assert found[-1].damage == 0
        few = front(items, by, points=3)
        assert len(few) <= min(len(found), 8)
        assert (few[0], few[-1]) == (found[0], found[-1])
        assert all(way in found for way in few)


def test_hundreds_of_items_are_near_their_bound():
    items = items_of(200, 30, 0)
    limits = {"limit": "ms", "budget": 0.45 * dense(items).ms, "minimise": "damage"}
    found = choose(items, **limits)
    assert bound(items, **limits) <= found.damage <= bound(items, **limits) * 1.001
    assert len(front(items)) > 60


def test_back_off_takes_most_damage_for_its_gain_and_ends_dense():
    items = items_of(12, 6, 3)
    now = choose(items, limit="ms", budget=0.4 * dense(items).ms, minimise="damage")
    steps = 0
    while (safer := back_off(items, now)) is not None:
        (moved,) = [name for name in now.chosen if now.chosen[name] != safer.chosen[name]]
        rate = (now.damage - safer.damage) / (safer.ms - now.ms)
        for item in items:
            own = item.candidates[now.chosen[item.name]]
            for other in item.candidates:
                gain, cost = item.damage(own) - item.damage(other), other.time.ms - own.time.ms
                assert gain <= 0 or item.name == moved or gain / cost <= rate * (1 + 1e-6)
        assert safer.damage < now.damage
        now, steps = safer, steps + 1
    assert now.damage == 0
    assert steps > 3
    start = choose(items, limit="ms", budget=0.4 * dense(items).ms, minimise="damage")
    half = back_off(items, start, most=start.damage / 2)
    assert half.damage <= start.damage / 2
    assert half.ms < dense(items).ms
    assert back_off(items, start, most=0.0).damage == 0


def test_back_off_keeps_regions_together():
    items = items_of(6, 5, 2, region=3)
    now = choose(items, limit="ms", budget=0.55 * dense(items).ms, minimise="damage", agree="region")
    assert now.damage > 0
    while (safer := back_off(items, now, agree="region")) is not None:
        assert agreed(items, safer)
        assert safer.damage < now.damage
        now = safer
    assert now.damage == 0
