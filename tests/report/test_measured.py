"""Parts of a document that are read from models: patterns, spectra, balance."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.report import parse_document
from sparsecc.report.measured import (
    measured_parts,
    partition_rows,
    pattern_thumbnails,
    spectra,
)

MLP = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[batch, 61] x) => (float[batch, 7] y) <float[61, 130] w1, float[130, 7] w2> {
    [fc1] h = MatMul(x, w1)
    [fc2] y = MatMul(h, w2)
}"""


def _model(sparsity: float) -> tuple[Model, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP)
    weights = {}
    for name, shape in (("w1", (61, 130)), ("w2", (130, 7))):
        weights[name] = rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) >= sparsity)
        proto.graph.initializer.append(numpy_helper.from_array(weights[name].astype(np.float32), name))
    return Model.from_proto(proto), weights


def _lowered(model: Model, layout: str) -> Model:
    prune = f"prune-magnitude{{pattern={layout} sparsity=0.75 min-elements=1}}"
    Pipeline.parse(f"{prune},choose-layout{{layout={layout}}},lower-sparse").run(model, PassContext())
    return model


@pytest.mark.parametrize(
    ("layout", "names"),
    [("unstructured", ["fc1", "fc2"]), ("1:4", ["fc1", "fc2"]), ("16x1", ["fc1"])],  # fc2 has 7 outputs
)
def test_thumbnails_are_the_densities_of_the_weights(layout: str, names: list[str]) -> None:
    model = _lowered(_model(0.0)[0], layout)
    rows = pattern_thumbnails(model)
    assert [row["site"] for row in rows] == names
    for row in rows:
        n, k = row["shape"]
        grid, corner = np.array(row["grid"]), np.array(row["corner"])
        assert row["layout"] == layout
        assert grid.shape[0] <= min(n, 32)
        assert grid.shape[1] <= min(k, 32)
        sizes = [
            np.diff(np.arange(cells + 1) * side // cells)
            for cells, side in zip(grid.shape, (n, k), strict=True)
        ]
        assert (grid * np.outer(*sizes)).sum() / (n * k) == pytest.approx(row["density"], abs=1e-3)
        assert corner.shape == (min(n, 32), min(k, 32))
        assert set(np.unique(corner)) <= {0, 1}
    json.dumps(rows, allow_nan=False)
    parse_document({"thumbnails": rows})


def test_thumbnails_cell_by_cell() -> None:
    model, weights = _model(0.5)
    (row,) = (row for row in pattern_thumbnails(model) if row["site"] == "fc1")
    kept = weights["w1"].T != 0  # [130, 61]
    assert row["layout"] == "dense, unstructured zeros"
    grid = np.array(row["grid"])
    assert grid.shape == (32, 15)
    for y, x in ((0, 0), (31, 14), (7, 3)):
        cell = kept[y * 130 // 32 : (y + 1) * 130 // 32, x * 61 // 15 : (x + 1) * 61 // 15]
        assert grid[y, x] == pytest.approx(cell.mean(), abs=1e-4)
    np.testing.assert_array_equal(np.array(row["corner"]), kept[:32, :32])


def test_dense_weights_have_no_thumbnail() -> None:
    assert pattern_thumbnails(_model(0.0)[0]) == []


def test_spectra_are_singular_values() -> None:
    model, weights = _model(0.0)
    rows = {row["site"]: row for row in spectra(model)}
    assert [row["count"] for row in rows.values()] == [61, 7]
    for site, name in (("fc1", "w1"), ("fc2", "w2")):
        expected = np.linalg.svd(weights[name].astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(rows[site]["values"], expected / expected[0], rtol=1e-3)
    assert [row["site"] for row in spectra(model, ["fc2", "absent"])] == ["fc2"]
    assert {row["site"] for row in spectra(_lowered(model, "16x1"))} == {"fc1", "fc2"}
    parse_document({"spectra": list(rows.values())})


def test_long_spectra_are_thinned_and_strange_ones_left_out() -> None:
    proto = onnx.parser.parse_model(MLP.replace("61", "100"))
    wide = np.diag(np.arange(100, 0, -1.0, dtype=np.float32))
    proto.graph.initializer.append(numpy_helper.from_array(np.hstack([wide, wide[:, :30]]), "w1"))
    proto.graph.initializer.append(numpy_helper.from_array(np.full((130, 7), np.nan, np.float32), "w2"))
    (row,) = spectra(Model.from_proto(proto))
    assert (row["site"], row["count"], len(row["values"])) == ("fc1", 100, 64)
    assert row["values"][0] == 1.0
    assert row["values"] == sorted(row["values"], reverse=True)


def test_work_of_parts_is_that_of_the_library() -> None:
    pytest.importorskip("sparsecc.runtime").get_library_path()
    rows = partition_rows(_lowered(_model(0.0)[0], "unstructured"), 4)
    assert [row["name"] for row in rows] == ["fc1", "fc2"]
    for row in rows:
        assert row["op"] == "SparseMatMul"
        assert len(row["part_work"]) <= 4
        assert row["lambda"] == max(row["part_work"]) * len(row["part_work"]) / sum(row["part_work"])
    parse_document({"partition": rows})


def test_all_parts_of_two_models() -> None:
    model, _ = _model(0.0)
    parts = measured_parts(_lowered(model.copy(), "unstructured"), model)
    document = parse_document(parts)
    assert (
        [item.site for item in document.thumbnails]
        == [item.site for item in document.spectra]
        == ["fc1", "fc2"]
    )
