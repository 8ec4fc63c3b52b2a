"""Removal on real models: what is cut is what nobody looks at any more, and shapes shrink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from sparsecc.calib import open_session, synthetic_inputs
from sparsecc.ir import Model
from sparsecc.ir.axes import AxisGraph, remove
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault, signature

#: Model -> shapes of its inputs, and how many orbits of it can be cut at least.
MODELS: dict[str, tuple[dict[str, tuple[int, ...]], int]] = {
    "ad01_autoencoder": ({}, 9),
    "mobilenet_v1_0.25_128": ({}, 14),
    "mobilenet_v2_1.0_224": ({}, 25),
    "resnet20_cifar10": ({}, 12),
    "silero_vad_16k_op15": ({"input": (1, 576), "state": (2, 1, 128), "sr": ()}, 4),
    "squeezenet1.0_pruned": ({}, 25),
    "stories260K": ({"tokens": (2, 9)}, 10),
    "ultraface_slim_320": ({}, 15),
}


def load(data_dir: Path, name: str) -> Model:
    model = Model.load(data_dir / "models" / f"{name}.onnx")
    Pipeline.parse("tidy").run(model, PassContext())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_removal_is_the_same_as_consumers_that_do_not_look(data_dir: Path, name: str) -> None:
    model = load(data_dir, name)
    shapes, least = MODELS[name]
    before, rng = signature(model), np.random.default_rng(4)
    axes = AxisGraph(model)
    free = [orbit for orbit in axes.orbits("removal") if orbit.reason is None and len(orbit.units) > 1]
    assert len(free) >= least
    units = np.concatenate(
        [rng.choice(orbit.units, len(orbit.units) // 3 or 1, replace=False) for orbit in free]
    )
    masked = model.copy()
    for part in AxisGraph(masked).parts:
        if part.role == "columns":
            array = part.value.const_value.numpy().copy()
            gone = np.isin(axes.units(np.atleast_2d(part.atoms)[0], "removal"), units)
            array[(slice(None),) * part.axis + (gone,)] = 0
            part.value.const_value = onnx_ir.Tensor(array, name=part.value.name)
    size = model.nbytes
    remove(model, axes, units)
    assert graph_fault(model) is None
    assert signature(model) == before
    assert model.nbytes < 0.9 * size
    assert {node.domain for node in model.onnx.graph} <= {"", "ai.onnx"}
    inputs = synthetic_inputs(model, 1, shapes)
    found, expected = (open_session(item, optimization="disable").run(inputs) for item in (model, masked))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5 * np.abs(value).max())
