"""Weights that must stay, and how prune and quantize passes treat them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.prune.protect import outlier_inputs, super_weights
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import Pattern, density, matches

RNG = np.random.default_rng(4)


def test_a_super_weight_carries_a_share_of_the_layer():
    weight = RNG.standard_normal((64, 64))
    energy = np.ones(64)
    assert not super_weights(weight, energy, 0.01).any()
    weight[5, 9] = 40.0
    assert np.argwhere(super_weights(weight, energy, 0.01)).tolist() == [[5, 9]]
    energy[9] = 1e-6  # a small input: the weight carries nothing
    assert not super_weights(weight, energy, 0.01).any()
    tiny = np.array([[1.0, 0.1], [0.1, 0.1]])  # no choice but to carry much
    assert not super_weights(tiny, np.ones(2), 0.01).any()
    assert super_weights(weight, np.stack([energy, energy]), 0.01).shape == (64, 64)


def test_outlier_inputs_are_large_beside_the_median():
    energy = np.ones(32)
    energy[3], energy[4] = 30.0**2, 0.0
    assert np.flatnonzero(outlier_inputs(energy, 20)).tolist() == [3]
    assert not outlier_inputs(np.zeros(4), 2).any()
    grouped = outlier_inputs(np.stack([energy, np.ones(32)]), 20)
    assert grouped.sum() == 1


def model() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,64] x) => (float[B,64] y) { [a] h = MatMul(x, w) [b] y = MatMul(h, v) }"""
    )
    weights = RNG.standard_normal((2, 64, 64)).astype(np.float32) * np.float32(0.1)
    weights[0, 7, 3] = 20.0
    for name, array in zip("wv", weights, strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def run(pruned: Model, spec: str, scale: np.ndarray | None = None) -> list:
    x = RNG.standard_normal((128, 64)).astype(np.float32) * (1.0 if scale is None else scale)
    source = Calibration.from_batches([{"x": x.astype(np.float32)}], pruned)
    return Pipeline.parse(spec).run(pruned, PassContext(calibration=source))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dass", "wanda-ols", "sparsegpt", "alps", "obc"])
@pytest.mark.parametrize("options", ["sparsity=0.9", "pattern=1:4", "pattern=4x1 sparsity=0.9"])
def test_prune_passes_keep_them_and_their_counts(method, options):
    pruned, mask = model(), np.zeros((64, 64), bool)
    smallest = np.abs(pruned.sites("a")[0].numpy()).reshape(16, 4, 64)[:, 0].argmin(1)
    mask[np.arange(16) * 4, smallest] = True  # any score alone would drop these
    source = Calibration.from_batches([{"x": RNG.standard_normal((128, 64)).astype(np.float32)}], pruned)
    context = PassContext(calibration=source, protected={"a": mask})
    (report,) = Pipeline.parse(f"prune-{method}{{{options} match=a}}").run(pruned, context)
    assert report.changed[0].numbers["protected"] == 16
    weight = pruned.sites("a")[0].numpy()
    assert (weight[mask] != 0).all()
    kept = {"sparsity=0.9": 0.1, "pattern=1:4": 0.25}.get(options, 0.1)
    assert density(weight) == pytest.approx(kept, abs=0.01)
    if "pattern" in options:
        assert matches(weight, Pattern.parse(options.split()[0].split("=")[1]))


def test_outlier_inputs_keep_their_weights():
    pruned, scale = model(), np.ones(64, np.float32)
    scale[11] = 50.0
    run(pruned, "protect{channels=20.0},prune-magnitude{sparsity=0.8}", scale)
    assert (pruned.sites("a")[0].numpy()[:, 11] != 0).all()
    assert density(pruned.sites("a")[0].numpy()) == pytest.approx(0.2, abs=0.001)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "obc"])
def test_what_calibration_finds_stays_and_is_reported(method):
    """A super weight by its share of the output, an outlier input by its size, both out of the reach of a pass."""
    pruned, scale = model(), np.ones(64, np.float32)
    scale[[7, 11]] = 3.0, 60.0
    weight = pruned.sites("a")[0].numpy().copy()
    weight[:, 11] = 1e-6 * (1 + np.arange(64))  # what a mask by weights alone would drop first
    pruned.sites("a")[0].replace(weight)
    spec = f"protect{{channels=20.0 weights=0.05 match=a}},prune-{method}{{sparsity=0.9 match=a}}"
    found, after = run(pruned, spec, scale), pruned.sites("a")[0].numpy()
    assert found[0].notes == ["a: 1 super weights, 1 outlier inputs"]
    assert not found[0].changed
    assert found[1].changed[0].numbers["protected"] == 65
    assert after[3, 7] != 0
    assert (after[:, 11] != 0).all()
    assert density(after) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("spec", ["permute{pattern=2:4}", "prune-structured"])
def test_passes_that_move_channels_go_before_it(spec):
    with pytest.raises(UsageError, match="put protect behind it"):
        run(model(), f"protect,{spec}")
    run(model(), f"{spec},protect")


def test_sites_whose_inputs_are_not_finite_have_a_reason():
    found = run(model(), "protect", np.full(64, np.inf, np.float32))[0]
    assert {skip.reason for skip in found.skipped} == {"not measured: no finite values"}


def test_quantize_leaves_them_exact():
    pruned = model()
    reports = run(pruned, "protect{match=a},quantize")
    assert [(skip.site, skip.reason) for skip in reports[1].skipped] == [
        ("a", "holds weights that must stay exact (protect)")
    ]
    assert [change.site for change in reports[1].changed] == ["b"]


def test_nothing_is_kept_beyond_the_run():
    context = PassContext(
        calibration=Calibration.from_batches([{"x": np.ones((4, 64), np.float32)}], model())
    )
    Pipeline.parse("protect").run(model(), context)
    assert context.protected == {}


def test_refusals():
    with pytest.raises(UsageError, match="--calibration-data"):
        Pipeline.parse("protect").run(model(), PassContext())
    for spec in ("protect{weights=0}", "protect{channels=1}"):
        with pytest.raises(SpecError):
            Pipeline.parse(spec)
