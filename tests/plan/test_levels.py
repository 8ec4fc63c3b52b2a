"""What ``-O0`` to ``-O3`` stand for."""

from __future__ import annotations

import pytest

from sparsecc.errors import UsageError
from sparsecc.plan import Asked, asked_at, refuse_at
from sparsecc.plan.pricing import FAMILIES, form_families
from sparsecc.pm import get_pass, search_families
from sparsecc.pm.search import Range


def test_levels_that_lose_nothing_ask_for_nothing() -> None:
    assert asked_at(0, None) is None
    assert asked_at(1, None) is None
    for level in (0, 1):
        with pytest.raises(UsageError, match=f"-O{level} loses nothing"):
            asked_at(level, Asked(max_drop="1%"))


def test_level_two_is_the_default_guard() -> None:
    assert asked_at(2, None) == Asked(max_drop="1%")
    assert asked_at(2, Asked(budget_size="0.5x")) == Asked(budget_size="0.5x", max_drop="1%")


def test_level_three_tries_more() -> None:
    asked = asked_at(3, None)
    assert asked is not None
    assert asked.families is not None
    assert asked.max_drop == "1%"
    assert asked.fine
    assert (asked.attempts or 0) > 6
    families = tuple(asked.families.split(","))
    assert set(FAMILIES) < set(families)
    assert len(form_families(families, convolutions=False, fine=True)) > len(
        form_families(FAMILIES, convolutions=False)
    )


def test_what_is_given_wins() -> None:
    own = Asked(max_drop="3%", families="quantize", attempts=2, fine=False, metric="cosine")
    assert asked_at(3, own) == own
    assert asked_at(None, own) == own
    analysed = asked_at(3, Asked(analysis="analysis.json"))
    assert analysed is not None
    assert (analysed.families, analysed.fine) == (None, None)


@pytest.mark.parametrize("level", [-1, 4])
def test_no_such_level(level: int) -> None:
    with pytest.raises(UsageError, match="there is no level"):
        asked_at(level, None)


@pytest.mark.parametrize(("level", "text"), [(0, "only tidies"), (2, "chooses"), (3, "chooses")])
def test_methods_contradict(level: int, text: str) -> None:
    refuse_at(1, ["pattern"])
    refuse_at(None, ["pattern"])
    with pytest.raises(UsageError, match=text):
        refuse_at(level, ["pattern"])


def test_an_analysis_has_its_own_families() -> None:
    with pytest.raises(UsageError, match="--analysis"):
        Asked(analysis="a.json", families="quantize")


def test_finer_ranges() -> None:
    assert Range.of("keep", (0.9, 0.8, 0.5)).finer().values == ("0.9", "0.85", "0.8", "0.65", "0.5")
    assert Range.of().finer() == Range.of()
    assert Range.of("mode", ("mild", "strong")).finer().values == ("mild", "strong")
    coarse = search_families(get_pass("prune-sparsegpt"))
    for few, many in zip(coarse, search_families(get_pass("prune-sparsegpt"), fine=True), strict=True):
        assert set(few) <= set(many)
        assert len(many) == 2 * len(few) - 1
