"""An N:M core between block-diagonal factors: exact steps, what they never do, and the graph that comes of it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.hybrid.armor_fit import (
    Wrapped,
    core_step,
    fit_diagonal,
    fit_full,
    inner_step,
    outer_step,
    plain,
)
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.sparse import Pattern, keep_mask, matches

RNG = np.random.default_rng(21)
SHAPES = [((8, 16), 4), ((16, 8), 8), ((12, 12), 4), ((8, 24), 8)]


def problem(shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal((60, shape[1])) @ rng.standard_normal((shape[1],) * 2)
    x *= np.exp(rng.standard_normal(shape[1]))
    return rng.standard_normal(shape), damped(x.T @ x / len(x), 0.01)[0]


def dense(stack: np.ndarray) -> np.ndarray:
    """The block-diagonal matrix of a stack."""
    count, block, _ = stack.shape
    full = np.zeros((count * block,) * 2)
    for at, part in enumerate(stack):
        full[at * block : (at + 1) * block, at * block : (at + 1) * block] = part
    return full


def started(weight, gram, block, pattern="2:4") -> Wrapped:
    mask = keep_mask(np.square(weight) * np.diag(gram), Pattern.parse(pattern))
    return plain(np.where(mask, weight, 0), block)


def loss(weight, gram, found: Wrapped) -> float:
    return float((np.square(weight - found.total()) * np.diag(gram)).sum())


def random_form(shape, block) -> Wrapped:
    core = RNG.standard_normal(shape)
    core *= keep_mask(np.abs(core), Pattern.parse("2:4"))
    stacks = [RNG.standard_normal((size // block, block, block)) for size in shape]
    return Wrapped(stacks[0], core, stacks[1])


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_products_are_those_of_the_whole_matrices(shape, block):
    form = random_form(shape, block)
    wanted = dense(form.outer) @ form.core @ dense(form.inner)
    np.testing.assert_allclose(form.total(), wanted, atol=1e-12)
    rows, columns = RNG.random(shape[0]), RNG.random(shape[1])
    np.testing.assert_allclose(
        form.scaled(rows, columns).total(), rows[:, None] * wanted * columns, atol=1e-12
    )


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_identities_are_the_core_alone(shape, block):
    weight, gram = problem(shape)
    np.testing.assert_array_equal(started(weight, gram, block).total(), started(weight, gram, block).core)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_every_step_is_an_exact_minimum(shape, block):
    weight, gram = problem(shape)
    energy = np.diag(gram)
    form = random_form(shape, block)
    outer, inner = outer_step(weight, energy, form), inner_step(weight, energy, form)
    whole = outer_step(weight, gram, form)
    for _ in range(20):
        push = 1e-3 * RNG.standard_normal(form.outer.shape)
        assert loss(weight, gram, outer) <= loss(
            weight, gram, Wrapped(outer.outer + push, form.core, form.inner)
        )
        near = Wrapped(whole.outer + push, form.core, form.inner)
        assert quadratic_error(weight - whole.total(), gram) <= quadratic_error(weight - near.total(), gram)
        push = 1e-3 * RNG.standard_normal(form.inner.shape)
        assert loss(weight, gram, inner) <= loss(
            weight, gram, Wrapped(form.outer, form.core, inner.inner + push)
        )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_groups_of_the_core_are_solved_as_by_brute_force(pattern):
    """One row of blocks of one group each: the sweep is then a single exact solution of every group in turn."""
    kept = Pattern.parse(pattern).n
    weight, gram = problem((4, 12), seed=kept)
    form = random_form((4, 12), 4)
    found = core_step(weight, np.diag(gram), form, (kept, 4))
    outer, inner, scale = dense(form.outer), dense(form.inner), np.sqrt(np.diag(gram))
    core = form.core.copy()
    for row in range(4):  # the order in which the sweep goes; blocks of columns do not touch one another
        for at in range(0, 12, 4):
            core[row, at : at + 4] = 0
            rest = ((weight - outer @ core @ inner) * scale).ravel()
            best = None
            for chosen in itertools.combinations(range(at, at + 4), kept):
                design = np.stack([np.outer(outer[:, row], inner[j] * scale).ravel() for j in chosen], 1)
                values, *_ = np.linalg.lstsq(design, rest, rcond=None)
                missed = np.square(rest - design @ values).sum()
                if best is None or missed < best[0]:
                    best = (missed, chosen, values)
            core[row, list(best[1])] = best[2]
    np.testing.assert_allclose(found.core, core, rtol=1e-4, atol=1e-6)  # blocks are badly conditioned


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_losses_never_rise_and_end_below_the_start(shape, block):
    for seed in range(3):
        weight, gram = problem(shape, seed)
        start = started(weight, gram, block)
        found, losses = fit_diagonal(weight, np.diag(gram), start, (2, 4), 8)
        assert losses[0] == pytest.approx(loss(weight, gram, start))
        assert losses[-1] == pytest.approx(loss(weight, gram, found))
        assert losses[-1] < losses[0]
        assert matches(found.core, Pattern.parse("2:4"))
        fitted, errors = fit_full(weight, gram, found, 6)
        assert errors[0] == pytest.approx(quadratic_error(weight - found.total(), gram))
        assert errors[-1] == pytest.approx(quadratic_error(weight - fitted.total(), gram))
        for steps in (losses, errors):
            assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(steps))
        np.testing.assert_array_equal(fitted.core != 0, found.core != 0)
        alone = refit_rows(weight, start.core != 0, gram, steps=500)
        wrapped, errors = fit_full(weight, gram, plain(alone, block), 2)
        assert errors[-1] <= quadratic_error(weight - alone, gram)
        assert np.isfinite(wrapped.total()).all()


def test_dead_rows_columns_and_blocks_are_safe():
    weight, gram = problem((8, 16))
    weight[:4] = 0
    weight[:, 4:8] = 0
    weight[5] = 0
    found, losses = fit_diagonal(weight, np.diag(gram), started(weight, gram, 4), (2, 4), 5)
    assert np.isfinite(found.total()).all()
    assert losses[-1] <= losses[0]
    fitted, errors = fit_full(weight, gram, found, 3)
    assert np.isfinite(fitted.total()).all()
    assert errors[-1] <= errors[0]
    zero, _ = fit_diagonal(np.zeros((8, 16)), np.diag(gram), started(np.zeros((8, 16)), gram, 4), (2, 4), 3)
    assert not zero.total().any()


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def run(model: Model, spec: str, x: np.ndarray, overrides=()):
    copy = model.copy()
    source = Calibration.from_batches([{"x": part} for part in np.array_split(x, 2)], copy, threads=1)
    return copy, Pipeline.parse(spec).run(copy, PassContext(calibration=source, overrides=overrides))[-1]


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


FORMS = [
    ("[s] h = MatMul(x, w) y = Relu(h)", {"w": (64, 48)}, (2, 90, 64)),
    ("[s] y = MatMul(x, w)", {"w": (64, 48)}, (180, 64)),
    ("[s] y = MatMul(x, w)", {"w": (64, 48)}, (3, 2, 30, 64)),
    ("[s] y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (48, 64), "b": (48,)}, (180, 64)),
    ("[s] y = Gemm(x, w, b)", {"w": (64, 48), "b": (1, 48)}, (180, 64)),
    ("[s] y = Gemm(x, w)", {"w": (64, 48)}, (180, 64)),
    ("[s] h = Conv<strides=[2,1]>(x, w, b) y = Relu(h)", {"w": (48, 64, 1, 1), "b": (48,)}, (4, 64, 9, 7)),
    ("[s] y = Conv<pads=[1,1]>(x, w)", {"w": (48, 64, 1)}, (4, 64, 40)),
]


@pytest.mark.parametrize(("text", "weights", "shape"), FORMS)
def test_the_graph_computes_the_product_of_three(text, weights, shape):
    channels = 1 if "Conv" in text else len(shape) - 1
    dims = ["ABCD"[at] if at != channels else str(size) for at, size in enumerate(shape)]
    model = build(
        f"g (float[{','.join(dims)}] x) => (float[{','.join('abcd'[: len(shape)])}] y) {{ {text} }}",
        **{name: normal(*size) for name, size in weights.items()},
    )
    x = normal(*shape)
    spec = "prune-armor{block=4 correction=0 bias=false}"
    after, report = run(model, spec, x)
    (change,) = report.changed
    assert change.numbers["output_error"] < change.numbers["output_error_alone"]
    assert change.numbers["diagonal_error"] < change.numbers["diagonal_error_before"]
    assert change.numbers["added_multiplications"] == 4 * (48 + 64)
    assert change.numbers["added_bytes"] == 16 * (48 + 64)
    sites = {site.name: site for site in after.sites()}
    assert matches(sites["s"].numpy(), Pattern.parse("2:4"))
    constants = {name: value.const_value.numpy() for name, value in after.onnx.graph.initializers.items()}
    blocks = [constants[f"s.{side}.weight"].reshape(-1, 4, 4).astype(float) for side in ("outer", "inner")]
    if "Conv" not in text:
        blocks = [stack.transpose(0, 2, 1) for stack in blocks]
    whole = model.copy()
    total = Wrapped(blocks[0], sites["s"].numpy().astype(float), blocks[1]).total()
    whole.sites()[0].replace(total.astype(np.float32))
    np.testing.assert_allclose(outputs(after, x), outputs(whole, x), atol=3e-4)
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [item.name for item in proto.graph.output] == ["y"]
    larger = np.concatenate([x, x])  # the batch stays free
    np.testing.assert_allclose(outputs(after, larger)[len(outputs(after, x)) :], outputs(after, x), atol=1e-5)
    again, second = run(after, spec, x)
    assert not second.changed
    assert again.fingerprint() == after.fingerprint()


def test_it_beats_the_mask_alone_at_the_outputs_of_the_model():
    model = build(
        """g (float[B,64] x) => (float[B,64] y) {
            [one] h = MatMul(x, v) r = Relu(h) [two] y = MatMul(r, w)
        }""",
        v=normal(64, 64), w=normal(64, 64),
    )  # fmt: skip
    x = normal(800, 64)
    alone, _ = run(model, "prune-wanda-ols{pattern=2:4 correction=1}", x)
    wrapped, report = run(model, "prune-armor{block=8 correction=1}", x)
    assert [change.site for change in report.changed] == ["one", "two"]
    missed = [np.linalg.norm(outputs(side, x) - outputs(model, x)) for side in (alone, wrapped)]
    assert missed[1] < missed[0]


def test_what_stays_as_it_is_has_reasons():
    model = build(
        """g (float[B,64] x) => (float[B,64] y) {
            [odd] h = MatMul(x, u) r = Relu(h) [small] s = MatMul(r, v) t = Relu(s) [big] y = MatMul(t, w)
        }""",
        u=normal(64, 50), v=normal(50, 64), w=normal(64, 64),
    )  # fmt: skip
    x = normal(200, 64)
    after, report = run(model, "prune-armor", x)
    assert after.fingerprint() == model.fingerprint()
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons["odd"] == "50 x 64 is no multiple of blocks of 32"
    assert reasons["big"] == "factors with blocks of 32 hold 4096 weights, 2:4 saves only 1952"
    kernel = build(
        "g (float[B,16,9,9] x) => (float[B,32,h,v] y) { [c] y = Conv(x, w) }", w=normal(32, 16, 3, 3)
    )
    _, report = run(kernel, "prune-armor{block=8}", normal(4, 16, 9, 9))
    assert "larger than one point" in report.skipped[0].reason
    override = SiteOverride("big", pattern=Pattern.parse("16x1"))
    _, report = run(model, "prune-armor{block=8 match=big}", x, (override,))
    assert "an override says 16x1" in report.skipped[0].reason
    for spec in ("pattern=16x1", "block=6", "block=0", "sweeps=0", "rounds=-1", "sparsity=0.6"):
        with pytest.raises(SpecError):
            Pipeline.parse(f"prune-armor{{{spec}}}")


def test_protected_weights_and_inputs_of_unknown_rank():
    model = build("g (float[B,64] x) => (float[B,64] y) { [s] y = MatMul(x, w) }", w=normal(64, 64))
    source = Calibration.from_batches([{"x": normal(100, 64)}], model, threads=1)
    ctx = PassContext(calibration=source, protected={"s": np.eye(64, dtype=bool)})
    (report,) = Pipeline.parse("prune-armor{block=8}").run(model, ctx)
    assert "protected" in report.skipped[0].reason
    model = build(
        "g (float[B,64] x, int64[n] s) => (float y) { h = Reshape(x, s) [m] y = MatMul(h, w) }",
        w=normal(64, 64),
    )
    batch = {"x": normal(100, 64), "s": np.array([4, 25, 64])}
    source = Calibration.from_batches([batch], model, threads=1)
    (report,) = Pipeline.parse("prune-armor{block=8}").run(model, PassContext(calibration=source))
    assert report.skipped[0].reason == "the rank of its input is not known to be 2 or more"
