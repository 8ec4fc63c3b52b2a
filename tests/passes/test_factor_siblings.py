"""Sites that read the same and share their first factor: the graphs, the fits, and what is not joined."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import MeasurementError
from sparsecc.ir import Model
from sparsecc.passes.factor.siblings import joint_factors
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import Quadratic, damped, quadratic_error
from sparsecc.plan.costs import CostTable
from sparsecc.plan.timing import MeasuredCosts
from sparsecc.pm import PassContext, Pipeline, RewriteCost, SiteOverride
from sparsecc.pm.checks import graph_fault

RNG = np.random.default_rng(11)

#: Three sites of one input in every way to write a product, each with an alpha and a bias of its own.
THREE = """
    [q] a = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, wq, bq)
    [k] b = MatMul(x, wk)
    c = Add(b, bk)
    [v] d = Gemm <alpha = 3.0> (x, wv)
    y = Concat <axis = 1> (a, c, d)
"""
PLAIN = "[q] a = MatMul(x, wq) [k] b = MatMul(x, wk) [v] c = MatMul(x, wv) y = Concat <axis = -1> (a, b, c)"


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(
    body: str,
    weights: dict[str, np.ndarray],
    shape: str = "N, 24",
    result: str = "N, M",
    dtype: str = "float",
) -> Model:
    text = f"g ({dtype}[{shape}] x) => ({dtype}[{result}] y) {{ {body} }}"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


def context(model: Model, x: np.ndarray, threads: int = 1, **more) -> PassContext:
    return PassContext(
        calibration=Calibration.from_batches([{"x": x}], model, threads=1), threads=threads, **more
    )


def run(model: Model, options: str, ctx: PassContext, name: str = "factor-rrr"):
    spec = f"{name}{{{options} multiple=1 min-elements=1 share-inputs=true}}"
    (report,) = Pipeline.parse(spec).run(model, ctx)
    assert graph_fault(model) is None
    return report


def numbers_of(model: Model) -> int:
    return sum(site.numpy().size for site in model.sites())


def of_one_space(rank: int = 6) -> dict[str, np.ndarray]:
    """Weights of q, k and v as ``[K, N]`` (q turned) whose rows span ``rank`` dimensions of the 24 together."""
    basis = normal(24, rank)
    return {
        "wq": (basis @ normal(rank, 17)).T.copy(),
        "wk": basis @ normal(rank, 20),
        "wv": basis @ normal(rank, 9),
        "bq": normal(17),
        "bk": normal(20),
    }


@pytest.mark.parametrize("name", ["factor-svd", "factor-rrr"])
def test_rows_of_one_space_are_kept_exactly_by_one_common_factor(name):
    weights = of_one_space()
    model = build(THREE, weights)
    dense, x = model.copy(), normal(200, 24)
    report = run(model, "param-ratio=0.4", context(model, x), name)
    # 0.4 * 46 * 24 numbers hold a common factor of rank 6 = 441 // 70, but of each alone rank 3, 4 and 2 at most
    assert [item.site for item in report.changed] == ["q", "k", "v"]
    assert all("rank 6 shared by 3 sites" in item.detail for item in report.changed)
    assert [site.name for site in model.sites()] == ["q.right", "q.left", "k.left", "v.left"]
    assert all(item.numbers["relative_error"] < 1e-5 for item in report.changed)
    np.testing.assert_allclose(outputs(model, x), outputs(dense, x), atol=2e-4)


def test_the_budget_is_that_of_all_sites_and_the_common_factor_is_stored_once():
    shapes = {"wq": (24, 17), "wk": (24, 20), "wv": (24, 9)}
    basis = normal(24, 24) * np.exp(-np.arange(24) / 4).astype(np.float32)
    weights = {name: basis @ normal(24, columns) for name, (_, columns) in shapes.items()}
    model = build(PLAIN, weights, "N, 3, 24", "N, 3, M")
    dense, x = model.copy(), normal(80, 3, 24)
    overrides = (SiteOverride("v", param_ratio=0.5),)
    report = run(model, "param-ratio=0.6 sequential=false", context(model, x, overrides=overrides))
    allowed = sum(int(share * 24 * size) for share, size in ((0.6, 17), (0.6, 20), (0.5, 9)))
    rank = allowed // (24 + 46)
    assert numbers_of(model) == rank * (24 + 46) <= allowed
    assert len(model.sites()) == 4
    sizes = {"q": 17 * 24, "k": 20 * 24, "v": 9 * 24}
    told = sum(item.numbers["parameters"] * sizes[item.site] for item in report.changed)
    assert told == pytest.approx(numbers_of(model), abs=2)
    # the sites of the graph are what was reported
    right, *lefts = (site.numpy().astype(np.float64) for site in model.sites())
    for site, left in zip(dense.sites(), lefts, strict=True):
        site.replace((left @ right).astype(np.float32))
    np.testing.assert_allclose(outputs(model, x), outputs(dense, x), atol=2e-4)


@pytest.mark.parametrize("rows", [(5, 7, 3), (1, 1), (13, 2)])
@pytest.mark.parametrize("kind", ["plain", "dead", "duplicate", "few"])
def test_a_common_factor_has_the_least_sum_of_relative_errors(rows, kind):
    x = RNG.standard_normal((4 if kind == "few" else 60, 11)) * np.exp(RNG.standard_normal(11))
    if kind == "dead":
        x[:, 3] = 0
    if kind == "duplicate":
        x[:, 5] = x[:, 2]
    gram = damped(x.T @ x / len(x), 0.01)[0]
    targets = [RNG.standard_normal((count, 11)) * 10.0**at for at, count in enumerate(rows)]
    problems = [Quadratic(target, gram, np.diag(gram), None) for target in targets]
    rank = 2 if sum(rows) > 2 else 1
    lefts, right = joint_factors(problems, lambda stack: best_factors(stack.target, stack.gram, rank))
    root = np.linalg.cholesky(gram)
    whitened = [target @ root / np.linalg.norm(target @ root) for target in targets]
    tail = np.square(np.linalg.svd(np.concatenate(whitened), compute_uv=False)[rank:]).sum()
    errors = [
        quadratic_error(left @ right - target, gram) / quadratic_error(target, gram)
        for left, target in zip(lefts, targets, strict=True)
    ]
    assert sum(errors) == pytest.approx(tail, rel=1e-8, abs=1e-10)
    assert [left.shape for left in lefts] == [(count, rank) for count in rows]


def test_weights_of_zeros_share_a_factor_too():
    target = RNG.standard_normal((5, 7))
    problems = [Quadratic(item, np.eye(7), np.ones(7), None) for item in (target, np.zeros((3, 7)))]
    lefts, right = joint_factors(problems, lambda stack: best_factors(stack.target, stack.gram, 5))
    np.testing.assert_allclose(lefts[0] @ right, target, atol=1e-10)
    assert not (lefts[1] @ right).any()


def test_sites_of_several_inputs_and_those_left_alone_are_not_joined():
    body = (
        "[q] a = MatMul(x, wq) [k] b = MatMul(x, wk) [v] c = MatMul(x, wv) h = Relu(x) "
        "[o] d = MatMul(h, wo) y = Concat <axis = -1> (a, b, c, d)"
    )
    weights = of_one_space()
    model = build(
        body, {"wq": weights["wq"].T.copy(), "wk": weights["wk"], "wv": weights["wv"], "wo": normal(24, 20)}
    )
    overrides = (SiteOverride("v", skip=True),)
    report = run(model, "param-ratio=0.6", context(model, normal(100, 24), overrides=overrides))
    details = {item.site: item.detail for item in report.changed}
    assert [site for site, detail in details.items() if "shared by 2 sites" in detail] == ["q", "k"]
    assert "shared" not in details["o"]
    assert [site.name for site in model.sites()] == ["q.right", "q.left", "k.left", "v", "o.right", "o.left"]
    assert [item.site for item in report.skipped] == ["v"]


def test_sites_whose_rows_have_nothing_in_common_keep_factors_of_their_own():
    left, right = normal(20, 5), normal(20, 5)
    weights = {  # each reads a half of the inputs, in five dimensions
        "wq": np.concatenate([normal(12, 5) @ left.T, np.zeros((12, 20), np.float32)]),
        "wk": np.concatenate([np.zeros((12, 20), np.float32), normal(12, 5) @ right.T]),
    }
    model = build("[q] a = MatMul(x, wq) [k] b = MatMul(x, wk) y = Concat <axis = -1> (a, b)", weights)
    report = run(model, "param-ratio=0.5", context(model, normal(100, 24)))
    assert all("shared" not in item.detail for item in report.changed)
    assert all(item.numbers["output_error"] < 1e-9 for item in report.changed)
    assert len(model.sites()) == 4


class Costs:
    """Times as given: of three sites together, and of each alone."""

    def __init__(self, together: RewriteCost | None, alone: RewriteCost) -> None:
        self.costs = {True: together, False: alone}

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        return self.costs[False]

    def rewritten_together(self, model, sites, rewrite, key, *, custom_ops):
        copy = model.copy()
        names = [site.name for site in sites]
        rewrite(copy, [site for site in copy.sites() if site.name in names])
        assert graph_fault(copy) is None
        if self.costs[True] is None:
            raise MeasurementError("not timed: no inputs reach it")
        return self.costs[True]


SLOW, FAST = RewriteCost(1.0, 1.5, 4416, 1680), RewriteCost(4.6, 2.3, 4416, 1680)


@pytest.mark.parametrize(("together", "reason"), [(SLOW, "not faster: rank 6 shared"), (None, "not timed")])
def test_a_common_factor_that_does_not_pay_is_noted_and_each_site_judged_alone(together, reason):
    model = build(THREE, of_one_space())
    alone = RewriteCost(1.0, 0.5, 2000, 700)
    ctx = context(model, normal(100, 24), costs=Costs(together, alone))
    report = run(model, "param-ratio=0.4", ctx)
    (note,) = [item for item in report.notes if "share no factor" in item]
    assert note.startswith(f"q, k, v share no factor: {reason}")
    assert [item.site for item in report.changed] == ["q", "k", "v"]
    assert all("shared" not in item.detail for item in report.changed)


def test_a_common_factor_may_pay_where_none_pays_alone_and_times_are_dealt_to_the_sites():
    model = build(THREE, of_one_space())
    report = run(model, "param-ratio=0.4", context(model, normal(100, 24), costs=Costs(FAST, SLOW)))
    assert [item.site for item in report.changed] == ["q", "k", "v"]
    assert sum(item.numbers["dense_ms"] for item in report.changed) == pytest.approx(4.6)
    assert [item.numbers["dense_ms"] for item in report.changed] == pytest.approx([1.7, 2.0, 0.9])
    assert all(item.numbers["gain"] == 2 for item in report.changed)


def test_siblings_are_timed_as_one_model_with_their_biases():
    weights = of_one_space()
    model = build(THREE, weights, "50, 24")
    x = normal(50, 24)
    table = CostTable(None, {})
    costs = MeasuredCosts(table, {"x": x}, 1)
    sites = model.sites()
    seen = []

    def rewrite(part: Model, own) -> None:
        seen.append([site.shape for site in own])
        own[1].replace(np.zeros((20, 24), np.float32))

    cost = costs.rewritten_together(model, sites, rewrite, "nothing", custom_ops=False)
    assert seen == [[(17, 24), (20, 24), (9, 24)]]
    assert cost.dense_ms > 0
    assert cost.dense_bytes == cost.bytes == 4 * (46 * 24 + 17 + 20)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_result_does_not_depend_on_threads_and_only_these_sites_change(dtype):
    weights = {name: normal(24, size).astype(dtype) for name, size in (("wq", 20), ("wk", 20), ("wv", 20))}
    found = []
    for threads in (1, 3):
        model = build(PLAIN, weights, dtype=np.dtype(dtype).name.replace("float32", "float"))
        x = np.random.default_rng(0).standard_normal((100, 24)).astype(dtype)
        report = run(model, "param-ratio=0.6", context(model, x, threads))
        assert len(report.changed) == 3
        assert all(site.dtype == dtype for site in model.sites())
        found.append(outputs(model, x))
    np.testing.assert_array_equal(*found)


def test_a_second_run_and_a_wrong_weight_leave_everything_as_it_is():
    model = build(THREE, of_one_space())
    ctx = context(model, normal(100, 24))
    run(model, "param-ratio=0.4", ctx)
    before = model.fingerprint()
    assert not run(model, "param-ratio=0.4", context(model, normal(100, 24))).changed
    assert model.fingerprint() == before
    weights = of_one_space()
    weights["wk"][2, 3] = np.nan
    model = build(PLAIN.replace("MatMul(x, wq)", "Gemm <transB = 1> (x, wq)"), weights)
    report = run(model, "param-ratio=0.6", PassContext(), "factor-svd")
    assert [item.site for item in report.changed] == ["q", "v"]
    assert "NaN" in report.skipped[0].reason
