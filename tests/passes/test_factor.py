"""Factorised sites: the graphs that come of them, what is refused, and that fits are what they claim."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import MeasurementError, SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.plan import preset
from sparsecc.pm import PassContext, Pipeline, RewriteCost, SiteOverride
from sparsecc.pm.checks import graph_fault
from sparsecc.sparse import Pattern

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def context(model: Model, x: np.ndarray, **more) -> PassContext:
    parts = [{"x": part} for part in np.array_split(x, 2)]
    return PassContext(calibration=Calibration.from_batches(parts, model, threads=1), threads=1, **more)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


LINEAR = [
    ("[s] y = MatMul(x, w)", {"w": (24, 40)}, ("N", 24), 40),
    ("[s] h = MatMul(x, w) y = Add(h, b)", {"w": (24, 40), "b": (40,)}, ("N", 3, 24), 40),
    ("[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", {"w": (40, 24), "b": (40,)}, ("N", 24), 40),
    ("[s] y = Gemm <alpha = 3.0> (x, w)", {"w": (24, 40)}, ("N", 24), 40),
]  # fmt: skip
STRIDED = "strides = [2, 1], pads = [0, 1, 1, 0], dilations = [1, 2]"
PADDED = 'auto_pad = "SAME_UPPER", strides = [2, 2]'
CONVS = [
    ("[s] y = Conv <kernel_shape = [3], pads = [1, 1]> (x, w, b)", {"w": (12, 6, 3), "b": (12,)}, ("N", 6, 9)),
    (f"[s] y = Conv <{STRIDED}> (x, w)", {"w": (9, 6, 3, 3)}, ("N", 6, 9, 8)),
    (f"[s] y = Conv <{PADDED}> (x, w, b)", {"w": (9, 6, 3, 3), "b": (9,)}, ("N", 6, 7, 8)),
    ("[s] y = Conv (x, w, b)", {"w": (10, 4, 2, 2, 2), "b": (10,)}, ("N", 4, 4, 4, 4)),
    ("[s] y = Conv (x, w)", {"w": (16, 20, 1, 1)}, ("N", 20, 4, 4)),
]  # fmt: skip


def graph(body: str, shape: tuple, rank: int | None = None) -> str:
    given = ", ".join(str(size) for size in shape)
    result = ", ".join(f"d{at}" for at in range(len(shape) if rank is None else rank))
    return f"g (float[{given}] x) => (float[{result}] y) {{ {body} }}"


FORMS = [(body, shapes, given) for body, shapes, given, _ in LINEAR] + CONVS


@pytest.mark.parametrize("spec", ["factor-svd", "factor-asvd", "factor-rrr"])
@pytest.mark.parametrize(("body", "shapes", "given"), FORMS)
def test_the_chain_computes_the_weight_that_was_reported(spec, body, shapes, given):
    weights = {name: normal(*shape) for name, shape in shapes.items()}
    model = build(graph(body, given), **weights)
    x = normal(300, *given[1:])
    ctx = context(model, x)
    whole = model.copy()
    report = Pipeline.parse(f"{spec}{{param-ratio=0.6 multiple=1 min-elements=1}}").run(model, ctx)[-1]
    (change,) = report.changed
    assert change.site == "s"
    assert graph_fault(model) is None
    sites = model.sites()
    assert [site.name for site in sites] == ["s.right", "s.left"]
    assert sum(site.numpy().size for site in sites) <= 0.6 * weights["w"].size
    assert change.numbers["parameters"] == sum(site.numpy().size for site in sites) / weights["w"].size
    # the same product in the original graph gives the same outputs, but for a bias that was fitted
    (site,) = whole.sites()
    right, left = (item.numpy().astype(np.float64) for item in sites)
    site.replace((left @ right).astype(np.float32))
    expected, found = outputs(whole, x[:7]), outputs(model, x[:7])
    assert found.shape == expected.shape
    if spec != "factor-svd" and "b" in shapes:
        axes = tuple(at for at in range(found.ndim) if at != (1 if "Conv" in body else found.ndim - 1))
        difference = outputs(model, x) - outputs(whole, x)
        assert np.abs(difference - difference.mean(axes, keepdims=True)).max() < 2e-4
    else:
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_fitted_outputs_are_closer_than_those_of_svd_and_full_rank_is_exact():
    mix = RNG.standard_normal((24, 24)) * np.exp(RNG.standard_normal(24))
    x = (RNG.standard_normal((400, 24)) @ mix + 3).astype(np.float32)
    weights = {"w": normal(24, 40), "b": normal(40)}
    dense = build(graph("[s] h = MatMul(x, w) y = Add(h, b)", ("N", 24)), **weights)
    errors = {}
    for spec in (
        "factor-svd",
        "factor-rrr{sequential=false bias=false damping=1e-9}",
        "factor-rrr{damping=1e-9}",
    ):
        name, _, options = spec.rstrip("}").partition("{")
        model = dense.copy()
        Pipeline.parse(f"{name}{{{options} param-ratio=0.5 multiple=1 min-elements=1}}").run(
            model, context(model, x)
        )
        errors[spec] = np.square(outputs(model, x) - outputs(dense, x)).sum()
    svd, whitened, affine = errors.values()
    assert affine < whitened < svd
    assert whitened < 0.5 * svd
    model = dense.copy()
    spec = "factor-rrr{param-ratio=1 multiple=1 min-elements=1 keep-slower=true}"
    override = SiteOverride("s", param_ratio=0.999)
    Pipeline.parse(spec).run(model, context(model, x, overrides=(override,)))
    assert len(model.sites()) == 2


def test_without_data_the_error_of_the_weight_is_told_and_none_of_outputs():
    weight = normal(20, 30)
    model = build(graph("[s] y = MatMul(x, w)", ("N", 20)), w=weight)
    (report,) = Pipeline.parse("factor-svd{param-ratio=0.6 multiple=2 min-elements=1}").run(
        model, PassContext()
    )
    values = np.linalg.svd(weight, compute_uv=False) ** 2
    numbers = report.changed[0].numbers
    assert "output_error" not in numbers  # inputs that count alike are no inputs of this site
    assert numbers["relative_error"] == pytest.approx(np.sqrt(values[6:].sum() / values.sum()), rel=1e-4)


def test_reported_output_errors_are_the_tail_of_the_whitened_spectrum():
    x = normal(500, 20) @ normal(20, 20)
    weight = normal(20, 30)
    model = build(graph("[s] y = MatMul(x, w)", ("N", 20)), w=weight)
    spec = "factor-rrr{param-ratio=0.6 multiple=2 min-elements=1}"
    (report,) = Pipeline.parse(spec).run(model, context(model, x))
    gram = damped(np.asarray(x, np.float64).T @ x / len(x), 0.01)[0]
    values = np.linalg.svd(weight.T.astype(np.float64) @ np.linalg.cholesky(gram), compute_uv=False) ** 2
    rank = 6  # 0.6 * 600 / 50, a multiple of 2
    assert report.changed[0].numbers["output_error"] == pytest.approx(
        values[rank:].sum() / values.sum(), rel=1e-4
    )
    best = best_factors(weight.T.astype(np.float64), gram, rank).product()
    assert quadratic_error(best - weight.T, gram) == pytest.approx(values[rank:].sum(), rel=1e-6)


def test_sequential_fits_beat_others_on_what_they_read_now():
    x = normal(600, 24) @ normal(24, 24)
    text = graph("[a] h = MatMul(x, w) g = Relu(h) [z] y = MatMul(g, v)", ("N", 24))
    dense = build(text, w=normal(24, 48), v=normal(48, 24))
    errors = []
    for options in ("correction=1", "sequential=false"):
        model = dense.copy()
        spec = f"factor-rrr{{{options} param-ratio=0.7 multiple=1 min-elements=1 damping=1e-6}}"
        report = Pipeline.parse(spec).run(model, context(model, x))[-1]
        assert [item.site for item in report.changed] == ["a", "z"]
        errors.append(np.square(outputs(model, x) - outputs(dense, x)).sum())
    assert errors[0] < errors[1]


class Costs:
    def __init__(self, cost: RewriteCost | None) -> None:
        self.cost, self.keys = cost, []

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        self.keys.append(key)
        if self.cost is None:
            raise MeasurementError("not timed: no inputs reach it")
        copy = model.copy()
        rewrite(copy, next(item for item in copy.sites() if item.name == site.name))
        assert graph_fault(copy) is None
        return self.cost


@pytest.mark.parametrize(
    ("cost", "reason"),
    [
        (RewriteCost(1.0, 1.1, 960, 384), "not faster: rank 3 takes 1.1 ms, dense 1 ms"),
        (
            RewriteCost(1.0, 0.9, 960, 960),
            "not smaller: 960 bytes, dense 960; rank 3 takes 0.9 ms, dense 1 ms",
        ),
        (
            RewriteCost(1.0, 0.9, 960, 600),
            "its sparse part is faster dense here and would take its zeros along, 600 bytes instead of 384: low rank "
            "of that size loses less (factor-rrr); rank 3 takes 0.9 ms, dense 1 ms",
        ),
        (None, "not timed: no inputs reach it"),
    ],
)
def test_what_does_not_pay_stays_dense_and_says_why(cost, reason):
    model = build(graph("[s] y = MatMul(x, w)", ("N", 20)), w=normal(20, 12))
    before = model.fingerprint()
    costs = Costs(cost)
    spec = "factor-svd{param-ratio=0.5 multiple=1 min-elements=1}"
    (report,) = Pipeline.parse(spec).run(model, PassContext(costs=costs))
    assert (report.skipped[0].site, report.skipped[0].reason) == ("s", reason)
    assert model.fingerprint() == before
    assert costs.keys == ["LowRank rank 3 96"]
    kept = Pipeline.parse(spec.replace("}", " keep-slower=true}")).run(model, PassContext(costs=costs))[-1]
    assert kept.changed
    assert len(costs.keys) == 1


def test_what_pays_is_rewritten_and_the_report_has_both_times():
    model = build(graph("[s] y = MatMul(x, w)", ("N", 20)), w=normal(20, 12))
    costs = Costs(RewriteCost(1.0, 0.5, 960, 384))
    (report,) = Pipeline.parse("factor-svd{param-ratio=0.5 multiple=1 min-elements=1}").run(
        model, PassContext(costs=costs)
    )
    (change,) = report.changed
    assert change.numbers["gain"] == 2
    assert "0.5 ms, dense 1 ms (2.00x)" in change.detail


REFUSED = [
    ("[s] y = Conv <group = 2> (x, w)", {"w": (8, 3, 3, 3)}, ("N", 6, 9, 8), "2 groups"),
    ("[s] h = MatMul(x, w) [z] y = MatMul(h, w)", {"w": (20, 20)}, ("N", 20), "shared by 2 nodes"),
    ("[s] y = MatMul(x, w)", {"w": (20, 2)}, ("N", 20), "28 numbers do not hold factors of rank 8 of 2 x 20 weights"),
    ("[s] y = MatMul(x, bad)", {}, ("N", 20), "1 of its 60 weights are NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "shapes", "given", "reason"), REFUSED)
def test_refusals_have_a_reason(body, shapes, given, reason):
    bad = normal(20, 3)
    bad[3, 1] = np.nan
    constants = {name: normal(*shape) for name, shape in shapes.items()} or {"bad": bad}
    model = build(graph(body, given), **constants)
    (report,) = Pipeline.parse("factor-svd{min-elements=1}").run(model, PassContext())
    assert not report.changed
    assert reason in report.skipped[0].reason


def test_overrides_say_what_a_site_may_hold_and_which_stay():
    text = graph(
        "[a] h = MatMul(x, w) [b] i = MatMul(h, v) [c] j = MatMul(i, u) [d] y = MatMul(j, t)", ("N", 40)
    )
    model = build(text, w=normal(40, 40), v=normal(40, 40), u=normal(40, 40), t=normal(40, 40))
    overrides = (
        SiteOverride("b", param_ratio=0.5),
        SiteOverride("c", param_ratio=1.0),
        SiteOverride("d", pattern=Pattern("dense")),
    )
    spec = "factor-svd{param-ratio=0.8 multiple=1 min-elements=1}"
    (report,) = Pipeline.parse(spec).run(model, PassContext(overrides=overrides))
    assert {item.site: item.numbers["parameters"] for item in report.changed} == {"a": 0.8, "b": 0.5}
    assert [item.site for item in report.skipped] == ["c", "d"]
    again = Pipeline.parse(spec).run(model, PassContext())[-1]
    assert not [item for item in again.changed if item.site not in ("c", "d")]


def test_half_precision_is_kept_and_factors_are_of_equal_size():
    model = build(
        graph("[s] y = MatMul(x, w)", ("N", 20)).replace("float[", "float16["),
        w=normal(20, 30).astype(np.float16),
    )
    (report,) = Pipeline.parse("factor-svd{multiple=1 min-elements=1}").run(model, PassContext())
    assert report.changed
    right, left = (site.numpy() for site in model.sites())
    assert right.dtype == left.dtype == np.float16
    np.testing.assert_allclose(
        np.linalg.norm(right.astype(np.float32), axis=1),
        np.linalg.norm(left.astype(np.float32), axis=0),
        rtol=1e-2,
    )


def test_inputs_that_are_nan_are_refused():
    model = build(graph("[s] y = MatMul(x, w)", ("N", 20)), w=normal(20, 30))
    x = normal(50, 20)
    x[3, 2] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        context(model, x)
    ctx = context(model, normal(50, 20) * 0)
    (report,) = Pipeline.parse("factor-rrr{multiple=1 min-elements=1}").run(model, ctx)
    assert report.changed  # inputs that are always zero leave the plain SVD
    assert np.isfinite(model.sites()[0].numpy()).all()


@pytest.mark.parametrize("options", ["param-ratio=0", "param-ratio=1.1", "multiple=0"])
def test_wrong_options_are_refused(options):
    with pytest.raises(SpecError, match="factor-svd"):
        Pipeline.parse(f"factor-svd{{{options}}}")


def test_presets_and_their_contradictions():
    names = [str(item) for item in preset(method="whitened-svd", param_ratio=0.6, calibrated=True).passes]
    assert names[1] == "factor-rrr{param-ratio=0.6 sequential=false}"
    for flags in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"permute": True}):
        with pytest.raises(UsageError, match="give --param-ratio"):
            preset(method="svd", **flags)
    with pytest.raises(UsageError, match="--param-ratio is an option of --method"):
        preset(method="wanda", param_ratio=0.5)
    for calibrated, name in ((True, "factor-rrr{param-ratio=0.6}"), (False, "factor-svd{param-ratio=0.6}")):
        assert str(preset(param_ratio=0.6, calibrated=calibrated).passes[1]) == name
    kept = preset(method="svd", keep_slower=True, standard_ops_only=True, match="a*").passes
    assert [str(item) for item in kept] == ["tidy", "factor-svd{match=a* keep-slower=true}"]
