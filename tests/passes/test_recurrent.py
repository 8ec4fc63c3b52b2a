"""LSTM and GRU, also inside If and Loop: chosen, confirmed and lowered as pairs of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.ir import Model, Site
from sparsecc.ir.packed import packed_sites
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.passes.lower.recurrent import candidate_pairs, recurrent_form, weight_pair
from sparsecc.plan import CostTable
from sparsecc.plan.timing import MeasuredCosts, input_shapes_of_sites, runs_of_sites
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.sparse import Layout, Pattern, keep_mask

UNSTRUCTURED = Layout(Pattern("unstructured"))
PLAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[t, n, 24] x) => (float[t, d, n, 16] y, float[d, n, 16] h, float[d, n, 16] c) {
    [cell] y, h, c = LSTM<hidden_size = 16>(x, w, r, b)
}"""
REVERSED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[t, n, 24] x, int32[n] lengths, float[1, n, 16] h0) => (float[1, n, 16] h) {
    [cell] y, h = GRU<hidden_size = 16, direction = "reverse", linear_before_reset = 1,
        activations = ["Sigmoid", "Tanh"]>(x, w, r, b, lengths, h0)
}"""
BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[t, n, 24] x, float[1, n, 16] h0, bool c) => (float[1, n, 16] y) {
    y = If (c) <
        then_branch = carry () => (float[1, n, 16] p) {
            [first] all, p, last = LSTM<hidden_size = 16>(x, w, r, b, "", h0, h0)
        },
        else_branch = fresh () => (float[1, n, 16] q) {
            twice = Add(x, x) [second] q0, q = LSTM<hidden_size = 16>(twice, w, r)
        }
    >
}"""
LOOP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 16] x, int64 rounds) => (float[n, 16] y) {
    go = Constant <value = bool {1}> ()
    y = Loop (rounds, go, x) <
        body = once (int64 i, bool keep, float[n, 16] state) => (bool keep_on, float[n, 16] next) {
            keep_on = Identity(keep)
            [fc] h = MatMul(state, v)
            next = Tanh(h)
        }
    >
}"""


def build(
    text: str, layouts: Sequence[str] = ("16x1", "16x1"), sparsity: float = 0.7, directions: int = 1
) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    gates = (4 if "LSTM" in text else 3) * 16
    names = {
        "w": (directions, gates, 24),
        "r": (directions, gates, 16),
        "b": (directions, 2 * gates),
        "v": (16, 16),
    }
    for index, (name, shape) in enumerate(names.items()):
        array = rng.standard_normal(shape, dtype=np.float32) / 4
        if name != "b":
            matrix = array.reshape(-1, shape[-1]) if name != "v" else array.T
            pattern = Pattern.parse(layouts[index % 2])
            matrix *= keep_mask(np.abs(matrix), pattern, sparsity if pattern.needs_sparsity else None)
        if f" {name}," in text or f" {name})" in text:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


@dataclass
class FakeCosts:
    times: Mapping[str, float]
    relative: float = 0.5
    asked: list[Any] = field(default_factory=list)

    def site_times_ms(self, model: Model, site: Site, patterns: Sequence[Pattern]) -> Mapping[str, float]:
        raise AssertionError("no site here is timed by itself")

    def recurrent_times_ms(
        self, model: Model, site: Site, layouts: Sequence[tuple[Layout, Layout]]
    ) -> Mapping[str, float]:
        self.asked.append((site.name, layouts))
        return self.times

    def relative_time(self, model: Model, sites: frozenset[str], quantization: object = None) -> float:
        self.asked.append(sites)
        return self.relative if sites else 1.0


def run(model: Model, pipeline: str, costs: Any = None) -> list[PassReport]:
    return Pipeline.parse(pipeline).run(model, PassContext(costs=costs))


def operators(model: Model) -> list[str]:
    return [node.op_type for graph in model.graphs() for node in graph if node.domain == "ai.sparsecc"]


def assert_same(dense: Model, lowered: Model, inputs: Mapping[str, np.ndarray]) -> None:
    emit.finalize(lowered)
    onnx.checker.check_model(lowered.to_proto(), full_check=True)
    for library in (True, False):
        assert verify.worst_rel_l2(verify.compare(dense, lowered, inputs, library=(False, library))) <= 2e-6


def inputs_of(model: Model, steps: int = 5, rows: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    sizes = {"t": steps, "n": rows}
    inputs = {
        spec.name: rng.standard_normal([sizes.get(dim, dim) for dim in spec.shape]).astype(np.float32)
        for spec in model.input_specs()
    }
    fixed = {"lengths": np.array([steps, 1, 2], np.int32), "c": np.array(True), "rounds": np.array(3)}
    return {name: fixed.get(name, array) for name, array in inputs.items()}


@pytest.mark.parametrize("layout", ["16x1", "4x1", "unstructured", "2:4"])
def test_lowered_means_the_same(layout: str) -> None:
    for text in (PLAIN, REVERSED):
        dense = build(text, (layout, layout))
        model = dense.copy()
        reports = run(model, f"choose-layout{{layout={layout}}},lower-sparse")
        assert [change.site for change in reports[0].changed] == ["cell.W", "cell.R"]
        assert [change.site for change in reports[1].changed] == ["cell.W", "cell.R"]
        assert operators(model) == ["SparseLSTM" if text is PLAIN else "SparseGRULengthsState"]
        assert not {"w", "r", "b"} & set(model.onnx.graph.initializers)
        assert_same(dense, model, inputs_of(dense))
        read_back = {site.name: site.tensor.decode() for site in packed_sites(model)}
        for site in dense.sites():
            np.testing.assert_array_equal(read_back[site.name], site.numpy())


def test_bidirectional() -> None:
    dense = build(PLAIN.replace("hidden_size", 'direction = "bidirectional", hidden_size'), directions=2)
    model = dense.copy()
    run(model, "choose-layout{layout=16x1},lower-sparse")
    assert operators(model) == ["SparseLSTM"]
    assert_same(dense, model, inputs_of(dense))


def test_one_weight_shared_by_two_branches() -> None:
    """Each branch gets constants of its own: onnxruntime up to 1.24 shows a kernel no others."""
    dense = build(BRANCHES, ("16x1", "unstructured"))
    model = dense.copy()
    costs = FakeCosts({"dense": 3.0, **dict.fromkeys(_names(dense), 2.0), "16x1+unstructured": 1.0})
    reports = run(model, "choose-layout,confirm-layout,lower-sparse", costs)
    assert [change.detail for change in reports[0].changed] == [
        "16x1+unstructured 1 ms, dense 3 ms (3.00x)",
        "16x1+unstructured, with first.W",
    ]
    assert operators(model) == ["SparseLSTMState", "SparseLSTM"]
    inputs = inputs_of(dense)
    for c in (True, False):
        assert_same(dense, model, {**inputs, "c": np.array(c)})
    nodes = [node for graph in model.graphs() for node in graph if node.domain == "ai.sparsecc"]
    assert len({id(node.graph) for node in nodes}) == 2
    for node in nodes:
        constants = [value for value in node.inputs if value is not None and value.const_value is not None]
        assert {value.name for value in constants} <= set(node.graph.initializers)


def _names(model: Model) -> list[str]:
    site = model.sites()[0]
    pairs = candidate_pairs(recurrent_form(model, weight_pair(model, site), site.node))
    return [f"{w}+{r}" if w != r else str(w) for w, r in pairs]


def test_a_dense_weight_beside_a_sparse_one_is_kept_whole() -> None:
    dense = build(PLAIN, ("unstructured", "4x1"))
    w = dense.sites()[0]
    w.replace(np.random.default_rng(3).standard_normal(w.shape).astype(np.float32))
    assert {name.split("+")[0] for name in _names(dense)} == {"16x1"}
    model = dense.copy()
    run(
        model,
        "choose-layout,lower-sparse",
        FakeCosts({"dense": 9.0, **dict.fromkeys(_names(dense), 2.0), "16x1+4x1": 1.0}),
    )
    assert [str(site.tensor.pattern) for site in packed_sites(model)] == ["16x1", "4x1"]
    assert_same(dense, model, inputs_of(dense))


def test_both_weights_stay_dense_together() -> None:
    for costs, words in (
        (FakeCosts({"dense": 1.0}), "dense is faster"),
        (FakeCosts({"dense": 3.0}, relative=0.99), "dense after all"),
    ):
        model = build(PLAIN)
        costs.times = {**dict.fromkeys(_names(model), 2.0), **costs.times}
        reports = run(model, "choose-layout,confirm-layout,lower-sparse", costs)
        text = " ".join(
            [entry.reason for r in reports for entry in r.skipped]
            + [c.detail for r in reports for c in r.changed]
        )
        assert words in text
        assert operators(model) == []
        assert all(LAYOUT_KEY not in site.node.metadata_props for site in model.sites())


def test_pruning_is_undone_for_pairs_that_stay_dense() -> None:
    dense = build(PLAIN, ("unstructured", "unstructured"), sparsity=0.0)
    model = dense.copy()
    costs = FakeCosts({"dense": 1.0, "unstructured": 2.0, **dict.fromkeys(("16x1",), 2.0)})
    pipeline = (
        "prune-magnitude{sparsity=0.8 min-elements=0},choose-layout,confirm-layout,restore-dense,lower-sparse"
    )
    run(model, pipeline, costs)
    for ours, theirs in zip(dense.sites(), model.sites(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("hidden_size = 16", "hidden_size = 16, clip = 3.0", "clip"),
        ("hidden_size = 16", "hidden_size = 16, input_forget = 1", "input_forget"),
        ("hidden_size = 16", "hidden_size = 16, layout = 1", "layout=1"),
        ("hidden_size = 16", 'hidden_size = 16, activations = ["Relu", "Tanh", "Tanh"]', "activations"),
        ("(x, w, r, b)", '(x, w, r, b, "", "", "", p)', "peepholes"),
        ("(x, w, r, b)", '(x, w, r, b, "", h0)', "only one"),
        ("(x, w, r, b)", "(x, w, r, given)", "bias"),
        ('["" : 17]', '["" : 10]', "opset 10"),
    ],
)
def test_refused(old: str, new: str, reason: str) -> None:
    text = PLAIN.replace(
        "(float[t, n, 24] x)", "(float[t, n, 24] x, float[1, 48] p, float[1, 128] given, float[1, n, 16] h0)"
    )
    model = build(text.replace(old, new))
    (report, _) = run(model, "choose-layout{layout=16x1},lower-sparse")
    assert not report.changed
    assert reason in report.skipped[0].reason
    assert report.skipped[1].reason == "decided together with cell.W"


def test_weights_without_zeros_are_timed_too_and_kept_where_that_is_faster() -> None:
    dense = build(PLAIN, ("dense", "dense"))
    for milliseconds, expected in ((1.0, ["SparseLSTM"]), (3.0, [])):
        model, costs = dense.copy(), FakeCosts({"dense": 2.0, "16x1": milliseconds})
        run(model, "choose-layout,lower-sparse", costs)
        assert operators(model) == expected
        assert costs.asked == [("cell.W", ((Layout.parse("16x1"),) * 2,))]
        assert_same(dense, model, inputs_of(dense))


def test_weights_without_zeros_are_rounded_where_the_operator_takes_them() -> None:
    model = build(PLAIN, ("dense", "dense"))
    (report, layout, _) = run(
        model,
        "round-weights,choose-layout{values=fp16},lower-sparse",
        FakeCosts({"dense": 2.0, "fp16 16x1": 1.0, "16x1": 1.5}),
    )
    assert [change.site for change in report.changed] == ["cell.W", "cell.R"]
    assert "fp16 16x1" in layout.changed[0].detail
    refused = build(PLAIN.replace("hidden_size = 16", "hidden_size = 16, clip = 3.0"), ("dense", "dense"))
    (report,) = run(refused, "round-weights")
    assert all("it has no zeros" in skip.reason for skip in report.skipped)


def test_blocks_that_cross_gates_are_refused() -> None:
    model = build(PLAIN, ("64x1", "64x1"))
    (report,) = run(model, "choose-layout{layout=64x1}")
    assert "blocks of 64 outputs cross its gates of 16 units" in report.skipped[0].reason


def test_weights_not_shared_by_the_same_nodes_are_refused() -> None:
    proto = build(BRANCHES).to_proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((1, 64, 16), np.float32), "r2"))
    (second,) = [node for node in proto.graph.node[0].attribute[1].g.node if node.op_type == "LSTM"]
    second.input[2] = "r2"
    model = Model.from_proto(proto)
    assert [site.name for site in model.sites()] == ["first.W", "first.R", "second.R"]
    (report,) = run(model, "choose-layout{layout=16x1}")
    assert all("do not share" in skip.reason for skip in report.skipped)


def _costs(model: Model, **changes: Any) -> MeasuredCosts:
    return MeasuredCosts(CostTable(None, {}), {**inputs_of(model), **changes}, threads=1)


def test_sites_in_bodies_are_timed() -> None:
    model = build(BRANCHES)
    assert input_shapes_of_sites(model, inputs_of(model)) == {"first.W": (5, 3, 24)}
    pairs = [(Layout.parse("16x1"),) * 2, (Layout.parse("16x1"), Layout.parse("unstructured"))]
    times = _costs(model).recurrent_times_ms(model, model.sites()[0], pairs)
    assert set(times) == {"dense", "16x1", "16x1+unstructured"}
    assert min(times.values()) > 0
    loop = build(LOOP)
    (site,) = loop.sites()
    assert input_shapes_of_sites(loop, inputs_of(loop)) == {"fc": (3, 16)}
    assert runs_of_sites(loop, inputs_of(loop) | {"rounds": np.array(7)}) == {"fc": 7}
    assert runs_of_sites(model, inputs_of(model)) == {"first.W": 1}
    times = _costs(loop).site_times_ms(loop, site, [UNSTRUCTURED])
    assert set(times) == {"dense", "unstructured"}
    with pytest.raises(Exception, match="do not reach it"):
        _costs(loop, rounds=np.array(0)).site_times_ms(loop, site, [UNSTRUCTURED])


def test_a_site_in_a_loop_is_lowered() -> None:
    dense = build(LOOP)
    model = dense.copy()
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    assert operators(model) == ["SparseMatMulTanh"]
    assert_same(dense, model, inputs_of(dense))
