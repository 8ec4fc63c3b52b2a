"""Attention with a constant mask: what is understood, what is refused and why, and that nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
import scipy.sparse
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.lower.constant_masks import seen_keys
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.sparse_steps import match_steps
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.pm.checks import graph_fault, signature

N, SIZE = 40, 8
ROW, KEY = np.arange(N)[:, None], np.arange(N)[None, :]
SEEN = {
    "window": abs(ROW - KEY) <= 5,
    "causal window": (KEY <= ROW) & (KEY > ROW - 7),
    "blocks": ROW // 10 == KEY // 10,
    "window and global keys": (abs(ROW - KEY) <= 3) | (KEY < 2),
    "keys hidden from all": np.broadcast_to(KEY < 25, (N, N)),
}


def mask_of(seen: np.ndarray, hidden: float = -np.inf) -> np.ndarray:
    return np.where(seen, 0, hidden).astype(np.float32)


def build(body: str, opset: int = 18, rows: int | str = N, **constants: np.ndarray) -> Model:
    """Attention in q, k and v [B,3,rows,SIZE]; ``body`` makes scores ``s`` into weights ``w``."""
    shape = f"float[B,3,{rows},{SIZE}]"
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g ({shape} q, {shape} k, {shape} v) => ({shape} y) {{
        t = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, t)
        {body}
        y = MatMul(w, v)
    }}"""
    proto = onnx.parser.parse_model(text)
    for name, array in {"c": np.array(SIZE**-0.5, np.float32), **constants}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


ADDED = "a = Mul(s, c) b = Add(a, m) [soft] w = Softmax<axis=-1>(b)"


def sparsify(model: Model, costs: Any = None, **options: str) -> PassReport:
    given = {**({} if costs else {"min-gain": "0"}), **options}
    text = " ".join(f"{key}={value}" for key, value in given.items())
    (report,) = Pipeline.parse(f"sparsify-attention{{{text}}}" if text else "sparsify-attention").run(
        model, PassContext(costs=costs)
    )
    assert graph_fault(model) is None
    return report


def check_same(before: Model, after: Model, tolerance: float = 1e-5) -> None:
    assert signature(before) == signature(after)
    pair = [before.copy(), after.copy()]
    for each in pair:
        emit.finalize(each)
        onnx.checker.check_model(each.to_proto(), full_check=True)
    inputs = verify.make_inputs(pair[0], None, 0, {name: (2, 3, N, SIZE) for name in "qkv"})
    for library in (True, False):
        assert verify.worst_rel_l2(verify.compare(*pair, inputs, library=(library, library))) <= tolerance


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.onnx.graph]


@pytest.mark.parametrize("which", list(SEEN))
@pytest.mark.parametrize("hidden", [-np.inf, -1e9, np.finfo(np.float32).min])
def test_masks_that_are_understood(which: str, hidden: float) -> None:
    before = build(ADDED, m=mask_of(SEEN[which], hidden)[None, None])
    after = before.copy()
    report = sparsify(after)
    (change,) = report.changed
    assert change.site == "soft"
    assert change.numbers["density"] == pytest.approx(SEEN[which].mean())
    assert change.numbers["nbytes_before"] == 4 * N * N
    assert op_types(after) == ["SparseAttention"]
    check_same(before, after)
    assert not sparsify(after).changed


