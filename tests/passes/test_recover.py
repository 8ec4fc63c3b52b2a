"""Recovery without gradients: the invariants of each method, what is kept, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session, tap
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.passes.recover.base import output_error
from sparsecc.pm import PassContext, Pipeline

PRUNE = "prune-magnitude{sparsity=0.6 min-elements=1 min-reduction=1}"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def mlp() -> Model:
    """A Gemm with beta, a MatMul with an Add behind it, one without, and two that share a bias."""
    return build(
        """g (float[B,24] x) => (float[B,20] y, float[B,20] z) {
            [one] h = Gemm<transB=1, beta=2.0>(x, w1, b1)
            a = Relu(h)
            [two] m = MatMul(a, w2)
            n = Add(b2, m)
            c = Relu(n)
            [three] p = MatMul(c, w3)
            d = Relu(p)
            [four] q = MatMul(d, w4)
            y = Add(q, shared)
            [five] r = MatMul(d, w5)
            z = Add(r, shared)
        }""",
        w1=0.3 * normal(32, 24, seed=1), b1=normal(32, seed=2), w2=0.3 * normal(32, 28, seed=3),
        b2=normal(1, 28, seed=4),
        w3=0.3 * normal(28, 28, seed=5), w4=0.3 * normal(28, 20, seed=6), w5=0.3 * normal(28, 20, seed=7),
        shared=normal(20, seed=8),
    )  # fmt: skip


def cnn(normalised: bool = True) -> Model:
    """A padded convolution, a grouped one and one behind a residual; BatchNormalization behind the first two."""
    body = """
        [first] h = Conv<pads=[1,1,1,1]>(x, w1)
        {norm1}
        a = Relu(n1)
        [second] m = Conv<pads=[1,1,1,1], group=2>(a, w2, b2)
        {norm2}
        s = Add(n2, a)
        [third] y = Conv(s, w3)"""
    norms = ("n1 = BatchNormalization(h, s1, o1, m1, v1)", "n2 = BatchNormalization(m, s2, o2, m2, v2)")
    plain = ("n1 = Identity(h)", "n2 = Identity(m)")
    text = body.format(norm1=(norms if normalised else plain)[0], norm2=(norms if normalised else plain)[1])
    arrays = {"w1": normal(8, 3, 3, 3, seed=1), "w2": 0.3 * normal(8, 4, 3, 3, seed=2), "b2": normal(8, seed=3),
              "w3": 0.3 * normal(6, 8, 1, 1, seed=4)}  # fmt: skip
    for number in (1, 2) if normalised else ():
        arrays |= {f"s{number}": 1 + 0.1 * normal(8, seed=5), f"o{number}": normal(8, seed=6),
                   f"m{number}": normal(8, seed=7), f"v{number}": 1 + normal(8, seed=8) ** 2}  # fmt: skip
    return build(f"g (float[B,3,9,9] x) => (float[B,6,9,9] y) {{ {text} }}", **arrays)


def samples(model: Model, count: int = 4) -> list[dict[str, np.ndarray]]:
    shape = (16, 24) if len(model.input_specs()[0].shape or ()) == 2 else (6, 3, 9, 9)
    return [{"x": 0.5 + np.abs(normal(*shape, seed=30 + number))} for number in range(count)]


def recovered(spec: str, make=mlp, prune: str = PRUNE):
    """Model after ``prune`` and ``spec``, the pruned one, the report, the calibration inputs."""
    model = make()
    batches = samples(model)
    calibration = Calibration.from_batches(batches, model, threads=1)
    pruned = model.copy()
    if prune:
        Pipeline.parse(prune).run(pruned)
    reports = Pipeline.parse(f"{prune},{spec}" if prune else spec).run(
        model, PassContext(calibration=calibration, threads=1)
    )
    return model, pruned, reports[-1], calibration


def tensor(model: Model, name: str, calibration: Calibration) -> np.ndarray:
    session = open_session(tap(model, [name]))
    return np.concatenate([session.run(batch)[name] for batch in calibration]).astype(np.float64)


def zeros(model: Model) -> dict[str, np.ndarray]:
    return {site.name: site.numpy() == 0 for site in model.sites()}


@pytest.mark.parametrize("scale", ["none", "least-squares", "variance"])
@pytest.mark.parametrize("make", [mlp, lambda: cnn(False)], ids=["mlp", "cnn"])
def test_bias_correction_makes_all_means_agree_and_keeps_zeros(make, scale):
    model, pruned, report, calibration = recovered(f"recover-bias{{scale={scale}}}", make)
    assert len(report.changed) == len(model.sites())
    names = ["h", "n", "p", "y", "z"] if make is mlp else ["h", "m", "y"]
    axes = (0,) if make is mlp else (0, 2, 3)
    for name in names:
        dense, found = tensor(make(), name, calibration), tensor(model, name, calibration)
        np.testing.assert_allclose(found.mean(axes), dense.mean(axes), rtol=1e-4, atol=1e-5)
        if scale == "variance":
            np.testing.assert_allclose(found.std(axes), dense.std(axes), rtol=0.02)
    for name, before in zeros(pruned).items():
        np.testing.assert_array_equal(zeros(model)[name], before)
    assert output_error(model, make(), calibration, 1) < output_error(pruned, make(), calibration, 1)


def test_the_gain_of_bias_correction_is_the_square_of_the_mean_error(monkeypatch):
    errors = iter([1.0, 0.0])  # what the outputs of the model make of it is another matter
    monkeypatch.setattr("sparsecc.passes.recover.base.output_error", lambda *args: next(errors))
    model, pruned, report, calibration = recovered("recover-bias{match=one}")
    dense, before, after = (tensor(item, "h", calibration) for item in (mlp(), pruned, model))
    gain = np.square(before - dense).sum() - np.square(after - dense).sum()
    (change,) = report.changed
    assert gain == pytest.approx(len(dense) * change.numbers["mean_error_before"] ** 2, rel=1e-4)
    energy = np.square(dense).sum()
    assert change.numbers["output_error_before"] == pytest.approx(
        np.square(before - dense).sum() / energy, rel=1e-4
    )
    assert change.numbers["output_error_after"] == pytest.approx(
        np.square(after - dense).sum() / energy, rel=1e-4
    )


@pytest.mark.parametrize("scale", ["none", "least-squares"])
def test_the_error_of_a_site_never_rises(scale):
    _, _, report, _ = recovered(f"recover-bias{{scale={scale}}}")
    for change in report.changed:
        assert change.numbers["output_error_after"] <= change.numbers["output_error_before"] + 1e-9


def test_sites_without_a_bias_are_left_alone_on_request():
    model, pruned, report, _ = recovered("recover-bias{add=false}")
    assert {skip.site for skip in report.skipped} == {"three"}
    assert [node.op_type for node in model.onnx.graph] == [node.op_type for node in pruned.onnx.graph]


def test_a_constant_that_two_sites_add_stays_for_the_other():
    _, _, report, _ = recovered("recover-bias{match=four}")
    assert [change.site for change in report.changed] == ["four"]
    _, _, report, _ = recovered("recover-bias{match=re:four|five}")
    assert {change.site for change in report.changed} == {"four", "five"}


@pytest.mark.parametrize("spec", ["recover-bias", "recover-bias{scale=variance}", "recover-bn"])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_a_dense_model_is_a_fixed_point(spec, make):
    model, _, report, _ = recovered(spec, make, prune="")
    assert model.fingerprint() == make().fingerprint()
    assert not report.changed
    assert "nothing to recover" in report.notes[0]


def test_statistics_of_unpruned_channels_do_not_change():
    """A reference that differs in one weight only: what lies before it is as it was, to rounding."""
    model, reference = cnn(), cnn()
    (site,) = model.sites("third")
    site.replace(0.5 * site.numpy())
    calibration = Calibration.from_batches(samples(model), model, threads=1)
    Pipeline.parse("recover-bn").run(
        model, PassContext(calibration=calibration, threads=1, reference=reference)
    )
    for name in ("m1", "v1", "m2", "v2"):
        before, after = (
            item.onnx.graph.initializers[name].const_value.numpy() for item in (reference, model)
        )
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        model.sites("third")[0].numpy(), reference.sites("third")[0].numpy(), rtol=1e-3
    )


@pytest.mark.parametrize("normalised", [True, False])
def test_channel_statistics_agree_after_bn_recovery(normalised):
    make = lambda: cnn(normalised)  # noqa: E731
    model, pruned, report, calibration = recovered("recover-bn", make)
    for name in ("n1", "n2", "y"):
        dense, found = tensor(make(), name, calibration), tensor(model, name, calibration)
        np.testing.assert_allclose(found.mean((0, 2, 3)), dense.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.std((0, 2, 3)), dense.std((0, 2, 3)), rtol=1e-2)
    assert output_error(model, make(), calibration, 1) < output_error(pruned, make(), calibration, 1)
    assert len(report.changed) == 3


def test_worse_outputs_are_taken_back(monkeypatch):
    errors = iter([0.1, 0.2])
    monkeypatch.setattr("sparsecc.passes.recover.base.output_error", lambda *args: next(errors))
    model, pruned, report, _ = recovered("recover-bias")
    assert model.fingerprint() == pruned.fingerprint()
    assert not report.changed
    assert "taken back" in report.notes[-1]


def test_errors_before_and_after_are_noted():
    model, pruned, report, calibration = recovered("recover-bias")
    before, after = (output_error(item, mlp(), calibration, 1) for item in (pruned, model))
    assert report.notes == [
        f"relative squared error of the outputs on the calibration inputs: {before:.4g} -> {after:.4g}"
    ]


def test_a_dense_model_given_as_reference_counts():
    dense, model = mlp(), mlp()
    Pipeline.parse(PRUNE).run(model)
    calibration = Calibration.from_batches(samples(model), model, threads=1)
    context = PassContext(calibration=calibration, threads=1, reference=dense)
    before = output_error(model, dense, calibration, 1)
    Pipeline.parse("recover-bias").run(model, context)
    assert output_error(model, dense, calibration, 1) < before


def test_another_graph_or_other_inputs_are_refused():
    model = mlp()
    Pipeline.parse(PRUNE).run(model)
    calibration = Calibration.from_batches(samples(model), model, threads=1)
    other = build(
        "g (float[B,24] x) => (float[B,20] y, float[B,20] z) { y = MatMul(x, w) z = MatMul(x, w) }",
        w=normal(24, 20),
    )
    (report,) = Pipeline.parse("recover-bias").run(
        model, PassContext(calibration=calibration, threads=1, reference=other)
    )
    assert not report.changed
    assert "compared one by one" in report.notes[0]
    with pytest.raises(UsageError, match="reads u, the model x"):
        Pipeline.parse("recover-bias").run(model, PassContext(calibration=calibration, reference=renamed()))


def renamed() -> Model:
    return build("g (float[B,24] u) => (float[B,20] y) { y = MatMul(u, w) }", w=normal(24, 20))


def test_recurrent_sites_are_skipped_with_the_reason():
    def make() -> Model:
        return build(
            "g (float[4,2,24] x) => (float[4,1,2,8] y) { [rnn] y = LSTM<hidden_size=8>(x, w, r, b) }",
            w=normal(1, 32, 24), r=normal(1, 32, 8), b=normal(1, 64),
        )  # fmt: skip

    model = make()
    batches = [{"x": normal(4, 2, 24)}]
    calibration = Calibration.from_batches(batches, model, threads=1)
    reports = Pipeline.parse(f"{PRUNE},recover-bias").run(
        model, PassContext(calibration=calibration, threads=1)
    )
    assert {skip.site for skip in reports[-1].skipped} == {"rnn.W", "rnn.R"}
    assert all("gates" in skip.reason for skip in reports[-1].skipped)


@pytest.mark.parametrize("correction", [0, 0.5, 1])
@pytest.mark.parametrize("make", [mlp, lambda: cnn(False)], ids=["mlp", "cnn"])
def test_least_squares_on_a_mask_lowers_the_error_and_keeps_zeros(make, correction):
    model, pruned, report, calibration = recovered(f"recover-ols{{correction={correction}}}", make)
    assert {change.site for change in report.changed} == {site.name for site in model.sites()}
    for name, before in zeros(pruned).items():
        np.testing.assert_array_equal(zeros(model)[name], before)
    for change in report.changed:
        assert change.numbers["output_error_after"] < change.numbers["output_error_before"]
    assert output_error(model, make(), calibration, 1) < output_error(pruned, make(), calibration, 1)


def test_the_gradient_on_the_support_is_zero_after_least_squares(monkeypatch):
    errors = iter([1.0, 0.0])  # what the outputs of the model make of it is another matter
    monkeypatch.setattr("sparsecc.passes.recover.base.output_error", lambda *args: next(errors))
    model, _, report, calibration = recovered("recover-ols{match=one correction=0}")
    (site,), (dense,) = model.sites("one"), mlp().sites("one")
    x = np.concatenate([batch["x"] for batch in calibration]).astype(np.float64)
    error = site.numpy().astype(np.float64) - dense.numpy()
    gram = x.T @ x
    gram += 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    gradient, scale = error @ gram, np.abs(dense.numpy().astype(np.float64) @ gram).max()
    assert np.abs(gradient[site.numpy() != 0]).max() < 1e-4 * scale
    assert report.changed


def test_least_squares_finds_nothing_where_the_weights_are_best():
    _, _, report, _ = recovered("recover-ols,recover-ols")
    second = {change.site: change.numbers for change in report.changed}
    assert all(
        numbers["output_error_after"] > 0.98 * numbers["output_error_before"] for numbers in second.values()
    )


def test_sites_without_zeros_are_left_to_others():
    _, _, report, _ = recovered("recover-ols", prune="prune-magnitude{sparsity=0.6 min-elements=1 match=two}")
    assert {change.site for change in report.changed} == {"two"}
    assert {skip.reason for skip in report.skipped} == {"it has no zeros"}


def residual() -> Model:
    """Two residual blocks of two products each, and a head."""
    return build(
        """g (float[B,24] x) => (float[B,12] y) {
            [up1] a = Gemm(x, w1, b1)
            c = Relu(a)
            [down1] d = MatMul(c, w2)
            e = Add(d, b2)
            s1 = Add(x, e)
            [up2] f = Gemm(s1, w3, b1)
            h = Relu(f)
            [down2] i = MatMul(h, w4)
            s2 = Add(i, s1)
            [head] y = MatMul(s2, w5)
        }""",
        w1=0.3 * normal(24, 32, seed=1), b1=normal(32, seed=2), w2=0.3 * normal(32, 24, seed=3), b2=normal(24, seed=4),
        w3=0.3 * normal(24, 32, seed=5), w4=0.3 * normal(32, 24, seed=6), w5=0.3 * normal(24, 12, seed=7),
    )  # fmt: skip


@pytest.mark.parametrize("options", ["", "{blend=0.5}", "{sweeps=3}"])
def test_alignment_lowers_the_error_and_keeps_zeros_and_nodes(options):
    model, pruned, report, calibration = recovered(f"recover-align{options}", residual)
    assert {change.site for change in report.changed} <= {"up1", "down1", "up2", "down2", "head"}
    assert {"down1", "down2"} <= {change.site for change in report.changed if "behind it" in change.detail}
    for name, before in zeros(pruned).items():
        np.testing.assert_array_equal(zeros(model)[name], before)
    for change in report.changed:
        assert change.numbers["output_error_after"] < change.numbers["output_error_before"]
    assert [node.op_type for node in model.onnx.graph] == [node.op_type for node in pruned.onnx.graph]
    assert output_error(model, residual(), calibration, 1) < output_error(pruned, residual(), calibration, 1)


def test_alignment_repairs_the_stream_better_than_least_squares_alone():
    aligned, _, _, calibration = recovered("recover-align{blend=1.0}", residual)
    fitted = recovered("recover-ols{correction=1.0}", residual)[0]
    errors = [output_error(model, residual(), calibration, 1) for model in (aligned, fitted)]
    assert errors[0] < errors[1]


def test_a_sweep_that_does_not_help_is_taken_back(monkeypatch):
    errors = iter([1.0, 0.5, 0.7])
    monkeypatch.setattr("sparsecc.passes.recover.align.output_error", lambda *args: next(errors))
    one, _, _, _ = recovered("recover-align{sweeps=3}", residual)
    errors = iter([1.0, 0.5])
    same, _, _, _ = recovered("recover-align", residual)
    assert one.fingerprint() == same.fingerprint()


def test_convolutions_are_not_aligned():
    _, _, report, _ = recovered("recover-align", lambda: cnn(False))
    assert not report.changed
    assert all("only products" in skip.reason for skip in report.skipped)


def test_what_was_recovered_is_not_restored():
    _, _, report, _ = recovered("recover-bias,restore-dense")
    assert not report.changed
    assert any("fitted the model around its zeros" in skip.reason for skip in report.skipped)


def test_a_bias_per_row_is_not_taken_for_one_per_output():
    text = "g (float[16,24] x) => (float[16,16] y) { [one] y = Gemm(x, w, c) }"
    weights = {"w": normal(24, 16, seed=1), "c": normal(16, 1, seed=2)}
    report = recovered("recover-bias", lambda: build(text, **weights))[2]
    assert [(skip.site, skip.reason) for skip in report.skipped] == [
        ("one", "its bias is no constant vector")
    ]


def test_inputs_that_are_zero_are_not_called_infinite():
    def silent() -> Model:
        text = "g (float[B,24] x) => (float[B,8] y) { [one] h = Neg(x) r = Relu(h) [two] y = MatMul(r, w) }"
        return build(text, w=normal(24, 8, seed=1))

    report = recovered("recover-align", silent)[2]
    assert [skip.reason for skip in report.skipped] == ["its input is zero on all of the calibration data"]


def test_biases_that_removal_added_do_not_shift_the_nodes_of_the_dense_model():
    text = """g (float[B,24] x) => (float[B,6] y) {
        [one] h = MatMul(x, w1) a = Relu(h) [two] m = MatMul(a, w2) s = Softmax(m) [three] y = MatMul(s, w3) }"""
    arrays = {"w1": normal(24, 32), "w2": 0.3 * normal(32, 8, seed=1), "w3": normal(8, 6, seed=2)}
    model = build(text, **arrays)
    calibration = Calibration.from_batches(samples(model), model, threads=1)
    spec = "prune-structured{flops-ratio=0.6 multiple=1},recover-align"
    report = Pipeline.parse(spec).run(model, PassContext(calibration=calibration, threads=1))[-1]
    assert any("on the calibration inputs" in note for note in report.notes)
