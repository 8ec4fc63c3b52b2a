"""Experts of a mixture merge, in the forms that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.structure.clusters import after, coactivation, distances, merges
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.pm.checks import graph_fault

EXPERTS, WIDTH, HIDDEN, TOKENS = 6, 5, 7, 9

#: Every token takes all experts by their shares; weights are stacked.
DENSE = """
    logits = MatMul(x, router)
    biased = Add(logits, router_bias)
    gates = Softmax<axis = -1>(biased)
    turned = Transpose<perm = [1, 0]>(gates)
    column = Unsqueeze(turned, last)
    up = MatMul(x, w1)
    shifted = Add(up, b1)
    hidden = Relu(shifted)
    down = MatMul(hidden, w2)
    weighted = Mul(down, column)
    y = ReduceSum<keepdims = 0>(weighted, first)
"""

#: The same with two experts per token, whose shares are written into zeros.
SCATTERED = """
    logits = Gemm<transB = 1>(x, router_t, router_bias)
    best, index = TopK(logits, two)
    shares = Softmax<axis = -1>(best)
    size = Shape(logits)
    zeros = ConstantOfShape(size)
    gates = ScatterElements<axis = -1>(zeros, index, shares)
    up = Einsum<equation = "th,ehf->etf">(x, w1)
    hidden = Relu(up)
    down = Einsum<equation = "etf,efh->eth">(hidden, w2)
    y = Einsum<equation = "eth,te->th">(down, gates)
"""

#: Two experts per token, whose weights are looked up.
GATHERED = """
    logits = MatMul(x, router)
    gates = Softmax<axis = -1>(logits)
    best, index = TopK(gates, two)
    w1_of = Gather<axis = 0>(w1, index)
    w2_of = Gather<axis = 0>(w2, index)
    rows = Unsqueeze(x, middle)
    up = MatMul(rows, w1_of)
    hidden = Relu(up)
    down = MatMul(hidden, w2_of)
    flat = Squeeze(down, minus_two)
    shares = Unsqueeze(best, last)
    weighted = Mul(flat, shares)
    y = ReduceSum<keepdims = 0>(weighted, second)
"""


def branches(experts: int = EXPERTS, one_hot: bool = True) -> str:
    """One branch per expert; the share of each is taken out of those of all."""
    lines = ["logits = MatMul(x, router)"]
    if one_hot:
        lines += [
            "best, index = TopK(logits, two)",
            "shares = Softmax<axis = -1>(best)",
            "mask = OneHot<axis = -1>(index, depth, off_on)",
            "column = Unsqueeze(shares, last)",
            "spread = Mul(mask, column)",
            "gates = ReduceSum<keepdims = 0>(spread, second)",
        ]
    else:
        lines.append("gates = Softmax<axis = -1>(logits)")
    for e in range(experts):
        lines += [
            f"g{e} = Gather<axis = 1>(gates, number{e})",
            f"c{e} = Unsqueeze(g{e}, last)",
            f"u{e} = MatMul(x, w1_{e})",
            f"h{e} = Relu(u{e})",
            f"d{e} = MatMul(h{e}, w2_{e})",
            f"p{e} = Mul(d{e}, c{e})",
        ]
    total = "p0"
    for e in range(1, experts):
        lines.append(f"{'y' if e == experts - 1 else f's{e}'} = Add({total}, p{e})")
        total = f"s{e}"
    return "\n".join(lines)


FORMS = {
    "dense": DENSE,
    "scattered": SCATTERED,
    "gathered": GATHERED,
    "branches": branches(),
    "dense branches": branches(one_hot=False),
}


def arrays(twins: tuple[int, ...] = (), seed: int = 0) -> dict[str, NDArray[Any]]:
    """Constants of all forms; the experts ``twins`` are one and the same."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[Any]:
        found = rng.standard_normal(shape).astype(np.float32)
        if shape[0] == EXPERTS:
            found[list(twins)] = found[list(twins[:1])] if twins else found[list(twins)]
        return found

    rows, bias = normal(EXPERTS, WIDTH), normal(EXPERTS)
    w1, w2 = normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
    found: dict[str, NDArray[Any]] = {
        "router": np.ascontiguousarray(rows.T), "router_t": rows, "router_bias": bias,
        "w1": w1, "w2": w2, "b1": normal(EXPERTS, 1, HIDDEN),
        "first": np.array([0]), "second": np.array([1]), "middle": np.array([1, 2]), "last": np.array([-1]),
        "minus_two": np.array([-2]), "two": np.array([2]), "depth": np.array([EXPERTS]),
        "off_on": np.array([0, 1], np.float32),
    }  # fmt: skip
    for e in range(EXPERTS):
        found |= {f"number{e}": np.array(e), f"w1_{e}": w1[e], f"w2_{e}": w2[e]}
    return found


