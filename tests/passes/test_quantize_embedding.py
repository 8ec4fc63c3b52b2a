"""Tables of embeddings in int8: the graph that comes of it, and what stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model
from sparsecc.passes.quantize.embedding import row_codes
from sparsecc.plan.sensitivity import measure_sensitivity
from sparsecc.plan.tables import table_items
from sparsecc.pm import Pipeline

V, D = 60, 16
TWO = """g (int64[n] ids, int64[n] others) => (float[n,8] y, float[n,16] z) {
    [words] a = Gather(t, ids) [again] b = Gather<axis = 0>(t, others) z = Add(a, b) [fc] y = MatMul(z, w) }"""
SPEC = "quantize-embedding{min-elements=1}"


def build(graph: str = TWO, table: np.ndarray | None = None) -> Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + graph)
    rows = np.exp(rng.standard_normal((V, 1))) * rng.standard_normal((V, D))
    rows[3] = 0
    arrays = {
        "t": rows.astype(np.float32) if table is None else table,
        "w": rng.standard_normal((D, 8)).astype(np.float32),
    }
    for name, array in arrays.items():
        if f" {name})" in graph or f"({name}," in graph:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


IDS = {"ids": np.array([0, 3, 59, -1]), "others": np.array([5, 5, 1, 2])}


def test_rows_are_looked_up_as_integers_with_their_scales() -> None:
    dense, model = build(), build()
    (report,) = Pipeline.parse(SPEC).run(model)
    (change,) = report.changed
    assert (change.site, change.numbers["relative_error"] < 0.01) == ("words", True)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    held = model.onnx.graph.initializers["t"].const_value
    assert held is not None
    assert (held.dtype.name, list(held.shape)) == ("INT8", [V, D])
    expected, found = (list(open_session(item).run(IDS).values()) for item in (dense, model))
    codes, scales = row_codes(dense.onnx.graph.initializers["t"].const_value.numpy())
    assert np.abs(codes).max() == 127
    rows = codes * scales
    assert np.allclose(found[1], rows[IDS["ids"]] + rows[IDS["others"]], atol=1e-6)
    for old, new in zip(expected, found, strict=True):
        assert np.linalg.norm(new - old) < 0.01 * np.linalg.norm(old)
    (again,) = Pipeline.parse(SPEC).run(model)
    assert not again.changed


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (build(table=np.zeros((V, D), np.float32)), "all its numbers are zero"),
        (build(table=np.full((V, D), np.nan, np.float32)), "NaN or infinite"),
        (
            build(
                """g (int64[n] ids) => (float[n,60] y) {
                [words] a = Gather(t, ids) h = Relu(a) [head] y = Gemm<transB = 1>(h, t) }"""
            ),
            "a product reads it too",
        ),
    ],
)
def test_what_stays_as_it_is(model: Model, reason: str) -> None:
    before = model.fingerprint()
    (report,) = Pipeline.parse(SPEC).run(model)
    assert not report.changed
    assert reason in report.skipped[0].reason
    assert model.fingerprint() == before


def test_small_tables_stay() -> None:
    (report,) = Pipeline.parse("quantize-embedding").run(build())
    assert report.skipped[0].reason == "only 960 numbers (min-elements=32768)"


def test_a_table_is_an_item_where_bytes_count() -> None:
    rng = np.random.default_rng(1)
    model = build(table=rng.standard_normal((4096, D)).astype(np.float32))
    families = ("quantize-embedding",)
    assert not table_items(model, families, ("ms",))
    assert not table_items(model, (), ("bytes",))
    (item,) = table_items(model, families, ("ms", "bytes"))
    dense, narrow = item.candidates
    assert (item.sites, narrow.passes) == (("words",), ("quantize-embedding",))
    assert (dense.bytes, narrow.bytes) == (4096 * D * 4, 4096 * (D + 4))
    assert 0 < narrow.error < 0.01
    calibration = Calibration.from_batches([{name: rng.integers(0, 4096, 64) for name in IDS}], model)
    found = measure_sensitivity(model, [item], calibration)
    assert found.replacements["words"][0] == "quantize-embedding"
    assert found.replacements["words"][1] == pytest.approx(narrow.error, rel=0.3)
