"""One budget for many layers: the knapsack against brute force and its bound, thresholds on spectra."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsecc.passes.factor.knapsack import allowed, capped, dual_bound, knapsack, lagrangian, total
from sparsecc.passes.factor.spectra import (
    parameters,
    spread,
    tail_errors,
    threshold_ranks,
    whitened_spectrum,
)
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import quadratic_error


def problem(seed: int, whole: bool):
    """Candidates of a few layers, the first dense, and a budget between the least and the most."""
    rng = np.random.default_rng(seed)
    costs, errors = [], []
    for _ in range(rng.integers(1, 6)):
        count = rng.integers(1, 5)
        own = rng.integers(0, 40, count).astype(float) if whole else rng.random(count) * 40
        costs.append(np.append(own.max() + 1, own))
        errors.append(np.append(0.0, rng.random(count) * 10))
    low, high = (sum(pick(own) for own in costs) for pick in (np.min, np.max))
    budget = low + rng.random() * (high - low)
    return costs, errors, float(np.round(budget)) if whole else float(budget)


def brute(costs, errors, budget):
    ways = (total(costs, errors, chosen) for chosen in itertools.product(*(range(len(own)) for own in costs)))
    return min((way for way in ways if way.cost <= budget), key=lambda way: way.error)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "real"])
def test_knapsack_is_brute_force_and_between_its_bounds(whole):
    for seed in range(60):
        costs, errors, budget = problem(seed, whole)
        best, found, easy = (
            brute(costs, errors, budget),
            *(solve(costs, errors, budget) for solve in (knapsack, lagrangian)),
        )
        assert found.cost <= budget
        assert easy.cost <= budget
        assert found.error == pytest.approx(best.error, abs=1e-9), seed
        bound = dual_bound(costs, errors, budget)
        assert bound <= best.error + 1e-9
        assert found.error <= easy.error
        uniform = [total(costs, errors, [c] * len(costs)) for c in range(min(map(len, costs)))]
        assert all(found.error <= way.error + 1e-9 for way in uniform if way.cost <= budget)


def test_more_budget_is_never_worse_and_none_is_told():
    costs, errors, _ = problem(7, True)
    least = sum(own.min() for own in costs)
    assert knapsack(costs, errors, least - 1) is None
    assert lagrangian(costs, errors, least - 1) is None
    previous = np.inf
    for budget in np.linspace(least, sum(own.max() for own in costs), 25):
        found = knapsack(costs, errors, budget)
        assert found.cost <= budget
        assert found.error <= previous + 1e-12
        previous = found.error
    assert previous == 0  # all dense
    assert knapsack(costs, errors, 1e18).error == 0


def test_candidates_without_cost_and_budgets_of_nothing():
    free = [np.array([0.0, 5.0]), np.array([0.0, 0.0])]
    errors = [np.array([3.0, 0.0]), np.array([2.0, 1.0])]
    assert knapsack(free, errors, 0).chosen == (0, 1)
    assert knapsack(free, errors, 5).chosen == (1, 1)
    assert knapsack([np.zeros(2)], [np.array([1.0, 0.5])], 0).chosen == (1,)
    tiny = [np.array([1e-9, 1e9])] * 3  # costs that round to nothing of the budget are not free
    assert knapsack(tiny, [np.array([1.0, 0.0])] * 3, 2e9).error == 1
    assert knapsack(tiny, [np.array([1.0, 0.0])] * 3, 2e9 + 1).error == 1


def test_the_cap_keeps_single_layers():
    costs = [np.array([10.0, 5, 1])] * 3
    errors = [np.array([0, 0.1, 0.9]), np.array([0, 0.3, 0.5]), np.array([0, 0.2, 0.3])]
    cap = capped(errors, costs, 15, mean=0.2)
    assert cap == pytest.approx(0.3)
    within = [allowed(loss, cap) for loss in errors]
    found = knapsack([own[keep] for own, keep in zip(costs, within, strict=True)],
                     [loss[keep] for loss, keep in zip(errors, within, strict=True)], 15)  # fmt: skip
    assert found.cost <= 15
    assert found.error <= 3 * cap
    assert capped(errors, costs, 4, mean=0.2) is None
    assert capped(errors, costs, 30, mean=0.2) == 0.2
    assert allowed(np.array([0.5, 0.4]), 0.1).tolist() == [False, True]


def layer(n, k, seed=0, decay=0.0):
    rng = np.random.default_rng([seed, n, k])
    x = rng.standard_normal((3 * k + 5, k)) @ rng.standard_normal((k, k))
    left, _, right = np.linalg.svd(rng.standard_normal((n, k)), full_matrices=False)
    return (left * np.exp(-decay * np.arange(min(n, k)))) @ right, x.T @ x


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (1, 5), (5, 1), (6, 6)])
def test_the_spectrum_tells_the_error_of_each_rank(shape):
    weight, gram = layer(*shape)
    spectrum = whitened_spectrum(weight, gram)
    tail = tail_errors(spectrum)
    whole = quadratic_error(weight, gram)
    assert np.sum(spectrum**2) == pytest.approx(whole)
    for rank in range(min(shape) + 1):
        lost = quadratic_error(weight - best_factors(weight, gram, rank).product(), gram)
        assert tail[rank] == pytest.approx(lost / whole, abs=1e-9)
    assert (np.diff(tail) <= 0).all()
    assert not tail_errors(np.zeros(3)).any()
    assert not spread(np.full(4, 2.0)).any()


def test_one_threshold_keeps_the_budget():
    shapes = [(40, 60), (64, 16), (30, 30), (5, 200), (8, 8)]
    levels = [
        spread(whitened_spectrum(*layer(*shape, decay=decay)))
        for shape, decay in zip(shapes, (0.0, 0.1, 0.3, 0.05, 0.0), strict=True)
    ]
    whole = parameters([None] * 5, shapes)
    for multiple in (1, 4):
        previous = None
        for share in (1.0, 0.9, 0.7, 0.5, 0.35):
            ranks = threshold_ranks(levels, shapes, share * whole, multiple)
            assert parameters(ranks, shapes) <= share * whole
            assert all(rank is None or rank % multiple == 0 for rank in ranks)
            for rank, (n, k) in zip(ranks, shapes, strict=True):
                assert rank is None or 0 < rank * (n + k) < n * k
            kept = [np.inf if rank is None else rank for rank in ranks]
            assert previous is None or all(a <= b for a, b in zip(kept, previous, strict=True))
            previous = kept
    assert threshold_ranks(levels, shapes, whole) == [None] * 5
    least = threshold_ranks(levels, shapes, 0, 4)
    assert least == [4, 4, 4, 4, None]  # the last has no smaller form of that rank
    limited = threshold_ranks(levels, shapes, 0.7 * whole, 1, [99, 3, 0, 99, 99])
    assert limited[2] is None
    assert limited[1] is None or limited[1] <= 3
    assert parameters(limited, shapes) <= 0.7 * whole
    flat, steep = threshold_ranks(levels[:1] + levels[2:3], [(40, 60), (30, 30)], 2000)
    assert flat is None or flat > steep
