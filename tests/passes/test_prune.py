"""The pruning passes on models: selection, refusals with reasons, overrides, reports."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.prune.magnitude import PruneMagnitude
from sparsecc.passes.prune.wanda import PruneWanda
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.sparse import Pattern, density, matches

RNG = np.random.default_rng(3)


def normal(*shape: int, dtype=np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def two_layers(dtype=np.float32) -> Model:
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    return build(
        f"""g ({kind}[B,64] x) => ({kind}[B,32] y) {{
            [up] h = Gemm<transB=1>(x, w1)
            [act] a = Relu(h)
            [down] y = MatMul(a, w2)
        }}""",
        w1=normal(64, 64, dtype=dtype),
        w2=normal(64, 32, dtype=dtype),
    )


class Source:
    """A calibration source with the statistics given to it."""

    def __init__(self, unavailable=None, **values):
        self.values = {name: np.asarray(array, np.float64) for name, array in values.items()}
        self.unavailable = unavailable or {}
        self.asked: list[str] = []

    def mean_square(self, model, sites):
        self.asked += [site.name for site in sites]
        return {site.name: self.values.get(site.name, np.ones(site.shape[1])) for site in sites
                if site.name not in self.unavailable}  # fmt: skip

    def gram(self, model, sites):
        raise NotImplementedError


def weights(model: Model) -> dict[str, np.ndarray]:
    return {site.name: site.numpy() for site in model.sites()}


def run(model: Model, spec: str, **context):
    return Pipeline.parse(spec).run(model, PassContext(**context))[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("options", "pattern", "kept"),
    [
        ("", "unstructured", 0.5),
        ("{sparsity=0.9}", "unstructured", 0.1),
        ("{pattern=2:4}", "2:4", 0.5),
        ("{pattern=1:4}", "1:4", 0.25),
        ("{pattern=16x1 sparsity=0.75}", "16x1", 0.25),
        ("{pattern=16x4 sparsity=0.5 scope=row}", "16x4", 0.5),
    ],
)
def test_magnitude_reaches_the_asked_density_in_the_pattern(dtype, options, pattern, kept):
    model = two_layers(dtype)
    before = weights(model)
    report = run(model, "prune-magnitude" + options)
    assert [change.site for change in report.changed] == ["up", "down"]
    for change in report.changed:
        after = weights(model)[change.site]
        assert after.dtype == dtype
        assert density(after) == pytest.approx(kept, abs=1 / after.size)
        assert matches(after, Pattern.parse(pattern))
        assert change.numbers["density_after"] == density(after)
        assert change.numbers["pattern"] == pattern
        old = before[change.site].astype(np.float64)
        error = np.linalg.norm(old - after) / np.linalg.norm(old)
        assert change.numbers["relative_error"] == pytest.approx(error, rel=1e-4)


def test_a_second_run_changes_nothing_and_says_why():
    for spec in ("prune-magnitude{pattern=2:4}", "prune-wanda{sparsity=0.7}"):
        model = two_layers()
        source = Source(up=RNG.random(64), down=RNG.random(64))
        assert len(run(model, spec, calibration=source).changed) == 2
        stable = model.fingerprint()
        other = Source(up=RNG.random(64), down=RNG.random(64))  # even on other statistics
        report = run(model, spec, calibration=other)
        assert report.changed == []
        assert all(skip.reason.startswith("already ") for skip in report.skipped)
        assert model.fingerprint() == stable


def test_a_sparser_site_is_left_alone():
    model = two_layers()
    run(model, "prune-magnitude{sparsity=0.8 match=up}")
    report = run(model, "prune-magnitude")
    assert [change.site for change in report.changed] == ["down"]
    assert report.skipped[0].reason == "already unstructured at sparsity 0.5 or sparser: density 0.2"


def test_wanda_follows_the_statistics():
    model = two_layers()
    columns = np.ones(64)
    columns[::2] = 1e-12
    source = Source(up=columns)
    report = run(model, "prune-wanda{match=up}", calibration=source)
    kept = weights(model)["up"] != 0
    assert kept[:, 1::2].all()
    assert not kept[:, ::2].any()
    assert source.asked == ["up"]
    assert report.changed[0].numbers["kept_score"] > 0.999


def test_wanda_keeps_as_many_in_every_row():
    model = two_layers()
    run(model, "prune-wanda{sparsity=0.75}", calibration=Source(up=RNG.random(64)))
    assert (np.count_nonzero(weights(model)["up"], axis=1) == 16).all()


def test_wanda_without_calibration_says_how_to_give_it():
    for call in (
        lambda: run(two_layers(), "prune-wanda"),
        lambda: PruneWanda().run(two_layers(), PassContext()),
    ):
        with pytest.raises(UsageError, match="--calibration-data"):
            call()


def test_wanda_reports_what_could_not_be_measured():
    source = Source(unavailable={"up": "inside a subgraph"}, down=np.full(64, np.nan))
    report = run(two_layers(), "prune-wanda", calibration=source)
    assert report.changed == []
    assert {skip.site: skip.reason for skip in report.skipped} == {
        "up": "not measured: inside a subgraph",
        "down": "its input is NaN or infinite on the calibration data",
    }


def test_not_finite_weights_are_counted_and_left():
    model = two_layers()
    broken = model.sites("up")[0].numpy().copy()
    broken[0, 0], broken[3, 5] = np.nan, np.inf
    model.sites("up")[0].replace(broken)
    report = run(model, "prune-magnitude")
    assert report.skipped[0].reason == "2 of its 4096 weights are NaN or infinite"
    np.testing.assert_array_equal(weights(model)["up"], broken)


def conv_model() -> Model:
    return build(
        """g (float[1,32,8,8] x) => (float[1,32,8,8] y) {
            [dw] d = Conv<group=32, pads=[1,1,1,1]>(x, wd)
            [grouped] g = Conv<group=4>(d, wg)
            [full] f = Conv<pads=[1,1,1,1]>(g, wf)
            [few] s = Conv(f, ws)
            [back] y = Conv(s, wb)
        }""",
        wd=normal(32, 1, 3, 3),
        wg=normal(64, 8, 2, 1),
        wf=normal(32, 64, 3, 3),
        ws=normal(4, 32, 1, 1),
        wb=normal(32, 4, 1, 1),
    )


def test_convolutions_by_kind():
    model = conv_model()
    report = run(model, "prune-magnitude{pattern=16x1}")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons["dw"] == "depthwise: each output reads only 9 inputs"
    assert reasons["few"] == "only 128 weights (min-elements=1024)"
    assert reasons["back"] == "only 4 inputs per output (min-reduction=16)"
    assert [change.site for change in report.changed] == ["grouped", "full"]
    for group in np.split(weights(model)["grouped"], 4):
        assert density(group) == 0.5


def test_limits_are_options():
    report = run(conv_model(), "prune-magnitude{min-elements=0 min-reduction=1}")
    assert [change.site for change in report.changed] == ["grouped", "full", "few", "back"]


def test_patterns_that_do_not_fit_are_refused_with_the_numbers():
    report = run(conv_model(), "prune-magnitude{pattern=32x1 min-elements=0 min-reduction=1}")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons["grouped"] == "pattern 32x1 does not fit 16 outputs x 16 inputs"
    assert reasons["few"] == "pattern 32x1 does not fit 4 outputs x 32 inputs"
    report = run(conv_model(), "prune-magnitude{pattern=1:16 min-elements=0 min-reduction=1}")
    assert "pattern 1:16 does not fit 32 outputs x 4 inputs" in [skip.reason for skip in report.skipped]
    report = run(two_layers(), "prune-magnitude{pattern=64x64 sparsity=0.6 match=up}")
    assert report.skipped[0].reason == "sparsity 0.6 in pattern 64x64 would leave nothing of it"


def test_lstm_weights_are_pruned():
    hidden, inputs = 24, 32
    model = build(
        """g (float[S,1,32] x) => (float[S,1,1,24] y) {
            [cell] y = LSTM<hidden_size=24>(x, w, r, b)
        }""",
        w=normal(1, 4 * hidden, inputs),
        r=normal(1, 4 * hidden, hidden),
        b=normal(1, 8 * hidden),
    )
    report = run(model, "prune-wanda", calibration=Source())
    assert [change.site for change in report.changed] == ["cell.W", "cell.R"]
    for weight in weights(model).values():
        assert density(weight) == 0.5


def test_tied_weights_are_pruned_once():
    model = build(
        """g (float[B,64] x) => (float[B,64] y) {
            [first] h = MatMul(x, w)
            [second] y = MatMul(h, w)
        }""",
        w=normal(64, 64),
    )
    report = run(model, "prune-magnitude")
    assert [change.site for change in report.changed] == ["first"]


def test_overrides_win_site_by_site():
    model = two_layers()
    overrides = (
        SiteOverride("*", sparsity=0.75),
        SiteOverride("re:^down$", pattern=Pattern.parse("2:4")),
    )
    run(model, "prune-magnitude{sparsity=0.5}", overrides=overrides)
    assert density(weights(model)["up"]) == 0.25
    assert matches(weights(model)["down"], Pattern.parse("2:4"))
    assert density(weights(model)["down"]) == 0.5

    model = two_layers()
    report = run(model, "prune-magnitude{pattern=2:4}", overrides=(SiteOverride("up", skip=True),))
    assert [(skip.site, skip.reason) for skip in report.skipped] == [("up", "left alone by an override")]

    with pytest.raises(SpecError, match=r"override 'up' asks sparsity 0.9 of 'up', whose pattern 2:4"):
        run(model, "prune-magnitude{pattern=2:4}", overrides=(SiteOverride("up", sparsity=0.9),))


def test_match_selects_and_must_match():
    model = two_layers()
    report = run(model, "prune-magnitude{match=d*}")
    assert [change.site for change in report.changed] == ["down"]
    with pytest.raises(UsageError, match=r"match 'dwon' matches none of the 2 sites; near: down"):
        run(model, "prune-magnitude{match=dwon}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "1"}, "sparsity must be in"),
        ({"sparsity": "-0.1"}, "sparsity must be in"),
        ({"sparsity": "nan"}, "sparsity must be in"),
        ({"pattern": "2:4", "sparsity": "0.75"}, "pattern 2:4 implies sparsity 0.5"),
        ({"pattern": "dense"}, "prunes nothing"),
        ({"pattern": "4:2"}, "out of range"),
        ({"scope": "global"}, "one of layer, row"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SpecError, match=message):
        PruneMagnitude.from_options(options)


def test_sparsity_may_repeat_what_the_pattern_implies():
    assert PruneMagnitude.from_options({"pattern": "2:4", "sparsity": "0.5"}).sparsity == 0.5


def test_progress_is_told():
    seen = []
    run(two_layers(), "prune-magnitude", progress=lambda *step: seen.append(step))
    assert ("prune-magnitude", 2, 2) in seen


def test_wanda_with_measured_inputs_beats_magnitude_on_skewed_data():
    from sparsecc.calib import Calibration

    model = two_layers()
    batch = normal(256, 64) * np.geomspace(0.01, 10, 64, dtype=np.float32)
    dense = weights(model)["up"].astype(np.float64)
    errors = {}
    for name in ("magnitude", "wanda"):
        copy = model.copy()
        source = Calibration.from_batches([{"x": batch}], copy)
        run(copy, f"prune-{name}{{match=up scope=row}}", calibration=source)
        errors[name] = np.linalg.norm(batch @ (dense - weights(copy)["up"]).T)
    assert errors["wanda"] < errors["magnitude"]


def test_blocks_of_channels_in_convolutions():
    """Four columns of a block are four channels at one place of the kernel; results and weights stay in order."""
    proto = """g (float[1,16,9,9] x) => (float[1,24,9,9] y) {
        [c] h = Conv<pads=[1,1,1,1]>(x, w)
        [p] y = Conv(h, v)
    }"""
    model = build(proto, w=normal(16, 16, 3, 3), v=normal(24, 16, 1, 1))
    dense = weights(model)["c"]
    run(model, "prune-magnitude{pattern=8x4 sparsity=0.75 by-channel=true}")
    pruned = weights(model)
    by_channel = np.moveaxis(pruned["c"].reshape(16, 16, 9), 1, 2).reshape(16, -1)
    assert matches(by_channel, Pattern.parse("8x4"))
    assert not matches(pruned["c"], Pattern.parse("8x4"))
    assert matches(pruned["p"], Pattern.parse("8x4"))
    assert density(pruned["c"]) == 0.25
    kept = pruned["c"] != 0
    np.testing.assert_array_equal(pruned["c"][kept], dense[kept])
    report = run(model, "prune-magnitude{pattern=8x4 sparsity=0.75 by-channel=true}")
    assert not report.changed