FORMS = {
    "mask first": "a = Div(s, c) b = Add(m, a) [soft] w = Softmax(b)",
    "no factor": "b = Add(s, m) [soft] w = Softmax<axis=3>(b)",
    "where seen": "a = Mul(s, c) b = Where(seen, a, never) [soft] w = Softmax<axis=-1>(b)",
    "where hidden": "a = Mul(s, c) b = Where(unseen, low, a) [soft] w = Softmax<axis=-1>(b)",
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("opset", [16, 18, 21])
def test_forms(form: str, opset: int) -> None:
    seen = SEEN["causal window"]
    before = build(FORMS[form], opset, m=mask_of(seen), seen=seen, unseen=~seen[None],
                   never=np.array(-np.inf, np.float32), low=np.array([-3e38], np.float32))  # fmt: skip
    after = before.copy()
    assert len(sparsify(after).changed) == 1
    assert op_types(after) == ["SparseAttention"]
    check_same(before, after)


GUARDED = "a = Mul(s, c) b = Add(a, m) [soft] r = Softmax<axis=-1>(b) n = IsNaN(r) w = Where(n, zero, r)"


@pytest.mark.parametrize("blind", [False, True])
def test_guard_against_rows_that_see_nothing(blind: bool) -> None:
    """As PyTorch exports attention with a mask of truth values."""
    seen = SEEN["window"] & ((ROW % 7 != 3) | (not blind))
    before = build(GUARDED, m=mask_of(seen), zero=np.zeros(1, np.float32))
    after = before.copy()
    assert len(sparsify(after).changed) == 1
    assert op_types(after) == ["SparseAttention"]
    check_same(before, after)


@pytest.mark.parametrize(
    ("body", "mask", "zero"),
    [
        (GUARDED, np.where(ROW == 7, -1e9, mask_of(SEEN["window"])), 0.0),
        (GUARDED, mask_of(SEEN["window"]), 0.5),
        (GUARDED.replace("zero, r", "r, zero"), mask_of(SEEN["window"]), 0.0),
    ],
)
def test_other_guards_are_left_alone(body: str, mask: np.ndarray, zero: float) -> None:
    model = build(body, m=mask.astype(np.float32), zero=np.full(1, zero, np.float32))
    assert not sparsify(model).changed


def rows_model(keys: str, heads: int = 3) -> Model:
    """From rows [B,N,W] as a projection gives them; ``keys`` makes ``t`` [B,heads,SIZE,N] of ``k4``."""
    width = heads * SIZE
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 18]>
    g (float[B,{N},{width}] q, float[B,{N},{width}] k, float[B,{N},{width}] v) => (float[B,{N},{width}] y) {{
        q4 = Reshape(q, cut) k4 = Reshape(k, cut) v4 = Reshape(v, cut)
        qh = Transpose<perm=[0,2,1,3]>(q4)
        qs = Mul(qh, c)
        vh = Transpose<perm=[0,2,1,3]>(v4)
        {keys}
        s = MatMul(qs, t)
        b = Add(s, m)
        [soft] w = Softmax<axis=-1>(b)
        y4 = MatMul(w, vh)
        yr = Transpose<perm=[0,2,1,3]>(y4)
        y = Reshape(yr, join)
    }}""")
    constants = {
        "cut": np.array([0, 0, heads, SIZE]), "join": np.array([0, 0, width]),
        "c": np.array(0.5, np.float32), "m": mask_of(SEEN["window"]),
    }  # fmt: skip
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    "keys",
    [
        "t = Transpose<perm=[0,2,3,1]>(k4)",
        "kh = Transpose<perm=[0,2,1,3]>(k4) kt = Transpose<perm=[0,1,3,2]>(kh) t = Mul(kt, c)",
        "kh = Transpose<perm=[0,2,3,1]>(k4) t = Relu(kh)",
    ],
)
def test_keys_however_they_are_turned(keys: str) -> None:
    before = rows_model(keys)
    after = before.copy()
    assert len(sparsify(after).changed) == 1
    assert "Softmax" not in op_types(after)
    shapes = {name: (2, N, 3 * SIZE) for name in "qkv"}
    pair = [before.copy(), after.copy()]
    for each in pair:
        emit.finalize(each)
    inputs = verify.make_inputs(pair[0], None, 0, shapes)
    for library in (True, False):
        assert verify.worst_rel_l2(verify.compare(*pair, inputs, library=(library, library))) <= 1e-5


def test_attentions_with_one_mask_share_its_pattern() -> None:
    window, other = mask_of(SEEN["window"]), mask_of(SEEN["blocks"])
    shape = f"float[B,3,{N},{SIZE}]"
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 18]>
    g ({shape} q) => ({shape} y) {{
        t1 = Transpose<perm=[0,1,3,2]>(q) s1 = MatMul(q, t1) b1 = Add(s1, m1) [one] w1 = Softmax(b1) x1 = MatMul(w1, q)
        t2 = Transpose<perm=[0,1,3,2]>(x1) s2 = MatMul(x1, t2) b2 = Add(s2, m2) [two] w2 = Softmax(b2) x2 = MatMul(w2, x1)
        t3 = Transpose<perm=[0,1,3,2]>(x2) s3 = MatMul(x2, t3) b3 = Add(s3, m1) [three] w3 = Softmax(b3) y = MatMul(w3, x2)
    }}""")  # noqa: E501
    for name, array in (("m1", window), ("m2", other)):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))

    class Costs:
        """The window pays, the blocks do not."""

        asked = 0

        def relative_time_of(self, model: Model, candidate: Model) -> float:
            self.asked += 1
            new = [node for node in candidate.onnx.graph if node.op_type == "SparseAttention"]
            return 0.5 if {str(node.name) for node in new} == {"one", "three"} else 2.0

    model, costs = Model.from_proto(proto), Costs()
    report = sparsify(model, costs)
    assert [change.site for change in report.changed] == ["one", "three"]
    assert [change.numbers["gain"] for change in report.changed] == [2.0, 2.0]
    assert [skip.site for skip in report.skipped] == ["two"]
    assert "would make the model 0.500x as fast" in report.skipped[0].reason
    assert costs.asked == 2
    assert {name for name in model.onnx.graph.initializers if "m1" not in name} == {
        "m2", "one.positions", "one.coordinates", "one.shape",
    }  # fmt: skip


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (ADDED, {"m": mask_of(SEEN["window"], -1e4)}, "holds -10000, which is neither 0 nor at most -1e+09"),
    (ADDED, {"m": mask_of(SEEN["window"]) + np.float32(0.5) * (KEY == 3)}, "holds 0.5"),
    (ADDED, {"m": np.where(ROW == 7, -np.inf, mask_of(SEEN["window"])).astype(np.float32)}, "query 7 sees no key"),
    (ADDED, {"m": np.where(ROW == 7, -1e9, mask_of(SEEN["window"])).astype(np.float32)}, "query 7 sees no key"),
    (ADDED, {"m": np.zeros((N, N), np.float32)}, "hides nothing"),
    (ADDED, {"m": np.full((N, N), np.nan, np.float32)}, "not of numbers"),
    (ADDED, {"m": np.stack([mask_of(SEEN[k]) for k in ("window", "blocks", "window")])}, "not the same for all"),
    (ADDED, {"m": np.stack([mask_of(SEEN["window"])] * 3)[:, None]}, "[3, 1, 40, 40] may be larger than the scores"),
    ("a = Mul(s, c) [soft] w = Softmax(a)", {}, "it has no mask"),
    ("r = Relu(s) b = Add(s, r) [soft] w = Softmax(b)", {}, "computed at run time"),
    ("e = Add(s, m) b = Where(seen, e, low) [soft] w = Softmax(b)",
     {"m": mask_of(SEEN["window"]), "seen": SEEN["window"], "low": np.array(-1e9, np.float32)}, "two masks"),
    ("b = Add(s, m) [soft] w = Softmax<axis=2>(b)", {"m": mask_of(SEEN["window"])}, "not over the keys"),
    ("x = Sigmoid(s) b = Add(x, m) [soft] w = Softmax(b)", {"m": mask_of(SEEN["window"])}, "not a scaled product"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "constants", "reason"), REFUSED)
