"""The benchmarks run, compare what every engine computes, and name the engines that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("--shape", "48x64", "-m", "1", "-m", "3", "--sparsity", "0.5", "--rounds", "1", "--seconds", "0.1")
OPTIONAL = {"openvino fp32": "openvino", "torch csr": "torch", "deepsparse sparse": "deepsparse"}


def run(root: Path, script: str, *arguments: str) -> str:
    command = [sys.executable, str(root / "bench" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "pattern", "threads"),
    [("kernels.py", "16x1", "1"), ("kernels.py", "unstructured", "2"), ("kernels_int8.py", "16x4", "1")],
)
def test_ours_against_the_baselines(
    root: Path, tmp_path: Path, script: str, pattern: str, threads: str
) -> None:
    path = tmp_path / "results.json"
    run(root, script, *QUICK, "--no-peers", "--pattern", pattern, "--threads", threads, "--json", str(path))
    document = json.loads(path.read_text())
    assert document["machine"]["clock"] == ("process" if threads == "1" else "wall")
    kind = "int8" if "int8" in script else "fp32"
    direct = {f"sparsecc {kind}, C"} if threads == "1" else set()
    wanted = {"onnxruntime fp32", "onnxruntime int8", f"sparsecc {kind}"} | direct
    for rows in (1, 3):
        found = [result for result in document["results"] if result["rows"] == rows]
        assert {result["engine"] for result in found} == wanted
        assert found[0]["ratio_to_fp32"] == 1
        assert found[1]["ratio_to_int8"] == 1


def test_values_of_16_bits_beside_float32(root: Path) -> None:
    printed = run(
        root, "kernels.py", *QUICK, "--no-peers", "--pattern", "2:4", "--values", "fp32", "--values", "bf16"
    )
    assert "sparsecc fp32" in printed
    assert "sparsecc bf16, C" in printed


def test_a_peer_that_is_missing_is_said(root: Path) -> None:
    absent = [name for name, module in OPTIONAL.items() if importlib.util.find_spec(module) is None]
    if not absent:
        pytest.skip("every optional engine is installed")
    printed = run(root, "kernels.py", *QUICK, "--pattern", "16x1")
    for name in absent:
        assert f"not measured: {name} (ModuleNotFoundError" in printed


def test_a_model_on_every_engine(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    model = root / "models" / "digits_cnn" / "digits_cnn_sparse16x1.onnx"
    run(root, "models.py", str(model), "--threads", "1", "--seconds", "0.1", "--json", str(path))
    document = json.loads(path.read_text())
    rows = {row["engine"]: row for row in document["rows"]}
    assert {"onnxruntime fp32", "sparsecc fp32", "onnxruntime int8 static"} <= rows.keys()
    assert rows["onnxruntime fp32"]["speedup"] == 1
    assert rows["sparsecc fp32"]["error"] < 1e-5
    assert 0 < rows["onnxruntime int8 static"]["error"] < 0.1
    for name in ("openvino fp32", "deepsparse sparse"):
        assert (name in rows) != (name in document["missing"])
