"""The pruning passes that fit weights: patterns, statistics, what they gain, what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.mapped import array_of, is_mapped
from sparsecc.passes.prune.wanda_ols import PruneWandaOls
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import Pattern, density, matches

RNG = np.random.default_rng(5)
METHODS = ["prune-wanda-ols", "prune-sparsegpt", "prune-alps", "prune-obc"]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def deep(layers: int = 3, width: int = 48, biased: bool = False) -> Model:
    steps = ""
    for i in range(layers):
        product = f"[l{i}] {'p' if biased else 'h'}{i} = MatMul({'x' if i == 0 else f'a{i - 1}'}, w{i}) "
        steps += product + (f"h{i} = Add(b{i}, p{i}) " if biased else "") + f"a{i} = Relu(h{i}) "
    weights = {f"w{i}": normal(width, width) / np.float32(np.sqrt(width)) for i in range(layers)}
    weights |= {f"b{i}": normal(width) for i in range(layers)} if biased else {}
    return build(
        f"g (float[B,{width}] x) => (float[B,{width}] y) {{ {steps} y = Identity(a{layers - 1}) }}", **weights
    )


def data(width: int = 48, rows: int = 400) -> np.ndarray:
    return normal(rows, width) @ normal(width, width) * np.float32(1 / np.sqrt(width))


def pruned(model: Model, x: np.ndarray, spec: str, **context: Any) -> tuple[Model, list]:
    copy = model.copy()
    source = Calibration.from_batches([{"x": part} for part in np.array_split(x, 2)], copy)
    return copy, Pipeline.parse(spec).run(copy, PassContext(calibration=source, **context))


def distance(model: Model, other: Model, x: np.ndarray) -> float:
    here, there = (open_session(side).run({"x": x})["y"] for side in (model, other))
    return float(np.linalg.norm(here - there) / np.linalg.norm(here))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "pattern", "kept"),
    [
        ("sparsity=0.75", "unstructured", 0.25),
        ("sparsity=0.6 scope=layer", "unstructured", 0.4),
        ("pattern=2:4", "2:4", 0.5),
        ("pattern=1:4", "1:4", 0.25),
        ("pattern=8x1 sparsity=0.5", "8x1", 0.5),
        ("pattern=4x4 sparsity=0.5 scope=layer", "4x4", 0.5),
        ('sparsity=0.75 caps="2:4,3:8"', "2:4", 0.25),
    ],
)
def test_patterns_have_exact_counts_and_a_second_run_changes_nothing(method, options, pattern, kept):
    model, x = deep(), data()
    spec = f"{method}{{{options}}}"
    after, (report,) = pruned(model, x, spec)
    assert sorted(change.site for change in report.changed) == ["l0", "l1", "l2"]
    for site in after.sites():
        weight = site.numpy()
        assert weight.dtype == np.float32
        assert density(weight) == pytest.approx(kept, abs=1 / weight.size)
        assert matches(weight, Pattern.parse(pattern))
    for change in report.changed:
        assert 0 < change.numbers["output_error"] < 1
        assert change.numbers["density_after"] == density(after.sites(change.site)[0].numpy())
    again, (second,) = pruned(after, x, spec)
    assert not second.changed
    assert again.fingerprint() == after.fingerprint()


def test_caps_bound_every_group_of_a_row():
    after, _ = pruned(deep(), data(), 'prune-wanda-ols{sparsity=0.5 caps="3:4,10:16"}')
    for site in after.sites():
        kept = site.numpy() != 0
        assert (kept.reshape(48, -1, 4).sum(2) <= 3).all()
        assert (kept.reshape(48, -1, 16).sum(2) <= 10).all()
        assert (kept.sum(1) == 24).all()


def test_caps_go_with_unstructured_masks_only():
    with pytest.raises(SpecError, match="caps go with pattern unstructured"):
        Pipeline.parse("prune-wanda-ols{pattern=2:4 caps=3:8}")
    with pytest.raises(SpecError, match="unknown cap"):
        Pipeline.parse("prune-wanda-ols{caps=8:3}")


@pytest.mark.parametrize("method", METHODS)
def test_fitting_beats_masking_and_the_front_counts(method):
    model, x = deep(4), data(rows=1200)
    plain = distance(model, pruned(model, x, "prune-wanda{sparsity=0.6}")[0], x)
    apart = distance(model, pruned(model, x, f"{method}{{sparsity=0.6 sequential=false}}")[0], x)
    front = distance(model, pruned(model, x, f"{method}{{sparsity=0.6 correction=1}}")[0], x)
    assert front < apart < plain


def test_the_front_is_measured_as_it_is_after_pruning():
    """A weight that only passes on what the first site gives makes up for what that lost."""
    model, x = deep(2), data()
    after, (report,) = pruned(model, x, "prune-wanda-ols{sparsity=0.5 correction=1 damping=1e-6}")
    assert [change.site for change in report.changed] == ["l0", "l1"]
    hidden, wanted = (np.maximum(x @ side.sites("l0")[0].numpy().T, 0) for side in (after, model))
    target = wanted @ model.sites("l1")[0].numpy().T
    weight = after.sites("l1")[0].numpy()
    for row, goal in zip(weight, target.T, strict=True):
        support = row != 0
        best = np.linalg.lstsq(hidden[:, support].astype(float), goal.astype(float), rcond=None)[0]
        np.testing.assert_allclose(row[support], best, rtol=0.05, atol=2e-3)


def bias_of(model: Model, name: str) -> np.ndarray:
    return next(v.const_value.numpy() for v in model.onnx.graph.initializers.values() if v.name == name)


@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_bias_makes_the_means_agree_and_the_error_smaller(method):
    model, x = deep(1, biased=True), data(rows=1200) + 2 * normal(48)
    errors = {}
    for bias in ("true", "false"):
        spec = f"{method}{{sparsity=0.6 bias={bias} damping=1e-4}}"
        after, (report,) = pruned(model, x, spec)
        here, there = (x @ side.sites("l0")[0].numpy().T + bias_of(side, "b0") for side in (after, model))
        errors[bias] = float(np.square(here - there).sum())
        moved = not np.array_equal(bias_of(after, "b0"), bias_of(model, "b0"))
        assert moved == (bias == "true")
        if moved:
            np.testing.assert_allclose(here.mean(0), there.mean(0), atol=1e-4)
        assert report.changed[0].numbers["irreducible_error"] == pytest.approx(0, abs=1e-9)
    assert errors["true"] < errors["false"]


def test_a_fitted_bias_is_the_affine_least_squares_on_the_mask():
    model, x = deep(1, biased=True), data() + 3 * normal(48)
    after, _ = pruned(model, x, "prune-wanda-ols{sparsity=0.5 damping=1e-9}")
    goal = x @ model.sites("l0")[0].numpy().T + bias_of(model, "b0")
    found = after.sites("l0")[0].numpy()
    for row, bias, wanted in zip(found, bias_of(after, "b0"), goal.T, strict=True):
        support = row != 0
        inputs = np.hstack([x[:, support], np.ones((len(x), 1))]).astype(float)
        best = np.linalg.lstsq(inputs, wanted.astype(float), rcond=None)[0]
        np.testing.assert_allclose(np.append(row[support], bias), best, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize(
    "product",
    [
        "[p] y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b)",
        "[p] h = MatMul(x, v) y = Add(h, b)",
        "u = Unsqueeze(x, at) [p] h = Conv<group=2>(u, k, b) y = Squeeze(h, at)",
    ],
)
def test_biases_of_every_kind_of_product_are_fitted(product):
    model = build(
        f"g (float[B,64] x) => (float[B,32] y) {{ {product} }}",
        w=normal(32, 64),
        v=normal(64, 32),
        k=normal(32, 32, 1),
        b=normal(32),
        at=np.array([2]),
    )
    x = normal(300, 64) + 2 * normal(64)
    after, (report,) = pruned(model, x, "prune-wanda-ols{sparsity=0.5}")
    assert [change.site for change in report.changed] == ["p"]
    here, there = (open_session(side).run({"x": x})["y"] for side in (after, model))
    np.testing.assert_allclose(here.mean(0), there.mean(0), atol=1e-3 * np.abs(there).max())


def test_a_bias_of_two_sites_is_fitted_for_each():
    model = build(
        "g (float[B,48] x) => (float[B,48] y) { [l] p = Gemm(x, v, b) [r] q = Gemm(x, w, b) y = Mul(p, q) }",
        v=normal(48, 48),
        w=normal(48, 48),
        b=normal(48),
    )
    x = data() + 1
    after, _ = pruned(model, x, "prune-wanda-ols{sparsity=0.5}")
    assert len({node.inputs[2].name for node in after.onnx.graph if node.op_type == "Gemm"}) == 2
    for site in after.sites():
        twin = model.sites(site.name)[0]
        own = site.node.inputs[2].const_value.numpy()
        lost = x.mean(0) @ (twin.numpy() - site.numpy()).T
        np.testing.assert_allclose(own, bias_of(model, "b") + lost, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["prune-wanda-ols{sparsity=0.5 min-elements=64CORRECTION}", "recover-ols{CORRECTION}"]
)
def test_by_default_convolutions_make_up_for_all_and_products_for_half(name):
    model = build(
        """g (float[B,32] x) => (float[B,32] y) {
            u = Unsqueeze(x, at) [a] p = Conv(u, v) [b] q = Conv(p, w) r = Squeeze(q, at) y = MatMul(r, m)
        }""",
        v=normal(32, 32, 1),
        w=normal(32, 32, 1),
        m=normal(32, 32),
        at=np.array([2]),
    )
    x = data(32)
    masks = "" if name.startswith("prune") else "prune-magnitude{sparsity=0.5},"
    found = {
        share: pruned(model, x, masks + name.replace("CORRECTION", share))[0]
        for share in ("", " correction=1", " correction=0.5")
    }
    whole, half = (
        {site.name: site.numpy() for site in found[share].sites()}
        for share in (" correction=1", " correction=0.5")
    )
    by_default = {site.name: site.numpy() for site in found[""].sites()}
    np.testing.assert_array_equal(by_default["b"], whole["b"])
    assert not np.array_equal(by_default["b"], half["b"])
    product = next(site.name for site in model.sites() if site.op == "MatMul")
    assert not np.array_equal(by_default[product], whole[product])


def test_what_no_weights_can_give_back_is_reported():
    model, x = deep(2), data()
    after, (report,) = pruned(model, x, "prune-wanda-ols{sparsity=0.75 damping=1e-9}")
    hidden, wanted = (np.maximum(x @ side.sites("l0")[0].numpy().T, 0) for side in (after, model))
    goal = wanted @ model.sites("l1")[0].numpy().T
    left = goal - hidden @ np.linalg.lstsq(hidden.astype(float), goal.astype(float), rcond=None)[0]
    found = {change.site: change.numbers["irreducible_error"] for change in report.changed}
    assert found["l0"] == pytest.approx(0, abs=1e-9)
    assert found["l1"] == pytest.approx(np.square(left).sum() / np.square(goal).sum(), rel=1e-3)
    _, (report,) = pruned(model, x, "prune-wanda-ols{sparsity=0.75 sequential=false}")
    assert "irreducible_error" not in report.changed[1].numbers


def test_grouped_and_kxk_convolutions():
    model = build(
        """g (float[B,16,9,9] x) => (float[B,16,9,9] y) {
            [c] h = Conv<pads=[1,1,1,1]>(x, w)
            [g] y = Conv<pads=[1,1,1,1], group=2>(h, v)
        }""",
        w=normal(16, 16, 3, 3),
        v=normal(16, 8, 3, 3),
    )
    x = normal(6, 16, 9, 9)
    for options in ("pattern=2:4", "pattern=8x4 sparsity=0.5 by-channel=true"):
        after, (report,) = pruned(model, x, f"prune-wanda-ols{{{options}}}")
        assert {change.site for change in report.changed} == {"c", "g"}
        plain, _ = pruned(model, x, f"prune-wanda{{{options}}}")
        assert distance(model, after, x) < distance(model, plain, x)
        for site in after.sites():
            assert density(site.numpy()) == 0.5
    by_channel = np.moveaxis(after.sites("c")[0].numpy().reshape(16, 16, 9), 1, 2).reshape(16, -1)
    assert matches(by_channel, Pattern.parse("8x4"))


def test_without_calibration_and_with_bad_options():
    model = deep()
    with pytest.raises(UsageError, match="--calibration-data"):
        Pipeline.parse("prune-alps").run(model, PassContext())
    for spec in (
        "prune-alps{damping=0}",
        "prune-alps{correction=2}",
        "prune-alps{steps=0}",
        "prune-sparsegpt{block=0}",
    ):
        with pytest.raises(SpecError):
            Pipeline.parse(spec)


def test_sites_that_are_not_reached_or_not_finite_have_reasons():
    model = build(
        """g (bool t, float[B,48] x) => (float[B,48] y) {
            y = If(t) <
                then_branch = yes () => (float[B,48] p) { [in] p = MatMul(x, w) },
                else_branch = no () => (float[B,48] q) { [out] q = MatMul(x, v) }
            >
        }""",
        w=normal(48, 48),
        v=normal(48, 48),
    )
    source = Calibration.from_batches([{"t": np.array(True), "x": data()}], model)
    (report,) = Pipeline.parse("prune-wanda-ols").run(model, PassContext(calibration=source))
    assert [change.site for change in report.changed] == ["in"]
    assert {skip.site: skip.reason for skip in report.skipped} == {
        "out": "not measured: its input is never computed"
    }
    model = deep(1)
    _, (report,) = pruned(model, np.full((3, 48), np.inf, np.float32), "prune-wanda-ols")
    assert report.skipped[0].reason == "its input is NaN or infinite on the calibration data"


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    model, x = deep(biased=True), data()
    spec = f"prune-wanda-ols{{sparsity=0.5 resume={tmp_path / 'steps'}}}"
    expected, (whole,) = pruned(model, x, "prune-wanda-ols{sparsity=0.5}")
    solve = PruneWandaOls._solve

    def dies(self, item, *rest):
        if item.site.name == "l2":
            raise UsageError("the power fails")
        return solve(self, item, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PruneWandaOls, "_solve", dies)
        with pytest.raises(UsageError, match="power"):
            pruned(model, x, spec)
    asked = []
    monkeypatch.setattr(
        PruneWandaOls,
        "_solve",
        lambda self, item, *rest: asked.append(item.site.name) or solve(self, item, *rest),
    )
    after, (report,) = pruned(model, x, spec)
    assert asked == ["l2"]
    assert [change.site for change in report.changed] == ["l0", "l1", "l2"]
    assert after.fingerprint() == expected.fingerprint()
    assert [change.numbers for change in report.changed] == [change.numbers for change in whole.changed]
    pruned(model, x, spec.replace("0.5", "0.6"))  # other options: nothing fits
    pruned(model, x * 2, spec)  # other data
    for file in (tmp_path / "steps").iterdir():  # damaged files
        file.write_bytes(file.read_bytes()[:100])
    after, _ = pruned(model, x, spec)
    assert after.fingerprint() == expected.fingerprint()
    assert asked == ["l2", *["l0", "l1", "l2"] * 3]
    other = model.copy()  # the same weights read something else
    for node in other.onnx.graph:
        node.op_type = node.op_type.replace("Relu", "Tanh")
    after, _ = pruned(other, x, spec)
    assert after.fingerprint() == pruned(other, x, "prune-wanda-ols{sparsity=0.5}")[0].fingerprint()
    kept = np.zeros((48, 48), bool)
    kept[:, :2] = True  # the same model, with weights that must stay
    assert pruned(model, x, spec, protected={"l1": kept})[0].sites()[1].numpy()[:, :2].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", ["sparsity=0.5", "pattern=2:4", "pattern=8x1 sparsity=0.5"])
def test_rows_that_are_solved_in_parts_are_what_they_were(method, options, monkeypatch):
    """A layer with many outputs is cut where no choice spans two parts."""
    model, x = deep(layers=1), data()
    whole, _ = pruned(model, x, f"{method}{{{options}}}")
    sizes = []
    problems = PruneWandaOls.problems

    def counted(self, *arguments, **options):
        for problem in problems(self, *arguments, **options):
            sizes.append(len(problem.target))
            yield problem

    monkeypatch.setattr("sparsecc.passes.prune.gram_pass._ELEMENTS", 48 * 20)
    monkeypatch.setattr("sparsecc.passes.prune.gram_pass.WalkPass.problems", counted)
    parts, _ = pruned(model, x, f"{method}{{{options}}}")
    assert sizes == ([16, 16, 16] if "8x1" in options else [20, 20, 8])
    (one,), (other,) = whole.sites(), parts.sites()
    if method == "prune-alps":  # its penalty grows by what changes in all rows of a problem
        assert density(other.numpy()) == density(one.numpy())
    else:
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-3, atol=1e-5)
    sizes.clear()
    pruned(model, x, f"{method}{{sparsity=0.5 scope=layer}}")
    assert sizes == [48]


def test_sites_solved_side_by_side_give_the_same_bits():
    model = build(
        """g (float[B,32] x) => (float[B,32] y) {
            [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv) m = Mul(q, k) y = Add(m, v)
        }""",
        wq=normal(32, 32), wk=normal(32, 32), wv=normal(32, 32),
    )  # fmt: skip
    x = data(32)
    found = {pruned(model, x, "prune-sparsegpt", threads=threads)[0].fingerprint() for threads in (1, 2, 5)}
    assert len(found) == 1


@pytest.mark.parametrize("method", ["prune-magnitude", "prune-wanda", "prune-wanda-ols"])
def test_weights_in_a_file_stay_out_of_memory(method, tmp_path):
    """The same result as in memory, saved over the file it came from."""
    inline, x = deep(layers=2), data()
    inline.save(tmp_path / "m.onnx", external_data=True)
    expected, _ = pruned(inline, x, method)
    found, _ = pruned(Model.load(tmp_path / "m.onnx"), x, method)
    for site in found.sites():
        assert is_mapped(array_of(found.onnx.graph.initializers[site.weight_name].const_value))
    assert found.fingerprint() == expected.fingerprint()
    found.save(tmp_path / "m.onnx")
    assert Model.load(tmp_path / "m.onnx").fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(("rows", "told"), [(40, True), (48, False)])
def test_fewer_rows_than_inputs_are_told(rows, told):
    model = deep()
    changed, reports = pruned(model, data(rows=rows), "prune-wanda-ols{sparsity=0.5}")
    notes = [note for report in reports for note in report.notes]
    assert (
        any("3 sites are fitted to fewer rows" in note and "40 rows, 48 inputs" in note for note in notes)
        == told
    )
    assert density(changed.sites()[0].numpy()) == 0.5
