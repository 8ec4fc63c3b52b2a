from __future__ import annotations

import numpy as np
import pytest

from sparsecc.sparse import Pattern, density, detect, keep_mask, matches


def pruned(text, sparsity=None, shape=(64, 96)):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return weight * keep_mask(np.abs(weight), Pattern.parse(text), sparsity)


def test_density():
    assert density(np.array([[0, 1], [2, np.nan]])) == 0.75
    assert density(np.zeros((0, 4))) == 0.0


@pytest.mark.parametrize(
    ("text", "sparsity"),
    [("2:4", None), ("1:2", None), ("3:8", None), ("16x1", 0.8), ("16x4", 0.5), ("4x4", 0.5)],
)
def test_a_pruned_weight_shows_its_pattern(text, sparsity):
    weight = pruned(text, sparsity)
    found = [str(p) for p in detect(weight)]
    assert text in found
    assert found[-1] == "unstructured"
    assert all(matches(weight, Pattern.parse(f)) for f in found)


def test_unstructured_shows_nothing_more():
    assert detect(pruned("unstructured", 0.5)) == (Pattern("unstructured"),)
    assert detect(pruned("unstructured", 0.97)) == (Pattern("unstructured"),)


def test_no_zeros_no_pattern():
    assert detect(np.ones((4, 4))) == ()
    assert detect(np.zeros((0, 4))) == ()


def test_implied_groups_are_not_repeated():
    assert [str(p) for p in detect(pruned("2:4")) if p.kind == "nm"] == ["2:4"]


def test_edges_count_what_exists():
    weight = pruned("16x4", 0.5, (50, 21))
    assert matches(weight, Pattern.parse("16x4"))
    assert not matches(np.ones((4, 5)), Pattern.parse("2:4"))
    assert matches(np.array([[1, 1, 0, 0, 1, 1]]), Pattern.parse("2:4"))


def test_block_tolerates_few_zeros_inside():
    weight = pruned("16x4", 0.5)
    weight[tuple(np.argwhere(weight)[0])] = 0
    assert matches(weight, Pattern.parse("16x4"))
    assert not matches(pruned("unstructured", 0.5), Pattern.parse("16x4"))


def test_all_zero():
    assert Pattern.parse("16x1") in detect(np.zeros((32, 32)))
