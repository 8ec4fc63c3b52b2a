"""Experts share bases: fits against brute force, and graphs that compute what the fit says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.expert_bases import affordable_width, fitted_bases
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.pm.checks import graph_fault, signature

Array = NDArray[Any]

EXPERTS, WIDTH, HIDDEN, TOKENS = 8, 12, 10, 9

DENSE = """
    [router] s = MatMul(x, router)  gates = Softmax<axis=-1>(s)
    turned = Transpose<perm=[1,0]>(gates)  column = Unsqueeze(turned, last)
    [up] u = MatMul(x, w1)  h = Relu(u)  [down] d = MatMul(h, w2)
    weighted = Mul(d, column)  y = ReduceSum<keepdims=0>(weighted, first)
"""
EINSUM = """
    [router] s = MatMul(x, router)  gates = Softmax<axis=-1>(s)
    [up] u = Einsum<equation="{equation}">(x, w1e)  h = Relu(u)
    [down] d = Einsum<equation="{second}">(h, w2)  y = Einsum<equation="eth,te->th">(d, gates)
"""
GATHERED = """
    [router] s = MatMul(x, router)  gates = Softmax<axis=-1>(s)  best, index = TopK(gates, two)
    [of] w1_of = Gather<axis=0>(w1, index)  w2_of = Gather<axis=0>(w2, index)  rows = Unsqueeze(x, middle)
    [up] u = MatMul(rows, w1_of)  h = Relu(u)  [down] d = MatMul(h, w2_of)
    flat = Squeeze(d, minus_two)  shares = Unsqueeze(best, last)
    weighted = Mul(flat, shares)  y = ReduceSum<keepdims=0>(weighted, second)
"""
FORMS = {
    "dense": DENSE,
    "einsum": EINSUM.format(equation="th,ehf->etf", second="etf,efh->eth"),
    "einsum by token": EINSUM.format(equation="th,fhe->tef", second="tef,efh->eth"),
    "gathered": GATHERED,
}


def arrays(planted: bool) -> dict[str, Array]:
    """Constants of all forms; planted weights of two bases of width 4."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((EXPERTS, WIDTH, HIDDEN))
    if planted:
        which = np.arange(EXPERTS) % 2
        w1 = rng.standard_normal((2, WIDTH, 4))[which] @ rng.standard_normal((EXPERTS, 4, HIDDEN))
    found = {
        "router": rng.standard_normal((WIDTH, EXPERTS)),
        "w1": w1,
        "w2": rng.standard_normal((EXPERTS, HIDDEN, WIDTH)),
    }
    found = {name: array.astype(np.float32) for name, array in found.items()}
    return found | {
        "first": np.array([0]), "second": np.array([1]), "middle": np.array([1, 2]), "last": np.array([-1]),
        "minus_two": np.array([-2]), "two": np.array([2]),
    }  # fmt: skip


def build(form: str, planted: bool = False, text: str | None = None, **changed: Array) -> Model:
    constants = arrays(planted) | changed
    constants["w1e"] = constants["w1"].transpose(2, 1, 0) if form == "einsum by token" else constants["w1"]
    head = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
    body = FORMS[form] if text is None else text
    proto = onnx.parser.parse_model(f"{head} g (float[T,{WIDTH}] x) => (float[T,{WIDTH}] y) {{ {body} }}")
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in constants.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    return Model.from_proto(proto)


def tokens(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((TOKENS, WIDTH)).astype(np.float32)


def output(model: Model) -> Array:
    return open_session(model).run({"x": tokens(9)})["y"]


def run(model: Model, options: str, calibrated: bool = True) -> PassReport:
    calibration = Calibration.from_batches([{"x": tokens(seed)} for seed in range(8)], model)
    ctx = PassContext(calibration=calibration if calibrated else None, threads=1)
    (report,) = Pipeline.parse(f"factor-mobe{{{options}}}").run(model, ctx)
    assert graph_fault(model) is None
    return report


# ---- mathematics


def problem(experts: int, rows: int, columns: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, columns)) @ rng.standard_normal((columns, columns))
    return rng.standard_normal((experts, rows, columns)), x.T @ x / 60


def lost(weights: Array, found: Array, gram: Array) -> float:
    return sum(float(np.trace((a - b) @ gram @ (a - b).T)) for a, b in zip(weights, found, strict=True))


