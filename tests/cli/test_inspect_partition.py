"""``sparsecc inspect --partition``: work of parts by weights, and of threads by the clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sparsecc import emit
from sparsecc.ir import Model
from sparsecc.ir.ops_algebra import Csr, einsum_node
from sparsecc.pm import PassContext, Pipeline

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
        assert (site["cut"], site["stored_parts"]) == ("when it is packed", 0)
    assert len(document["busy_seconds"]) <= 2
    cut = tmp_path / "cut.onnx"
    run = sparsecc("optimize", out, "-o", cut, "--pipeline", "partition{packed=true}", "--keep-slower")
    assert run.code == 0, run.err
    sites = json.loads(sparsecc("inspect", cut, *arguments[2:], "--json").out)["sites"]
    assert [site["stored_parts"] for site in sites] == [64, 64]
    assert [site["part_work"] for site in sites] == [site["part_work"] for site in document["sites"]]
    text = sparsecc(*arguments, "--parts", 4).out.splitlines()
    assert [line.split()[0] for line in text[1:3]] == ["fc1", "fc2"]
    assert text[-1].startswith("work of one row of x in 4 parts; times of one run on 2 threads")


def test_models_without_sparse_operators_and_wrong_shapes(sparsecc: Run, mlp: Path) -> None:
    result = sparsecc("inspect", mlp, "--partition")
    assert (result.code, result.out) == (0, "no operators of sparsecc: optimize the model first\n")
    assert json.loads(sparsecc("inspect", mlp, "--partition", "--json").out)["sites"] == []
    result = sparsecc("inspect", mlp, "--partition", "--input-shapes", "z:1,64")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert sparsecc("inspect", mlp, "--input-shapes", "x:1,64").code == 2
    assert sparsecc("inspect", mlp.parent / "absent.onnx", "--partition").code == 3


def test_stored_cuts_are_shown(sparsecc: Run, tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((60, 80)) < 0.2
    arrays = {
        "p": np.concatenate([[0], np.cumsum(mask.sum(1))]), "c": np.nonzero(mask)[1],
        "v": np.ones(mask.sum(), np.float32), "s": np.array(mask.shape),
    }  # fmt: skip
    x = ir.Value(name="x", shape=ir.Shape((80,)), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in arrays.items()
    ]
    node = einsum_node("ij,j->i", Csr(*constants), x, name="op")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18, node.domain: 1}, name="g",
                     initializers=constants)  # fmt: skip
    model = Model(ir.Model(graph, ir_version=8))
    emit.finalize(model)
    model.save(tmp_path / "plain.onnx")
    Pipeline.parse("partition").run(model, PassContext())
    model.save(tmp_path / "cut.onnx")
    sites = {}
    for name in ("plain", "cut"):
        result = sparsecc("inspect", tmp_path / f"{name}.onnx", "--partition", "--parts", 4, "--json")
        assert result.code == 0, result.err
        (sites[name],) = json.loads(result.out)["sites"]
    assert sites["plain"]["part_work"] == []
    assert (sites["plain"]["cut"], sites["plain"]["stored_parts"]) == ("at each run", 0)
    assert (sites["cut"]["cut"], sites["cut"]["stored_parts"]) == ("in the file", 64)
    assert 1 <= sites["cut"]["stored_lambda"] <= -(-(60 + mask.sum()) // 64) * 64 / (60 + mask.sum())
    assert sparsecc("inspect", tmp_path / "cut.onnx").code == 0  # its operands are no packed weights
    work = 60 + int(mask.sum())
    assert sites["cut"]["part_work"] == [(part + 1) * work // 4 - part * work // 4 for part in range(4)]
