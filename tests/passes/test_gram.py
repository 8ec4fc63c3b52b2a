"""Layer-wise reconstruction: what is proven about it, on small random layers with correlated inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecc.errors import ModelError
from sparsecc.passes.prune.admm import alternate
from sparsecc.passes.prune.gram import damped, inverse_factor, quadratic_error, shifted_target
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.obs import sweep
from sparsecc.passes.prune.selection import Selection
from sparsecc.sparse import Pattern

N, K, ROWS = 12, 16, 70
SEEDS = range(8)
PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.75),
    ("2:4", None),
    ("3:8", None),
    ("4x1", 0.5),
    ("3x4", 0.5),
]


def layer(seed: int, rows: int = ROWS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A weight, and inputs that are correlated and badly scaled."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, K)) @ rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))
    return rng.standard_normal((N, K)), inputs


def problem(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    weight, inputs = layer(seed)
    return weight, damped(inputs.T @ inputs, 0.01)[0]


def selection(pattern: str, sparsity: float | None, scope: str = "row") -> Selection:
    return Selection(Pattern.parse(pattern), sparsity, scope)


def wanda(weight, gram, chosen: Selection):
    return chosen.mask(np.square(weight) * np.diag(gram))


def swept(weight, gram, chosen: Selection, every: int = 8, block: int = 8):
    return sweep(weight, inverse_factor(gram), lambda squares, at: chosen.part(squares, at, K), every, block)


def refit_exact(target, mask, gram) -> NDArray[np.float64]:
    """The least-squares weights by one factorisation per row."""
    wanted, fitted = target @ gram, np.zeros_like(target)
    for row, support in enumerate(mask):
        fitted[row, support] = np.linalg.solve(gram[np.ix_(support, support)], wanted[row, support])
    return fitted


def best_on(weight, gram, mask) -> float:
    """Error of the exact least-squares weights, row by row."""
    total = 0.0
    for row, support in zip(weight, mask, strict=True):
        inside, outside = np.flatnonzero(support), np.flatnonzero(~support)
        schur = gram[np.ix_(outside, outside)].copy()
        if len(inside):
            part = gram[np.ix_(inside, outside)]
            schur -= part.T @ np.linalg.solve(gram[np.ix_(inside, inside)], part)
        total += row[outside] @ schur @ row[outside]
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_least_squares_is_the_best_on_its_mask(pattern, sparsity, seed):
    weight, gram = problem(seed)
    mask = wanda(weight, gram, selection(pattern, sparsity))
    fitted = refit_rows(weight, mask, gram, steps=200)
    exact = refit_exact(weight, mask, gram)
    assert (fitted[~mask] == 0).all()
    assert (exact[~mask] == 0).all()
    error = quadratic_error(fitted - weight, gram)
    assert quadratic_error(exact - weight, gram) == pytest.approx(best_on(weight, gram, mask), rel=1e-8)
    assert error == pytest.approx(best_on(weight, gram, mask), rel=1e-6)
    assert error <= quadratic_error(np.where(mask, weight, 0) - weight, gram)
    gradient = ((exact - weight) @ gram)[mask]
    assert np.abs(gradient).max() < 1e-9 * np.abs(weight @ gram).max()


def test_every_step_of_the_fit_helps():
    weight, gram = problem(3)
    mask = wanda(weight, gram, selection("unstructured", 0.6))
    errors = [quadratic_error(refit_rows(weight, mask, gram, steps=n) - weight, gram) for n in range(12)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(quadratic_error(np.where(mask, weight, 0) - weight, gram))


def test_larger_supports_are_never_worse():
    for seed in SEEDS:
        weight, gram = problem(seed)
        masks = [wanda(weight, gram, selection("unstructured", p)) for p in (0.25, 0.5, 0.75)]
        assert (masks[2] <= masks[1]).all()
        assert (masks[1] <= masks[0]).all()
        errors = [quadratic_error(refit_exact(weight, mask, gram) - weight, gram) for mask in masks]
        assert errors == sorted(errors)


def test_rows_without_support_and_full_rows():
    weight, gram = problem(0)
    mask = np.zeros((N, K), bool)
    mask[1] = True
    for fitted in (refit_rows(weight, mask, gram), refit_exact(weight, mask, gram)):
        assert (fitted[0] == 0).all()
        np.testing.assert_allclose(fitted[1], weight[1], rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_the_sweep_counts_its_own_error(pattern, sparsity, seed):
    weight, gram = problem(seed)
    chosen = selection(pattern, sparsity)
    every = chosen.unit if pattern in ("2:4", "3:8") else 8
    result = swept(weight, gram, chosen, every)
    assert result.error == pytest.approx(quadratic_error(result.weight - weight, gram), rel=1e-10)
    assert (result.weight[~result.mask] == 0).all()
    fitted = refit_exact(weight, result.mask, gram)
    assert quadratic_error(fitted - weight, gram) <= result.error * (1 + 1e-12)


@pytest.mark.parametrize(("every", "block"), [(1, 1), (4, 4), (4, 6), (8, 128), (16, 5), (5, 3)])
def test_a_fixed_mask_gives_the_same_sweep_in_any_blocks(every, block):
    weight, gram = problem(5)
    mask = wanda(weight, gram, selection("unstructured", 0.5))
    fixed = lambda squares, at: mask[:, at : at + squares.shape[1]]  # noqa: E731
    expected = sweep(weight, inverse_factor(gram), fixed, 16, 16)
    result = sweep(weight, inverse_factor(gram), fixed, every, block)
    np.testing.assert_allclose(result.weight, expected.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_the_sweep_keeps_exact_counts(scope, sparsity):
    weight, gram = problem(1)
    chosen = selection("unstructured", sparsity, scope)
    mask = swept(weight, gram, chosen, 5, 5).mask
    if scope == "row":
        assert (mask.sum(1) == chosen.pattern.keep_count(K, sparsity)).all()
    else:
        assert mask.sum() == chosen.pattern.keep_count(N * K, sparsity)


def test_the_first_removal_costs_what_theory_says():
    """Removing one weight, the others following, costs w**2 / [G^-1]_jj (Hassibi and Stork 1993)."""
    weight, gram = problem(2)
    inverse = np.linalg.inv(gram)
    for row, column in ((0, 0), (4, 9), (11, 15)):
        mask = np.ones((N, K), bool)
        mask[row, column] = False
        error = quadratic_error(refit_exact(weight, mask, gram) - weight, gram)
        assert error == pytest.approx(weight[row, column] ** 2 / inverse[column, column], rel=1e-8)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_alternating_is_never_worse_than_its_start_and_usually_better(pattern, sparsity):
    chosen, gains = selection(pattern, sparsity), []
    for seed in SEEDS:
        weight, gram = problem(seed)
        start = wanda(weight, gram, chosen)
        before = quadratic_error(refit_rows(weight, start, gram) - weight, gram)
        fitted, mask = alternate(weight, gram, chosen.mask, start)
        assert (mask == chosen.mask(mask.astype(float))).all()  # legal
        assert mask.sum() == start.sum()
        after = quadratic_error(fitted - weight, gram)
        assert after <= before
        gains.append(after < before * 0.999)
    assert sum(gains) > (0 if "x" in pattern else len(gains) / 2)


def test_average_orderings_of_methods():
    """Not theorems: they hold for most layers."""
    chosen = selection("unstructured", 0.5)
    wins = np.zeros(3, int)
    for seed in range(60):
        weight, gram = problem(seed)
        error = lambda result: quadratic_error(result - weight, gram)  # noqa: E731
        magnitude = np.where(chosen.mask(np.square(weight)), weight, 0)
        by_wanda = wanda(weight, gram, chosen)
        sparsegpt = swept(weight, gram, chosen, 16, 16)
        wins += [
            error(np.where(by_wanda, weight, 0)) <= error(magnitude),
            error(sparsegpt.weight) <= error(np.where(sparsegpt.mask, weight, 0)),
            error(refit_rows(weight, by_wanda, gram)) <= error(sparsegpt.weight),
        ]
    assert (wins > [50, 55, 40]).all(), wins


def test_retained_score_is_higher_the_freer_the_pattern():
    for seed in SEEDS:
        weight, gram = problem(seed)
        score = np.square(weight) * np.diag(gram)
        chosen = [
            selection("unstructured", 0.5, "layer"),
            selection("unstructured", 0.5, "row"),
            selection("8:16", None),
            selection("4:8", None),
            selection("2:4", None),
        ]
        kept = [score[item.mask(score)].sum() for item in chosen]
        assert kept == sorted(kept, reverse=True)
        blocks = [score[selection(p, 0.5, "layer").mask(score)].sum() for p in ("1x1", "2x2", "4x4")]
        assert blocks == sorted(blocks, reverse=True)
        assert blocks[0] == kept[0]


def test_the_shifted_target_completes_the_square():
    """||X W^T - Xh V^T||^2 is a constant plus Q(V - target)."""
    weight, inputs = layer(4)
    rng = np.random.default_rng(9)
    changed = inputs + 0.3 * rng.standard_normal(inputs.shape)
    gram = changed.T @ changed
    target = shifted_target(weight, gram, inputs.T @ changed, 1e-12, 1.0)
    constant = np.square(inputs @ weight.T - changed @ target.T).sum()
    for candidate in (weight, rng.standard_normal(weight.shape)):
        total = np.square(inputs @ weight.T - changed @ candidate.T).sum()
        assert total == pytest.approx(constant + quadratic_error(candidate - target, gram), rel=1e-6)


@given(seed=st.integers(0, 1000), damping=st.floats(1e-4, 10), correction=st.floats(0, 1))
def test_without_a_difference_the_target_is_the_weight(seed, damping, correction):
    weight, inputs = layer(seed)
    gram = inputs.T @ inputs
    np.testing.assert_allclose(
        shifted_target(weight, gram, gram, damping, correction), weight, rtol=1e-6, atol=1e-9
    )


def test_no_correction_gives_the_weight_and_damping_pulls_towards_it():
    weight, inputs = layer(6)
    changed = inputs * 0.5
    gram, cross = changed.T @ changed, inputs.T @ changed
    np.testing.assert_allclose(shifted_target(weight, gram, cross, 0.01, 0.0), weight, rtol=1e-9)
    away = [
        np.linalg.norm(shifted_target(weight, gram, cross, damping, 1.0) - weight)
        for damping in (1e-6, 0.1, 10.0, 1e6)
    ]
    assert away == sorted(away, reverse=True)
    np.testing.assert_allclose(shifted_target(weight, gram, cross, 1e-9, 1.0), 2 * weight, rtol=1e-4)


def test_bias_correction_gains_exactly_the_mean():
    weight, inputs = layer(7)
    inputs += 2.0
    pruned = np.where(wanda(weight, inputs.T @ inputs, selection("2:4", None)), weight, 0)
    error = inputs @ (weight - pruned).T
    mean = (weight - pruned) @ inputs.mean(0)
    gain = np.square(error).sum() - np.square(error - mean).sum()
    assert gain == pytest.approx(len(inputs) * np.square(mean).sum(), rel=1e-9)


def test_inputs_that_are_dead_double_or_few():
    weight, inputs = layer(8, rows=5)  # fewer rows than columns
    inputs[:, 3] = 0
    inputs[:, 7] = inputs[:, 6]
    gram = damped(inputs.T @ inputs, 0.01)[0]
    chosen = selection("unstructured", 0.5)
    mask = wanda(weight, inputs.T @ inputs, chosen)
    assert not mask[:, 3].any()  # dead inputs go first
    for result in (
        refit_rows(weight, mask, gram),
        swept(weight, gram, chosen).weight,
        alternate(weight, gram, chosen.mask, mask)[0],
    ):
        assert np.isfinite(result).all()
        assert quadratic_error(result - weight, gram) <= quadratic_error(weight, gram)
    assert damped(np.zeros((3, 3)), 0.01)[0].tolist() == np.eye(3).tolist()


def test_inverse_factor():
    _, gram = problem(0)
    factor = inverse_factor(gram)
    np.testing.assert_allclose(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(gram), rtol=1e-7, atol=1e-12)
    singular = np.ones((3, 3))  # is damped
    assert np.isfinite(inverse_factor(singular)).all()
    for broken in (np.full((2, 2), np.nan), -np.eye(2)):
        with pytest.raises(ModelError, match="Gram matrix"):
            inverse_factor(broken)