def build(body: str, constants: dict[str, NDArray[Any]], width: int = WIDTH) -> Model:
    head = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
    proto = onnx.parser.parse_model(f"{head} g (float[T,{width}] x) => (float[T,{width}] y) {{ {body} }}")
    used = {name for node in proto.graph.node for name in node.input}
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{number}"
    for name, array in constants.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def run(model: Model, x: NDArray[Any]) -> NDArray[Any]:
    return open_session(model).run({"x": x})["y"]


def prune(model: Model, options: str, calibrated: bool = False) -> PassReport:
    calibration = None
    if calibrated:
        calibration = Calibration.from_batches([{"x": tokens(1)}], model)
    (report,) = Pipeline.parse(f"prune-experts{{{options}}}").run(model, PassContext(calibration=calibration))
    assert graph_fault(model) is None
    return report


def tokens(seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(100 + seed).standard_normal((TOKENS, WIDTH)).astype(np.float32)


def reference(
    form: str, constants: dict[str, NDArray[Any]], kept: list[int], logs: Any, x: Any
) -> NDArray[Any]:
    """What the experts ``kept`` give alone."""
    scores = x @ constants["router"][:, kept] + logs
    if form in ("dense", "scattered"):
        scores = scores + constants["router_bias"][kept]
    gates = np.exp(scores - scores.max(1, keepdims=True))
    best = np.argsort(-gates, 1)[:, :2]
    mask = np.zeros_like(gates)
    np.put_along_axis(mask, best, 1.0, 1)
    if form == "gathered":
        gates = gates / gates.sum(1, keepdims=True) * mask
    else:
        gates = gates if form.startswith("dense") else gates * mask
        gates = gates / gates.sum(1, keepdims=True)
    hidden = np.einsum("th,ehf->etf", x, constants["w1"][kept])
    hidden = np.maximum(hidden + (constants["b1"][kept] if form == "dense" else 0), 0)
    return np.einsum("etf,efh,te->th", hidden, constants["w2"][kept], gates)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_target_is_hit_and_the_rest_computes_what_it_did(form: str, calibrated: bool) -> None:
    constants = arrays((1, 4))
    model = build(FORMS[form], constants)
    np.testing.assert_allclose(
        run(model, tokens()),
        reference(form, constants, list(range(EXPERTS)), 0, tokens()),
        rtol=1e-4,
        atol=1e-4,
    )
    before = model.nbytes
    report = prune(model, "experts=5", calibrated)
    (change,) = report.changed
    assert (change.numbers["experts_before"], change.numbers["experts_after"]) == (EXPERTS, 5)
    assert change.numbers["largest_cluster"] == 2
    kept = [0, 1, 2, 3, 5]
    logs = np.log([1, 2, 1, 1, 1]) if form.startswith("dense") else 0
    np.testing.assert_allclose(
        run(model, tokens()), reference(form, constants, kept, logs, tokens()), rtol=1e-4, atol=1e-4
    )
    assert model.nbytes < before * 0.87


@pytest.mark.parametrize("form", ["dense", "dense branches"])
@pytest.mark.parametrize("representative", ["nearest", "average"])
def test_equal_experts_merge_first_and_change_nothing_where_shares_add_up(
    form: str, representative: str
) -> None:
    """Exact with a softmax over all experts, all of which every token takes."""
    model = build(FORMS[form], arrays((0, 2, 5)))
    expected = run(model, tokens())
    report = prune(model, f"experts=4 representative={representative}")
    assert report.changed[0].numbers["largest_cluster"] == 3
    assert report.changed[0].numbers["relative_error"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(run(model, tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_half_of_them_can_go_but_not_those_that_a_token_takes(form: str) -> None:
    model = build(FORMS[form], arrays())
    assert prune(model, "keep=0.5").changed[0].numbers["experts_after"] == 3
    run(model, tokens())
    stable = model.fingerprint()
    assert prune(model, "keep=0.5").changed == []
    assert model.fingerprint() == stable
    least = 1 if form.startswith("dense") else 2
    assert prune(model, "experts=1").changed[0].numbers["experts_after"] == least
    run(model, tokens())
    left = prune(model, "experts=1")
    assert left.changed == []
    words = "no router of experts" if least == 1 else "nothing to merge: it keeps all 2 experts"
    assert any(words in skip.reason for skip in left.skipped)


def test_averages_are_means_of_the_members() -> None:
    constants = arrays()
    constants["router"][:, 3] = constants["router"][:, 1] + 1e-3
    model = build(FORMS["gathered"], constants)
    prune(model, "experts=5 representative=average")
    shapes = {name: value.const_value.numpy() for name, value in model.onnx.graph.initializers.items()}
    np.testing.assert_allclose(
        shapes["w1.experts"][1], (constants["w1"][1] + constants["w1"][3]) / 2, rtol=1e-6
    )
    np.testing.assert_array_equal(shapes["w1.experts"][[0, 2, 3, 4]], constants["w1"][[0, 2, 4, 5]])
    np.testing.assert_allclose(
        shapes["router.experts"][:, 1], constants["router"][:, [1, 3]].mean(1), rtol=1e-6
    )


def test_over_the_model_layers_with_more_alike_lose_more() -> None:
    first = SCATTERED.replace("y = ", "x2 = ")
    second = SCATTERED
    for word in ("logits", "best", "index", "shares", "size", "zeros", "gates", "up", "hidden", "down"):
        second = second.replace(word, f"{word}_b")
    for word in ("router_t", "router_bias", "w1", "w2"):
        second = second.replace(word, f"{word}_c")
    second = second.replace("(x,", "(x2,")
    constants = arrays((0, 1, 2, 3))
    constants |= {f"{name}_c": array for name, array in arrays(seed=7).items()}
    model = build(first + second, constants)
    report = prune(model, "keep=0.75 scope=model")
    assert [item.numbers["experts_after"] for item in report.changed] == [3]
    run(model, tokens())


def test_contrib_operator_is_cut() -> None:
    constants = arrays((2, 3))
    body = """
        logits = MatMul(x, router)
        y = com.microsoft.MoE<k = 2, activation_type = "relu">(logits_in, logits, w1, , w2)
    """.replace("logits_in", "x")
    model = build(body, constants)
    report = prune(model, "experts=4")
    assert report.changed[0].numbers["experts_after"] == 4
    shapes = {name: value.const_value.shape.numpy() for name, value in model.onnx.graph.initializers.items()}
    assert shapes == {
        "router.experts": (WIDTH, 4), "w1.experts": (4, WIDTH, HIDDEN), "w2.experts": (4, HIDDEN, WIDTH)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("y = ReduceSum<keepdims = 0>(weighted, first)", "y = ReduceMean<keepdims = 0, axes = [0]>(weighted)"),
         "ReduceMean"),
        (("gates = Softmax<axis = -1>(biased)", "gates = Softmax<axis = -1>(biased) more = CumSum(gates, first)"),
         "CumSum"),
        (("biased = Add(logits, router_bias)", "biased = Add(logits, logits_of) "), "mixes experts"),
        (("up = MatMul(x, w1)", "some = Expand(x, wide) up = MatMul(some, w1)"), "Expand"),
    ],
)  # fmt: skip
def test_other_forms_are_left_alone(change: tuple[str, str], words: str) -> None:
    body = DENSE.replace(*change)
    body = "logits_of = MatMul(x, other) " + body if "logits_of" in body else body
    constants = arrays() | {
        "other": np.ones((WIDTH, EXPERTS), np.float32),
        "wide": np.array([EXPERTS, 1, 1]),
    }
    model = build(body, constants)
    before = model.fingerprint()
    report = prune(model, "experts=3")
    assert report.changed == []
    assert model.fingerprint() == before
    assert any("no mixture that is understood" in s.reason and words in s.reason for s in report.skipped)


def test_plain_layers_are_no_routers() -> None:
    model = build(
        "a = MatMul(x, square) b = Relu(a) y = Softmax<axis = -1>(b)", {"square": np.eye(WIDTH, dtype="f")}
    )
    report = prune(model, "experts=2")
    assert [item.reason for item in report.skipped] == [
        "no router of experts: nothing chooses between its outputs"
    ]
    model = build("a = MatMul(x, square) y = Softmax<axis = -1>(a)", {"square": np.eye(WIDTH, dtype="f")})
    assert "is an output of the model" in prune(model, "experts=2").skipped[0].reason


def test_clusters_obey_complete_linkage() -> None:
    """Against brute force: at every number of clusters all cross pairs are under the height of the last merge."""
    rng = np.random.default_rng(3)
    distance = distances(rng.standard_normal((7, 4)), None, 1.0)
    found = merges(distance)
    heights = [height for _, _, height in found]
    assert heights == sorted(heights)
    for count in range(1, 7):
        clusters = after(found[:count], 7)
        assert sorted(item for cluster in clusters for item in cluster) == list(range(7))
        assert len(clusters) == 7 - count
        inside = [distance[i, j] for cluster in clusters for i in cluster for j in cluster if i != j]
        assert max(inside) == pytest.approx(heights[count - 1])
        apart = [max(distance[i, j] for i in a for j in b) for a in clusters for b in clusters if a is not b]
        assert not apart or min(apart) >= heights[count - 1]


def test_being_chosen_together_counts_against_distance() -> None:
    scores = np.array([[3.0, 2.0, 1.0, 0.0]] * 3 + [[3.0, 0.0, 2.0, 1.0]])
    together = coactivation(scores, 2)
    assert together[0, 1] == 3
    assert together[0, 2] == 1
    assert together[2, 3] == 0
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert merges(distances(rows, together, 1.0))[0][:2] == (0, 1)
    assert merges(distances(rows, together[::-1, ::-1], 1.0))[0][:2] == (2, 3)


@pytest.mark.parametrize("option", ["keep=1", "keep=0", "experts=0", "coactivation=-1"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(SpecError, match="prune-experts"):
        Pipeline.parse(f"prune-experts{{{option}}}")
