"""One sparsity dealt to layers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.prune.allocation import by_curves, erk, lamp
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.sparse import density

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.8, 1.0])
def test_erk_reaches_the_budget_and_clamps(wanted):
    shapes = [(4, 3, 3, 3), (64, 32, 3, 3), (256, 128), (1000, 512)]
    sizes = np.array([np.prod(shape) for shape in shapes])
    found = erk(shapes, wanted)
    assert (found <= 1).all()
    assert (found * sizes).sum() == pytest.approx(wanted * sizes.sum())
    assert found[0] >= found[-1]


def test_lamp_laws():
    layers = [np.square(RNG.standard_normal((20, 30)) * scale) for scale in (1, 100)]
    found = lamp(layers, 0.3)
    assert (found * 600).sum() == 360
    np.testing.assert_array_equal(
        found, lamp([layers[0] * 1e-6, layers[1]], 0.3)
    )  # the scale does not matter
    assert (lamp(layers, 0.001) > 0).sum() >= 1
    spiky = np.square(RNG.standard_normal((20, 30)) ** 5)
    flat, sharp = lamp([layers[0], spiky], 0.3)
    assert sharp < flat
    assert (lamp([np.zeros((4, 4)), np.ones((4, 4))], 0.5) == [0, 1]).all()


def test_curves_give_the_best_of_all_ways_to_deal():
    densities = np.array([1.0, 0.75, 0.5, 0.25, 0.1])
    errors = [np.array([0, 1, 3, 7, 12.0]), np.array([0, 0.1, 0.2, 0.5, 5.0]), np.array([0, 5, 6, 7, 8.0])]
    sizes = [100, 300, 50]
    previous = np.inf
    for wanted in (0.2, 0.4, 0.6, 0.9):
        found = by_curves(sizes, densities, errors, wanted)
        assert (found * sizes).sum() == pytest.approx(wanted * 450)
        cost = lambda at: sum(np.interp(-d, -densities, e) for d, e in zip(at, errors, strict=True))  # noqa: E731
        assert cost(found) <= cost([wanted] * 3) + 1e-9
        assert cost(found) <= previous
        previous = cost(found)


def model() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,64] x) => (float[B,64] y) {
            [wide] a = MatMul(x, w)
            r = Relu(a)
            [weak] b = MatMul(r, v)
            s = Mul(b, tiny)
            [a] a2 = MatMul(x, u)
            y = Add(a2, s)
        }"""
    )
    arrays = {
        name: RNG.standard_normal(shape)
        for name, shape in (("w", (64, 256)), ("v", (256, 64)), ("u", (64, 64)))
    }
    for name, array in {**arrays, "tiny": np.array(0.01)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


@pytest.mark.parametrize("method", ["erk", "lamp", "sensitivity"])
@pytest.mark.parametrize("pattern", ["unstructured", "8x1"])
def test_the_prune_pass_after_it_follows(method, pattern):
    pruned = model()
    source = Calibration.from_batches([{"x": RNG.standard_normal((64, 64)).astype(np.float32)}], pruned)
    options = f"pattern={pattern} sparsity=0.6"
    reports = Pipeline.parse(f"allocate{{{options} method={method}}},prune-wanda{{{options}}}").run(
        pruned, PassContext(calibration=source)
    )
    assert len(reports[0].notes) == 3
    weights = {site.name: site.numpy() for site in pruned.sites()}
    total = sum(weight.size for weight in weights.values())
    kept = sum(np.count_nonzero(weight) for weight in weights.values())
    assert kept / total == pytest.approx(0.4, abs=0.02)
    densities = {name: density(weight) for name, weight in weights.items()}
    assert len(set(densities.values())) > 1
    if method == "sensitivity":  # what is multiplied with almost nothing can go
        assert densities["weak"] < densities["a"]


def test_overrides_of_the_recipe_win():
    pruned = model()
    overrides = (SiteOverride("a", sparsity=0.25), SiteOverride("weak", skip=True))
    Pipeline.parse("allocate{sparsity=0.6 method=erk},prune-magnitude{sparsity=0.6}").run(
        pruned, PassContext(overrides=overrides)
    )
    densities = {site.name: density(site.numpy()) for site in pruned.sites()}
    assert densities["a"] == 0.75
    assert densities["weak"] == 1


def test_refusals():
    with pytest.raises(SpecError, match="nothing to deal"):
        Pipeline.parse("allocate{pattern=2:4}")
    with pytest.raises(SpecError, match="most must be"):
        Pipeline.parse("allocate{most=1}")
    with pytest.raises(UsageError, match="--calibration-data"):
        Pipeline.parse("allocate{method=sensitivity}").run(model(), PassContext())
