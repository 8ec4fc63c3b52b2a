"""``sparsecc diff``: what differs between two models, whatever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

Run = Callable[..., Any]
LOWER = "tidy,prune-magnitude{pattern=16x1 sparsity=0.75},choose-layout{layout=16x1},lower-sparse"
STRINGS = """<ir_version: 8, opset_import: ["" : 17]>
graph (string[n] x) => (bool[n] y) <string word> {
    y = Equal(x, word)
}"""
BRANCH = """<ir_version: 8, opset_import: ["" : 17]>
graph (bool c, float[2] x) => (float[2] y) {
    y = If (c) <
        then_branch = yes () => (float[2] a) { a = Relu(x) },
        else_branch = no () => (float[2] b) { b = Neg(x) }
    >
}"""


def _diff(sparsecc: Run, a: Path, b: Path) -> dict[str, Any]:
    done = sparsecc("diff", a, b, "--json")
    assert done.code == 0, done.err
    return dict(json.loads(done.out))


def test_optimized_model_against_its_input(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert sparsecc("optimize", mlp, "-o", out, "--pipeline", LOWER, "--keep-slower").code == 0
    document = _diff(sparsecc, mlp, out)
    assert document["verdict"] == "different"
    assert document["a"]["nbytes"] == mlp.stat().st_size > document["b"]["nbytes"] == out.stat().st_size
    assert document["inputs"] == document["outputs"] == []
    assert {"name": "ai.sparsecc", "a": None, "b": 1} in document["opsets"]
    assert {"name": "MatMul", "a": 2, "b": None} in document["operators"]
    assert {"name": "ai.sparsecc.BlockSparseMatMulRelu", "a": None, "b": 1} in document["operators"]
    first, second = document["sites"]
    assert (first["name"], first["status"]) == ("fc1", "changed")
    assert (first["a"]["layout"], first["b"]["layout"]) == ("dense", "16x1")
    assert (first["a"]["density"], first["b"]["density"]) == (1.0, 0.25)
    assert first["a"]["shape"] == first["b"]["shape"] == [128, 64]
    assert first["a"]["nbytes"] > first["b"]["nbytes"]
    assert second["name"] == "fc2"
    weights = {row["name"]: row["status"] for row in document["initializers"]}
    assert weights["w1"] == "removed"
    assert weights["fc1.values"] == "added"
    assert any(row["name"] == "sparsecc.pipeline" for row in document["metadata"])
    text = sparsecc("diff", mlp, out).out
    for part in ("MatMul -> BlockSparseMatMulRelu", "dense -> 16x1", "1.0000 -> 0.2500", "the models differ"):
        assert part in text, part


def test_a_model_is_the_same_as_itself(sparsecc: Run, mlp: Path) -> None:
    document = _diff(sparsecc, mlp, mlp)
    assert document["verdict"] == "same"
    assert [row["status"] for row in document["sites"]] == ["same", "same"]
    done = sparsecc("diff", mlp, mlp)
    assert done.code == 0
    assert done.out.endswith("the models are the same\n")


def test_other_values_of_one_weight(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    proto = onnx.load(mlp)
    array = numpy_helper.to_array(proto.graph.initializer[1]).copy()
    array[0] += 1
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "b1"))
    onnx.save(proto, tmp_path / "b.onnx")
    document = _diff(sparsecc, mlp, tmp_path / "b.onnx")
    assert [(row["name"], row["status"]) for row in document["initializers"]] == [("b1", "changed")]
    assert document["operators"] == []


def test_another_graph_of_the_same_operators(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    proto = onnx.load(mlp)
    proto.graph.node[2].name = "other"
    onnx.save(proto, tmp_path / "b.onnx")
    assert _diff(sparsecc, mlp, tmp_path / "b.onnx")["verdict"] == "graphs"
    assert "differ only in nodes" in sparsecc("diff", mlp, tmp_path / "b.onnx").out


def test_inputs_and_opsets(sparsecc: Run, tmp_path: Path) -> None:
    texts = {
        "a": "<ir_version: 8, opset_import: ['' : 17]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }",
        "b": "<ir_version: 8, opset_import: ['' : 18]> g (float[n, 4] x, float z) => (float[n, 4] y) { y = Add(x, z) }",
    }
    for name, text in texts.items():
        onnx.save(onnx.parser.parse_model(text.replace("'", '"')), tmp_path / f"{name}.onnx")
    document = _diff(sparsecc, tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert document["inputs"] == [
        {"name": "x", "a": "float32 nx3", "b": "float32 nx4"},
        {"name": "z", "a": None, "b": "float32 scalar"},
    ]
    assert document["opsets"] == [{"name": "", "a": 17, "b": 18}]
    assert "ai.onnx" in sparsecc("diff", tmp_path / "a.onnx", tmp_path / "b.onnx").out


@pytest.mark.parametrize("text", [STRINGS, BRANCH])
def test_any_graph_goes(sparsecc: Run, mlp: Path, tmp_path: Path, text: str) -> None:
    proto = onnx.parser.parse_model(text)
    if text == STRINGS:
        proto.graph.initializer.append(numpy_helper.from_array(np.array("w", object), "word"))
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    assert _diff(sparsecc, path, path)["verdict"] == "same"
    assert _diff(sparsecc, mlp, path)["verdict"] == _diff(sparsecc, path, mlp)["verdict"] == "different"
    assert sparsecc("diff", mlp, path).code == 0
    if text == BRANCH:
        names = {row["name"] for row in _diff(sparsecc, mlp, path)["operators"]}
        assert {"If", "Neg"} <= names
        assert "Relu" not in names  # once in both


def test_bad_files_have_the_usual_codes(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for pair in ((mlp, tmp_path / "bad.onnx"), (tmp_path / "absent.onnx", mlp)):
        done = sparsecc("diff", *pair)
        assert (done.code, done.err.count("\n"), done.out) == (3, 1, "")
    assert sparsecc("diff", mlp).code == 2
