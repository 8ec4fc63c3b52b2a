"""Parts of models: what takes one form together, and what cannot be taken out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model
from sparsecc.plan.part_data import PartCalibration, PartData, collect_parts
from sparsecc.plan.parts import Part, find_parts
from sparsecc.pm import PassContext, Pipeline, no_progress

RNG = np.random.default_rng(0)


def build(graph: str, **shapes: tuple[int, ...]) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + graph)
    for name, shape in shapes.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def names(parts: list[Part]) -> list[tuple[str, ...]]:
    return [part.names for part in parts]


GATED = """g (float[n,16] x) => (float[n,16] y) {
    [gate] a = MatMul(x, w0) s = Sigmoid(a) [up] b = MatMul(x, w1) h = Mul(s, b) [down] y = MatMul(h, w2) }"""


def test_gate_up_and_down_are_one_part_unless_nothing_is_to_be_coupled() -> None:
    model = build(GATED, w0=(16, 32), w1=(16, 32), w2=(32, 16))
    (part,) = find_parts(model)
    assert (part.names, part.nested, len(part.ends)) == (("gate", "up", "down"), True, 1)
    assert names(find_parts(model, coupled=False)) == [("gate", "up"), ("down",)]


def test_a_part_by_itself_computes_what_it_does_in_the_model() -> None:
    model = build(GATED, w0=(16, 32), w1=(16, 32), w2=(32, 16))
    (part,) = find_parts(model)
    x = RNG.standard_normal((5, 16)).astype(np.float32)
    (expected,) = open_session(model).run({"x": x}).values()
    alone = part.compared((5, 16))
    assert sorted(site.name for site in alone.sites()) == ["down", "gate", "up"]
    (found,) = open_session(alone).run({alone.input_specs()[0].name: x}).values()
    assert np.allclose(found, expected, atol=1e-5)
    before = model.fingerprint()
    for site in alone.sites():
        site.replace(0 * site.numpy())
    alone.onnx.graph.initializers.values()
    assert model.fingerprint() == before


def test_at_most_three_layers_are_one_part() -> None:
    chain = " ".join(f"[f{at}] h{at + 1} = MatMul(h{at}, w{at})" for at in range(5))
    model = build(
        f"g (float[n,16] h0) => (float[n,16] h5) {{ {chain} }}", **{f"w{at}": (16, 16) for at in range(5)}
    )
    assert names(find_parts(model)) == [("f0", "f1", "f2"), ("f3", "f4")]


def test_units_that_others_read_or_that_depend_on_more_are_not_coupled() -> None:
    model = build(
        """g (float[n,16] x, float[n,32] z) => (float[n,16] y, float[n,32] a) {
            [up] a = MatMul(x, w0) b = Mul(a, z) [down] y = MatMul(b, w1) }""",
        w0=(16, 32),
        w1=(32, 16),
    )
    assert names(find_parts(model)) == [("up",), ("down",)]


def test_a_shared_weight_stays_shared() -> None:
    model = build(
        """g (float[n,64] x, float[m,64] z) => (float[n,64] y, float[m,64] v) {
            [first] y = MatMul(x, w0) [second] v = MatMul(z, w0) }""",
        w0=(64, 64),
    )
    (part,) = find_parts(model)
    alone = part.timed((4, 64))
    (site,) = alone.sites()
    assert (site.name, len(site.nodes), len(alone.input_specs())) == ("first", 2, 2)
    (report,) = Pipeline.parse("factor-svd{param-ratio=0.5}").run(alone)
    assert "2 nodes" in report.skipped[0].reason or "shared" in report.skipped[0].reason
    calibration = Calibration.from_batches(
        [{name: RNG.standard_normal((8, 64)).astype(np.float32) for name in ("x", "z")}], model
    )
    ((_, data),) = collect_parts(model, [part], calibration, threads=1, progress=no_progress)
    assert data.moments["first"].rows == 16
    (report,) = Pipeline.parse("prune-wanda{sparsity=0.5}").run(
        alone, PassContext(calibration=PartCalibration(data, whole=calibration))
    )
    assert report.changed


SEQUENCE = "g (float[t,n,8] x) => (float[1,n,16] h) { [l] y, h = LSTM<hidden_size=16>(x, w, r, b) }"
WEIGHTS = {"w": (1, 64, 8), "r": (1, 64, 16), "b": (1, 128)}
BRANCHES = """g (bool c, float[t,n,8] x, float[1,n,16] s) => (float[1,n,16] y) { y = If(c) <
    then_branch = one () => (float[1,n,16] p) { [first] a, p = LSTM<hidden_size=16>(x, w, r, b, "", s, s) },
    else_branch = two () => (float[1,n,16] q) { z = Add(x, x) [second] e, q = LSTM<hidden_size=16>(z, w, r) }> }"""
LOOP = """g (float[n,16] x, int64 rounds) => (float[n,16] y) { go = Constant<value = bool {1}>()
    y = Loop(rounds, go, x) <body = once (int64 i, bool keep, float[n,16] state) => (bool on, float[n,16] next) {
        on = Identity(keep) [fc] h = MatMul(state, w) next = Tanh(h) }> }"""


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def collected(model: Model, part: Part, *batches: dict[str, np.ndarray]) -> PartData | str:
    calibration = Calibration.from_batches(batches, model)
    ((_, data),) = collect_parts(model, [part], calibration, threads=1, progress=no_progress)
    return data


def test_both_weights_of_an_lstm_are_one_part_that_gives_what_the_model_reads() -> None:
    model = build(SEQUENCE, **WEIGHTS)
    (part,) = find_parts(model)
    assert (part.names, part.reason) == (("l.W", "l.R"), None)
    data = collected(model, part, *({"x": random(5, 3, 8)} for _ in range(2)))
    assert isinstance(data, PartData)
    assert data.sample.shape == (5, 6, 8)
    assert data.moments["l.W"].rows == 30
    alone = part.compared(data.sample.shape)
    assert [site.name for site in alone.sites()] == ["l.W", "l.R"]
    (found,) = open_session(alone).run({"x": data.sample}).values()
    (expected,) = open_session(model).run({"x": data.sample}).values()
    assert np.allclose(found, expected, atol=1e-6)


def test_an_lstm_that_is_given_states_is_sampled_over_time_in_the_branch_that_runs() -> None:
    model = build(BRANCHES, **WEIGHTS)
    (part,) = find_parts(model)
    assert part.names == ("first.W", "first.R")
    x, state = random(1, 2, 8), random(1, 2, 16)
    data = collected(model, part, *({"c": np.array(c), "x": x, "s": state} for c in (True, True, False)))
    assert isinstance(data, PartData)
    assert np.array_equal(data.sample, np.concatenate([x, x, x + x]))
    assert len(part.timed(x.shape).input_specs()) == 1


def test_a_product_in_a_loop_is_a_part_that_reads_all_rounds() -> None:
    model = build(LOOP, w=(16, 16))
    (part,) = find_parts(model)
    x = random(4, 16)
    data = collected(model, part, {"x": x, "rounds": np.array(3)})
    assert isinstance(data, PartData)
    assert data.sample.shape == (12, 16)
    assert np.array_equal(data.sample[:4], x)
    assert data.moments["fc"].rows == 12
    assert collected(model, part, {"x": x, "rounds": np.array(0)}) == "its input is never computed"


TWICE = """g (bool c, float[n,8] x) => (float[n,8] y) { y = If(c) <
    then_branch = t () => (float[n,8] p) { [then] p = MatMul(x, w) },
    else_branch = e () => (float[n,8] q) { [else] q = MatMul(x, w) }> }"""


@pytest.mark.parametrize(
    ("graph", "shapes", "reason"),
    [
        (SEQUENCE.replace("=16>", "=16, clip=3.0>"), WEIGHTS, "clip"),
        (
            SEQUENCE.replace("(float[1,n,16] h)", "(float[1,n,16] h, float[1,n,16] k)").replace(
                "b) }", "b) [m] z, k = LSTM<hidden_size=16>(x, w, r, b) }"
            ),
            WEIGHTS,
            "2 nodes share its weights",
        ),
        (TWICE, {"w": (8, 8)}, "in several bodies"),
    ],
)
def test_what_cannot_be_taken_out_is_a_part_with_a_reason(graph: str, shapes: dict, reason: str) -> None:
    parts = find_parts(build(graph, **shapes))
    assert parts
    assert all(reason in str(part.reason) for part in parts)


def test_calibration_that_is_not_finite_is_told() -> None:
    model = build("g (float[n,16] x) => (float[n,16] y) { r = Log(x) [f] y = MatMul(r, w) }", w=(16, 16))
    (part,) = find_parts(model)
    calibration = Calibration.from_batches([{"x": np.zeros((4, 16), np.float32)}], model)
    ((_, data),) = collect_parts(model, [part], calibration, threads=1, progress=no_progress)
    assert data == "its input is NaN or infinite on the calibration data"


def test_a_convolution_keeps_pictures_and_a_product_rows() -> None:
    model = build(
        """g (float[n,3,8,8] x) => (float[n,5] y) {
            [c] a = Conv<kernel_shape=[3,3]>(x, w0) p = GlobalAveragePool(a) f = Flatten(p) r = Tanh(f)
            [fc] y = Gemm<alpha=0.5, transB=1>(r, w1, b1) }""",
        w0=(7, 3, 3, 3),
        w1=(5, 7),
        b1=(5,),
    )
    parts = find_parts(model, coupled=False)
    calibration = Calibration.from_batches(
        [{"x": RNG.standard_normal((6, 3, 8, 8)).astype(np.float32)} for _ in range(2)], model
    )
    found = dict(collect_parts(model, parts, calibration, threads=1, progress=no_progress))
    assert [data.sample.shape for data in found.values()] == [(12, 3, 8, 8), (12, 7)]
    assert found[parts[0]].moments["c"].gram.shape == (27, 27)
