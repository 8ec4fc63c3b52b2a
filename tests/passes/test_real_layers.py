"""The orderings of pruning methods on the layers of a trained network and its own inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.obs import sweep
from sparsecc.passes.prune.selection import Selection
from sparsecc.pm import Pipeline
from sparsecc.sparse import Pattern


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_orderings_on_the_convolutions_of_a_resnet(data_dir: Path, pattern: str) -> None:
    model = Model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    Pipeline.parse("tidy").run(model)
    pictures = np.load(data_dir / "images" / "cifar10_test_2500.npz")["images"][::50]
    x = (pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.45) / 0.225
    source = Calibration.from_batches([{"input": x}], model, threads=1)
    sites = [site for site in model.sites() if site.shape[1] >= 64]
    chosen = Selection(Pattern.parse(pattern), None if pattern == "2:4" else 0.5)
    grams = source.gram(model, sites)
    wins = np.zeros(3, int)
    for site in sites:
        weight = site.numpy().astype(np.float64)
        gram, _ = damped(grams[site.name], 0.01)
        columns = weight.shape[1]

        def error(result, weight=weight, gram=gram) -> float:
            return quadratic_error(result - weight, gram)

        wanda = chosen.mask(np.square(weight) * np.diag(gram))
        magnitude = chosen.mask(np.square(weight))
        every = 4 if pattern == "2:4" else 128
        swept = sweep(weight, gram, lambda squares, at, k=columns: chosen.part(squares, at, k), every)
        fitted = refit_rows(weight, swept.mask, gram, swept.weight)
        # Proven: the fit is the best on its mask, and the sweep's own account of its error is right.
        assert error(fitted) <= error(swept.weight) * (1 + 1e-9)
        assert error(refit_rows(weight, wanda, gram)) <= error(np.where(wanda, weight, 0))
        assert swept.error == pytest.approx(error(swept.weight), rel=1e-6)
        # Usual: counted over the layers.
        wins += [
            error(np.where(wanda, weight, 0)) <= error(np.where(magnitude, weight, 0)),
            error(swept.weight) <= error(np.where(wanda, weight, 0)),
            error(refit_rows(weight, wanda, gram)) <= error(swept.weight),
        ]
    assert (wins > len(sites) / 2).all(), (wins, len(sites))
