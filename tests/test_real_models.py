"""Real models, pruned and lowered at every site that can be, against the pruned dense model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsecc
from sparsecc.ir import Model

MODELS = {
    "ad01_autoencoder": None,
    "charrnn_shakespeare": None,
    "mnist_cntk": None,
    "mobilenet_v1_0.25_128": None,
    "mobilenet_v2_1.0_224": None,
    "resnet20_cifar10": None,
    "silero_vad_16k_op15": {"input": (1, 576), "state": (2, 1, 128)},
    "squeezenet1.0_pruned": None,
    "stories260K": None,
    "ultraface_slim_320": None,
}
LOWER_ALL = "tidy,prune-magnitude{{pattern={0} sparsity=0.7}},choose-layout{{layout={0}}},lower-sparse"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_every_site_lowered_computes_the_same(
    name: str, pattern: str, data_dir: Path, tmp_path: Path
) -> None:
    """``optimize`` itself compares with and without the library and raises when they differ by more than 1e-5."""
    source = data_dir / "models" / f"{name}.onnx"
    before = source.read_bytes()
    output = tmp_path / "out.onnx"
    result = sparsecc.optimize(
        source,
        output,
        pipeline=LOWER_ALL.format(pattern),
        keep_slower=True,
        threads=1,
        input_shapes=MODELS[name],
    )
    assert source.read_bytes() == before
    assert result.max_rel_l2 <= 1e-5
    onnx.checker.check_model(str(output), full_check=True)
    lowered = [site for site in result.sites if site.layout != "dense"]
    assert bool(lowered) == (Model.load(source).opset >= 11)
    if name in ("charrnn_shakespeare", "silero_vad_16k_op15"):
        assert {site.layout for site in result.sites if site.op == "LSTM"} == {pattern}
    for site in result.sites:
        assert site.reason


def test_already_sparse_model_is_found_and_keeps_its_weights(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "models" / "squeezenet1.0_pruned.onnx"
    output = tmp_path / "out.onnx"
    pipeline = "tidy,choose-layout{layout=unstructured},lower-sparse"
    result = sparsecc.optimize(source, output, pipeline=pipeline, keep_slower=True, threads=1)
    zeros = [site for site in Model.load(source).sites() if (site.numpy() == 0).mean() >= 0.15]
    lowered = {site.site for site in result.sites if site.layout == "unstructured"}
    assert lowered == {site.name for site in zeros}
    assert result.bytes_after < 0.6 * result.bytes_before
    document = json.dumps(result.to_json())
    assert "unstructured" in document


def test_calibrated_pruning_of_a_real_model(data_dir: Path, tmp_path: Path) -> None:
    images = np.load(data_dir / "images" / "cifar10_test_2500.npz")["images"][:16]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((images / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
    source = data_dir / "models" / "resnet20_cifar10.onnx"
    name = Model.load(source).input_specs()[0].name
    np.savez(tmp_path / "data.npz", **{name: x})
    result = sparsecc.optimize(
        source,
        tmp_path / "out.onnx",
        pattern="2:4",
        method="wanda",
        calibration_data=tmp_path / "data.npz",
        standard_ops_only=True,
        threads=1,
    )
    pruned = [site for site in result.sites if site.density <= 0.5]
    assert len(pruned) == 18  # all but the stem and the classifier, which are too small
    assert Model.load(result.output).metadata["sparsecc.calibration"] not in ("none", "synthetic")
