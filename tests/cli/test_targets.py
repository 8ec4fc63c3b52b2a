"""`sparsecc targets` and `targets profile`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsecc.ir import Model
from sparsecc.plan import profile as measuring
from sparsecc.plan import timing
from sparsecc.plan.cost_model import CostModel


def test_targets_are_listed(sparsecc: Callable[..., object]) -> None:
    result = sparsecc("targets", "--json")
    assert result.code == 0
    assert {target["name"] for target in json.loads(result.out)["targets"]} == {"cpu", "cuda", "arm64"}


def test_profile_says_how_long_and_goes_on(
    sparsecc: Callable[..., object], mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_SITE_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "PATTERNS", ("16x1",))
    monkeypatch.setattr(measuring, "DENSITIES", (0.2,))
    monkeypatch.setattr(measuring, "_RANK_SHARES", ())
    table = tmp_path / "cpu.json"
    arguments = (
        "targets",
        "profile",
        "-o",
        table,
        "--model",
        mlp,
        "--threads",
        1,
        "--input-shapes",
        "x:4,64",
    )
    result = sparsecc(*arguments, "--seconds", 0)
    assert result.code == 0, result.err
    assert "0 of them there already" in result.err
    assert "to go: give the command again" in result.out
    result = sparsecc(*arguments, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["measured"] == told["planned"] > 0
    before = table.read_bytes()
    result = sparsecc(*arguments)
    assert f"{told['planned']} of them there already" in result.err
    assert table.read_bytes() == before
    costs = CostModel.load(table)
    assert "16x1" in costs.forms["linear"]
    model = Model.load(mlp)
    assert costs.model_ms(model, {"x": np.ones((4, 64), np.float32)}) is not None
    assert costs.model_ms(model, {"x": np.ones((5, 64), np.float32)}) is None


def test_profile_refuses_what_is_no_table(sparsecc: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text("[]")
    result = sparsecc("targets", "profile", "-o", tmp_path / "cpu.json")
    assert result.code == 2
    assert "not a sparsecc cost table" in result.err
    result = sparsecc("targets", "profile", "-o", tmp_path / "none" / "cpu.json", "--seconds", 0)
    assert result.code == 2
    assert "does not exist" in result.err
