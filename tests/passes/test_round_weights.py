"""Weights rounded to 16 bits: the pass, and what choosing, restoring and lowering make of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

import sparsecc
from sparsecc import emit, verify
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.ir.packed import packed_sites
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.plan import preset
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.sparse import Layout, holds, rounded

TWO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 64] x) => (float[batch, 48] y) {
    [up] h = MatMul(x, w)
    r = Relu(h)
    [down] y = MatMul(r, v)
}"""
GRU = """<ir_version: 8, opset_import: ["" : 17]>
g (float[T, 2, 24] x) => (float[T, 1, 2, 16] y) {
    [cell] y = GRU<hidden_size = 16>(x, w, v)
}"""


def build(text: str = TWO, **arrays: np.ndarray) -> Model:
    rng = np.random.default_rng(0)
    shapes = {"w": (64, 80), "v": (80, 48)} if text != GRU else {"w": (1, 48, 24), "v": (1, 48, 16)}
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        random = (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(arrays.get(name, random), name))
    return Model.from_proto(proto)


class FakeCosts:
    """Times by layout text; what is not named takes as long as dense."""

    def __init__(self, **times: float) -> None:
        self.times = {name.replace("_", " "): time for name, time in times.items()}
        self.asked: list[list[str]] = []

    def site_times_ms(self, model: Model, site: Any, layouts: Sequence[Layout], base: Any = None):
        self.asked.append([str(layout) for layout in layouts])
        return {"dense": 9.0, **{name: self.times.get(name, 9.0) for name in self.asked[-1]}}

    def recurrent_times_ms(self, model: Model, site: Any, layouts: Sequence[tuple[Layout, Layout]]):
        self.asked.append(["+".join(dict.fromkeys(map(str, pair))) for pair in layouts])
        return {"dense": 9.0, **{name: self.times.get(name, 9.0) for name in self.asked[-1]}}


def run(model: Model, pipeline: str, **times: float) -> tuple[list[PassReport], FakeCosts]:
    costs = FakeCosts(**times)
    return Pipeline.parse(pipeline).run(model, PassContext(costs=costs)), costs


@pytest.mark.parametrize("floats", ["fp16", "bf16"])
def test_rounds_to_nearest_and_says_what_it_costs(floats: str) -> None:
    dense, model = build(), build()
    ((report,), _) = run(model, f"round-weights{{values={floats}}}")
    for before, after, change in zip(dense.sites(), model.sites(), report.changed, strict=True):
        np.testing.assert_array_equal(after.numpy(), rounded(before.numpy(), floats))
        assert 0 < change.numbers["relative_error"] <= change.numbers["worst_output"] < 2.0**-7
        assert change.numbers["density_after"] == change.numbers["density_before"]
    ((again,), _) = run(model, f"round-weights{{values={floats}}}")
    assert [skip.reason for skip in again.skipped] == [f"its weights are {floats} numbers already"] * 2


def _scaled(row: float) -> np.ndarray:
    """The weight of ``up``, its output 5 brought to a size of ``row``."""
    weight = build().sites()[0].numpy().T.copy()
    weight[:, 5] *= row / np.abs(weight[:, 5]).max()
    return weight


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (_scaled(7e4), "largest weight is 7e\\+04, fp16 ends at 65504; use values=bf16"),
        (_scaled(1e-6), "output 5 would lose .*%: its weights, at most 1e-06, are too small for fp16"),
        (_scaled(1e-12), "output 5 would lose 100.00%"),
        (np.full((64, 80), np.inf, np.float32), "NaN or infinite"),
        (np.ones((64, 80), np.float32), "no zeros"),
        (np.zeros((64, 80), np.float32), "fp16 numbers already"),
    ],
)
def test_what_fp16_cannot_hold_is_left_alone(weight: np.ndarray, reason: str) -> None:
    model = build(w=weight)
    ((report,), _) = run(model, "round-weights")
    (skip,) = report.skipped
    assert skip.site == "up"
    assert re.search(reason, skip.reason), skip.reason
    np.testing.assert_array_equal(model.sites()[0].numpy(), weight.T)
    if "bf16" in skip.reason:
        ((report,), _) = run(model, "round-weights{values=bf16}")
        assert {change.site for change in report.changed} == {"up", "down"}


def test_bf16_needs_opset_13() -> None:
    model = build(TWO.replace(": 17", ": 12"))
    ((report,), _) = run(model, "round-weights{values=bf16}")
    assert all("opset 12 has no bfloat16" in skip.reason for skip in report.skipped)
    for site in model.sites():
        site.replace(rounded(site.numpy(), "bf16"))
    _, costs = run(model, "choose-layout{values=bf16}")
    assert costs.asked == [["unstructured"]] * 2


