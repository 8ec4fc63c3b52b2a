"""``sparsecc inspect --partition``: work of parts by weights, and of threads by the clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "object"]
LOWER = "tidy,prune-magnitude{pattern=%s sparsity=0.75},choose-layout{layout=%s},lower-sparse"


@pytest.mark.parametrize("layout", ["unstructured", "16x1"])
def test_every_operator_has_parts_and_threads(sparsecc: Run, mlp: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out.onnx"
    assert (
        sparsecc("optimize", mlp, "-o", out, "--pipeline", LOWER % (layout, layout), "--keep-slower").code
        == 0
    )
    arguments = ("inspect", out, "--partition", "--threads", 2, "--input-shapes", "x:40,64")
    result = sparsecc(*arguments, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert (document["threads"], document["parts"]) == (2, 2)
    assert [site["name"] for site in document["sites"]] == ["fc1", "fc2"]
    for site in document["sites"]:
        assert site["parts"] == len(site["part_work"]) == 2
        assert site["work"] == sum(site["part_work"]) > 0
        assert site["max"] == max(site["part_work"])
        assert site["lambda"] == pytest.approx(site["max"] / site["mean"])
        assert 0 < max(site["busy_seconds"]) <= site["seconds"]
    assert len(document["busy_seconds"]) <= 2
    text = sparsecc(*arguments, "--parts", 4).out.splitlines()
    assert [line.split()[0] for line in text[1:3]] == ["fc1", "fc2"]
    assert text[-1].startswith("work of one row of x in 4 parts; times of one run on 2 threads")


def test_models_without_sparse_operators_and_wrong_shapes(sparsecc: Run, mlp: Path) -> None:
    result = sparsecc("inspect", mlp, "--partition")
    assert (result.code, result.out) == (0, "no operators of sparsecc: optimize the model first\n")
    assert json.loads(sparsecc("inspect", mlp, "--partition", "--json").out)["sites"] == []
    result = sparsecc("inspect", mlp, "--partition", "--input-shapes", "z:1,64")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert sparsecc("inspect", mlp.parent / "absent.onnx", "--partition").code == 3
