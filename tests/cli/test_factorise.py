"""``sparsecc optimize --method`` with methods that put factors in the place of weights."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import onnxruntime

from sparsecc.plan.presets import FACTOR


def test_factorised_sites_are_one_line_each_and_the_file_runs_anywhere(sparsecc, mlp, tmp_path):
    out = tmp_path / "small.onnx"
    arguments = ("optimize", mlp, "-o", out, "--method", "svd", "--param-ratio", "0.7", "--keep-slower")
    result = sparsecc(*arguments, "--standard-ops-only", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    first, second = document["sites"]
    assert (first["site"], first["op"], first["shape"], first["layout"]) == (
        "fc1",
        "MatMul",
        [128, 64],
        "rank 24",
    )
    assert first["density"] == 24 * (128 + 64) / (128 * 64)
    assert (second["site"], second["layout"]) == ("fc2", "rank 16")
    assert document["bytes_after"] < document["bytes_before"]
    assert document["rel_l2_to_input"] > 0
    model = onnx.load(out)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 4
    assert {node.domain for node in model.graph.node} == {""}
    onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])


def test_help_names_every_method_that_factorises(sparsecc):
    told = set(re.findall(r"[a-z-]+", sparsecc("optimize", "--help").out))
    assert not set(FACTOR) - told


def test_flags_of_other_methods_are_refused_in_one_line(sparsecc, mlp):
    for more, text in (
        (("--method", "svd", "--sparsity", "0.5"), "--method svd factorises: give --param-ratio"),
        (("--method", "wanda", "--param-ratio", "0.5"), "--param-ratio is an option of --method"),
        (("--param-ratio", "0.5", "--sparsity", "0.5"), "--param-ratio is an option of --method"),
        (
            ("--method", "sparse-lowrank", "--param-ratio", "0.5", "--sparsity", "0.5"),
            "in the place of --sparsity",
        ),
        (("--method", "rrr"), "factor-rrr needs calibration inputs; give --calibration-data"),
        (("--method", "svd", "--param-ratio", "0"), "--param-ratio"),
    ):
        result = sparsecc("optimize", mlp, *more)
        assert result.code == 2
        assert text in result.err
        assert "Traceback" not in result.err


def test_packed_sites_are_rows_of_the_table_and_not_called_unsupported(sparsecc, mlp, tmp_path):
    data, out = tmp_path / "x.npz", tmp_path / "small.onnx"
    (given,) = onnx.load(mlp).graph.input
    columns = given.type.tensor_type.shape.dim[-1].dim_value
    np.savez(data, **{given.name: np.random.default_rng(0).standard_normal((40, columns), np.float32)})
    arguments = ("optimize", mlp, "-o", out, "--method", "slab", "--calibration-data", data, "--keep-slower")
    document = json.loads(sparsecc(*arguments, "--standard-ops-only", "--json").out)
    assert [(item["site"], item["density"] <= 0.25) for item in document["sites"]] == [
        ("fc1", True),
        ("fc2", True),
    ]
    assert all("signs" in item["layout"] for item in document["sites"])
    assert document["not_sites"] == []
