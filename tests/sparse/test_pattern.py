from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import SpecError
from sparsecc.sparse import Pattern


@pytest.mark.parametrize("text", ["dense", "unstructured", "1:2", "2:4", "15:16", "1x1", "16x1", "64x64"])
def test_parse_and_str_are_inverse(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "2/4", "0:4", "4:4", "5:4", "2:17", "0x4", "65x1", "16x", "-1:4", "2:4:8", "9999:1", "2 : 4"]
)
def test_bad_text_is_refused_with_the_forms(text):
    with pytest.raises(SpecError, match="N:M"):
        Pattern.parse(text)


def test_numbers_that_do_not_belong_are_refused():
    with pytest.raises(SpecError, match="takes no such"):
        Pattern("unstructured", n=2)
    with pytest.raises(SpecError, match="unknown pattern kind"):
        Pattern("csr")  # type: ignore[arg-type]


def test_density():
    assert Pattern.parse("2:4").density() == 0.5
    assert Pattern.parse("2:4").density(0.9) == 0.5
    assert Pattern.parse("dense").density() == 1.0
    assert Pattern.parse("16x1").density(0.75) == 0.25
    with pytest.raises(SpecError, match="needs a sparsity"):
        Pattern.parse("16x1").density()
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(SpecError, match="between 0 and 1"):
            Pattern.parse("unstructured").density(bad)


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [(5, 0.9, 1), (10, 0.9, 1), (4, 0.9, 0), (100, 0.29, 71), (7, 1.0, 0), (7, 0, 7)],
)
def test_keep_count_rounds_exact_halves_up(total, sparsity, kept):
    assert Pattern.parse("unstructured").keep_count(total, sparsity) == kept


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8))
def test_grid_covers_the_matrix(n, k, rows, cols):
    grid = Pattern("block", rows=rows, cols=cols).grid((n, k))
    assert (grid[0] - 1) * rows < n <= grid[0] * rows
    assert (grid[1] - 1) * cols < k <= grid[1] * cols
