"""The JSON Schema admits what is read, and refuses names and values that no pass has."""

from __future__ import annotations

import re

import pytest

from sparsecc.errors import SpecError
from sparsecc.pm import Pipeline, get_pass, pass_names, search_specs
from sparsecc.pm.recipe import RECIPE_KEYS
from sparsecc.pm.schema import recipe_schema

SCHEMA = recipe_schema()


def admitted(spec: str) -> bool:
    """Whether some definition of a pass, or of several, admits the text."""
    names = [own["$ref"].removeprefix("#/$defs/") for own in SCHEMA["$defs"]["spec"]["anyOf"]]
    return any(re.search(SCHEMA["$defs"][name]["pattern"], spec) for name in names)


def test_every_pass_with_its_defaults_and_what_is_searched():
    for name in pass_names():
        pass_type = get_pass(name)
        given = [info for info in pass_type.option_infos() if info.default]
        quoted = " ".join(f'{info.name}="{info.default}"' for info in given if '"' not in info.default)
        for spec in (name, f"{name}{{ {quoted} }}", *search_specs(pass_type)):
            assert admitted(spec), spec
        assert pass_type.name in SCHEMA["$defs"]


@pytest.mark.parametrize(
    "spec",
    [
        "prune-wanda{pattern=2:4 match=re:.*mlp.*}",
        'prune-wanda{pattern=16x1 match="re:^(?:a{2}|b)\\\\Z"}',
        "prune-wanda{min_elements=3 sparsity=5e-1}",
        "prune-wanda{sparsity=none}",
        " tidy , quantize{method=none activations=static},prune-magnitude{by-channel=true} ",
    ],
)
def test_admits_what_is_read(spec):
    Pipeline.parse(spec)
    assert admitted(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "prune-wandaa",
        "prune-wanda{patern=2:4}",
        "prune-wanda{sparsity=high}",
        "quantize{activations=sometimes}",
        "prune-magnitude{by-channel=yes}",
        "tidy,",
        "tidy quantize",
    ],
)
def test_refuses_what_is_not_read(spec):
    with pytest.raises(SpecError):
        Pipeline.parse(spec)
    assert not admitted(spec)


def test_has_every_key():
    assert set(SCHEMA["properties"]) == set(RECIPE_KEYS)
    assert all(r"\-" not in own.get("pattern", "") for own in SCHEMA["$defs"].values())
    assert all("description" in SCHEMA["$defs"][name] for name in pass_names())