def test_refused_with_a_reason(body: str, constants: dict[str, Any], reason: str) -> None:
    model = build(body, **constants)
    bytes_before = model.fingerprint()
    report = sparsify(model)
    assert not report.changed
    assert model.fingerprint() == bytes_before
    (skip,) = report.skipped
    assert skip.site == "soft"
    assert reason in skip.reason


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("b = Add(s, m) [soft] w = Softmax(b)", {"m": mask_of(SEEN["window"])[None, None, None]}),
        ("b = Where(m, s, low) [soft] w = Softmax(b)",
         {"m": SEEN["window"], "low": np.full((1,) * 5, -np.inf, np.float32)}),
    ],
)  # fmt: skip
def test_masks_that_add_an_axis_are_left_alone(body: str, constants: dict[str, Any]) -> None:
    model = build(body, **constants)
    model.onnx.graph.outputs[0].shape = None
    bytes_before = model.fingerprint()
    assert sparsify(model).skipped
    assert model.fingerprint() == bytes_before


def test_mask_of_every_head_may_be_the_same() -> None:
    before = build(ADDED, m=np.stack([mask_of(SEEN["window"])] * 3))
    after = before.copy()
    assert len(sparsify(after).changed) == 1
    check_same(before, after)


def test_unknown_sizes_are_refused() -> None:
    report = sparsify(build(ADDED, rows="S", m=mask_of(SEEN["window"])))
    assert [skip.reason for skip in report.skipped] == ["the numbers of queries and keys are not known"]


def test_weights_that_are_read_otherwise_stay() -> None:
    model = build(ADDED + " z = Relu(w) u = MatMul(z, v)", m=mask_of(SEEN["window"]))
    model.infer_shapes()
    model.onnx.graph.outputs.append(
        next(node for node in model.onnx.graph if node.op_type == "Relu").outputs[0]
    )
    model.onnx.graph.outputs.append(
        next(node for node in model.onnx.graph if node.op_type == "Relu").outputs[0]
    )
    assert not sparsify(model).changed


