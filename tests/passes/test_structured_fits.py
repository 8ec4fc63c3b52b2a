"""BLAST, Kronecker sums and block-diagonal plus low rank: fits against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsecc.passes.factor import blast_fit, blockdiag_fit, kronecker_fit
from sparsecc.passes.factor.blast_fit import SharedBlocks
from sparsecc.passes.factor.kronecker_fit import KroneckerSum
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import quadratic_error

GRIDS = [(8, 12, (2, 3)), (12, 8, (4, 2)), (6, 9, (1, 3)), (9, 6, (3, 1)), (7, 5, (1, 1)), (4, 4, (4, 4))]
OUTER = [(8, 12, (2, 3)), (12, 8, (12, 2)), (6, 9, (1, 3)), (9, 6, (3, 6)), (1, 6, (1, 2)), (6, 1, (2, 1))]


def problem(rows: int, columns: int, seed: int = 0):
    """A weight and second moments of inputs of mixed and very different sizes, damped as passes do."""
    rng = np.random.default_rng([seed, rows, columns])
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x *= np.exp(rng.standard_normal(columns))
    gram = x.T @ x / len(x)
    return rng.standard_normal((rows, columns)), gram + 0.01 * np.trace(gram) / columns * np.eye(columns)


def never_rises(objectives: list[float]) -> bool:
    return all(later <= earlier * (1 + 1e-9) + 1e-9 for earlier, later in itertools.pairwise(objectives))


def best_of_linear(total, free: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """The smallest ``Q(weight - total(values))`` for ``total`` linear in ``values`` of the shape of ``free``."""
    root = np.linalg.cholesky(gram)
    columns = []
    for at in range(free.size):
        unit = np.zeros(free.size)
        unit[at] = 1
        columns.append((total(unit.reshape(free.shape)) @ root).ravel())
    design, wanted = np.stack(columns, 1), (weight @ root).ravel()
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return float(np.square(design @ solution - wanted).sum())


@pytest.mark.parametrize(("rows", "columns", "grid"), GRIDS)
def test_blast_starts_at_low_rank_and_only_improves(rows, columns, grid):
    weight, gram = problem(rows, columns)
    previous = np.inf
    for rank in range(1, min(rows, columns) + 1):
        low = quadratic_error(weight - best_factors(weight, gram, rank).product(), gram)
        first = blast_fit.start(weight, gram, grid, rank)
        assert quadratic_error(weight - first.total(), gram) == pytest.approx(low, abs=1e-9)
        found, objectives = blast_fit.fit(weight, gram, grid, rank, 6)
        assert objectives[0] == pytest.approx(low, abs=1e-9)
        assert never_rises(objectives)
        assert quadratic_error(weight - found.total(), gram) == pytest.approx(objectives[-1], abs=1e-9)
        np.testing.assert_allclose(found.balanced().total(), found.total(), atol=1e-9)
        assert objectives[0] < previous
        previous = objectives[0]


def test_blast_steps_are_least_squares():
    weight, gram = problem(6, 8, 1)
    rng = np.random.default_rng(2)
    found = SharedBlocks(*(rng.standard_normal(shape) for shape in ((2, 3, 2), (2, 4, 2), (4, 2, 2))))
    whole = found.total()
    for i, j in np.ndindex(2, 4):
        block = found.left[i] @ np.diag(found.mix[i, j]) @ found.right[j]
        np.testing.assert_allclose(whole[3 * i : 3 * i + 3, 2 * j : 2 * j + 2], block, atol=1e-12)
    best = best_of_linear(
        lambda left: SharedBlocks(left, found.mix, found.right).total(), found.left, weight, gram
    )
    stepped = blast_fit.left_step(weight, gram, found)
    assert quadratic_error(weight - stepped.total(), gram) == pytest.approx(best)

    def with_panel(mix, right):
        own = SharedBlocks(stepped.left, stepped.mix.copy(), stepped.right.copy())
        own.mix[:, 1], own.right[1] = mix, right
        return own.total()

    mix, right = stepped.mix[:, 1].copy(), stepped.right[1].copy()
    others = with_panel(np.zeros_like(mix), right)
    slope = (weight - others) @ gram[:, 2:4]
    blast_fit.panel_step(stepped, 1, slope, gram[2:4, 2:4])
    best_mix = best_of_linear(lambda free: with_panel(free, right) - others, mix, weight - others, gram)
    assert quadratic_error(weight - with_panel(stepped.mix[:, 1], right), gram) == pytest.approx(best_mix)
    best_right = best_of_linear(
        lambda free: with_panel(stepped.mix[:, 1], free) - others, right, weight - others, gram
    )
    assert quadratic_error(weight - stepped.total(), gram) == pytest.approx(best_right)


def test_blast_finds_blocks_with_shared_bases():
    """Full rank as a whole, but of this form: low rank of the same size misses most of it."""
    rng = np.random.default_rng(3)
    own = SharedBlocks(*(rng.standard_normal(shape) for shape in ((2, 8, 3), (2, 2, 3), (2, 3, 8))))
    _, gram = problem(16, 16, 3)
    found, objectives = blast_fit.fit(own.total(), gram, (2, 2), 3, 100)
    assert objectives[-1] < 0.5 * objectives[0]
    assert np.isfinite(found.total()).all()


@pytest.mark.parametrize(("rows", "columns", "outer"), OUTER)
def test_nearest_kronecker_sum_is_the_svd_of_the_rearranged_weight(rows, columns, outer):
    weight, gram = problem(rows, columns)
    values = np.linalg.svd(kronecker_fit.rearranged(weight, outer), compute_uv=False)
    for terms in range(1, len(values) + 1):
        near = kronecker_fit.project(weight, outer, terms)
        expected = sum(np.kron(left, right) for left, right in zip(near.left, near.right, strict=True))
        np.testing.assert_allclose(near.total(), expected, atol=1e-12)
        error = np.square(weight - near.total()).sum()
        assert error == pytest.approx(np.square(values[terms:]).sum(), abs=1e-12)
        found, objectives = kronecker_fit.fit(weight, gram, outer, terms, 4)
        assert objectives[0] == pytest.approx(quadratic_error(weight - near.total(), gram), abs=1e-9)
        assert never_rises(objectives)
        assert quadratic_error(weight - found.total(), gram) == pytest.approx(objectives[-1], abs=1e-9)
        np.testing.assert_allclose(found.balanced().total(), found.total(), atol=1e-9)
    np.testing.assert_allclose(near.total(), weight, atol=1e-10)


def test_kronecker_factors_are_least_squares_beside_the_others():
    weight, gram = problem(6, 12, 4)
    near = kronecker_fit.project(weight, (2, 3), 2)
    found, _ = kronecker_fit.fit(weight, gram, (2, 3), 2, 1)
    left_best = best_of_linear(lambda left: KroneckerSum(left, near.right).total(), near.left, weight, gram)
    left = KroneckerSum(found.left, near.right)
    assert quadratic_error(weight - left.total(), gram) == pytest.approx(left_best)
    best = best_of_linear(lambda right: KroneckerSum(found.left, right).total(), near.right, weight, gram)
    assert quadratic_error(weight - found.total(), gram) == pytest.approx(best)
    own = KroneckerSum(np.ones((1, 2, 3)), np.arange(12.0).reshape(1, 3, 4))
    np.testing.assert_allclose(
        kronecker_fit.fit(own.total(), gram, (2, 3), 1, 2)[0].total(), own.total(), atol=1e-9
    )


@pytest.mark.parametrize(("rows", "columns", "count"), [(8, 12, 2), (12, 8, 4), (6, 6, 6), (3, 9, 3)])
def test_blocks_and_factors_are_the_best_beside_one_another(rows, columns, count):
    weight, gram = problem(rows, columns, 5)
    for rank in range(min(rows, columns)):
        found, objectives = blockdiag_fit.fit(weight, gram, count, rank, 8)
        low = quadratic_error(weight - best_factors(weight, gram, rank).product(), gram)
        assert objectives[0] == pytest.approx(low, abs=1e-9)
        assert never_rises(objectives)
        assert quadratic_error(weight - found.total(), gram) == pytest.approx(objectives[-1], abs=1e-9)
        blocks = blockdiag_fit.diagonal_step(weight - found.factors.product(), gram, count)
        best = best_of_linear(blockdiag_fit.spread, blocks, weight - found.factors.product(), gram)
        total = blockdiag_fit.spread(blocks) + found.factors.product()
        assert quadratic_error(weight - total, gram) == pytest.approx(best, abs=1e-9)
    mask = np.kron(np.eye(count), np.ones((rows // count, columns // count)))
    np.testing.assert_array_equal(
        blockdiag_fit.spread(np.ones((count, rows // count, columns // count))), mask
    )


def test_fits_of_zero_weights_and_few_samples_are_finite():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((4, 12))
    x[:, 3], x[:, 7] = 0, x[:, 2]
    gram = x.T @ x + 1e-6 * np.eye(12)
    for weight in (np.zeros((6, 12)), rng.standard_normal((6, 12))):
        for found, objectives in (
            blast_fit.fit(weight, gram, (2, 3), 2, 4),
            kronecker_fit.fit(weight, gram, (2, 3), 2, 4),
            blockdiag_fit.fit(weight, gram, 3, 2, 4),
        ):
            assert np.isfinite(found.total()).all()
            assert never_rises(objectives)
