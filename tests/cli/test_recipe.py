"""``sparsecc recipe``: what it writes can be run, what it refuses cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecc.plan import preset
from sparsecc.pm import Pipeline

Run = Callable[..., "object"]

PLAN = r"""
pipeline = ["tidy", "@items", "quantize{match=fc2}"]
[plan]
model = "0000"
[[item]]
name = "fc1"
sites = ["fc1"]
choice = "prune-wanda{pattern=2:4}"
[[override]]
match = "fc1"
pattern = "16x1"
sparsity = 0.25
"""


def test_init_writes_what_optimize_would_run(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.toml"
    flags = ("--pattern", "16x1", "--sparsity", "0.5", "--quantize", "int8", "--recover", "ols")
    result = sparsecc("recipe", "init", mlp, *flags, "-o", out)
    assert result.code == 0, result.err
    wanted = preset(pattern="16x1", sparsity=0.5, quantize="int8", recover="ols", calibrated=True)
    assert Pipeline.from_toml(out) == wanted
    assert '#   "fc1"  # MatMul' in out.read_text()
    assert "recipe check" in result.err
    again = sparsecc("recipe", "init", *flags, "-o", out)
    assert again.code == 2
    assert "exists and may have been edited" in again.err
    printed = sparsecc("recipe", "init", *flags)
    assert Pipeline.parse_toml(printed.out) == wanted
    assert sparsecc("recipe", "init", "-o", tmp_path / "no" / "r.toml").code == 2
    assert sparsecc("recipe", "init", "--method", "rrr", "--pattern", "2:4").code == 2


def test_check_says_what_is_wrong(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.toml"
    good.write_text(PLAN)
    result = sparsecc("recipe", "check", good, mlp)
    assert result.code == 0, result.err
    assert "good: 3 passes, 1 overrides" in result.out
    assert "note: needs --calibration-data: prune-wanda" in result.out
    assert "made for another model file" in result.out
    bad = tmp_path / "bad.toml"
    bad.write_text(PLAN.replace("match=fc2", "match=fc3").replace('sites = ["fc1"]', 'sites = ["fd1"]'))
    result = sparsecc("recipe", "check", bad, mlp, "--json")
    assert result.code == 2
    document = json.loads(result.out)
    assert not document["ok"]
    told = " | ".join(document["problems"])
    assert "the model has no site 'fd1' (did you mean 'fc1'?)" in told
    assert "match of prune-wanda" in told
    assert "match of quantize 'fc3' matches none of the 2 sites" in told
    bad.write_text(PLAN.replace('choice = "prune-wanda', 'choice = "prune-wandaa'))
    result = sparsecc("recipe", "check", bad)
    assert result.code == 2
    assert result.err.startswith("sparsecc: error: ")
    assert result.err.count("\n") == 1
    made = tmp_path / "made.toml"
    made.write_text('pipeline = ["factor-svd", "quantize{match=*.first}"]')
    result = sparsecc("recipe", "check", made, mlp)
    assert result.code == 0
    assert "match of quantize is not checked" in result.out
    assert sparsecc("recipe", "check", good, tmp_path / "absent.onnx").code == 3


def test_show_resolves_items_and_overrides(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    document = json.loads(sparsecc("recipe", "show", path, mlp, "--json").out)
    assert document["pipeline"] == [
        "tidy", r'prune-wanda{pattern=2:4 match="re:^(?:fc1)\\Z"}', "quantize{match=fc2}",
    ]  # fmt: skip
    assert document["overrides"] == [{"match": "fc1", "pattern": "16x1", "sparsity": 0.25}]
    assert {site["site"]: site["takes"] for site in document["sites"]} == {
        "fc1": ["prune-wanda{pattern=16x1 sparsity=0.25}"],
        "fc2": ["quantize"],
    }
    assert "sites" not in json.loads(sparsecc("recipe", "show", path, "--json").out)
    shown = sparsecc("recipe", "show", path, mlp).out
    assert "override match = fc1, pattern = 16x1, sparsity = 0.25" in shown
    path.write_text('pipeline = ["quantize"]\n[[override]]\nmatch = "fc2"\nskip = true\n')
    shown = sparsecc("recipe", "show", path, mlp).out
    assert "left alone by an override (quantize)" in shown


def test_schema_is_json(sparsecc: Run, tmp_path: Path) -> None:
    printed = sparsecc("recipe", "schema")
    assert json.loads(printed.out)["properties"]["pipeline"]["type"] == "array"
    assert sparsecc("recipe", "schema", "-o", tmp_path / "s.json").code == 0
    assert (tmp_path / "s.json").read_text() == printed.out


@pytest.mark.parametrize("verb", ["init", "check", "show", "schema"])
def test_help_of_each_has_an_example(sparsecc: Run, verb: str) -> None:
    assert f"Example: sparsecc recipe {verb}" in sparsecc("recipe", verb, "--help").out