def test_option_hidden() -> None:
    before = build(ADDED, m=mask_of(SEEN["window"], -1e4))
    after = before.copy()
    assert len(sparsify(after, hidden="-10000.0").changed) == 1
    check_same(before, after)
    with pytest.raises(SpecError, match="must be below 0"):
        Pipeline.parse("sparsify-attention{hidden=0.0}")


def test_old_opset_and_missing_costs() -> None:
    old = build(ADDED, 13, m=mask_of(SEEN["window"]))
    assert sparsify(old).notes == ["opset 13 is below 16: nothing is changed"]
    with pytest.raises(UsageError, match="min-gain=0"):
        Pipeline.parse("sparsify-attention").run(build(ADDED, m=mask_of(SEEN["window"])), PassContext())


def test_seen_keys_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        shape = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        seen = rng.random(shape) < rng.random()
        try:
            found = seen_keys(mask_of(seen, -1e12)[(None,) * int(rng.integers(0, 3))], shape, -1e9)
        except Refusal:
            assert seen.all() or not seen.any(1).all(), trial
            continue
        rows = [
            found.coordinates[a:b].tolist()
            for a, b in zip(found.positions[:-1], found.positions[1:], strict=True)
        ]
        assert rows == [np.flatnonzero(row).tolist() for row in seen]
        assert found.density == seen.mean()
    with pytest.raises(Refusal, match="not one of 3 queries and 4 keys"):
        seen_keys(np.zeros((4, 3), np.float32), (3, 4), -1e9)
    with pytest.raises(Refusal, match="not the same"):
        seen_keys(np.zeros((0, 3, 4), np.float32), (3, 4), -1e9)


def steps_of(seen: np.ndarray, **changes: np.ndarray) -> Model:
    """Attention in three sparse operators; ``changes`` are other constants for its initializers."""
    model = emit.sparse_attention_model(scipy.sparse.csr_array(seen.astype(np.float32)), heads=3, size=SIZE)
    for name, array in changes.items():
        value = model.onnx.graph.initializers[f"pattern.{name}"]
        value.const_value = onnx_ir.Tensor(array, name=value.name)
    return model


@pytest.mark.parametrize("which", list(SEEN))
@pytest.mark.parametrize("blind", [False, True])
def test_three_sparse_operators_become_one(which: str, blind: bool) -> None:
    seen = SEEN[which].copy()
    seen[5] &= not blind
    model = steps_of(seen)
    before = model.copy()
    report = sparsify(model)
    assert [change.detail.split()[0] for change in report.changed] == ["SparseAttention"]
    assert op_types(model) == ["SparseAttention"]
    check_same(before, model)


def test_steps_that_are_left_alone_have_a_reason() -> None:
    seen = SEEN["window"]
    entries = int(seen.sum())
    rng = np.random.default_rng(0)
    for model, reason in (
        (steps_of(seen, values=rng.random(entries).astype(np.float32)), "factors of their own"),
        (steps_of(seen, values=np.full(entries, np.inf, np.float32)), "factors of their own"),
        (steps_of(seen, shape=np.array([N, 3])), "malformed"),
        (steps_of(seen, shape=np.array([N, N + 1])), "to fit the pattern"),
    ):
        assert reason in sparsify(model).skipped[0].reason
        assert len(op_types(model)) == 3
    model = steps_of(seen)
    weights = next(node for node in model.onnx.graph if node.op_type == "SparseSoftmax").outputs[0]
    weights.type, weights.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(("B", 3, entries))
    model.onnx.graph.outputs.append(weights)
    assert "read elsewhere" in sparsify(model).skipped[0].reason
    model = steps_of(seen)
    context = list(model.onnx.graph)[-1]
    other = emit.csr_constants(
        model.onnx.graph, scipy.sparse.csr_array(SEEN["causal window"].astype(np.float32)), "o"
    )
    context.replace_input_with(0, other.positions)
    context.replace_input_with(1, other.coordinates)
    softmax = next(node for node in model.onnx.graph if node.op_type == "SparseSoftmax")
    with pytest.raises(Refusal, match="different patterns"):
        match_steps(softmax)
    context.replace_input_with(0, model.onnx.graph.inputs[0])
    with pytest.raises(Refusal, match="computed when the model runs"):
        match_steps(softmax)
    assert match_steps(context) is None
