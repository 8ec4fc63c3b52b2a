"""Sparse plus low rank: what is proven of the mathematics, and the graph that comes of it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.hybrid.lowrank import Factors, affordable_rank, best_factors, subspace_step
from sparsecc.passes.hybrid.sparse_plus_rank import decompose, refit
from sparsecc.passes.prune.gram import damped, quadratic_error, shifted_target
from sparsecc.passes.prune.selection import Selection
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import Pattern, matches

RNG = np.random.default_rng(3)
SHAPES = [(12, 16), (16, 12), (1, 9), (9, 1), (7, 7)]


def layer(n: int, k: int, rows: int = 80, seed: int = 0):
    """A weight and the Gram matrix of correlated, badly scaled inputs."""
    rng = np.random.default_rng([seed, n, k])
    x = rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    return rng.standard_normal((n, k)), x


def rows_of(sparsity: float):
    return Selection(Pattern("unstructured"), sparsity, "row").mask


def nothing(squares):
    return np.zeros(squares.shape, bool)


@pytest.mark.parametrize("shape", SHAPES)
def test_best_factors_are_the_tail_of_the_whitened_spectrum(shape):
    weight, x = layer(*shape)
    gram = x.T @ x
    tail = np.linalg.svd(weight @ np.linalg.cholesky(gram), compute_uv=False) ** 2
    for rank in range(min(shape) + 1):
        found = best_factors(weight, gram, rank)
        assert (found.left.shape, found.right.shape) == ((shape[0], rank), (rank, shape[1]))
        error = quadratic_error(weight - found.product(), gram)
        assert error == pytest.approx(tail[rank:].sum(), rel=1e-8, abs=1e-9 * tail.sum())
        np.testing.assert_allclose(found.balanced().product(), found.product(), atol=1e-9)
        plain = best_factors(weight, np.eye(shape[1]), rank)
        assert error <= quadratic_error(weight - plain.product(), gram) * (1 + 1e-9) + 1e-9 * tail.sum()
        scale = np.abs(x).mean(0)  # ASVD
        inner, values, outer = np.linalg.svd(weight * scale)
        asvd = (inner[:, :rank] * values[:rank]) @ outer[:rank] / scale
        assert error <= quadratic_error(weight - asvd, gram) * (1 + 1e-9) + 1e-9 * tail.sum()


def test_both_sides_give_one_matrix_and_singular_grams_are_in_order():
    weight, x = layer(9, 12)
    gram = x.T @ x
    for rank in (1, 4, 9):
        wide = best_factors(weight, gram, rank).product()
        root = np.linalg.cholesky(gram)
        left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
        whitened = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)
        np.testing.assert_allclose(wide, whitened, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(best_factors(weight, gram, 9).product(), weight, atol=1e-8)
    few = x[:5]
    np.testing.assert_allclose(
        few @ best_factors(weight, few.T @ few, 5).product().T, few @ weight.T, atol=1e-6
    )


def test_reduced_rank_regression_is_best_towards_the_shifted_target():
    weight, x = layer(8, 10)
    noisy = x + RNG.standard_normal(x.shape)
    gram, cross = noisy.T @ noisy, x.T @ noisy
    target = shifted_target(weight, gram, cross, 1e-9, 1.0)
    found = best_factors(target, gram, 3)

    def missed(product):
        return np.linalg.norm(x @ weight.T - noisy @ product.T)

    assert missed(found.product()) <= missed(best_factors(weight, gram, 3).product())
    for _ in range(20):
        near = Factors(
            found.left + 1e-3 * RNG.standard_normal(found.left.shape),
            found.right + 1e-3 * RNG.standard_normal(found.right.shape),
        )
        assert missed(near.product()) >= missed(found.product())


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (3, 40)])
def test_subspace_steps_only_improve_and_find_the_svd(shape):
    matrix = RNG.standard_normal(shape) @ np.diag(0.7 ** np.arange(shape[1]))
    rank = min(4, shape[0])
    start, errors = RNG.standard_normal((min(10, *shape), shape[1])), []
    for _ in range(30):
        found, start = subspace_step(matrix, start, rank)
        assert found.rank == rank
        errors.append(np.linalg.norm(matrix - found.product()))
    assert all(
        later <= earlier + 1e-12 * np.linalg.norm(matrix) for earlier, later in itertools.pairwise(errors)
    )
    best = np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())
    assert errors[-1] == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_ranks_within_a_budget():
    assert affordable_rank(64, 64, 0.5) == 16
    assert affordable_rank(64, 64, 0.5, 5) == 15
    assert affordable_rank(16, 144, 0.1, 4) == 0
    assert affordable_rank(4, 100, 5.0) == 4


@pytest.mark.parametrize("shape", [(12, 16), (5, 33), (1, 24)])
def test_no_rank_is_the_mask_of_wanda(shape):
    weight, x = layer(*shape)
    energy = np.square(x).mean(0)
    found = decompose(weight, energy, 0, rows_of(0.5), 80, RNG)
    mask = rows_of(0.5)(np.square(weight) * energy)
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.total(), np.where(mask, weight, 0))


def test_nothing_sparse_is_an_svd_with_scaled_inputs():
    weight, x = layer(12, 16)
    energy = np.square(x).mean(0)
    found = decompose(weight, energy, 5, nothing, 500, RNG)
    scale = np.sqrt(energy)
    left, values, right = np.linalg.svd(weight * scale)
    wanted = (left[:, :5] * values[:5]) @ right[:5] / scale
    distance = np.linalg.norm((found.total() - wanted) * scale) / np.linalg.norm(wanted * scale)
    assert distance < 0.05  # it stops at a gain of 1e-4
    assert found.objectives[-1] == pytest.approx(np.square(values[5:]).sum(), rel=1e-2)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (13, 27)])
def test_objectives_never_rise_and_the_fit_is_never_worse(pattern, shape):
    for seed in range(4):
        weight, x = layer(*shape, seed=seed)
        sparsity = None if pattern == "2:4" else 0.6
        chosen = Selection(Pattern.parse(pattern), sparsity, "row")
        gram = damped(x.T @ x / len(x), 0.01)[0]
        found = decompose(weight, np.square(x).mean(0), 2, chosen.mask, 40, np.random.default_rng(seed))
        fitted = refit(found, weight, gram, 15)
        for steps in (found.objectives, fitted.objectives):
            assert len(steps) > 1
            assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(steps))
        assert fitted.objectives[0] == pytest.approx(quadratic_error(found.total() - weight, gram))
        assert fitted.objectives[-1] == pytest.approx(
            quadratic_error(fitted.total() - weight, gram), rel=1e-6
        )
        np.testing.assert_array_equal(fitted.mask, found.mask)
        assert not fitted.sparse[~fitted.mask].any()
        assert np.linalg.matrix_rank(fitted.factors.product()) <= 2
        again = decompose(weight, np.square(x).mean(0), 2, chosen.mask, 40, np.random.default_rng(seed))
        np.testing.assert_array_equal(again.total(), found.total())


def test_dead_and_duplicate_inputs_are_safe():
    weight, x = layer(10, 14)
    x[:, 3] = 0
    x[:, 5] = x[:, 6]
    gram = damped(x.T @ x / len(x), 0.01)[0]
    found = decompose(weight, np.square(x).mean(0), 3, rows_of(0.5), 30, RNG)
    assert np.isfinite(found.total()).all()
    assert not found.total()[:, 3].any()
    fitted = refit(found, weight, gram, 10)
    assert np.isfinite(fitted.total()).all()
    dead = decompose(weight, np.zeros(14), 3, rows_of(0.5), 30, RNG)
    assert not dead.total().any()


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def run(model: Model, spec: str, x: np.ndarray):
    copy = model.copy()
    source = Calibration.from_batches([{"x": part} for part in np.array_split(x, 2)], copy, threads=1)
    return copy, Pipeline.parse(spec).run(copy, PassContext(calibration=source))[-1]


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


FORMS = [
    ("[s] h = MatMul(x, w) y = Relu(h)", {"w": (64, 48)}, (2, 90, 64)),
    ("[s] y = MatMul(x, w)", {"w": (64, 48)}, (180, 64)),
    ("[s] y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (48, 64), "b": (48,)}, (180, 64)),
    ("[s] y = Gemm(x, w)", {"w": (64, 48)}, (180, 64)),
    ("[s] y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)", {"w": (48, 8, 3, 3), "b": (48,)}, (8, 8, 13, 13)),
    ("[s] y = Conv(x, w)", {"w": (48, 64, 1)}, (8, 64, 29)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "weights", "shape"), FORMS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:8", "8x1"])
def test_the_graph_computes_the_sum_and_its_parts_are_sites(text, weights, shape, pattern):
    channels = 1 if "Conv" in text else len(shape) - 1
    dims = ["ABCD"[at] if at != channels else str(size) for at, size in enumerate(shape)]
    model = build(
        f"g (float[{','.join(dims)}] x) => (float[{','.join('abcd'[: len(shape)])}] y) {{ {text} }}",
        **{name: normal(*size) for name, size in weights.items()},
    )
    x = normal(*shape)
    amount = "" if ":" in pattern else " sparsity=0.5"
    spec = f"sparse-lowrank{{pattern={pattern}{amount} rank-share=0.5 bias=false}}"
    after, report = run(model, spec, x)
    (change,) = report.changed
    parts = {site.name: site.numpy() for site in after.sites()}
    assert set(parts) == {"s", "s.right", "s.left"}
    assert matches(parts["s"], Pattern.parse(pattern))
    size = parts["s"].size
    held = np.count_nonzero(parts["s"]) + parts["s.right"].size + parts["s.left"].size
    assert held <= 0.5 * size + len(parts["s"]) / 2  # counts per row are rounded
    assert change.numbers["parameters"] == pytest.approx(held / size)
    assert len(parts["s.right"]) == change.numbers["rank"] > 0
    assert change.numbers["output_error"] <= change.numbers["output_error_before_fit"]
    whole = model.copy()
    alpha = 0.5 if "alpha" in text else 1.0  # the left factor of a Gemm has its alpha inside
    whole.sites()[0].replace(parts["s"] + parts["s.left"] @ parts["s.right"] / np.float32(alpha))
    np.testing.assert_allclose(outputs(after, x), outputs(whole, x), atol=2e-4)
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [item.name for item in proto.graph.output] == ["y"]
    again, second = run(after, spec, x)
    assert not second.changed
    assert again.fingerprint() == after.fingerprint()


def test_later_layers_are_fitted_to_what_the_rewritten_ones_give():
    model = build(
        """g (float[B,48] x) => (float[B,48] y) {
            [one] h = MatMul(x, v) r = Relu(h) [two] y = MatMul(r, w)
        }""",
        v=normal(48, 48), w=normal(48, 48),
    )  # fmt: skip
    x = normal(600, 48)
    errors = {}
    for option in ("sequential=false", "correction=1.0"):
        after, report = run(model, f"sparse-lowrank{{multiple=1 {option}}}", x)
        assert len(report.changed) == 2
        errors[option] = np.linalg.norm(outputs(after, x) - outputs(model, x))
    assert errors["correction=1.0"] < errors["sequential=false"]


@pytest.mark.parametrize(
    "name", ["sparse-lowrank{sparsity=0.6 multiple=1 BIAS}", "prune-armor{block=8 BIAS}"]
)
@pytest.mark.parametrize(
    ("text", "weights", "given"),
    [
        ("[s] h = MatMul(x, w) y = Add(h, b)", {"w": (64, 48), "b": (48,)}, (300, 64)),
        ("[s] y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (48, 64), "b": (48,)}, (300, 64)),
        ("[s] y = Conv(x, w, b)", {"w": (48, 64, 1, 1), "b": (48,)}, (20, 64, 4, 4)),
    ],
)
def test_a_fitted_bias_makes_the_means_agree_and_the_error_smaller(name, text, weights, given):
    dims = ["N", *map(str, given[1:])]
    model = build(
        f"g (float[{','.join(dims)}] x) => (float[{','.join('abcd'[: len(given)])}] y) {{ {text} }}",
        **{key: normal(*size) for key, size in weights.items()},
    )
    x = normal(*given) + 2 * normal(*given[1:])
    errors = {}
    for bias in ("false", "true"):
        after, report = run(model, name.replace("BIAS", f"bias={bias} damping=1e-4"), x)
        assert report.changed
        difference = outputs(after, x) - outputs(model, x)
        axes = tuple(at for at in range(len(given)) if at != (1 if "Conv" in text else len(given) - 1))
        errors[bias] = np.square(difference).sum()
        assert (np.abs(difference.mean(axes)).max() < 1e-4) == (bias == "true")
    assert errors["true"] < errors["false"]


def test_no_share_for_the_rank_is_pruning_with_least_squares():
    model, x = (
        build("g (float[B,64] x) => (float[B,48] y) { [s] y = MatMul(x, w) }", w=normal(64, 48)),
        normal(200, 64),
    )
    alone, _ = run(model, "sparse-lowrank{rank-share=0}", x)
    plain, _ = run(model, "prune-wanda-ols", x)
    assert [node.op_type for node in alone.onnx.graph] == ["MatMul"]
    np.testing.assert_allclose(*(side.sites()[0].numpy() for side in (alone, plain)), atol=1e-4)


def test_what_cannot_be_rewritten_has_reasons():
    model = build(
        """g (float[B,64] x) => (float[B,64] y) {
            [one] h = MatMul(x, w) r = Relu(h) [two] s = MatMul(r, w) [thin] t = MatMul(s, u) [back] y = MatMul(t, v)
        }""",
        w=normal(64, 64), u=normal(64, 16), v=normal(16, 64),
    )  # fmt: skip
    after, report = run(model, "sparse-lowrank", normal(50, 64))
    assert after.fingerprint() == model.fingerprint()
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons["one"] == "its weight is shared by 2 nodes"
    assert "does not hold factors of rank 4" in reasons["thin"]
    for spec in ("rank-share=1", "multiple=0", "rounds=-1", "iterations=0"):
        with pytest.raises(SpecError):
            Pipeline.parse(f"sparse-lowrank{{{spec}}}")
