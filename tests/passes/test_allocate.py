"""One sparsity dealt to layers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.prune.allocation import bounded, by_curves, erk, lamp, outlier_share, owl
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


def test_lamp_keeps_the_largest_of_each_layer_and_never_empties_one():
    rng = np.random.default_rng(3)
    layers = [np.square(rng.standard_normal((9, 7)) * scale) for scale in (1e-3, 1.0, 1e4)]
    scores = []
    for layer in layers:  # by the definition: a square over the sum of all that are not smaller
        flat = layer.reshape(-1)
        scores.append(np.array([value / flat[flat >= value].sum() for value in flat]))
        assert scores[-1].max() == pytest.approx(1)
        assert np.argsort(scores[-1]).tolist() == np.argsort(flat).tolist()
    threshold = np.sort(np.concatenate(scores))[-20]
    expected = [(score >= threshold).mean() for score in scores]
    np.testing.assert_allclose(lamp(layers, 20 / 189), expected)
    assert (lamp(layers, 3 / 189) > 0).all()


def test_what_a_layer_must_keep_comes_from_the_others():
    sizes, dealt = [100, 200, 700], np.array([0.5, 0.3, 0.01])
    wanted = (dealt * sizes).sum() / 1000
    np.testing.assert_allclose(bounded(dealt, sizes, wanted, 0.0), dealt)
    found = bounded(dealt, sizes, wanted, 0.05)
    assert (found * sizes).sum() == pytest.approx(1000 * wanted)
    assert found[2] == 0.05
    assert found[0] / found[1] == pytest.approx(5 / 3)
    np.testing.assert_allclose(bounded(dealt, sizes, 0.02, 0.05), 0.05)
    full = bounded(np.array([1.0, 0.2]), [100, 100], 0.8, 0.05)  # nothing is more than dense
    np.testing.assert_allclose(full, [1.0, 0.6])
    np.testing.assert_allclose(bounded(np.zeros(2), [5, 5], 0.5, 0.1), 0.1)


@pytest.mark.parametrize("method", ["erk", "lamp", "owl"])
def test_high_sparsities_are_reached_although_no_site_may_lose_all(method):
    pruned = model()
    source = Calibration.from_batches([{"x": RNG.standard_normal((64, 64)).astype(np.float32)}], pruned)
    spec = f"allocate{{sparsity=0.9 method={method} most=0.91}},prune-wanda{{sparsity=0.9}}"
    Pipeline.parse(spec).run(pruned, PassContext(calibration=source))
    weights = [site.numpy() for site in pruned.sites()]
    kept = sum(np.count_nonzero(weight) for weight in weights) / sum(weight.size for weight in weights)
    assert kept == pytest.approx(0.1, abs=0.006)


def test_owl_laws():
    shares, sizes = [0.01, 0.03, 0.02], [100, 400, 300]
    found = owl(sizes, shares, 0.4, 0.08)
    assert (found * sizes).sum() == pytest.approx(0.4 * 800)
    assert found.argsort().tolist() == [0, 2, 1]
    assert np.ptp(found) == pytest.approx(0.16)
    assert found[2] == pytest.approx((found[0] + found[1]) / 2)
    np.testing.assert_allclose(owl([5, 5], [0.2, 0.2], 0.3, 0.08), 0.3)  # equal layers keep equal shares
    np.testing.assert_allclose(owl([5, 5], [0.1, 0.2], 0.3, 0.0), 0.3)
    high = owl([100, 100], [0.0, 1.0], 0.95, 0.5)
    assert high.max() <= 1
    assert high.sum() == pytest.approx(1.9)
    same = owl([100] * 4, [0.1, 0.2, 0.3, 0.4], 0.5, 0.08)
    assert np.abs(same - 0.5).max() <= 0.08 + 1e-9
    # The formula of the paper, where layers are of one size and nothing is cut off.
    lifted = 0.16 * np.arange(4) / 3
    np.testing.assert_allclose(same, 0.5 + lifted - lifted.mean(), atol=1e-9)


def test_outliers_are_counted_against_the_mean():
    score = np.ones((10, 10))
    assert outlier_share(score, 5) == 0
    score[0, :2] = 100
    assert outlier_share(score, 5) == 0.02
    assert outlier_share(score * 1e-9, 5) == 0.02
    assert outlier_share(np.zeros((3, 3)), 5) == 0


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


@pytest.mark.parametrize("method", ["erk", "lamp", "owl", "sensitivity"])
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
    for options in ("outlier=0", "spread=0.6"):
        with pytest.raises(SpecError, match="must be"):
            Pipeline.parse(f"allocate{{{options}}}")
    for method in ("sensitivity", "owl"):
        with pytest.raises(UsageError, match="--calibration-data"):
            Pipeline.parse(f"allocate{{method={method}}}").run(model(), PassContext())


def test_sensitivity_is_a_curve_of_the_layer_scaled_by_what_the_outputs_say(monkeypatch):
    """The error of a site at each density: nothing when dense, rising, and at one density what was measured there."""
    given = {}

    def keep(sizes, densities, errors, density):
        given.update(densities=densities, errors=errors)
        return by_curves(sizes, densities, errors, density)

    monkeypatch.setattr("sparsecc.passes.prune.allocate.by_curves", keep)
    dense = model()
    x = RNG.standard_normal((64, 64)).astype(np.float32)
    source = Calibration.from_batches([{"x": x}], dense)
    Pipeline.parse("allocate{method=sensitivity sparsity=0.6}").run(dense, PassContext(calibration=source))
    middle = int(np.abs(given["densities"] - 0.4).argmin())
    for site, curve in zip(dense.sites(), given["errors"], strict=True):
        assert curve[0] == 0
        assert (np.diff(curve) >= -1e-12).all()
        pruned = dense.copy()
        sparsity = 1 - given["densities"][middle]
        Pipeline.parse(f"prune-wanda{{sparsity={sparsity} match={site.name} scope=layer}}").run(
            pruned, PassContext(calibration=source)
        )
        before, after = (open_session(item).run({"x": x})["y"] for item in (dense, pruned))
        effect = np.square(after - before).sum() / np.square(before).sum()
        assert curve[middle] == pytest.approx(effect, rel=1e-3)


@pytest.mark.parametrize("method", ["lamp", "owl", "sensitivity"])
def test_inputs_that_are_not_finite_are_refused(method):
    dense = model()
    x = np.zeros((4, 64), np.float32)
    x[0, 0] = np.inf
    source = Calibration.from_batches([{"x": x}], dense)
    with pytest.raises(UsageError, match="'wide' is NaN or infinite"):
        Pipeline.parse(f"allocate{{method={method}}}").run(dense, PassContext(calibration=source))


def test_a_site_that_is_never_run_goes_by_its_weights():
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[B,64] x) => (float[B,64] y) {
            y = If(c) <
                then_branch = t () => (float[B,64] p) { [then] p = MatMul(x, w) },
                else_branch = e () => (float[B,64] q) { [else] q = MatMul(x, v) }
            >
        }"""
    )
    for name in "wv":
        array = RNG.standard_normal((64, 64)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    pruned = Model.from_proto(proto)
    batch = {"c": np.array(True), "x": RNG.standard_normal((8, 64)).astype(np.float32)}
    source = Calibration.from_batches([batch], pruned)
    (report,) = Pipeline.parse("allocate").run(pruned, PassContext(calibration=source))
    assert "else is not measured: its weights alone count" in report.notes