@pytest.mark.parametrize(("rows", "columns", "width"), [(7, 5, 2), (3, 11, 3), (1, 6, 1), (5, 1, 1)])
def test_as_many_bases_as_experts_are_the_best_matrices_of_their_rank(
    rows: int, columns: int, width: int
) -> None:
    weights, gram = problem(5, rows, columns)
    found = fitted_bases(weights, gram, 5, width, 9)
    expected = np.stack([best_factors(item, gram, width).product() for item in weights])
    np.testing.assert_allclose(found.dense(), expected, atol=1e-9)
    assert sorted(found.mixing.sum(1)) == [1] * 5
    assert found.errors[-1] == pytest.approx(lost(weights, expected, gram), abs=1e-9)


def test_one_basis_is_the_best_shared_space() -> None:
    weights, gram = problem(4, 6, 7)
    found = fitted_bases(weights, gram, 1, 3, 9)
    stacked = best_factors(weights.reshape(-1, 7), gram, 3).product().reshape(weights.shape)
    np.testing.assert_allclose(found.dense(), stacked, atol=1e-9)
    np.testing.assert_allclose(fitted_bases(weights, gram, 1, 7, 9).dense(), weights, atol=1e-9)
    assert found.numbers == 3 * 7 + 4 * 6 * 3


@pytest.mark.parametrize("bases", [2, 3])
def test_errors_fall_and_are_those_of_the_result(bases: int) -> None:
    weights, gram = problem(6, 5, 8)
    found = fitted_bases(weights, gram, bases, 2, 12)
    assert all(
        after <= before * (1 + 1e-9) for before, after in zip(found.errors, found.errors[1:], strict=False)
    )
    assert found.errors[-1] < 0.99 * found.errors[0]
    assert found.errors[-1] == pytest.approx(lost(weights, found.dense(), gram))
    assert found.numbers == bases * 2 * 8 + 6 * bases + 6 * 5 * 2
    fewer = fitted_bases(weights, gram, bases, 2, 3)
    assert found.errors[: len(fewer.errors)] == pytest.approx(fewer.errors)
    rng = np.random.default_rng(3)
    for part in ("shared", "mixing", "own"):  # stationary: no small step in any of the three helps
        own = fitted_bases(weights, gram, bases, 2, 400)
        moved = {name: getattr(own, name).copy() for name in ("shared", "mixing", "own")}
        moved[part] += 1e-3 * rng.standard_normal(moved[part].shape)
        dense = moved["own"] @ np.einsum("em,mrk->erk", moved["mixing"], moved["shared"])
        assert lost(weights, dense, gram) > own.errors[-1] * (1 - 1e-5)


def test_experts_of_one_basis_are_found() -> None:
    rng = np.random.default_rng(2)
    shared, which = rng.standard_normal((3, 2, 9)), np.array([0, 1, 2, 0, 1, 2, 1])
    weights = rng.standard_normal((7, 5, 2)) @ shared[which]
    found = fitted_bases(weights, np.eye(9), 3, 2, 5)
    np.testing.assert_allclose(found.dense(), weights, atol=1e-9)


@pytest.mark.parametrize("bases", [1, 2, 8])
def test_width_keeps_the_budget(bases: int) -> None:
    for share in (0.2, 0.5, 0.9):
        width = affordable_width(8, 10, 12, bases, share, 1)
        size = width * (8 * 10 + bases * 12) + (8 * bases if bases > 1 else 0)
        assert size <= share * 960
        larger = size + 8 * 10 + bases * 12
        assert larger > share * 960 or width == (12 if bases == 1 else 10)
    assert affordable_width(8, 10, 12, 8, 0.05, 1) == 0


# ---- graphs


