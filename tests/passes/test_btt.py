"""Monarch and block tensor-train: projections and sweeps against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparsecc.passes.factor.btt_fit import BlockFactors, blocks_of, fit, project, refit_left
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import quadratic_error

#: (N, K, grid): square, rectangular, one row, one column, one of each, single entries.
SHAPES = [
    (12, 12, (3, 4)), (12, 20, (4, 5)), (20, 12, (2, 3)), (6, 8, (1, 4)), (8, 6, (4, 1)), (5, 7, (1, 1)),
    (1, 6, (1, 2)), (6, 1, (3, 1)), (6, 6, (6, 6)),
]  # fmt: skip


def correlated(size: int, seed: int, rows: int | None = None) -> np.ndarray:
    """Second moments of inputs of mixed and very different sizes, damped as passes do."""
    rng = np.random.default_rng([seed, size])
    x = rng.standard_normal((rows or 4 * size, size)) @ rng.standard_normal((size, size))
    x *= np.exp(rng.standard_normal(size))
    gram = x.T @ x / len(x)
    return gram + 0.01 * np.trace(gram) / size * np.eye(size)


def monarch(rows: int, columns: int, grid: tuple[int, int], rank: int, rng) -> BlockFactors:
    (down, across), height, width = grid, rows // grid[0], columns // grid[1]
    return BlockFactors(
        rng.standard_normal((down, across, height, rank)), rng.standard_normal((down, across, rank, width))
    )


@pytest.mark.parametrize(("rows", "columns", "grid"), SHAPES)
def test_projection_is_the_svd_of_every_block_and_exact_where_it_can_be(rows, columns, grid):
    rng = np.random.default_rng(rows * columns)
    weight = rng.standard_normal((rows, columns))
    np.testing.assert_array_equal(
        blocks_of(weight, grid)[0, -1], weight[: rows // grid[0], columns - columns // grid[1] :]
    )
    full = min(rows // grid[0], columns // grid[1])
    errors = []
    for rank in range(1, full + 1):
        found = project(weight, grid, rank)
        tails = np.linalg.svd(blocks_of(weight, grid), compute_uv=False)[..., rank:]
        errors.append(np.square(weight - found.total()).sum())
        assert errors[-1] == pytest.approx(np.square(tails).sum(), abs=1e-12)
        np.testing.assert_allclose(found.balanced().total(), found.total(), atol=1e-12)
        own = monarch(rows, columns, grid, rank, rng)
        np.testing.assert_allclose(project(own.total(), grid, rank).total(), own.total(), atol=1e-10)
        refitted, _ = fit(own.total(), correlated(columns, 1), grid, rank, 3)
        np.testing.assert_allclose(refitted.total(), own.total(), atol=1e-7)
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_entries_are_those_of_the_definition():
    rng = np.random.default_rng(2)
    form = monarch(6, 12, (2, 3), 2, rng)
    total = form.total()
    for i, j in np.ndindex(6, 12):
        (k, p), (r, s) = divmod(i, 3), divmod(j, 4)
        assert total[i, j] == pytest.approx(form.left[k, r, p] @ form.right[k, r, :, s])


def test_discrete_fourier_transform_is_monarch_in_the_order_of_its_first_step():
    side = 4
    order = np.arange(side * side).reshape(side, side).T.ravel()  # every fourth one, from each start
    count = np.arange(side * side)
    transform = np.exp(-2j * np.pi * np.outer(count, count) / side**2)[np.ix_(order, order)]
    found = project(transform, (side, side), 1)
    np.testing.assert_allclose(found.total(), transform, atol=1e-12)
    assert np.abs(project(transform[:, order], (side, side), 1).total() - transform[:, order]).max() > 0.1
    hadamard = np.array([[1.0]])
    for _ in range(4):
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    hadamard = hadamard[order]
    np.testing.assert_allclose(project(hadamard, (4, 4), 1).total(), hadamard, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "grid"), SHAPES)
def test_sweeps_never_raise_the_error_and_start_at_panels_by_themselves(rows, columns, grid):
    rng = np.random.default_rng(7 * rows + columns)
    weight, gram = rng.standard_normal((rows, columns)), correlated(columns, 2)
    width, height = columns // grid[1], rows // grid[0]
    previous = math.inf
    for rank in range(1, min(height, width) + 1):
        found, objectives = fit(weight, gram, grid, rank, 5)
        assert quadratic_error(weight - found.total(), gram) == pytest.approx(objectives[-1], abs=1e-9)
        assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in itertools.pairwise(objectives))
        start = np.zeros_like(weight)
        for (k, r), block in zip(
            np.ndindex(grid), blocks_of(weight, grid).reshape(-1, height, width), strict=True
        ):
            panel = slice(r * width, (r + 1) * width)
            own = best_factors(block, gram[panel, panel], rank).product()
            start[k * height : (k + 1) * height, panel] = own
        assert quadratic_error(weight - start, gram) == pytest.approx(objectives[0], abs=1e-9)
        assert objectives[0] <= quadratic_error(weight - start, gram) * (1 + 1e-9) + 1e-12
        assert objectives[0] < previous + 1e-9
        previous = objectives[0]


def test_uncorrelated_panels_need_no_sweep_and_plain_inputs_give_the_projection():
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((8, 12))
    found, objectives = fit(weight, np.eye(12), (2, 3), 2, 4)
    np.testing.assert_allclose(found.total(), project(weight, (2, 3), 2).total(), atol=1e-10)
    assert objectives[-1] == pytest.approx(objectives[0])
    one, _ = fit(weight, correlated(12, 3), (1, 1), 3, 2)
    best = best_factors(weight, correlated(12, 3), 3)
    np.testing.assert_allclose(one.total(), best.product(), atol=1e-8)


def test_left_factors_solve_the_least_squares_problem_of_their_row():
    rng = np.random.default_rng(5)
    gram, weight = correlated(12, 4), rng.standard_normal((6, 12))
    start = monarch(6, 12, (2, 3), 2, rng)
    found = refit_left(weight, gram, start)
    root = np.linalg.cholesky(gram)
    for k in range(2):
        features = np.zeros((6, 12))
        for r in range(3):
            features[2 * r : 2 * r + 2, 4 * r : 4 * r + 4] = start.right[k, r]
        rows = weight[3 * k : 3 * k + 3]
        expected = np.linalg.lstsq((features @ root).T, (rows @ root).T, rcond=None)[0].T
        np.testing.assert_allclose(found.left[k].transpose(1, 0, 2).reshape(3, 6), expected, atol=1e-8)


def test_duplicate_and_dead_inputs_and_few_samples_are_no_trouble():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((5, 12))
    x[:, 3], x[:, 7] = 0, x[:, 2]
    gram = x.T @ x + 1e-6 * np.eye(12)
    weight = rng.standard_normal((8, 12))
    found, objectives = fit(weight, gram, (2, 3), 2, 6)
    assert np.isfinite(found.total()).all()
    assert objectives[-1] <= objectives[0]
    zero, _ = fit(np.zeros((8, 12)), gram, (2, 3), 2, 2)
    np.testing.assert_array_equal(zero.total(), 0)
