"""One budget of parameters dealt to sites, and the factor pass that follows it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import MeasurementError, SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.factor.knapsack import knapsack
from sparsecc.passes.prune.effect import OutputChange
from sparsecc.plan import preset
from sparsecc.pm import PassContext, PassReport, Pipeline, RewriteCost, SiteOverride

RNG = np.random.default_rng(4)
SITES = {"steep": (48, 40), "flat": (64, 40), "weak": (64, 40)}
WHOLE = sum(rows * columns for rows, columns in SITES.values())


def weight(rows: int, columns: int, decay: float) -> np.ndarray:
    left, _, right = np.linalg.svd(RNG.standard_normal((rows, columns)), full_matrices=False)
    return ((left * np.exp(-decay * np.arange(min(rows, columns)))) @ right).T.astype(np.float32)


def model(dtype: str = "float") -> Model:
    """Three products of the same input; what the last of them gives hardly counts."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({dtype}[B,40] x) => ({dtype}[B,48] s, {dtype}[B,64] y, {dtype}[B,64] z) {{
            [steep] s = MatMul(x, w)
            [flat] y = MatMul(x, v)
            [weak] b = MatMul(x, u) z = Mul(b, tiny)
        }}"""
    )
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    arrays = {
        "w": weight(48, 40, 0.3),
        "v": weight(64, 40, 0.03),
        "u": weight(64, 40, 0.03),
        "tiny": np.array(0.01),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, kind), name))
    return Model.from_proto(proto)


def context(of: Model, **more) -> PassContext:
    x = (RNG.standard_normal((200, 40)) + 1).astype(np.float32)
    return PassContext(calibration=Calibration.from_batches([{"x": x}], of, threads=1), threads=1, **more)


def run(spec: str, on: Model, ctx: PassContext) -> list[PassReport]:
    """Run passes one by one, so that what the first hands on can be looked at."""
    return [item.run(on, ctx) for item in Pipeline.parse(spec).passes]


SMALL = "multiple=1 min-elements=1 match=re:steep|flat|weak"


def shares(ctx: PassContext) -> dict[str, float]:
    return {item.match: item.param_ratio for item in ctx.overrides}


@pytest.mark.parametrize("method", ["knapsack", "welore", "compot"])
@pytest.mark.parametrize("ratio", [0.4, 0.7, 0.9])
def test_the_pass_that_follows_keeps_the_budget(method, ratio):
    dense = model()
    ctx = context(dense)
    options = f"{SMALL} param-ratio={ratio}"
    spec = f"allocate-parameters{{{options} method={method}}},factor-rrr{{{options} keep-slower=true}}"
    first, second = run(spec, dense, ctx)
    assert not first.changed
    found = shares(ctx)
    assert set(found) == set(SITES)
    kept = {item.site: item.numbers["parameters"] for item in second.changed}
    total = sum(kept.get(name, 1.0) * rows * columns for name, (rows, columns) in SITES.items())
    assert total <= ratio * WHOLE
    assert total > (ratio - 0.12) * WHOLE
    assert all((found[name] == 1) == (name not in kept) for name in SITES)
    if ratio == 0.7:
        assert found["steep"] < 0.7 < max(found.values())


def test_what_the_outputs_say_counts(monkeypatch):
    dense, given = model(), []

    def keep(costs, errors, budget):
        given.append([float(item.max()) for item in errors])
        return knapsack(costs, errors, budget)

    monkeypatch.setattr("sparsecc.passes.factor.allocate.knapsack", keep)
    for measured in ("true", "false"):
        run(f"allocate-parameters{{{SMALL} param-ratio=0.5 measured={measured}}}", dense, context(dense))
    (_, flat, weak), (_, plain_flat, plain_weak) = given
    assert weak < 1e-3 * flat
    assert plain_weak == pytest.approx(plain_flat, rel=0.2)
    assert flat < plain_flat  # there are other outputs beside its own


class Costs:
    """A form is faster below a share of the numbers of the one weight of its site, which is timed once each."""

    def __init__(self, most: float) -> None:
        self.most, self.asked = most, []

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        if site.name == "weak":
            raise MeasurementError("not timed: no inputs reach it")
        numbers = int(key.rsplit(" ", 1)[1])
        self.asked.append((site.name, key))
        size = site.shape[0] * site.shape[1]
        return RewriteCost(1.0, numbers / size / self.most, 4 * size, 4 * numbers)


@pytest.mark.parametrize("method", ["knapsack", "welore"])
def test_no_site_gets_a_share_at_which_it_is_slower(method):
    dense = model()
    costs = Costs(0.6)
    ctx = context(dense, costs=costs)
    spec = f"allocate-parameters{{{SMALL} param-ratio=0.7 method={method}}},factor-rrr{{{SMALL}}}"
    first, second = run(spec, dense, ctx)
    found = shares(ctx)
    assert all(found[name] < 0.6 or found[name] == 1 for name in ("steep", "flat"))
    assert found["weak"] == 1
    assert "weak" in {item.site for item in first.skipped if "not timed" in item.reason}
    assert not [item for item in second.skipped if "not faster" in item.reason]
    assert sum(share * np.prod(SITES[name]) for name, share in found.items()) <= 0.7 * WHOLE + 3
    assert len([key for name, key in costs.asked if name == "flat"]) < 12


def test_a_budget_out_of_reach_is_told():
    ctx = context(model(), costs=Costs(1e-9))
    (report,) = run(f"allocate-parameters{{{SMALL}}}", model(), ctx)
    assert any("the least is 1 of the bytes" in note for note in report.notes)
    assert set(shares(ctx).values()) == {1.0}


def test_shares_of_the_recipe_win_and_a_second_run_deals_nothing():
    dense = model()
    ctx = context(dense, overrides=(SiteOverride("flat", param_ratio=0.5), SiteOverride("weak", skip=True)))
    spec = f"allocate-parameters{{{SMALL}}}"
    (report,) = run(spec, dense, ctx)
    reasons = {item.site: item.reason for item in report.skipped}
    assert reasons["flat"] == "its share is given"
    assert "left alone" in reasons["weak"]
    assert shares(ctx)["flat"] == 0.5
    assert shares(ctx)["steep"] <= 0.71
    before = ctx.overrides
    run(spec, dense, ctx)
    assert ctx.overrides == before


def test_without_data_the_weights_count():
    ctx = PassContext()
    (report,) = run(f"allocate-parameters{{{SMALL}}}", model(), ctx)
    assert "no calibration data: the weights alone count" in report.notes
    assert shares(ctx)["steep"] < 0.7


def test_other_forms_say_what_they_take_themselves():
    dense = model("float16")
    text = 'allocate-parameters{min-elements=1 multiple=1 param-ratio=0.6 form="factor-monarch{keep-slower=true}"}'
    (pass_,) = Pipeline.parse(text).passes
    assert str(pass_) == str(Pipeline.parse(str(pass_)).passes[0])
    x = RNG.standard_normal((64, 40)).astype(np.float16)
    ctx = PassContext(calibration=Calibration.from_batches([{"x": x}], dense, threads=1), threads=1)
    report = pass_.run(dense, ctx)
    assert shares(ctx)
    assert len(report.notes) >= len(shares(ctx))


def test_refusals():
    for options, message in (
        ("form=prune-wanda", "must be a pass that factorises"),
        ('form="tidy,factor-rrr"', "form must be one pass"),
        ("param-ratio=0", "param-ratio must be in"),
        ("damping=0", "damping must be above 0"),
        ("form=factor-rr", "unknown"),
    ):
        with pytest.raises(SpecError, match=message):
            Pipeline.parse(f"allocate-parameters{{{options}}}")
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[B,40] x) => (float[B,40] y) {
            [s] a = MatMul(x, w) b = Abs(a) c = Neg(b) y = Log(c)
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(40, 40, 0.1), "w"))
    bad = Model.from_proto(proto)
    with pytest.raises(UsageError, match="outputs are NaN or infinite"):
        run("allocate-parameters{multiple=1 min-elements=1}", bad, context(bad))
    with pytest.raises(UsageError, match="--allocate is an option"):
        preset(method="wanda", allocate=True)
    steps = [
        str(item) for item in preset(method="whitened-svd", param_ratio=0.6, allocate=True, match="a*").passes
    ]
    assert steps[1] == ('allocate-parameters{match=a* param-ratio=0.6 form="factor-rrr{sequential=false}"}')
    assert steps[2] == "factor-rrr{match=a* param-ratio=0.6 sequential=false}"


def test_scores_of_classes_may_all_move_by_the_same():
    """Neither what all scores of a row share counts, nor the mean of rows; without ``centred`` both do."""
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[B,4] x) => (float[B,4] y) { y = Add(x, c) }'

    def shifted(by: np.ndarray) -> Model:
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(by.astype(np.float32), "c"))
        return Model.from_proto(proto)

    base = shifted(np.array([100.0, 0, 0, 0]))
    x = RNG.standard_normal((50, 4)).astype(np.float32)
    source = Calibration.from_batches([{"x": x}], base, threads=1)
    change, plain = OutputChange(base, source, centred=True), OutputChange(base, source)
    moved = shifted(np.array([107.0, 7, 7, 7]))
    assert change.of(base) == plain.of(base) == 0
    assert change.of(moved) < 1e-9 < plain.of(moved)
    centred = x - x.mean(1, keepdims=True)
    own = np.square(centred - centred.mean(0)).sum()
    other = shifted(np.array([104.0, 0, 0, 0]))
    assert change.of(other) == pytest.approx(50 * (3**2 + 3) / own, rel=1e-4)
    assert plain.of(other) == pytest.approx(50 * 16 / np.square(x + np.array([100, 0, 0, 0])).sum(), rel=1e-4)
