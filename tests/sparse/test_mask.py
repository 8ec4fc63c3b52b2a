from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse import Pattern, keep_capped, keep_mask

UNSTRUCTURED = Pattern.parse("unstructured")
# Few distinct values, so that ties are the rule.
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.integers(0, 4)
)
groups = st.integers(2, 16).flatmap(
    lambda m: st.builds(Pattern, st.just("nm"), st.integers(1, m - 1), st.just(m))
)
blocks = st.builds(Pattern, st.just("block"), rows=st.integers(1, 6), cols=st.integers(1, 6))
sparsities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


def best(scores, count):
    """The tie rule in plain Python: highest score first, of equals the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in order for i in range(len(scores))]


@given(matrices, sparsities, st.sampled_from(["layer", "row"]))
def test_unstructured_follows_the_rule(score, sparsity, scope):
    rows = score.reshape(1, -1) if scope == "layer" else score
    expected = [best(list(row), UNSTRUCTURED.keep_count(len(row), sparsity)) for row in rows]
    assert np.array_equal(keep_mask(score, UNSTRUCTURED, sparsity, scope), np.reshape(expected, score.shape))


@given(matrices, groups)
def test_groups_follow_the_rule(score, pattern):
    mask = keep_mask(score, pattern)
    for row, kept in zip(score, mask, strict=True):
        for start in range(0, len(row), pattern.m):
            part = list(row[start : start + pattern.m])
            assert list(kept[start : start + pattern.m]) == best(part, min(pattern.n, len(part)))


@given(matrices, blocks, sparsities, st.sampled_from(["layer", "row"]))
def test_blocks_follow_the_rule(score, pattern, sparsity, scope):
    grid = pattern.grid(score.shape)
    cell = lambda a, i, j: a[i * pattern.rows :, j * pattern.cols :][: pattern.rows, : pattern.cols]  # noqa: E731
    sums = np.array([[cell(score, i, j).sum() for j in range(grid[1])] for i in range(grid[0])])
    rows = sums.reshape(1, -1) if scope == "layer" else sums
    expected = np.reshape([best(list(r), pattern.keep_count(len(r), sparsity)) for r in rows], grid)
    mask = keep_mask(score, pattern, sparsity, scope)
    assert mask.shape == score.shape
    for i, j in np.ndindex(*grid):
        assert (cell(mask, i, j) == expected[i, j]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int64, bool])
def test_any_real_dtype(dtype):
    score = np.array([[0, 1, 1, 0]], dtype)
    assert keep_mask(score, Pattern.parse("1:2")).tolist() == [[False, True, True, False]]
    assert keep_mask(score, UNSTRUCTURED, 0.75).tolist() == [[False, True, False, False]]


def test_infinities_rank_and_padding_never_wins():
    score = np.array([[-np.inf, -np.inf, np.inf, 0, -np.inf]], np.float32)
    assert keep_mask(score, Pattern.parse("2:4")).tolist() == [[False, False, True, True, True]]
    assert keep_mask(score, UNSTRUCTURED, 0.4).tolist() == [[True, False, True, True, False]]


def test_dense_keeps_all_and_empty_is_fine():
    assert keep_mask(np.zeros((2, 3)), Pattern.parse("dense")).all()
    for text in ("2:4", "unstructured", "16x4"):
        assert keep_mask(np.zeros((0, 5)), Pattern.parse(text), 0.5).shape == (0, 5)
        assert keep_mask(np.zeros((5, 0)), Pattern.parse(text), 0.5, "row").shape == (5, 0)


def test_nan_is_refused_with_its_place():
    score = np.zeros((3, 4), np.float32)
    score[1, 2] = np.nan
    with pytest.raises(ModelError, match=r"NaN at \[1, 2\]"):
        keep_mask(score, Pattern.parse("2:4"))
    score[1, 1:3] = np.inf, -np.inf
    with pytest.raises(ModelError, match="NaN"):
        keep_mask(score, Pattern.parse("2x4"), 0.5)


def test_wrong_arguments():
    with pytest.raises(SpecError, match="matrix"):
        keep_mask(np.zeros(4), UNSTRUCTURED, 0.5)
    with pytest.raises(SpecError, match="scope"):
        keep_mask(np.zeros((2, 2)), UNSTRUCTURED, 0.5, "column")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="needs a sparsity"):
        keep_mask(np.zeros((2, 2)), UNSTRUCTURED)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(1, 8)), elements=st.integers(0, 6)),
    st.sampled_from([[(1, 2)], [(2, 4)], [(1, 2), (1, 4)], [(3, 4), (4, 8)], [(1, 1), (5, 8)], []]),
    st.integers(0, 8),
)
def test_capped_masks_are_the_best_under_all_caps(score, caps, count):
    """Against every mask there is: the sum of scores is the largest, counts are exact at every node of the tree."""
    columns = score.shape[1]
    legal = [
        picked
        for picked in itertools.combinations(range(columns), count)
        if all(
            sum(start <= j < start + m for j in picked) <= n
            for n, m in caps
            for start in range(0, columns, m)
        )
    ]
    if not legal:
        with pytest.raises(SpecError, match="caps leave"):
            keep_capped(score, caps, count)
        return
    mask = keep_capped(score, caps, count)
    for row, kept in zip(score, mask, strict=True):
        assert tuple(np.flatnonzero(kept)) in legal
        assert row[kept].sum() == max(sum(row[list(picked)]) for picked in legal)


def test_capped_masks_are_nested_and_concave_in_the_count():
    score = np.random.default_rng(0).random((5, 32))
    masks = [keep_capped(score, [(3, 4), (9, 16)], count) for count in range(19)]
    for smaller, larger in itertools.pairwise(masks):
        assert (smaller <= larger).all()
    gains = np.diff([(score * mask).sum(1) for mask in masks], axis=0)
    assert (np.diff(gains, axis=0) <= 1e-12).all()
    over_layer = keep_capped(score, [(3, 4)], 40, "layer")
    assert over_layer.sum() == 40
    assert (over_layer.reshape(5, 8, 4).sum(2) <= 3).all()


def test_caps_must_be_nested():
    with pytest.raises(SpecError, match="6 is no multiple of 4"):
        keep_capped(np.ones((1, 12)), [(2, 4), (3, 6)], 2)
