"""Squared gradients without labels, as ``bench/fisher.py`` computes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.ir import Model

pytest.importorskip("torch", reason="gradients need PyTorch: pip install 'sparsecc[heal]'")


@pytest.fixture(scope="module")
def fisher():
    path = Path(__file__).resolve().parents[2] / "bench" / "fisher.py"
    spec = importlib.util.spec_from_file_location("fisher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear():
    """Outputs that are scaled behind a product, and the inputs of one run."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,6] x) => (float[N,5] y) { [s] h = Gemm<transB=1>(x, w) y = Mul(h, c) }"""
    )
    rng = np.random.default_rng(0)
    scale = np.array([1, 2, 0, 0.5, 3], np.float32)
    for name, array in (("w", rng.standard_normal((5, 6)).astype(np.float32)), ("c", scale)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    x = (rng.standard_normal((40, 6)) * np.arange(1, 7)).astype(np.float32)
    model = Model.from_proto(proto)
    return model, Calibration.from_batches([{"x": x}], model, threads=1), x, scale


def test_rows_of_a_linear_model_are_known(fisher):
    model, calibration, x, scale = linear()
    found = fisher.measure(model, calibration, draws=400)
    expected = scale.astype(float) ** 2 * np.square(x).sum()
    assert set(found) == {"s.rows"}
    np.testing.assert_allclose(found["s.rows"] / 400, expected, rtol=0.25)
    again = fisher.measure(model, calibration, draws=3)
    np.testing.assert_array_equal(again["s.rows"], fisher.measure(model, calibration, draws=3)["s.rows"])


def test_the_nearest_kronecker_product_of_a_linear_model_is_exact(fisher):
    model, calibration, x, scale = linear()
    found = fisher.measure(model, calibration, kind="kronecker", draws=400)
    inputs, outputs = np.asarray(x.T @ x, float), np.diag(scale.astype(float) ** 2)
    for key, wanted in (("s.A", inputs), ("s.B", outputs)):
        near = found[key] / np.linalg.norm(found[key])
        assert np.linalg.norm(near - wanted / np.linalg.norm(wanted)) < 0.2
        assert np.linalg.eigvalsh(found[key]).min() > -1e-9


def test_classes_that_are_certain_have_no_gradient(fisher):
    model, calibration, _, _ = linear()
    unsure = fisher.measure(model, calibration, outputs="classes")["s.rows"]
    assert unsure[2] == 0  # times zero
    assert (unsure[[0, 1, 3, 4]] > 0).all()
    (site,) = model.sites()
    site.replace(site.numpy() * 1e6)
    assert fisher.measure(model, calibration, outputs="classes")["s.rows"].sum() < 1e-3 * unsure.sum()


def test_the_file_is_what_the_pass_reads(fisher, tmp_path):
    from click.testing import CliRunner

    from sparsecc.passes.factor.fisher import FisherFile

    model, _, x, _ = linear()
    model.save(tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x)
    for kind in ("rows", "kronecker"):
        out = tmp_path / f"{kind}.npz"
        arguments = [
            tmp_path / "model.onnx",
            "--calibration-data",
            tmp_path / "x.npy",
            "-o",
            out,
            "--kind",
            kind,
        ]
        done = CliRunner().invoke(fisher.main, [str(item) for item in arguments])
        assert done.exit_code == 0, done.output
        importance = FisherFile(out).importance("s", (5, 6))
        assert (importance.inputs is None) == (kind == "rows")
    done = CliRunner().invoke(
        fisher.main, [str(tmp_path / "none.onnx"), "--calibration-data", "x", "-o", "y"]
    )
    assert done.exit_code == 1
    assert "error:" in str(done.exception) or "error:" in done.output
