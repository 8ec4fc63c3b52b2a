"""One rule for which weights stay, in whole matrices and in parts of their columns."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecc.errors import SpecError
from sparsecc.passes.prune.selection import Cap, Selection
from sparsecc.sparse import Pattern

SCORES = np.random.default_rng(2).random((12, 44))


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.13, 0.5, 0.9])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "3x4", "5x3"])
def test_counts_of_parts_add_up_to_the_whole(pattern, sparsity, scope):
    selection = Selection(Pattern.parse(pattern), sparsity, scope)
    step = selection.unit * 3
    parts = [selection.part(SCORES[:, at : at + step], at, 44) for at in range(0, 44, step)]
    units = lambda mask: mask[:: selection.pattern.rows or 1, :: selection.pattern.cols or 1]  # noqa: E731
    whole, joined = units(selection.mask(SCORES)), units(np.concatenate(parts, axis=1))
    assert joined.sum() == whole.sum()
    if scope == "row":
        assert (joined.sum(1) == whole.sum(1)).all()


def test_groups_and_caps():
    grouped = Selection(Pattern.parse("2:4"), None)
    assert grouped.unit == 4
    assert (grouped.mask(SCORES).reshape(12, 11, 4).sum(2) == 2).all()
    capped = Selection(Pattern.parse("unstructured"), 0.5, "row", (Cap(3, 4),))
    mask = capped.mask(SCORES)
    assert capped.unit == 4
    assert (mask.sum(1) == 22).all()
    assert (mask.reshape(12, 11, 4).sum(2) <= 3).all()


@pytest.mark.parametrize("text", ["4", "4:4", "0:4", "5:4", "a:b", "-1:4", "1:4x"])
def test_caps_have_a_text_form(text):
    assert str(Cap.parse(" 2:4 ")) == "2:4"
    with pytest.raises(SpecError, match="unknown cap"):
        Cap.parse(text)
