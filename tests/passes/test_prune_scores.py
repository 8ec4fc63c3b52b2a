"""Pruning mathematics against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import UsageError
from sparsecc.passes.prune.scores import is_pruned, magnitude_score, prune_matrix, wanda_score
from sparsecc.passes.prune.selection import Selection
from sparsecc.sparse import Pattern, matches

UNSTRUCTURED = Pattern.parse("unstructured")
PATTERNS = ["unstructured", "2:4", "1:4", "4:8", "1:16", "16x1", "4x4", "1x16"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scaled(weight: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """The metric in its plain form, relative to the largest norm."""
    return np.abs(weight) * np.sqrt(mean_square / mean_square.max())


def test_magnitude_mask_has_the_smallest_frobenius_error_of_all_masks():
    weight = normal(0, 2, 4)
    pruned = prune_matrix(weight, magnitude_score(weight), Selection(UNSTRUCTURED, 0.5, "layer"))
    total = float(np.linalg.norm(weight))
    best = min(
        np.linalg.norm(weight.reshape(-1)[list(dropped)]) / total
        for dropped in itertools.combinations(range(8), 4)
    )
    assert pruned.relative_error == pytest.approx(best, rel=1e-6)
    assert pruned.relative_error == pytest.approx(np.linalg.norm(weight - pruned.weight) / total, rel=1e-6)


def test_block_mask_has_the_smallest_frobenius_error_of_all_block_masks():
    weight = normal(8, 4, 8) ** 3  # heavy tails: sums of magnitudes would choose other blocks
    pruned = prune_matrix(weight, magnitude_score(weight), Selection(Pattern.parse("2x2"), 0.5, "layer"))
    blocks = (weight.astype(np.float64) ** 2).reshape(2, 2, 4, 2).sum((1, 3)).reshape(-1)
    best = min(sum(blocks[list(dropped)]) for dropped in itertools.combinations(range(8), 4))
    assert pruned.relative_error == pytest.approx(np.sqrt(best / blocks.sum()), rel=1e-6)


def test_huge_statistics_do_not_overflow():
    weight = normal(9, 4, 8)
    score = wanda_score(weight, np.full(8, 1e76))
    assert np.isfinite(score).all()
    assert 0 < prune_matrix(weight, score, Selection(UNSTRUCTURED, 0.5, "row")).kept_score < 1


def test_wanda_mask_has_the_smallest_diagonal_output_error_of_all_row_masks():
    weight, inputs = normal(1, 3, 6), normal(2, 50, 6) * np.arange(1, 7, dtype=np.float32)
    mean_square = np.mean(np.square(inputs, dtype=np.float64), axis=0)
    score = wanda_score(weight, mean_square)
    np.testing.assert_allclose(score, scaled(weight, mean_square), rtol=1e-6)
    pruned = prune_matrix(weight, score, Selection(UNSTRUCTURED, 0.5, "row"))
    assert (np.count_nonzero(pruned.weight, axis=1) == 3).all()
    for row, kept in zip(weight, pruned.weight, strict=True):
        error = float(((row - kept) ** 2) @ mean_square)
        best = min(
            sum(row[j] ** 2 * mean_square[j] for j in dropped)
            for dropped in itertools.combinations(range(6), 3)
        )
        assert error == pytest.approx(best, rel=1e-5)


def test_wanda_with_equal_inputs_is_row_magnitude():
    weight = normal(3, 8, 32)
    ours = prune_matrix(weight, wanda_score(weight, np.ones(32)), Selection(UNSTRUCTURED, 0.6, "row"))
    plain = prune_matrix(weight, magnitude_score(weight), Selection(UNSTRUCTURED, 0.6, "row"))
    np.testing.assert_array_equal(ours.weight, plain.weight)


def test_wanda_groups_read_their_own_columns():
    weight = normal(4, 6, 5)
    mean_square = np.random.default_rng(5).random((3, 5))
    expected = scaled(weight, mean_square.repeat(2, axis=0))
    np.testing.assert_allclose(wanda_score(weight, mean_square, groups=3), expected, rtol=1e-6)
    shared = wanda_score(weight, mean_square[0], groups=3)
    np.testing.assert_allclose(shared, scaled(weight, mean_square[0]), rtol=1e-6)


def test_wanda_refuses_statistics_of_another_length():
    with pytest.raises(UsageError, match="7 column statistics for a weight of 5 columns"):
        wanda_score(normal(4, 6, 5), np.ones(7))


def test_a_dead_input_loses_its_weights_first():
    weight = np.ones((4, 8), np.float32)
    mean_square = np.ones(8)
    mean_square[[1, 6]] = 0
    pruned = prune_matrix(
        weight, wanda_score(weight, mean_square), Selection(UNSTRUCTURED, 0.25, "row")
    ).weight
    assert (pruned[:, [1, 6]] == 0).all()
    assert np.count_nonzero(pruned) == 24


@given(
    pattern=st.sampled_from(PATTERNS).map(Pattern.parse),
    sparsity=st.sampled_from([0.1, 0.5, 0.9]),
    scope=st.sampled_from(["layer", "row"]),
    groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_laws(pattern, sparsity, scope, groups, dtype, seed):
    weight = normal(seed, 64, 48).astype(dtype)
    wanted = sparsity if pattern.needs_sparsity else None
    pruned = prune_matrix(weight, magnitude_score(weight), Selection(pattern, wanted, scope), groups)
    kept = pruned.weight != 0
    assert pruned.weight.dtype == dtype
    assert matches(pruned.weight, pattern)
    np.testing.assert_array_equal(pruned.weight[kept], weight[kept])  # what stays is unchanged
    for block in np.split(kept, groups):  # exact count in every group of rows
        grid = np.array(pattern.grid(block.shape))
        rows = 1 if scope == "layer" else int(grid[0])
        units = pattern.keep_count(int(grid.prod()) // rows, wanted) * rows if wanted else None
        if pattern.kind == "unstructured":
            assert np.count_nonzero(block) == units
        elif pattern.kind == "nm":
            assert np.count_nonzero(block) == block.size * pattern.n // pattern.m
    assert is_pruned(pruned.weight, Selection(pattern, wanted, scope), groups)
    again = prune_matrix(
        pruned.weight, magnitude_score(pruned.weight), Selection(pattern, wanted, scope), groups
    )
    np.testing.assert_array_equal(again.weight, pruned.weight)
    assert 0 <= pruned.kept_score <= 1
    assert pruned.density_after <= pruned.density_before == 1
    dense_norm = np.linalg.norm(weight.astype(np.float64))
    error = np.linalg.norm((weight - pruned.weight).astype(np.float64)) / dense_norm
    assert pruned.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_scopes_and_patterns_are_ordered_by_freedom():
    weight = normal(6, 32, 64)
    shares = [
        prune_matrix(
            weight, magnitude_score(weight), Selection(Pattern.parse(pattern), sparsity, scope)
        ).kept_score
        for pattern, sparsity, scope in [
            ("unstructured", 0.5, "layer"),
            ("unstructured", 0.5, "row"),
            ("4:8", None, "layer"),
            ("2:4", None, "layer"),
        ]
    ]
    assert shares == sorted(shares, reverse=True)
    blocks = [
        prune_matrix(
            weight, magnitude_score(weight), Selection(Pattern.parse(p), 0.5, "layer")
        ).relative_error
        for p in ("4x1", "16x1", "16x4")
    ]
    assert blocks == sorted(blocks)


def test_a_sparser_weight_counts_as_pruned_and_a_denser_does_not():
    weight = np.zeros((8, 32), np.float32)
    weight[:, :8] = 1
    assert is_pruned(weight, Selection(UNSTRUCTURED, 0.5, "layer"))
    assert is_pruned(weight, Selection(UNSTRUCTURED, 0.75, "row"))
    assert not is_pruned(weight, Selection(UNSTRUCTURED, 0.8, "layer"))
    assert not is_pruned(weight, Selection(Pattern.parse("2:4"), None, "layer"))


def test_extreme_values_do_not_overflow_the_report():
    weight = np.array([[3e38, 1e38, 1e-38, 2e38]], np.float32)
    pruned = prune_matrix(weight, magnitude_score(weight), Selection(UNSTRUCTURED, 0.5, "layer"))
    assert 0 < pruned.relative_error < 1
    zero = np.zeros((2, 4), np.float32)
    assert prune_matrix(zero, zero, Selection(UNSTRUCTURED, 0.5, "layer")).kept_score == 1
