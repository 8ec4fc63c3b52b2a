"""The models the repository carries are what their descriptions say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from sparsecc.sparse import Pattern, matches

MODELS = Path(__file__).resolve().parents[2] / "models"
SHIPPED = sorted(MODELS.glob("*/*.onnx"))
SPARSE = [path for path in SHIPPED if "_sparse16x1" in path.name]
INPUT = {"digits_cnn": "image", "text_lm": "ids"}


def name(path: Path) -> str:
    return path.name


def evaluation(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"evaluation_{folder.name}", folder / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def stated(path: Path) -> dict[str, str]:
    """The row of the README's table about this file, by column."""
    lines = (path.parent / "README.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| file |"))
    row = next(line for line in lines if line.startswith(f"| `{path.name}` |"))
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)]
    return dict(zip(*split, strict=True))


def large_weights(path: Path) -> dict[str, np.ndarray]:
    """Weights of the layers that the scripts prune, as ``[outputs, inputs]``."""
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        weight = arrays.get(node.input[1]) if node.op_type in ("MatMul", "Conv") else None
        if weight is None or weight.size < 50_000:
            continue
        weights[node.name] = weight.T if node.op_type == "MatMul" else weight.reshape(weight.shape[0], -1)
    return weights


def test_every_folder_ships_both_variants():
    assert {path.stem for path in SHIPPED} == {
        "digits_cnn",
        "digits_cnn_sparse16x1",
        "text_lm",
        "text_lm_sparse16x1",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_file_is_small_and_valid(path):
    assert path.stat().st_size < 4_000_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert all(node.name for node in model.graph.node)


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_accuracy_is_the_stated_one(path):
    result = evaluation(path.parent).evaluate(session(path))
    data = np.load(path.parent / "test.npz")
    samples = data["labels"].size if "labels" in data else data["windows"][:, 1:].size
    assert result["higher_is_better"] is True
    # rounding differs between machines: one sample may flip, and the README gives four digits
    tolerance = max(1 / samples, 2e-4) + 5e-5
    assert result["value"] == pytest.approx(float(stated(path)[result["metric"]]), abs=tolerance)


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name == "text_lm"], ids=name)
def test_bits_per_character_are_the_stated_ones(path):
    result = evaluation(path.parent).bits_per_character(session(path))
    assert result["value"] == pytest.approx(float(stated(path)[result["metric"]]), abs=1e-3)


@pytest.mark.parametrize("path", SPARSE, ids=name)
def test_sparse_variant_has_whole_blocks_of_zeros(path):
    zeros = float(re.match(r"(\d+)", stated(path)["zeros"]).group(1)) / 100
    weights = large_weights(path)
    assert len(weights) == {"digits_cnn": 3, "text_lm": 4}[path.parent.name]
    for node, weight in weights.items():
        blocks = (weight.reshape(weight.shape[0] // 16, 16, -1) != 0).any(1)
        assert 1 - blocks.mean() == pytest.approx(zeros, abs=1e-3), node
        assert matches(weight, Pattern.parse("16x1"))


@pytest.mark.parametrize("folder", ["digits_cnn", "text_lm"])
def test_calibration_data_fit_and_are_not_test_data(folder):
    path = MODELS / folder / f"{folder}.onnx"
    samples = np.load(MODELS / folder / "calibration.npz")[INPUT[folder]][:, 0]  # stored as batches of one
    (logits,) = session(path).run(None, {INPUT[folder]: samples[:2]})
    assert np.isfinite(logits).all()
    test = np.load(MODELS / folder / "test.npz")
    held_out = test["images"][:, None] / 16 if folder == "digits_cnn" else test["windows"][:, :-1]
    known = {np.ascontiguousarray(row, np.float32).tobytes() for row in held_out}
    assert not any(np.ascontiguousarray(row, np.float32).tobytes() in known for row in samples)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("folder", ["digits_cnn", "text_lm"])
def test_batch_is_dynamic(folder, batch):
    samples = np.load(MODELS / folder / "calibration.npz")[INPUT[folder]][:batch, 0]
    (logits,) = session(MODELS / folder / f"{folder}.onnx").run(None, {INPUT[folder]: samples})
    assert logits.shape[0] == batch
