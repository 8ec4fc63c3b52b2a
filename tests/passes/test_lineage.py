"""Recovery after units or blocks were removed: tensors are matched with what is left of the dense ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session, tap
from sparsecc.ir import Model
from sparsecc.passes.recover.base import output_error
from sparsecc.passes.recover.lineage import counterpart
from sparsecc.pm import Lineage, PassContext, Pipeline

MLP = """g (float[B,12] x) => (float[B,5] y) {
    [one] h = MatMul(x, w1) r = Relu(h) [two] m = MatMul(r, w2) a = Add(m, b2) c = Relu(a)
    [three] y = MatMul(c, w3) }"""
CNN = """g (float[B,3,9,9] x) => (float[B,5] y) {
    [one] h = Conv<pads=[1,1,1,1]>(x, k1, q1) n = BatchNormalization(h, s, o, e, v) r = Relu(n)
    [two] m = Conv<pads=[1,1,1,1], strides=[2,2]>(r, k2) c = Relu(m)
    p = GlobalAveragePool(c) f = Flatten(p) [three] y = Gemm<transB=1>(f, w4, b4) }"""
STREAM = """g (float[B,12] x) => (float[B,5] y) {
    [in] s0 = MatMul(x, w0)
    [up1] h1 = MatMul(s0, u1) r1 = Relu(h1) [down1] d1 = MatMul(r1, v1) [block1] s1 = Add(s0, d1)
    [up2] h2 = MatMul(s1, u2) r2 = Relu(h2) [down2] d2 = MatMul(r2, v2) [block2] s2 = Add(d2, s1)
    [up3] h3 = MatMul(s2, u3) r3 = Relu(h3) [down3] d3 = MatMul(r3, v3) [block3] s3 = Add(d3, s2)
    [out] y = MatMul(s3, w3) }"""
SHAPES = {
    "w0": (12, 16), "w1": (12, 16), "w2": (16, 16), "w3": (16, 5), "b2": (16,), "k1": (8, 3, 3, 3), "q1": (8,),
    "k2": (8, 8, 3, 3), "w4": (5, 8), "b4": (5,), "u": (16, 24), "v": (24, 16),
}  # fmt: skip


def build(text: str) -> Model:
    rng = np.random.default_rng(3)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    made = {name for node in proto.graph.node for name in node.output} | {"x"}
    for name in dict.fromkeys(name for node in proto.graph.node for name in node.input):
        if name in made:
            continue
        shape = SHAPES.get(name) or SHAPES.get(name[0]) or (8,)
        if name == "v":
            shape = (8,)
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        array = np.abs(array) + 0.5 if name == "v" else array * (0.5 if name == "v2" else 1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def batches(model: Model, count: int = 3) -> list[dict[str, np.ndarray]]:
    shape = (40, *(int(size) for size in model.input_specs()[0].shape[1:]))
    arrays = [np.random.default_rng(9 + n).standard_normal(shape) for n in range(count)]
    return [{"x": np.cumsum(array, -1).astype(np.float32) / 2} for array in arrays]


def run(text: str, pipeline: str):
    """The model after ``pipeline``, the one before, the inputs and the reports."""
    model = build(text)
    dense, data = model.copy(), batches(model)
    context = PassContext(calibration=Calibration.from_batches(data, model, threads=1), threads=1)
    return model, dense, data, Pipeline.parse(pipeline).run(model, context)


def values(model: Model, name: str, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = open_session(tap(model, [name]), threads=1)
    return np.concatenate([session.run(batch)[name] for batch in data]).astype(np.float64)


CUT = "prune-structured{flops-ratio=0.3 multiple=1 compensation=none}"


def test_least_squares_behind_removed_units_are_those_of_the_dense_outputs() -> None:
    model, dense, data, reports = run(MLP, f"{CUT},recover-ols{{match=three damping=1e-9 correction=1.0}}")
    inside = values(model, "c", data)
    assert inside.shape[1] < 16
    best, *_ = np.linalg.lstsq(inside, values(dense, "y", data), rcond=None)
    (site,) = [site for site in model.sites() if site.name == "three"]
    np.testing.assert_allclose(site.numpy(), best.T, atol=1e-4)
    assert [change.site for change in reports[1].changed] == ["three"]


def test_sites_with_a_bias_are_fitted_with_it() -> None:
    model, dense, data, _ = run(CNN, f"{CUT},recover-ols{{match=three damping=1e-9 correction=1.0}}")
    inside = values(model, "f", data)
    assert inside.shape[1] < 8
    wide = np.hstack([inside, np.ones((len(inside), 1))])
    best, *_ = np.linalg.lstsq(wide, values(dense, "y", data), rcond=None)
    np.testing.assert_allclose(values(model, "y", data), wide @ best, atol=1e-4)


@pytest.mark.parametrize(("text", "name"), [(MLP, "a"), (CNN, "m"), (CNN, "h")])
def test_means_of_the_channels_that_stay_become_the_dense_ones(text: str, name: str) -> None:
    model, dense, data, reports = run(text, f"{CUT},recover-bias")
    assert reports[1].changed
    site = {"a": "two", "m": "two", "h": "one"}[name]
    left = next(change for change in reports[0].changed if change.site == site).numbers["units_after"]
    means = []
    for side in (model, dense):
        found = values(side, name, data)
        means.append(np.moveaxis(found, 1, -1).reshape(-1, found.shape[1]).mean(0))
    assert len(means[0]) == left < len(means[1])
    assert all(np.isclose(means[1], mean, atol=1e-4).any() for mean in means[0])


def test_every_recovery_follows_structured_removal() -> None:
    for text in (MLP, CNN):
        cut, dense, data, _ = run(text, CUT)
        source = Calibration.from_batches(data, dense, threads=1)
        before = output_error(cut, dense, source, 1)
        for names in ("recover-ols", "recover-bn", "recover-bias", "recover-ols,recover-bn,recover-bias"):
            model, dense, _, reports = run(text, f"{CUT},{names}")
            assert not any("cannot be compared" in note for report in reports for note in report.notes)
            after = output_error(model, dense, source, 1)
            assert after <= before
            if "recover-ols" in names:
                assert after < 0.7 * before


def test_behind_a_removed_block_least_squares_see_what_it_computed() -> None:
    options = "prune-depth{blocks=1 match=block2 compensation=none}"
    cut, dense, data, _ = run(STREAM, options)
    model, _, _, reports = run(STREAM, f"{options},recover-ols{{damping=1e-9 correction=1.0}}")
    assert [change.site for change in reports[1].changed] == ["up3", "down3", "out"]
    source = Calibration.from_batches(data, dense, threads=1)
    assert output_error(model, dense, source, 1) < output_error(cut, dense, source, 1)
    # up3 reads s1 where the dense model reads s2: the best linear map from the one to what it made of the other
    best, *_ = np.linalg.lstsq(values(cut, "s1", data), values(dense, "h3", data), rcond=None)
    np.testing.assert_allclose(values(model, "h3", data), values(cut, "s1", data) @ best, atol=2e-3)


def test_a_layer_that_stands_in_for_a_block_is_left_as_it_was_fitted() -> None:
    fitted, dense, data, reports = run(STREAM, "prune-depth{blocks=1 match=block2}")
    assert "'down1'" in reports[0].changed[0].detail
    for names in ("recover-ols", "recover-align", "recover-bias"):
        model, _, _, reports = run(STREAM, f"prune-depth{{blocks=1 match=block2}},{names}")
        reasons = {skip.site: skip.reason for skip in reports[1].skipped}
        assert "stands in" in reasons["down1"]
        assert not any("cannot be compared" in note for note in reports[1].notes)
        source = Calibration.from_batches(data, dense, threads=1)
        assert output_error(model, dense, source, 1) <= output_error(fitted, dense, source, 1)
        np.testing.assert_array_equal(values(model, "s1", data), values(fitted, "s1", data))


def test_blocks_and_units_one_after_the_other() -> None:
    steps = "prune-depth{blocks=1},prune-structured{flops-ratio=0.5 multiple=1},recover-ols,recover-bias"
    model, dense, data, reports = run(STREAM, steps)
    assert reports[1].changed
    assert not any("cannot be compared" in note for report in reports for note in report.notes)
    source = Calibration.from_batches(data, dense, threads=1)
    without, *_ = run(STREAM, steps.partition(",recover")[0])
    assert output_error(model, dense, source, 1) <= output_error(without, dense, source, 1)


def test_what_was_cut_twice_is_counted_from_the_start() -> None:
    rows, columns = np.array([1, 0, 1, 1], bool), np.array([1, 1, 0], bool)
    once = Lineage().cut("a", rows, columns)
    twice = once.cut("a", np.array([0, 1, 1], bool), np.array([0, 1], bool))
    assert twice.kept["a"].rows.tolist() == [2, 3]
    assert twice.kept["a"].columns.tolist() == [1]
    assert once.kept["a"].rows.tolist() == [0, 2, 3]
    assert Lineage().bridged("s1", "s2").bridged("s0", "s1").tensors == {"s1": "s2", "s0": "s2"}


def test_a_model_that_cannot_be_matched_is_refused() -> None:
    model, dense, _, _ = run(STREAM, "prune-depth{blocks=1 match=block2 compensation=none}")
    assert counterpart(dense, dense, None) is dense
    assert "nodes are not those" in str(counterpart(model, dense, None))
    assert "input 'x'" in str(counterpart(model, dense, Lineage().bridged("x", "s1")))
    assert "is nothing that the dense model computes" in str(
        counterpart(dense, model, Lineage().bridged("s1", "gone"))
    )
    beside = counterpart(model, dense, Lineage().bridged("s1", "s2"))
    assert isinstance(beside, Model)
    assert dense.fingerprint() == build(STREAM).fingerprint()
