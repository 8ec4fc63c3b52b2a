"""Another order of channels: the same outputs, and more of the scores under the mask of the prune pass."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc import verify
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.structure.regroup import BlockTerm, GroupTerm, regroup
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import Pattern, keep_mask

MLP = """g (float[B,32] x) => (float[B,24] y) {
    [up] h = MatMul(x, w) a = Add(h, b) r = Relu(a) [down] y = MatMul(r, v) }"""
CNN = """g (float[B,3,6,6] x) => (float[B,5,6,6] y) {
    [c1] a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [c2] c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, w2) s = Add(c, r) [c3] y = Conv(s, w3) }"""


def build(text: str, **shapes: tuple[int, ...]) -> Model:
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, shape in shapes.items():
        # Columns and rows of very different size: what a good order can use.
        array = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[:1] + (1,) * (len(shape) - 1)))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def mlp() -> Model:
    return build(MLP, w=(32, 64), b=(64,), v=(64, 24))


def cnn() -> Model:
    return build(CNN, w1=(16, 3, 3, 3), b1=(16,), w2=(16, 16, 3, 3), w3=(5, 16, 1, 1))


def kept(model: Model, prune: str) -> float:
    (report,) = Pipeline.parse(prune).run(model.copy(), PassContext())
    return sum(float(change.numbers["kept_score"]) for change in report.changed)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize(
    "pattern", ["2:4", "4:8", "4x1 sparsity=0.5", "4x4 sparsity=0.6", "1x4 sparsity=0.5"]
)
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_outputs_stay_and_more_is_kept(make, pattern: str, scope: str) -> None:
    model = make()
    options = f"pattern={pattern} scope={scope} min-elements=1 min-reduction=1"
    by_channel = " by-channel=true" if make is cnn else ""
    prune = f"prune-magnitude{{{options}{by_channel}}}"
    dense, inputs = model.copy(), verify.make_inputs(model, seed=2)
    before = kept(model, prune)
    (report,) = Pipeline.parse(f"permute{{{options}{by_channel}}}").run(model, PassContext())
    assert report.changed, report.skipped
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs)) < 1e-6
    assert kept(model, prune) > before
    for change in report.changed:
        assert change.numbers["kept_after"] > change.numbers["kept_before"]


def test_score_of_the_report_is_that_of_the_prune_pass() -> None:
    model = mlp()
    options = "pattern=4x1 sparsity=0.5 scope=row min-elements=1"
    (report,) = Pipeline.parse(f"permute{{{options} match=up}}").run(model, PassContext())
    assert report.changed[0].numbers["kept_after"] == pytest.approx(
        kept(model, f"prune-magnitude{{{options} match=up}}"), abs=1e-5
    )


def test_exchanges_reach_the_best_order_of_a_small_matrix() -> None:
    rng = np.random.default_rng(0)
    scores = np.square(rng.standard_normal((6, 8))).astype(np.float32)
    term = GroupTerm(scores, np.arange(8), 2, 4)
    best = max(
        term.score(np.array([*chosen, *(c for c in range(8) if c not in chosen)]))
        for chosen in itertools.combinations(range(8), 4)
    )
    _, before, after = regroup([term], 8, 50)
    assert before <= after <= best * (1 + 1e-6)
    assert after >= before + 0.5 * (best - before)


@pytest.mark.parametrize("seed", range(5))
def test_score_never_falls_and_bounds_hold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.square(rng.standard_normal((12, 40)) * np.exp(rng.standard_normal(40))).astype(np.float32)
    terms = [
        GroupTerm(scores, np.arange(40), 2, 4),
        BlockTerm(scores.T.copy(), np.zeros((10, 12), np.float32), np.arange(40) // 4, 0.5, "row", False),
    ]
    free = float(scores[keep_mask(scores, Pattern("unstructured"), 0.5, "row")].sum())
    for term in terms:
        order, before, after = regroup([term], 40, 30)
        assert sorted(order.tolist()) == list(range(40))
        assert before <= after <= free * (1 + 1e-5)
        assert after == pytest.approx(term.score(order), rel=1e-6)


def test_similar_rows_are_found_again() -> None:
    rng = np.random.default_rng(1)
    profiles = rng.random((4, 30)) < 0.4
    rows = np.repeat(profiles, 4, axis=0).astype(np.float32)
    mixed = rows[rng.permutation(16)]
    term = BlockTerm(mixed, np.zeros((4, 30), np.float32), np.arange(16) // 4, 0.6, "layer", True)
    order, before, after = regroup([term], 16, 50)
    assert after > before
    assert len({tuple(mixed[unit]) for unit in order[:4]}) == 1


def test_wanda_scores_need_data_and_use_it() -> None:
    with pytest.raises(UsageError, match="calibration"):
        Pipeline.parse("permute{score=wanda}").run(mlp(), PassContext())


def test_reasons() -> None:
    model = build(MLP.replace("r = Relu(a)", "r = Softmax(a)"), w=(32, 64), b=(64,), v=(64, 24))
    (report,) = Pipeline.parse("permute{pattern=2:4}").run(model, PassContext())
    assert not report.changed
    assert any("Softmax" in skip.reason for skip in report.skipped)
    (report,) = Pipeline.parse("permute{pattern=2:4 match=up}").run(mlp(), PassContext())
    assert any("no order" in skip.reason for skip in report.skipped)


@pytest.mark.parametrize("options", ["pattern=unstructured", "sparsity=0", "sparsity=1", "rounds=0"])
def test_options_that_mean_nothing_are_refused(options: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(f"permute{{{options}}}")


def test_orders_are_the_same_every_time() -> None:
    first, second = mlp(), mlp()
    for model in (first, second):
        Pipeline.parse("permute{pattern=4x1}").run(model, PassContext())
    assert first.fingerprint() == second.fingerprint() != mlp().fingerprint()


def test_sites_that_do_not_count_have_a_reason() -> None:
    (report,) = Pipeline.parse("permute{min-elements=100000}").run(mlp(), PassContext())
    assert {skip.site for skip in report.skipped} == {site.name for site in mlp().sites()}
    assert all("min-elements" in skip.reason for skip in report.skipped)