def test_both_types_are_timed_and_the_faster_is_stored() -> None:
    pipeline = "round-weights,choose-layout{values=fp16},restore-dense,lower-sparse"
    for times, layout in (({"fp16_unstructured": 3.0, "unstructured": 5.0}, "fp16 unstructured"),
                          ({"fp16_unstructured": 5.0, "unstructured": 5.1}, "fp16 unstructured"),
                          ({"fp16_unstructured": 5.0, "unstructured": 3.0}, "unstructured")):  # fmt: skip
        dense, model = build(), build()
        _, costs = run(model, pipeline, **times)
        assert costs.asked == [["fp16 unstructured", "unstructured"]] * 2
        assert [site.layout for site in packed_sites(model)] == [layout] * 2
        for site, own in zip(packed_sites(model), dense.sites(), strict=True):
            expected = rounded(own.numpy(), "fp16") if "fp16" in layout else own.numpy()
            np.testing.assert_array_equal(site.tensor.decode(), expected)


def test_sites_that_stay_dense_get_their_weights_back() -> None:
    dense, model = build(), build()
    reports, _ = run(
        model, "prune-magnitude{sparsity=0.9},round-weights,choose-layout{values=fp16},restore-dense"
    )
    assert not any(LAYOUT_KEY in site.node.metadata_props for site in model.sites())
    assert len(reports[-1].changed) == 2
    for site, own in zip(model.sites(), dense.sites(), strict=True):
        np.testing.assert_array_equal(site.numpy(), own.numpy())


def test_without_the_option_nothing_is_narrow() -> None:
    model = build()
    _, costs = run(model, "round-weights,choose-layout,lower-sparse", unstructured=1.0)
    assert costs.asked == [["unstructured"]] * 2
    assert [site.layout for site in packed_sites(model)] == ["unstructured"] * 2


def test_a_weight_changed_after_choosing_is_refused_at_lowering() -> None:
    model = build()
    run(model, "round-weights,choose-layout{values=fp16 layout=unstructured}")
    site = model.sites()[0]
    site.replace(site.numpy() * np.float32(1 / 3))
    ((report,), _) = run(model, "lower-sparse")
    assert [skip.reason for skip in report.skipped] == [
        "a weight is no fp16 number: round the weights first (round-weights)"
    ]
    assert [site.layout for site in packed_sites(model)] == ["fp16 unstructured"]


def test_recurrent_weights() -> None:
    dense, model = build(GRU), build(GRU)
    pipeline = "round-weights,choose-layout{values=fp16},lower-sparse"
    _, costs = run(model, pipeline, fp16_unstructured=1.0)
    assert costs.asked == [["fp16 unstructured", "unstructured"]]
    assert [site.layout for site in packed_sites(model)] == ["fp16 unstructured"] * 2
    emit.finalize(model)
    x = {"x": np.random.default_rng(1).standard_normal((5, 2, 24)).astype(np.float32)}
    for library in (True, False):
        (diff,) = verify.compare(dense, model, x, library=(False, library))
        assert diff.rel_l2 < 1e-3


def test_the_preset_and_the_whole_way(tmp_path) -> None:
    assert "round-weights{values=bf16}" in str(preset(values="bf16"))
    assert "values=bf16" in str(preset(values="bf16", pattern="16x1")).partition("choose-layout")[2]
    with pytest.raises(UsageError, match="unknown type of values 'fp8'; known: fp32, fp16, bf16"):
        preset(values="fp8")
    with pytest.raises(UsageError, match="needs sparse operators"):
        preset(values="fp16", standard_ops_only=True)
    source = tmp_path / "model.onnx"
    rng = np.random.default_rng(2)
    w, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 80), (80, 48)))
    build(w=w, v=v).save(source)
    sizes = {}
    for values in ("fp32", "fp16"):
        result = sparsecc.optimize(
            source, tmp_path / f"{values}.onnx", pattern="16x1", values=values, keep_slower=True, threads=1
        )
        sizes[values] = sum(site.tensor.nbytes for site in packed_sites(Model.load(result.output)))
        assert {site.layout for site in result.sites} == {"16x1" if values == "fp32" else "fp16 16x1"}
        assert result.max_rel_l2 < 1e-5
    assert sizes["fp16"] < 0.56 * sizes["fp32"]
    assert all(
        holds(site.tensor.decode(), "fp16") for site in packed_sites(Model.load(tmp_path / "fp16.onnx"))
    )
    with pytest.raises(UsageError, match="pipeline and values contradict"):
        sparsecc.optimize(source, pipeline="tidy", values="fp16")
