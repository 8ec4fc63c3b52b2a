"""``optimize --reference``: a model that was pruned elsewhere is recovered towards its dense one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsecc.ir import Model
from sparsecc.sparse import density
from sparsecc.verify import session

Run = Callable[..., Any]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64)) + 1
    path = tmp_path / "inputs.npz"
    np.savez(path, x=x.astype(np.float32))
    return path


@pytest.fixture
def pruned(sparsecc: Run, mlp: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pruned.onnx"
    result = sparsecc("optimize", mlp, "-o", path, "--sparsity", "0.7", "--standard-ops-only", "--threads", 1)
    assert result.code == 0, result.err
    return path


def distance(model: Path, dense: Path, inputs: Path) -> float:
    x = np.load(inputs)["x"]
    here, there = (session(Model.load(path)).run({"x": x})["y"] for path in (model, dense))
    return float(np.linalg.norm(here - there) / np.linalg.norm(there))


def test_what_was_pruned_elsewhere_is_recovered(
    sparsecc: Run, mlp: Path, pruned: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    arguments = ("optimize", pruned, "-o", out, "--calibration-data", inputs, "--recover", "ols,bias")
    fixed = ("--reference", mlp, "--standard-ops-only", "--threads", 1)
    result = sparsecc(*arguments, *fixed)
    assert result.code == 0, result.err
    assert "recover-ols: relative squared error of the outputs on the calibration inputs" in result.out
    assert distance(out, mlp, inputs) < 0.7 * distance(pruned, mlp, inputs)
    before, after = ([site.numpy() for site in Model.load(path).sites()] for path in (pruned, out))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old == 0, new == 0)
        assert density(new) == pytest.approx(0.3, abs=0.001)
    assert "sparsecc.reference_sha256" in Model.load(out).metadata
    document = json.loads(sparsecc(*arguments, *fixed, "--json").out)
    assert document["pipeline"] == "tidy,recover-ols,recover-bias"


def test_it_must_be_the_model_that_this_one_was_made_from(
    sparsecc: Run, mlp: Path, pruned: Path, inputs: Path, tmp_path: Path
) -> None:
    other = onnx.load(mlp)
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    onnx.save(other, tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    data, recover = ("--calibration-data", inputs), ("--recover", "ols")
    out = tmp_path / "out.onnx"
    for code, message, arguments in (
        (2, "not what the model was made from", (tmp_path / "other.onnx", *recover, *data)),
        (2, "give --recover NAMES too", (mlp, *data)),
        (2, "give --calibration-data PATH", (mlp, *recover)),
        (2, "permute reorders channels", (mlp, *recover, *data, "--pattern", "2:4", "--permute")),
        (3, "broken.onnx", (tmp_path / "broken.onnx", *recover, *data)),
    ):
        result = sparsecc("optimize", pruned, "-o", out, "--reference", *arguments)
        assert result.code == code, result.err
        assert message in result.err
        assert not out.exists()
    result = sparsecc("optimize", pruned, "-o", mlp, "--reference", mlp, *recover, *data)
    assert (result.code, "is the input" in result.err) == (2, True)


def test_batch_normalisation_is_folded_in_both(sparsecc: Run, tmp_path: Path) -> None:
    """The reference is tidied as the model is, so that their nodes can be compared one by one."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,3,8,8] x) => (float[B,16,8,8] y) {
            c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, s, s, s, s) y = Relu(n)
        }"""
    )
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 3, 3, 3)).astype(np.float32)
    for name, array in (("w", weight), ("s", np.ones(16, np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "dense.onnx")
    small = np.where(np.abs(weight) < 0.7, 0, weight)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(small.astype(np.float32), "w"))
    onnx.save(proto, tmp_path / "pruned.onnx")
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((8, 3, 8, 8)).astype(np.float32))
    result = sparsecc(
        "optimize", tmp_path / "pruned.onnx", "--reference", tmp_path / "dense.onnx", "--recover", "ols",
        "--calibration-data", tmp_path / "x.npz", "--threads", 1, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    report = next(item for item in json.loads(result.out)["passes"] if item["pass"].startswith("recover"))
    assert report["changed"], report["notes"]
