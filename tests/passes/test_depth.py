"""Residual blocks are found exactly, leave whole, and what stands in front makes up for them or stays as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc import verify
from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.recover.base import output_error
from sparsecc.passes.structure.blocks import find_blocks, runs
from sparsecc.passes.structure.influence import distance
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault, signature

#: Pre-norm: three blocks on a plain stream.
PRE = """g (float[B,T,16] x) => (float[B,T,16] y) {
    [in] e = MatMul(x, w0) s0 = Add(e, b0)
    n1 = LayerNormalization<axis=-1>(s0, g1, z1) [up1] h1 = MatMul(n1, u1) r1 = Relu(h1)
    [down1] d1 = MatMul(r1, v1) [block1] s1 = Add(s0, d1)
    n2 = LayerNormalization<axis=-1>(s1, g2, z2) [up2] h2 = MatMul(n2, u2) r2 = Relu(h2)
    [down2] d2 = MatMul(r2, v2) [block2] s2 = Add(d2, s1)
    n3 = LayerNormalization<axis=-1>(s2, g3, z3) [up3] h3 = MatMul(n3, u3) r3 = Relu(h3)
    [down3] d3 = MatMul(r3, v3) [block3] s3 = Add(s2, d3)
    [out] y = MatMul(s3, w4) }"""
#: Post-norm: the stream is behind the normalisation; the last block ends in the output.
POST = """g (float[B,T,16] x) => (float[B,T,16] y) {
    [in] e = MatMul(x, w0) s0 = LayerNormalization<axis=-1>(e, g0, z0)
    [up1] h1 = MatMul(s0, u1) r1 = Relu(h1) [down1] d1 = MatMul(r1, v1)
    [block1] a1 = Add(d1, s0) s1 = LayerNormalization<axis=-1>(a1, g1, z1)
    [up2] h2 = MatMul(s1, u2) r2 = Relu(h2) [down2] d2 = MatMul(r2, v2) c2 = Add(d2, b0)
    [block2] a2 = Add(c2, s1) s2 = LayerNormalization<axis=-1>(a2, g2, z2)
    [up3] h3 = MatMul(s2, u3) r3 = Relu(h3) [down3] d3 = MatMul(r3, v3)
    [block3] a3 = Add(d3, s2) y = LayerNormalization<axis=-1>(a3, g3, z3) }"""
#: Two basic blocks and one whose shortcut is a convolution.
CNN = """g (float[B,3,8,8] x) => (float[B,5] y) {
    [c0] a0 = Conv<pads=[1,1,1,1]>(x, k0) s0 = Relu(a0)
    [c1] a1 = Conv<pads=[1,1,1,1]>(s0, k1, q1) r1 = Relu(a1) [c2] a2 = Conv<pads=[1,1,1,1]>(r1, k2, q2)
    [block1] t1 = Add(a2, s0) s1 = Relu(t1)
    [c3] a3 = Conv<pads=[1,1,1,1]>(s1, k3, q3) r3 = Relu(a3) [c4] a4 = Conv<pads=[1,1,1,1]>(r3, k4)
    [block2] t2 = Add(s1, a4) s2 = Relu(t2)
    [c5] a5 = Conv<pads=[1,1,1,1]>(s2, k5) [c6] a6 = Conv(s2, k6) [widened] t3 = Add(a5, a6) s3 = Relu(t3)
    p = GlobalAveragePool(s3) f = Flatten(p) [fc] y = Gemm(f, w) }"""
TEXTS = {"pre": PRE, "post": POST, "cnn": CNN}


def build(text: str, scale: dict[str, float] | None = None) -> Model:
    """The model with random weights; those that ``scale`` names are multiplied."""
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    shapes = {
        "w": (8, 5),
        "w0": (16, 16),
        "w4": (16, 16),
        "b0": (16,),
        "k0": (8, 3, 3, 3),
        "k6": (8, 8, 1, 1),
    }
    made = {name for node in proto.graph.node for name in node.output} | {"x", "m"}
    for name in dict.fromkeys(name for node in proto.graph.node for name in node.input):
        if name in made:
            continue
        shape = shapes.get(name) or {
            "u": (16, 32), "v": (32, 16), "g": (16,), "z": (16,), "k": (8, 8, 3, 3), "q": (8,)
        }[name[0]]  # fmt: skip
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        array = array * (scale or {}).get(name, 1.0)
        array = 1 + 0.1 * array if name[0] == "g" else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def data(model: Model, batches: int = 4) -> Calibration:
    shape = (6, 3, 8, 8) if model.input_specs()[0].shape[1] == 3 else (6, 7, 16)
    arrays = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(batches)]
    return Calibration.from_batches([{"x": np.cumsum(a, -1) / 2} for a in arrays], model, threads=1)


def cut(model: Model, options: str):
    context = PassContext(calibration=data(model), threads=1)
    (report,) = Pipeline.parse(f"prune-depth{{{options}}}").run(model, context)
    assert graph_fault(model) is None
    return report


def outputs(model: Model, batch: int = 2) -> np.ndarray:
    (spec,) = model.input_specs()
    rest = (3, 8, 8) if spec.shape[1] == 3 else (4, 16)
    x = np.random.default_rng(9).standard_normal((batch, *rest)).astype(np.float32)
    return next(iter(verify.session(model, threads=1).run({"x": x}).values()))


def test_blocks_are_found_exactly() -> None:
    for text, joins in ((PRE, []), (POST, []), (CNN, ["widened"])):
        model = build(text)
        before = model.fingerprint()
        blocks, others = find_blocks(model)
        names = ["block1", "block2"] if text is CNN else ["block1", "block2", "block3"]
        assert [block.name for block in blocks] == names
        assert all(block.reason is None for block in blocks)
        assert [name for name, _ in others] == joins
        streams = [(block.start.name, block.end.name) for block in blocks]
        assert streams == [("s0", "s1"), ("s1", "s2"), ("s2", "y" if text is POST else "s3")][: len(names)]
        pairs = runs(model, blocks, 2)
        assert (pairs[0].start.name, pairs[0].end.name) == ("s0", "s2")
        assert len(pairs) == len(blocks) - 1
        assert model.fingerprint() == before


@pytest.mark.parametrize("name", ["pre", "cnn"])
def test_a_block_that_does_nothing_leaves_first_and_nothing_changes(name: str) -> None:
    idle = {"pre": {"v2": 0.0}, "cnn": {"k4": 0.0}}[name]
    model = build(TEXTS[name], idle)
    reference = model.copy()
    report = cut(model, "blocks=1")
    assert [change.site for change in report.changed] == ["block2"]
    assert report.changed[0].numbers["score"] == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(outputs(model), outputs(reference), rtol=1e-5, atol=1e-5)
    gone = {"pre": {"up2", "down2"}, "cnn": {"c3", "c4"}}[name]
    left = {site.name for site in model.sites()}
    assert left == {site.name for site in reference.sites()} - gone


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("count", [1, 2])
def test_exactly_so_many_leave_and_compensation_never_costs(name: str, count: int) -> None:
    reference = build(TEXTS[name])
    errors = {}
    for way in ("none", "least-squares"):
        model = build(TEXTS[name])
        report = cut(model, f"blocks={count} compensation={way}")
        assert len(report.changed) == count
        assert len(find_blocks(model)[0]) == len(find_blocks(reference)[0]) - count
        assert signature(model) == signature(reference)
        assert model.nbytes < reference.nbytes
        for change in report.changed:
            assert change.numbers["output_error"] <= change.numbers["output_error_uncompensated"]
        errors[way] = output_error(model, reference, data(model), 1)
        assert errors[way] == pytest.approx(report.changed[-1].numbers["output_error"], rel=1e-3)
        for batch in (1, 5):
            assert outputs(model, batch).shape == outputs(reference, batch).shape
    assert errors["least-squares"] < 0.9 * errors["none"]


def test_a_linear_block_is_made_up_for_entirely() -> None:
    """Without an activation the layer in front can do all that the block did."""
    text = PRE.replace("n2 = LayerNormalization<axis=-1>(s1, g2, z2) ", "").replace("MatMul(n2", "MatMul(s1")
    text = text.replace("r2 = Relu(h2)", "r2 = Identity(h2)")
    text = text.replace(
        "n1 = LayerNormalization<axis=-1>(s0, g1, z1) [up1] h1 = MatMul(n1", "[up1] h1 = MatMul(x"
    )
    model = build(text.replace("Add(s0, d1)", "Add(d1, b0)"))
    reference = model.copy()
    report = cut(model, "match=block2 damping=0.0000001")
    assert report.changed[0].numbers["output_error"] < 1e-6
    np.testing.assert_allclose(outputs(model), outputs(reference), rtol=0.01, atol=0.01)


def test_a_second_run_removes_no_more_and_more_can_be_asked_for() -> None:
    model = build(PRE)
    cut(model, "blocks=1")
    stable = model.fingerprint()
    assert not cut(model, "blocks=1").changed
    assert model.fingerprint() == stable
    assert len(cut(model, "blocks=2").changed) == 1


def test_the_share_of_multiplications_is_reached() -> None:
    model = build(PRE)
    report = cut(model, "flops-ratio=0.5")
    assert len(report.changed) == 2  # a block is 4 of 14 parts
    assert any("42.9 %" in note for note in report.notes)
    assert not cut(model, "flops-ratio=0.5").changed
    report = cut(model, "flops-ratio=0.01")
    assert any("no more blocks" in note for note in report.notes)


def test_spans_leave_whole() -> None:
    model = build(POST)
    report = cut(model, "span=2")
    assert len(report.changed) == 1
    assert " to " in report.changed[0].site
    assert len(find_blocks(model)[0]) == 1


def test_tensors_inside_that_others_need_keep_a_block() -> None:
    model = build(PRE.replace("(float[B,T,16] y)", "(float[B,T,16] y, float[B,T,32] r2)"))
    reference = model.copy()
    report = cut(model, "blocks=3")
    assert {change.site for change in report.changed} == {"block1", "block3"}
    assert "'r2' inside it is an output" in next(s.reason for s in report.skipped if s.site == "block2")
    assert signature(model) == signature(reference)
    text = PRE.replace(
        "[up3] h3 = MatMul(n3, u3) r3 = Relu(h3)", "[up3] h3 = MatMul(n3, u3) k3 = Relu(h3) r3 = Add(k3, r1)"
    )
    (reason,) = [block.reason for block in find_blocks(build(text))[0] if block.name == "block1"]
    assert reason is not None
    assert "read by" in reason


def test_a_state_that_is_an_output_is_not_fitted() -> None:
    model = build(PRE.replace("(float[B,T,16] y)", "(float[B,T,16] y, float[B,T,16] s1)"))
    reference = model.copy()
    report = cut(model, "match=block2")
    assert len(report.changed) == 1
    assert any("is an output of the model" in note for note in report.notes)
    x = {"x": np.ones((1, 2, 16), np.float32)}
    ours, theirs = (verify.session(item, threads=1).run(x)["s1"] for item in (model, reference))
    np.testing.assert_array_equal(ours, theirs)


def test_a_shared_weight_in_front_is_not_fitted() -> None:
    text = PRE.replace("d3 = MatMul(r3, v3)", "d3 = MatMul(r3, v1)")
    model = build(text)
    kept = next(site for site in model.sites() if site.name == "down1").numpy().copy()
    report = cut(model, "match=block2")
    assert len(report.changed) == 1
    assert any("shared by several nodes" in note for note in report.notes)
    after = next(site for site in model.sites() if site.name == "down1").numpy()
    np.testing.assert_array_equal(after, kept)


def test_a_weight_in_front_that_an_earlier_layer_shares_is_not_fitted() -> None:
    model = build(PRE.replace("d2 = MatMul(r2, v2)", "d2 = MatMul(r2, v1)"))
    report = cut(model, "match=block3")
    assert any("shared by several nodes" in note for note in report.notes)


def test_a_state_that_a_body_reads_is_replaced_there_too() -> None:
    text = PRE.replace("float[B,T,16] x)", "float[B,T,16] x, bool m)").replace(
        "[out] y = MatMul(s3, w4)",
        """t = If(m) <then_branch = a () => (float[B,T,16] p) { p = Relu(s3) },
                      else_branch = b () => (float[B,T,16] q) { q = Abs(s3) }> [out] y = MatMul(t, w4)""",
    )
    model = build(text)
    (spec, _) = model.input_specs()
    x = np.random.default_rng(1).standard_normal((4, 7, 16)).astype(np.float32)
    batches = [{spec.name: x, "m": np.array(flag)} for flag in (True, False)]
    context = PassContext(calibration=Calibration.from_batches(batches, model, threads=1), threads=1)
    dense = model.copy()
    reports = Pipeline.parse("prune-depth{match=block3},recover-ols").run(model, context)
    assert [change.site for change in reports[0].changed] == ["block3"]
    assert not any("cannot be compared" in note for note in reports[1].notes)
    numbers = reports[0].changed[0].numbers
    after = output_error(model, dense, context.calibration, 1)
    assert after <= numbers["output_error"] <= numbers["output_error_uncompensated"]


def test_shared_weights_of_a_block_stay_for_the_others() -> None:
    model = build(PRE.replace("MatMul(n3, u3)", "MatMul(n3, u2)"))
    cut(model, "match=block2")
    assert "u2" in model.onnx.graph.initializers


def test_a_state_that_may_grow_in_the_sum_keeps_its_block() -> None:
    text = PRE.replace("(float[B,T,16] x)", "(float[1,T,16] x, float[B,T,32] m)")
    text = text.replace(
        "[up1] h1 = MatMul(n1, u1) r1 = Relu(h1)", "[up1] h1 = MatMul(n1, u1) r1 = Add(h1, m)"
    )
    (reason,) = [block.reason for block in find_blocks(build(text))[0] if block.name == "block1"]
    assert reason is not None
    assert "shape" in reason


def test_distances() -> None:
    a = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(distance(a, b, "influence"), [0, 1, 0, 1])
    np.testing.assert_allclose(distance(a, b, "angular"), [0, 0.5, 0, 0.5])


def test_refusals() -> None:
    model = build(CNN)
    with pytest.raises(UsageError, match="calibration"):
        Pipeline.parse("prune-depth").run(model, PassContext())
    with pytest.raises(UsageError, match="matches none"):
        cut(model, "match=nothing")
    report = cut(model, "blocks=2")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert "no identity" in reasons["widened"]
    assert reasons["fc"] == "it is in no residual block"


@pytest.mark.parametrize(
    "options", ["blocks=0", "span=0", "flops-ratio=1", "blocks=1 flops-ratio=0.5", "damping=0"]
)
def test_options_that_mean_nothing_are_refused(options: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(f"prune-depth{{{options}}}")