@pytest.mark.parametrize("bases", [1, 2, 8])
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_computes_what_the_fit_says(form: str, bases: int) -> None:
    model = build(form)
    before, work = signature(model), model.copy()
    report = run(work, f"param-ratio=0.9 multiple=1 bases={bases} keep-slower=true", calibrated=False)
    assert [change.site for change in report.changed] == ["up"]
    assert signature(work) == before
    onnx.checker.check_model(work.to_proto(), full_check=True)
    weights = arrays(False)["w1"].transpose(0, 2, 1).astype(np.float64)
    width = affordable_width(EXPERTS, HIDDEN, WIDTH, bases, 0.9, 1)
    dense = fitted_bases(weights, 1.01 * np.eye(WIDTH), bases, width, 10).dense()
    expected = output(build(form, w1=dense.transpose(0, 2, 1).astype(np.float32)))
    np.testing.assert_allclose(output(work), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert work.nbytes < model.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_planted_bases_are_exact_and_a_second_run_changes_nothing(form: str) -> None:
    model = build(form, planted=True)
    expected = output(model)
    report = run(model, "param-ratio=0.48 multiple=4 bases=2")
    assert "8 experts share 2 bases of width 4" in report.changed[0].detail
    numbers = report.changed[0].numbers
    assert numbers["parameters_after"] < 0.48 * numbers["parameters_before"]
    np.testing.assert_allclose(output(model), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    stable = model.fingerprint()
    assert not run(model, "param-ratio=0.48 multiple=4 bases=2").changed
    assert model.fingerprint() == stable


def test_calibration_lowers_the_error_of_the_outputs() -> None:
    """Tokens that lie near a plane: what they never show need not be kept."""
    scale = np.geomspace(1, 1e-3, WIDTH).astype(np.float32)
    errors = []
    for calibrated in (False, True):
        model = build("dense")
        batches = [{"x": tokens(seed) * scale} for seed in range(8)]
        calibration = Calibration.from_batches(batches, model) if calibrated else None
        expected = open_session(model).run(batches[0])["y"]
        Pipeline.parse("factor-mobe{param-ratio=0.5 multiple=1 damping=1e-6}").run(
            model, PassContext(calibration=calibration, threads=1)
        )
        errors.append(float(np.abs(open_session(model).run(batches[0])["y"] - expected).max()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            DENSE.replace("MatMul(x, w1)", "MatMul(x3, w1)").replace("[up]", "x3 = Unsqueeze(x, first) [up]"),
            None,
        ),
        (
            DENSE.replace("[up] u = MatMul(x, w1)", "xe = Expand(x, shape) [up] u = MatMul(xe, w1)"),
            "is not understood",
        ),
        (DENSE.replace("h = Relu(u)", "h = Relu(u) z = Sigmoid(u)"), None),
        (
            GATHERED.replace("[up]", "other = Relu(w1_of) [up]").replace("y =", "r = ReduceSum(other) y ="),
            "not read by one",
        ),
        ("[router] y0 = MatMul(x, router)  s = Softmax(y0)  y = MatMul(s, wide)", None),
    ],
)
def test_other_forms_are_left_alone(text: str, reason: str | None) -> None:
    wide = np.ones((EXPERTS, WIDTH), np.float32)
    model = build("dense", text=text, wide=wide, shape=np.array([EXPERTS, 1, 1]))
    fingerprint = model.fingerprint()
    report = run(model, "param-ratio=0.5 multiple=1")
    if not report.changed:
        assert model.fingerprint() == fingerprint
        assert report.skipped
    if reason is not None:
        assert not report.changed
        assert any(reason in item.reason for item in report.skipped), report.skipped


def test_the_second_layer_stays_and_says_why() -> None:
    report = run(build("dense"), "multiple=1")
    assert [item.reason for item in report.skipped if item.site == "down"] == [
        "each of its experts reads rows of its own"
    ]


def test_inputs_that_are_not_finite_are_refused() -> None:
    text = DENSE.replace("[up] u = MatMul(x, w1)", "big = Exp(x) [up] u = MatMul(big, w1)")
    model = build("dense", text=text)
    fingerprint = model.fingerprint()
    calibration = Calibration.from_batches([{"x": 200 * tokens()}], model)
    (report,) = Pipeline.parse("factor-mobe{multiple=1}").run(model, PassContext(calibration=calibration))
    assert any("infinite" in item.reason for item in report.skipped)
    assert model.fingerprint() == fingerprint


class Costs:
    """Says that everything takes as long."""

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        return 1.0


def test_what_is_not_faster_is_not_kept() -> None:
    model = build("dense")
    fingerprint = model.fingerprint()
    ctx = PassContext(costs=Costs())  # type: ignore[arg-type]
    (report,) = Pipeline.parse("factor-mobe{multiple=1}").run(model, ctx)
    assert not report.changed
    assert model.fingerprint() == fingerprint
    assert any("1.000 times as long" in item.reason for item in report.skipped)


@pytest.mark.parametrize("options", ["param-ratio=0", "bases=0", "multiple=0", "turns=0", "damping=0"])
def test_options_are_checked(options: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(f"factor-mobe{{{options}}}")
