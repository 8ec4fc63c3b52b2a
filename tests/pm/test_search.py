"""Ranges that passes declare for a search."""

from __future__ import annotations

import pytest

from sparsecc.pm import Pipeline, Range, get_pass, pass_names, search_families, search_specs

SEARCHED = [name for name in pass_names() if get_pass(name).search]


def test_a_range_is_its_points_mildest_first() -> None:
    item = Range.of("sparsity", (0.5, 0.9), pattern="16x1", by_channel=True)
    assert item.options() == [
        {"pattern": "16x1", "by-channel": "true", "sparsity": "0.5"},
        {"pattern": "16x1", "by-channel": "true", "sparsity": "0.9"},
    ]
    assert str(item) == "pattern=16x1 by-channel=true sparsity=0.5|0.9"
    assert Range.of().options() == [{}]
    assert str(Range.of()) == ""


@pytest.mark.parametrize("name", SEARCHED)
def test_every_declared_spec_parses_and_is_canonical(name: str) -> None:
    specs = search_specs(get_pass(name))
    assert len(set(specs)) == len(specs) > 0
    for spec in specs:
        assert str(Pipeline.parse(spec)) == spec
        assert "match" not in spec
    assert specs == tuple(spec for family in search_families(get_pass(name)) for spec in family)


def test_the_passes_that_the_planner_chooses_from_declare_ranges() -> None:
    wanted = {"prune-sparsegpt", "factor-rrr", "factor-cur", "factor-btt", "prune-structured", "quantize"}
    assert wanted <= set(SEARCHED)
    assert not get_pass("tidy").search
    assert [name for name in SEARCHED if get_pass(name).narrows] == ["quantize", "round-weights"]
