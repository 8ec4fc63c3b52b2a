"""Tables of embeddings and tied heads: which are found, the fit, and the graphs that come of it."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import MeasurementError, SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.factor.embedding_fit import (
    column_metric,
    project,
    row_moment,
    row_weights,
    subspace,
    weighted_error,
)
from sparsecc.passes.factor.tables import find_tables
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.plan import preset
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.pm.checks import graph_fault

V, D = 60, 16
SPEC = "factor-embedding{min-elements=1 multiple=1 param-ratio=0.7}"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def gram(size: int, seed: int = 0) -> np.ndarray:
    root = (
        np.random.default_rng(seed).standard_normal((size, 2 * size))
        * np.exp(np.arange(size) / size)[:, None]
    )
    return root @ root.T


@pytest.mark.parametrize("shape", [(50, 12), (7, 12), (1, 5), (5, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_factors_have_the_smallest_weighted_error_of_their_rank(shape, tied):
    table = normal(*shape).astype(np.float64)
    weights = np.exp(np.random.default_rng(1).standard_normal(shape[0]))
    moment = row_moment(table, weights)
    metric = column_metric(moment, gram(shape[1]) if tied else None)
    assert tied or (metric == np.eye(shape[1])).all()
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        into, back = subspace(moment, metric, rank)
        near = project(table, into, np.dtype(np.float64))
        error = weighted_error(table, near, back, weights, metric)
        values = np.linalg.svd(
            np.sqrt(weights)[:, None] * table @ np.linalg.cholesky(metric), compute_uv=False
        )
        assert error == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), rel=1e-5, abs=1e-12)
        np.testing.assert_allclose(back @ back.T, np.eye(rank), atol=1e-9)
        best = best_factors(np.sqrt(weights)[:, None] * table, metric, rank).product()
        if rank < min(shape):
            np.testing.assert_allclose(near @ back * np.sqrt(weights)[:, None], best, atol=1e-5)
        # B is also the best for rows and for heads alone, given A: no factor of their own would help
        seen = near * np.sqrt(weights)[:, None]
        alone = np.linalg.lstsq(seen, table * np.sqrt(weights)[:, None], rcond=None)[0]
        np.testing.assert_allclose(seen @ alone, seen @ back, atol=1e-5)


def test_both_parts_of_the_metric_cost_the_same_where_all_is_lost():
    moment, heads = gram(9, 1), gram(9, 2)
    metric = column_metric(moment, heads)
    assert np.einsum("ij,ij->", moment, metric) == pytest.approx(2 * np.trace(moment))
    assert (column_metric(moment, np.zeros((9, 9))) == np.eye(9)).all()


def test_row_weights_deal_out_a_share_evenly():
    counts = np.array([0, 3, 1, 0])
    np.testing.assert_allclose(row_weights(counts, 4, 0.5), [0.5, 2.0, 1.0, 0.5])
    for none in (None, np.zeros(4, np.int64)):
        assert (row_weights(none, 4, 0.5) == 1).all()
    assert (row_weights(counts, 4, 1.0) == 1).all()


def build(text: str, opset: int = 17, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def graph(body: str, result: str = "N, T, v") -> str:
    return f"g (int64[N, T] ids) => (float[{result}] y) {{ {body} }}"


MIDDLE = "h = MatMul(e, w) r = Tanh(h)"
PLAIN = graph(f"[embed] e = Gather(table, ids) {MIDDLE} y = Identity(r)")
TIED = graph(
    f"[embed] e = Gather(table, ids) {MIDDLE} t = Transpose <perm = [1, 0]> (table) [head] y = MatMul(r, t)"
)
GEMM = graph(
    f"""[embed] e = Gather <axis = 0> (table, ids) {MIDDLE} f = Reshape(r, flat)
    [head] y = Gemm <transB = 1, alpha = 0.5> (f, table, b)""",
    "M, v",
)
COPIED = graph(f"[embed] e = Gather(table, ids) {MIDDLE} [head] y = MatMul(r, copy)")
FLIPPED = COPIED.replace("[head] y = MatMul(r, copy)", "c = Transpose(copy) [head] y = MatMul(r, c)")
COPIED_GEMM = GEMM.replace("(f, table, b)", "(f, copy, b)")
TWICE = graph(
    f"""[embed] e0 = Gather(table, ids) [again] e1 = Gather(same, ids) same = Identity(table)
    e = Add(e0, e1) {MIDDLE} t = Transpose(table) [head] y = MatMul(r, t)"""
).replace(
    "[embed] e0 = Gather(table, ids) [again] e1 = Gather(same, ids) same = Identity(table)",
    "[embed] e0 = Gather(table, ids) same = Identity(table) [again] e1 = Gather(same, ids)",
)


def table_of(rank: int | None = None) -> np.ndarray:
    full = normal(V, D)
    return full if rank is None else (normal(V, rank) @ normal(rank, D)).astype(np.float32)


def model_of(text: str, table: np.ndarray) -> Model:
    weights = {"table": table, "w": normal(D, D), "flat": np.array([-1, D]), "b": normal(V)}
    weights["copy"] = np.ascontiguousarray(table.T) if "MatMul(r, copy)" in text else table
    return build(text, **{name: weights[name] for name in weights if re.search(rf"[(,] ?{name}[,)]", text)})


def tokens(count: int = 40, length: int = 6) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.minimum(rng.geometric(0.15, (count, length)) - 1, V - 2) - V * rng.integers(
        0, 2, (count, length)
    )


def context(model: Model, ids: np.ndarray, **more) -> PassContext:
    batches = [{"ids": part} for part in np.array_split(ids, 2)]
    return PassContext(calibration=Calibration.from_batches(batches, model, threads=1), threads=1, **more)


def outputs(model: Model, ids: np.ndarray) -> np.ndarray:
    return open_session(model).run({"ids": ids})["y"]


@pytest.mark.parametrize("text", [PLAIN, TIED, GEMM, COPIED, FLIPPED, COPIED_GEMM, TWICE])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_table_of_that_rank_gives_the_same_outputs_in_fewer_numbers(text, calibrated):
    model = model_of(text, table_of(rank=7))
    dense, ids = model.copy(), tokens()
    spec = SPEC.replace("0.7", "0.35") if "copy" in text else SPEC
    before = sum(array.const_value.size for array in model.onnx.graph.initializers.values())
    ctx = context(model, ids) if calibrated else PassContext()
    (report,) = Pipeline.parse(spec).run(model, ctx)
    (change,) = report.changed
    assert change.site == "embed"
    assert graph_fault(model) is None
    np.testing.assert_allclose(outputs(model, ids), outputs(dense, ids), atol=1e-4)
    after = sum(array.const_value.size for array in model.onnx.graph.initializers.values())
    copies = 2 if "copy" in text else 1
    assert before - after == round((1 - change.numbers["parameters"]) * V * D * copies)
    assert change.numbers["parameters"] <= 0.7
    assert ("head_error" in change.numbers) == (calibrated and text != PLAIN)
    assert change.numbers["rows_read"] == (len(np.unique(ids % V)) if calibrated else 0)
    assert [node.name for node in model.onnx.graph if "head" in node.name] == ["head"] * (text != PLAIN)
    stable = model.fingerprint()
    (again,) = Pipeline.parse(SPEC).run(model, ctx)
    assert model.fingerprint() == stable
    assert "rewritten already" in again.skipped[0].reason
    assert not [site for site in model.sites() if "table" in site.weight_name]


@pytest.mark.parametrize("text", [COPIED, FLIPPED, COPIED_GEMM])
def test_a_copy_goes_alone_where_that_is_enough(text):
    model = model_of(text, table_of())
    dense, ids = model.copy(), tokens()
    (report,) = Pipeline.parse(SPEC).run(model, PassContext(costs=Costs(None)))
    assert report.changed[0].detail == "1 copy of it gone: 0.5 of the numbers"
    assert graph_fault(model) is None
    assert "copy" not in model.onnx.graph.initializers
    np.testing.assert_allclose(outputs(model, ids), outputs(dense, ids), atol=1e-5)
    assert Pipeline.parse(SPEC).run(model, PassContext())[-1].skipped


def test_what_is_read_is_kept_better_than_by_svd():
    dense, ids = model_of(PLAIN, table_of()), tokens()
    errors = []
    for ctx in (context(dense, ids), PassContext()):
        model = dense.copy()
        Pipeline.parse(SPEC.replace("0.7", "0.5")).run(model, ctx)
        errors.append(np.square(outputs(model, ids) - outputs(dense, ids)).sum())
    assert errors[0] < 0.7 * errors[1]


def test_half_precision_stays_and_heads_read_the_same_numbers():
    text = TIED.replace("float[", "float16[")
    weights = {"table": table_of().astype(np.float16), "w": normal(D, D).astype(np.float16) / 4}
    model = build(text, **weights)
    (report,) = Pipeline.parse(SPEC).run(model, context(model, tokens()))
    assert report.changed
    assert {value.const_value.dtype.name for value in model.onnx.graph.initializers.values()} == {"FLOAT16"}
    assert graph_fault(model) is None
    assert np.isfinite(outputs(model, tokens())).all()


REFUSED = [
    (PLAIN.replace("y = Identity(r)", "n = Exp(table) s = ReduceMax(n) y = Add(r, s)"), "is also read by Exp"),
    (PLAIN.replace("y = Identity(r)", "c = Gather <axis = 1> (table, one) y = Add(r, c)"), "reads columns"),
    (PLAIN.replace("y = Identity(r)", "y = MatMul(o, table)"), "is also read by MatMul"),
    (PLAIN.replace("[embed]", "table = Constant <value = float[2, 2] {1, 2, 3, 4}> () [embed]"), "tidy"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_tables_that_others_read_stay(text, reason):
    weights = {"table": table_of(), "w": normal(D, D), "one": np.array([0]), "o": normal(3, V)}
    used = {name: weights[name] for name in weights if re.search(rf"[(,] ?{name}[,)]", text)}
    if "Constant" in text:
        del used["table"]
    model = build(text, **used)
    before = model.fingerprint()
    (report,) = Pipeline.parse(SPEC).run(model, PassContext())
    assert not report.changed
    assert reason in report.skipped[0].reason
    assert model.fingerprint() == before


def test_tables_in_bodies_and_in_numbers_of_few_bits_stay():
    body = graph(
        """[choose] y = If(c) <
            then_branch = g1 () => (float[N, T, 16] a) { [inner] a = Gather(table, ids) },
            else_branch = g2 () => (float[N, T, 16] b) { z = Gather(table, ids) b = Neg(z) }>""",
        "N, T, 16",
    )
    model = build(body, table=table_of(), c=np.array(True))
    assert "inside a body, by Gather" in find_tables(model)[1][0][1]
    text = graph("f = DequantizeLinear(q, s) [embed] e = Gather(f, ids) y = Identity(e)", "N, T, 16")
    model = build(text, q=(table_of() * 30).astype(np.int8), s=np.float32(0.1).reshape(()))
    assert "quantised" in find_tables(model)[1][0][1]
    text = graph("[embed] e = Gather(table, ids) y = Cast <to = 1> (e)", "N, T, 16")
    model = build(text, table=table_of().astype(ml_dtypes.bfloat16))
    assert "bfloat16" in find_tables(model)[1][0][1]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("factor-embedding", "only 960 numbers (min-elements=1048576)"),
        (
            "factor-embedding{min-elements=1 param-ratio=0.1}",
            "0.1 of 60 x 16 numbers do not hold factors of rank 8",
        ),
        ("factor-embedding{min-elements=1 param-ratio=1}", "left alone: nothing of it is to be saved"),
    ],
)
def test_refusals_have_a_reason(spec, reason):
    (report,) = Pipeline.parse(spec).run(model_of(PLAIN, table_of()), PassContext())
    assert (report.skipped[0].site, report.skipped[0].reason) == ("embed", reason)
    assert report.notes == [f"embed stays: {reason}"]


def test_bad_numbers_overrides_and_names():
    table = table_of()
    table[3, 2] = np.nan
    (report,) = Pipeline.parse(SPEC).run(model_of(PLAIN, table), PassContext())
    assert "1 of its 960 numbers are NaN" in report.skipped[0].reason
    ctx = PassContext(overrides=(SiteOverride("*", param_ratio=0.5),))
    (report,) = Pipeline.parse(SPEC).run(model_of(PLAIN, table_of()), ctx)
    assert report.changed[0].detail.startswith("rank 6 of 16")  # 480 / 76
    with pytest.raises(UsageError, match="matches none"):
        Pipeline.parse("factor-embedding{match=other}").run(model_of(PLAIN, table_of()), PassContext())
    (report,) = Pipeline.parse(SPEC).run(
        build("g (float[4] x) => (float[4] y) { y = Relu(x) }"), PassContext()
    )
    assert report.notes == ["no Gather of the model reads rows of a constant table"]
    for bad in ("floor=0", "param-ratio=0", "multiple=0"):
        with pytest.raises(SpecError, match="factor-embedding"):
            Pipeline.parse(f"factor-embedding{{{bad}}}")
    steps = [str(step) for step in preset(method="embedding", param_ratio=0.5).passes]
    assert steps[1] == "factor-embedding{param-ratio=0.5}"


class Costs:
    def __init__(self, time: float | None) -> None:
        self.time = time

    def relative_time_of(self, model, candidate):
        if self.time is None:
            raise MeasurementError("not timed")
        assert graph_fault(candidate) is None
        assert candidate.fingerprint() != model.fingerprint()
        return self.time


@pytest.mark.parametrize(
    ("text", "time", "stays"),
    [(PLAIN, 1.02, False), (PLAIN, 1.05, True), (TIED, 0.9, False), (TIED, 1.01, True), (PLAIN, None, True)],
)
def test_time_must_fall_where_a_head_is_tied_and_may_not_rise_elsewhere(text, time, stays):
    model = model_of(text, table_of())
    before = model.fingerprint()
    (report,) = Pipeline.parse(SPEC).run(model, PassContext(costs=Costs(time)))
    assert bool(report.skipped) == stays
    assert (model.fingerprint() == before) == stays
    if stays:
        reason = f"not faster: the model takes {time:.3g} times" if time else "not timed"
        assert report.skipped[0].reason.startswith(reason)
        kept = Pipeline.parse(SPEC.replace("}", " keep-slower=true}"))
        assert kept.run(model, PassContext(costs=Costs(time)))[-1].changed


def test_real_language_model_drops_its_copy_then_fits_what_is_read(data_dir):
    dense = Model.load(data_dir / "models" / "stories260K.onnx")
    ids = np.load(data_dir / "text" / "tinystories_part1_tok512.npz")["tokens"][:12, :64].astype(np.int64)
    batches = [{"tokens": part} for part in np.array_split(ids[:8], 2)]
    ctx = PassContext(calibration=Calibration.from_batches(batches, dense, threads=1), threads=1)
    logits = open_session(dense).run({"tokens": ids[8:]})["logits"]
    errors = []
    for spec in (
        "{min-elements=1}",
        "{min-elements=1 param-ratio=0.45}",
        "{min-elements=1 param-ratio=0.45 floor=1}",
    ):
        model = dense.copy()
        (report,) = Pipeline.parse(f"factor-embedding{spec}").run(model, ctx)
        assert report.changed[0].numbers["parameters"] <= 0.7
        assert graph_fault(model) is None
        found = open_session(model).run({"tokens": ids[8:]})["logits"]
        errors.append(np.linalg.norm(found - logits) / np.linalg.norm(logits))
    shared, weighted, alike = errors
    assert shared < 1e-6
    assert weighted < alike
