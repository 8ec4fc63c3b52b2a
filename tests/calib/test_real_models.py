"""Real trained models: made-up inputs run, and every linear operator of the main graph is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsecc.calib import Calibration
from sparsecc.ir import Model

MODELS = (
    "resnet20_cifar10",
    "mobilenet_v1_0.25_128",
    "mnist_cntk",
    "stories260K",
    "charrnn_shakespeare",
    "silero_vad_16k_op15",
    "ad01_autoencoder",
    "ultraface_slim_320",
)


@pytest.mark.parametrize("name", MODELS)
def test_synthetic_statistics(data_dir: Path, name: str) -> None:
    model = Model.load(data_dir / "models" / f"{name}.onnx")
    sites = [site for site in model.sites() if site.in_main_graph]
    assert sites
    source = Calibration.from_path("synthetic", model, num_samples=1, threads=1)
    found = source.mean_square(model, sites)
    assert set(found) == {site.name for site in sites}
    for site in sites:
        assert found[site.name].size == site.shape[1] * site.groups
        assert np.isfinite(found[site.name]).all()
        assert (found[site.name] >= 0).all()
