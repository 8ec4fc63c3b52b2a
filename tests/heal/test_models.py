"""Whole models in PyTorch against onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")

from sparsecc.calib import open_session, synthetic_inputs
from sparsecc.heal.graph import TorchGraph
from sparsecc.ir import Model
from sparsecc.pm import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

import zoo

TINY = {
    "bert_base": {
        "layers": 1,
        "hidden": 32,
        "heads": 2,
        "intermediate": 64,
        "vocabulary": 20,
        "positions": 8,
    },
    "llama_block": {"hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "past": 4},
    "resnet50": {"depths": (1, 1, 1, 1), "width": 8, "image": 32, "classes": 10, "batch_norm": 1},
    "mobilenet_v2": {"image": 32, "classes": 10, "stages": ((1, 16, 1, 1), (6, 24, 2, 2)), "head": 64},
}
REAL = (
    "ad01_autoencoder",
    "charrnn_shakespeare",
    "mnist_cntk",
    "mobilenet_v1_0.25_128",
    "resnet20_cifar10",
    "silero_vad_16k_op15",
    "squeezenet1.0_pruned",
    "stories260K",
    "ultraface_slim_320",
)
SHAPES = {
    "charrnn_shakespeare": {"tokens": (5, 2)},
    "stories260K": {"tokens": (2, 9)},
    "silero_vad_16k_op15": {"input": (1, 576), "state": (2, 1, 128), "sr": ()},
}


def agree(model: Model, inputs) -> None:
    expected = open_session(model, optimization="disable").run(inputs)
    found = TorchGraph(model).run(inputs, list(expected))
    for name, array in expected.items():
        difference = np.linalg.norm(found[name].numpy().astype(np.float64) - array)
        assert difference <= 1e-4 * np.linalg.norm(array.astype(np.float64)), name


@pytest.mark.parametrize("opset", [13, 22])
@pytest.mark.parametrize("name", list(TINY))
def test_architectures(name, opset):
    model = Model.from_proto(zoo.build(name, seq=8, opset=opset, **TINY[name]))
    agree(model, synthetic_inputs(model, 0))


@pytest.mark.parametrize("name", REAL)
def test_real_models(name, data_dir):
    model = Model.load(data_dir / "models" / f"{name}.onnx")
    inputs = synthetic_inputs(model, 0, SHAPES.get(name))
    if "sr" in inputs:
        inputs["sr"] = np.array(16000, np.int64)
    agree(model, inputs)
    Pipeline.parse("tidy").run(model)
    agree(model, inputs)
