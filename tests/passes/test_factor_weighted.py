"""Low rank with weights on inputs and outputs, and the file that gradients come from."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.factor.fisher import FisherFile
from sparsecc.passes.factor.weighted import Importance, asvd_factors, asvd_scale, fisher_factors, floored
from sparsecc.passes.hybrid.lowrank import best_factors, truncated
from sparsecc.passes.prune.gram import quadratic_error
from sparsecc.plan import preset
from sparsecc.pm import PassContext, Pipeline

SHAPES = [(11, 7), (7, 11), (5, 5), (1, 6), (6, 1)]


def layer(n, k, seed=0):
    """A weight, inputs that are correlated and badly scaled, and second moments of gradients."""
    rng = np.random.default_rng([seed, n, k])
    x = rng.standard_normal((5 * k, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    g = rng.standard_normal((5 * n, n)) @ rng.standard_normal((n, n)) * np.exp(rng.standard_normal(n))
    return rng.standard_normal((n, k)), x.T @ x, g.T @ g, np.abs(x).mean(0)


def svd(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_svd(shape):
    weight = layer(*shape)[0]
    for rank in range(min(shape) + 1):
        found = truncated(weight, rank)
        assert (found.left.shape, found.right.shape) == ((shape[0], rank), (rank, shape[1]))
        np.testing.assert_allclose(found.product(), svd(weight, rank), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_between_the_svd_and_the_whitened_one(shape):
    weight, gram, _, magnitude = layer(*shape)
    np.testing.assert_array_equal(asvd_scale(magnitude, 0), 1)
    for rank in range(1, min(shape)):
        plain = asvd_factors(weight, asvd_scale(magnitude, 0), rank).product()
        np.testing.assert_allclose(plain, svd(weight, rank), atol=1e-9)
        best = quadratic_error(weight - best_factors(weight, gram, rank).product(), gram)
        for alpha in (0, 0.5, 1):
            scale = asvd_scale(magnitude, alpha)
            found = asvd_factors(weight, scale, rank).product()
            np.testing.assert_allclose(found, svd(weight * scale, rank) / scale, atol=1e-8)
            assert best <= quadratic_error(weight - found, gram) * (1 + 1e-9)
        diagonal = np.diag(np.diag(gram))
        root = np.sqrt(np.diag(gram))
        np.testing.assert_allclose(
            asvd_factors(weight, root, rank).product(),
            best_factors(weight, diagonal, rank).product(),
            atol=1e-8,
        )


def test_inputs_that_are_always_zero_stay_finite():
    weight = layer(6, 9)[0]
    scale = asvd_scale(np.array([0, 0, 1, 2, 3, 4, 5, 6, 7.0]), 1.0)
    assert np.isfinite(asvd_factors(weight, scale, 3).product()).all()
    np.testing.assert_array_equal(asvd_scale(np.zeros(4), 0.5), 1)
    assert floored(np.array([0.0, 2.0])).min() == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_reduces_to_what_it_generalises(shape):
    n, k = shape
    weight, gram, outputs, _ = layer(n, k)
    for rank in range(1, min(shape) + 1):
        alone = fisher_factors(weight, Importance(np.eye(n), np.eye(k)), rank).product()
        np.testing.assert_allclose(alone, svd(weight, rank), atol=1e-9)
        whitened = fisher_factors(weight, Importance(np.eye(n), gram), rank).product()
        np.testing.assert_allclose(whitened, best_factors(weight, gram, rank).product(), atol=1e-8)
        rows = np.diag(outputs).copy()
        np.testing.assert_allclose(
            fisher_factors(weight, Importance(rows), rank).product(),
            fisher_factors(weight, Importance(np.diag(rows), np.eye(k)), rank).product(),
            atol=1e-8,
        )
        scale = np.sqrt(rows)[:, None]
        np.testing.assert_allclose(
            fisher_factors(weight, Importance(rows), rank).product(),
            svd(scale * weight, rank) / scale,
            atol=1e-8,
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_has_the_least_weighted_error_which_is_a_tail(shape):
    n, k = shape
    weight, gram, outputs, magnitude = layer(n, k)
    rng = np.random.default_rng(1)
    rows = np.diag(outputs).copy()
    left, right = np.linalg.cholesky(outputs), np.linalg.cholesky(gram)
    for importance, moved in (
        (Importance(outputs, gram), left.T @ weight @ right),
        (Importance(rows), np.sqrt(rows)[:, None] * weight),
        (Importance(rows, gram), np.sqrt(rows)[:, None] * weight @ right),
    ):
        tail = np.linalg.svd(moved, compute_uv=False) ** 2
        for rank in range(1, min(shape)):
            found = fisher_factors(weight, importance, rank)
            cost = importance.cost(weight - found.product())
            assert cost == pytest.approx(tail[rank:].sum(), rel=1e-7, abs=1e-9 * tail.sum())
            others = [
                truncated(weight, rank).product(),
                best_factors(weight, gram, rank).product(),
                asvd_factors(weight, asvd_scale(magnitude, 0.5), rank).product(),
                (found.left + 1e-2 * rng.standard_normal((n, rank))) @ found.right,
                found.left @ (found.right + 1e-2 * rng.standard_normal((rank, k))),
            ]
            assert all(cost <= importance.cost(weight - other) * (1 + 1e-9) for other in others)


def test_outputs_without_gradients_and_singular_matrices_are_in_order():
    weight, gram, outputs, _ = layer(8, 6)
    rows = np.zeros(8)
    rows[2] = 1.0
    found = fisher_factors(weight, Importance(rows), 1).product()
    np.testing.assert_allclose(found[2], weight[2], rtol=1e-4)
    assert np.abs(found).max() < 1e3 * np.abs(weight).max()
    thin = np.outer(outputs[0], outputs[0])
    with pytest.raises(np.linalg.LinAlgError):
        fisher_factors(weight, Importance(thin - 1e-3 * np.eye(8), gram), 2)
    assert np.isfinite(fisher_factors(weight, Importance(thin, gram), 2, damping=0.01).product()).all()


# ------------------------------------------------------------------------------------------------ the file


def test_what_a_file_says(tmp_path):
    _, gram, outputs, _ = layer(5, 4)
    squares = np.random.default_rng(0).random((5, 4))
    path = tmp_path / "fisher.npz"
    arrays = {
        "/a/b.rows": squares.sum(1), "c": squares.astype(np.float32), "c.rows": squares.sum(1),
        "d": squares, "d.A": gram, "d.B": outputs, "e.rows": np.zeros(5), "f": squares,
        "g.A": np.ones((4, 4)), "g.B": outputs, "h.A": np.zeros((4, 4)), "h.B": outputs,
    }  # fmt: skip
    np.savez_compressed(path, **arrays)
    file = FisherFile(path)
    for name in ("/a/b", "c", "f"):
        found = file.importance(name, (5, 4))
        assert found.inputs is None
        np.testing.assert_allclose(found.outputs, squares.sum(1))
    both = file.importance("d", (5, 4))
    np.testing.assert_allclose(both.inputs, gram)
    np.testing.assert_allclose(both.outputs, outputs)
    few = file.importance("g", (5, 4))  # one sample: made definite
    np.testing.assert_allclose(few.inputs, 1, atol=1e-3)
    np.linalg.cholesky(few.inputs)
    for name in "eh":
        assert "are 0" in file.importance(name, (5, 4))
    assert "holds neither 'x.A' and 'x.B' nor 'x.rows' nor 'x'" in file.importance("x", (5, 4))
    file.refuse_unknown(["x", "d"])
    with pytest.raises(UsageError, match="no array has the name of a site, such as 'x'"):
        file.refuse_unknown(["x", "y"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"s.rows": np.ones(4)}, r"'s.rows' is float64 \[4\]; give floating-point \[5\]"),
        ({"s": np.ones((4, 5))}, r"give floating-point \[5, 4\]"),
        ({"s": np.ones((5, 4), int)}, "is int64"),
        ({"s": np.full((5, 4), np.nan)}, "NaN or infinity"),
        ({"s.rows": np.array([1, 1, 1, 1, np.inf])}, "NaN or infinity"),
        ({"s": -np.ones((5, 4))}, "negative squares"),
        ({"s": np.array([[None] * 4] * 5)}, "is object"),
        ({"s.A": np.eye(4), "s.B": np.eye(4)}, r"'s.B' is float64 \[4, 4\]"),
        ({"s.A": -np.eye(4), "s.B": np.eye(5)}, "'s.A' is not positive semi-definite"),
        ({"s.A": np.triu(np.ones((4, 4))), "s.B": np.eye(5)}, "'s.A' is not symmetric"),
    ],
)  # fmt: skip
def test_files_that_are_of_no_use(tmp_path, arrays, message):
    path = tmp_path / "fisher.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        FisherFile(path).importance("s", (5, 4))
    assert "\n" not in str(caught.value)


def test_files_that_lie_are_not_read(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        FisherFile(tmp_path / "none.npz")
    path = tmp_path / "fisher.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz"):
        FisherFile(path)
    plain = io.BytesIO()
    np.save(plain, np.ones(5))
    vast = io.BytesIO()
    np.lib.format.write_array_header_1_0(vast, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    for content, message in (
        (plain.getvalue()[:-8], "cannot be read as an array"),
        (b"text", "cannot be read as an array"),
        (vast.getvalue(), r"\[1000000000000\]; give floating-point"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("s.rows.npy", content)
        with pytest.raises(UsageError, match=message):
            FisherFile(path).importance("s", (5, 4))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s.rows.npy", plain.getvalue() * 9)
    data = bytearray(path.read_bytes())
    data[50:70] = b"\xff" * 20
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match="cannot be read as an array"):
        FisherFile(path).importance("s", (5, 4))


# --------------------------------------------------------------------------------------------- the passes


def build(n, k):
    """A product and its bias, with inputs that are correlated and badly scaled."""
    weight = layer(n, k)[0].astype(np.float32)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,{k}] x) => (float[N,{n}] y) {{ [s] h = MatMul(x, w) y = Add(h, b) }}"""
    )
    rng = np.random.default_rng(3)
    for name, array in (("w", weight.T), ("b", rng.standard_normal(n).astype(np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    mix = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    return Model.from_proto(proto), weight, (rng.standard_normal((200, k)) @ mix).astype(np.float32)


def run(spec, n=24, k=40):
    model, weight, x = build(n, k)
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    (report,) = Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))
    if not report.changed:
        return report, weight, x, None
    right, left = (site.numpy().astype(np.float64) for site in model.sites())
    return report, weight.astype(np.float64), np.asarray(x, np.float64), left @ right


OPTIONS = "param-ratio=0.5 multiple=1 min-elements=1 sequential=false bias=false damping=1e-9"


def test_asvd_of_a_site_is_the_one_of_its_inputs():
    for alpha in (0, 0.5):
        report, weight, x, found = run(f"factor-asvd{{{OPTIONS} alpha={alpha}}}")
        scale = np.sqrt(np.square(x).mean(0)) ** alpha
        np.testing.assert_allclose(found, svd(weight * scale, 7) / scale, atol=1e-4)
        assert report.changed[0].detail.startswith("rank 7")
    with pytest.raises(SpecError, match="alpha must be in"):
        Pipeline.parse("factor-asvd{alpha=1.5}")


def test_fwsvd_of_a_site_is_the_one_of_its_file(tmp_path):
    _, gram, outputs, _ = layer(24, 40)
    path = tmp_path / "fisher.npz"
    spec = f'factor-fwsvd{{{OPTIONS} fisher="{path}"}}'
    squares = np.random.default_rng(2).random((24, 40)) * np.exp(np.arange(24) / 4)[:, None]
    np.savez(path, s=squares)
    _, weight, x, found = run(spec)
    scale = np.sqrt(squares.sum(1))[:, None]
    np.testing.assert_allclose(found, svd(scale * weight, 7) / scale, atol=1e-4)
    moments = x.T @ x / len(x)
    _, _, _, whitened = run(spec.replace("}", " whiten=true}"))
    importance = Importance(squares.sum(1), moments)
    np.testing.assert_allclose(whitened, fisher_factors(weight, importance, 7).product(), atol=1e-4)
    assert importance.cost(weight - whitened) < importance.cost(weight - found)
    np.savez(path, **{"s.A": gram, "s.B": outputs})
    both = run(spec)[3]
    np.testing.assert_allclose(
        both, fisher_factors(weight, Importance(outputs, gram), 7).product(), rtol=1e-3, atol=1e-3
    )


def test_sites_without_gradients_say_so(tmp_path):
    (reason,) = (skip.reason for skip in run("factor-fwsvd{min-elements=1 multiple=1}")[0].skipped)
    assert "fisher=PATH" in reason
    path = tmp_path / "fisher.npz"
    spec = f'factor-fwsvd{{{OPTIONS} fisher="{path}"}}'
    np.savez(path, s=np.zeros((24, 40)))
    assert "are 0" in run(spec)[0].skipped[0].reason
    np.savez(path, other=np.zeros((24, 40)))
    with pytest.raises(UsageError, match="no array has the name of a site, such as 's'"):
        run(spec)
    np.savez(path, s=np.ones((40, 24)))
    with pytest.raises(UsageError, match=r"give floating-point \[24, 40\]"):
        run(spec)


def test_flags():
    for flags, message in (
        ({"method": "fwsvd"}, "needs gradients: give --fisher"),
        ({"method": "svd", "fisher": "f.npz"}, "--fisher is an option of --method fwsvd"),
        ({"method": "wanda", "fisher": "f.npz"}, "--fisher is an option of --method fwsvd"),
    ):
        with pytest.raises(UsageError, match=message):
            preset(**flags)
    assert str(preset(method="fwsvd", fisher="f.npz", param_ratio=0.6).passes[1]) == (
        "factor-fwsvd{param-ratio=0.6 sequential=false fisher=f.npz}"
    )
