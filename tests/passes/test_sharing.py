"""Blocks that share weights: the joint fit is the best one, files shrink, what costs too much is taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session, tap
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.recover.base import output_error
from sparsecc.passes.structure.sharing import joint_weight
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault, signature

TOKENS = """g (float[B,T,16] x) => (float[B,T,16] y) {
    [in] s0 = MatMul(x, w0)
    n1 = LayerNormalization<axis=-1>(s0, g1, z1) [up1] h1 = MatMul(n1, u1) r1 = Relu(h1)
    [down1] d1 = MatMul(r1, v1) [block1] s1 = Add(s0, d1)
    n2 = LayerNormalization<axis=-1>(s1, g2, z2) [up2] h2 = MatMul(n2, u2) r2 = Relu(h2)
    [down2] d2 = MatMul(r2, v2) [block2] s2 = Add(d2, s1)
    n3 = LayerNormalization<axis=-1>(s2, g3, z3) [up3] h3 = MatMul(n3, u3) r3 = Relu(h3)
    [down3] d3 = MatMul(r3, v3) [block3] s3 = Add(s2, d3)
    [out] y = MatMul(s3, w4) }"""
PICTURES = """g (float[B,8,6,6] x) => (float[B,8,6,6] y) {
    s0 = Relu(x)
    [c1] a1 = Conv<pads=[1,1,1,1]>(s0, k1, q1) r1 = Relu(a1) [c2] a2 = Conv<pads=[1,1,1,1]>(r1, k2, q2)
    [block1] t1 = Add(a2, s0) s1 = Relu(t1)
    [c3] a3 = Conv<pads=[1,1,1,1]>(s1, k3, q3) r3 = Relu(a3) [c4] a4 = Conv<pads=[1,1,1,1]>(r3, k4)
    [block2] t2 = Add(s1, a4) y = Relu(t2) }"""
SHAPES = {"w": (16, 16), "u": (16, 32), "v": (32, 16), "g": (16,), "z": (16,), "k": (8, 8, 3, 3), "q": (8,)}


def build(text: str, like: dict[str, str] | None = None, noise: float = 0.0) -> Model:
    """Random weights; ``like`` says which ones are those of another, but for ``noise``."""
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    made = {name for node in proto.graph.node for name in node.output} | {"x"}
    arrays: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for node in proto.graph.node for name in node.input):
        if name not in made:
            shape = SHAPES[name[0]]
            arrays[name] = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    for name, other in (like or {}).items():
        arrays[name] = arrays[other] + noise * arrays[name]
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


ALIKE = {"u2": "u1", "v2": "v1"}


def data(model: Model) -> Calibration:
    shape = (20, 7, 16) if len(model.input_specs()[0].shape or ()) == 3 else (20, 8, 6, 6)
    arrays = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(3)]
    return Calibration.from_batches([{"x": np.cumsum(a, -1) / 2} for a in arrays], model, threads=1)


def share(model: Model, options: str = ""):
    context = PassContext(calibration=data(model), threads=1)
    (report,) = Pipeline.parse(f"share-weights{{{options}}}" if options else "share-weights").run(
        model, context
    )
    assert graph_fault(model) is None
    return report


@pytest.mark.parametrize(("n", "k", "rows"), [(3, 5, 40), (1, 4, 9), (4, 7, 5)])
def test_the_joint_weight_is_the_least_squares_solution_over_both_inputs(n: int, k: int, rows: int) -> None:
    rng = np.random.default_rng(n)
    inputs = [rng.standard_normal((rows, k)) * rng.random(k) for _ in range(2)]
    inputs[1][:, 0] = 0  # a dead input
    weights = [rng.standard_normal((n, k)) for _ in range(2)]
    outputs = [x @ w.T for x, w in zip(inputs, weights, strict=True)]
    scale = [1 / np.linalg.norm(y) for y in outputs]
    stacked = [
        np.concatenate([a * s for a, s in zip(parts, scale, strict=True)]) for parts in (inputs, outputs)
    ]
    best, *_ = np.linalg.lstsq(*stacked, rcond=None)
    found = joint_weight(weights, [x.T @ x for x in inputs], 1e-12)
    losses = [
        np.square(x @ w.T - y).sum() * s**2
        for w, (x, y, s) in [
            (v, z) for v in (found.weight, best.T) for z in zip(inputs, outputs, scale, strict=True)
        ]
    ]
    assert sum(losses[:2]) == pytest.approx(sum(losses[2:]), rel=1e-5, abs=1e-9)
    assert found.errors == pytest.approx(losses[:2], rel=1e-4, abs=1e-9)
    same = joint_weight([weights[0]] * 2, [x.T @ x for x in inputs], 0.01)
    np.testing.assert_allclose(same.weight, weights[0], atol=1e-9)
    assert max(same.errors) < 1e-15
    nothing = joint_weight([np.zeros((n, k))] * 2, [np.zeros((k, k))] * 2, 0.01)
    assert not nothing.weight.any()


def test_equal_blocks_are_found_and_stored_once(tmp_path: Path) -> None:
    model = build(TOKENS, ALIKE)
    dense = model.copy()
    report = share(model)
    (change,) = report.changed
    assert change.site == "block2 with block1"
    assert change.numbers["output_error"] < 1e-9
    assert change.numbers["weights_saved"] == 2 * 16 * 32
    assert signature(model) == signature(dense)
    tied = {site.name: len(site.nodes) for site in model.sites()}
    assert tied == {"in": 1, "up1": 2, "down1": 2, "up3": 1, "down3": 1, "out": 1}
    model.save(tmp_path / "small.onnx")
    dense.save(tmp_path / "dense.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("dense.onnx", "small.onnx")]
    assert sizes[0] - sizes[1] > 4 * 2 * 16 * 32 - 1000
    again = Model.load(tmp_path / "small.onnx")
    assert {site.name: len(site.nodes) for site in again.sites()} == tied
    assert output_error(again, dense, data(dense), 1) < 1e-9


@pytest.mark.parametrize(("text", "like"), [(TOKENS, ALIKE), (PICTURES, {"k3": "k1", "k4": "k2"})])
def test_the_fit_is_better_than_weights_as_they_are_and_means_are_kept(
    text: str, like: dict[str, str]
) -> None:
    errors = {}
    for way in ("none", "least-squares"):
        model = build(text, like, noise=0.3)
        dense = model.copy()
        report = share(model, f"compensation={way} max-error=9.0")
        errors[way] = report.changed[0].numbers["output_error"]
        assert errors[way] == pytest.approx(output_error(model, dense, data(dense), 1))
    assert errors["least-squares"] < 0.7 * errors["none"]
    name = "d2" if text is TOKENS else "a4"
    axis = -1 if text is TOKENS else 1
    means = []
    for side in (model, dense):
        session = open_session(tap(side, [name]), threads=1)
        found = np.concatenate([session.run(batch)[name] for batch in data(side)])
        means.append(np.moveaxis(found, axis, -1).reshape(-1, found.shape[axis]).mean(0))
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)


def test_what_costs_too_much_is_taken_back_with_the_reason() -> None:
    model = build(TOKENS)
    before = model.fingerprint()
    report = share(model, "pairs=5 max-error=0.00001")
    assert not report.changed
    assert model.fingerprint() == before
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert "more than max-error" in reasons["block2 with block1"]
    assert "more than max-error" in reasons["block3 with block2"]
    assert "no block of its form" in reasons["block1"]
    assert {"in", "up1", "out"} <= reasons.keys()


def test_runs_of_blocks_several_pairs_and_what_is_shared_already() -> None:
    model = build(TOKENS, {**ALIKE, "u3": "u1", "v3": "v1"}, noise=0.05)
    assert len(share(model, "max-error=9.0").changed) == 1
    assert not share(model, "max-error=9.0").changed  # the pair of the first run counts
    # The third finds no free block of its form.
    report = share(model, "pairs=4 max-error=9.0")
    assert not report.changed
    assert any("shares its weight already" in skip.reason for skip in report.skipped)
    wide = build(TOKENS, ALIKE)
    assert not share(wide, "span=2 max-error=9.0").changed  # two of three blocks overlap with the others


def test_bad_input() -> None:
    for options in ("pairs=0", "span=0", "max-error=0", "damping=11"):
        with pytest.raises(SpecError):
            Pipeline.parse(f"share-weights{{{options}}}")
    with pytest.raises(UsageError, match="calibration"):
        Pipeline.parse("share-weights").run(build(TOKENS), PassContext())
    with pytest.raises(UsageError, match="match"):
        share(build(TOKENS), "match=nothing")
    broken = build(TOKENS, ALIKE)
    (site,) = [site for site in broken.sites() if site.name == "up2"]
    site.replace(np.full(site.shape, np.nan))
    report = share(broken, "max-error=9.0")
    assert "NaN" in {skip.site: skip.reason for skip in report.skipped}["block2"]
