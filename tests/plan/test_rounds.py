"""Sites that pruning does not make faster are left out of it, also where the others are fitted to their zeros."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import sparsecc
from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.plan import run_where_it_pays
from sparsecc.pm import PassContext, Pipeline

LOWER = "choose-layout,restore-dense,lower-sparse"


class Costs:
    """Sparse forms of the sites named are twice as fast as dense ones, of all others half as fast."""

    def __init__(self, *pays: str) -> None:
        self.pays = pays
        self.asked = 0

    def site_times_ms(self, model, site, layouts, base=None):
        self.asked += 1
        return {"dense": 1.0, **{str(layout): 0.5 if site.name in self.pays else 2.0 for layout in layouts}}


def mlp() -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32) / 8, f"w{number}")
        for number in range(3)
    ]
    nodes = []
    for number, name in enumerate(("one", "two", "three")):
        before = "x" if number == 0 else f"r{number - 1}"
        nodes.append(helper.make_node("MatMul", [before, f"w{number}"], [f"h{number}"], name=name))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"], name=f"relu{number}"))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 64])
    y = helper.make_tensor_value_info("r2", onnx.TensorProto.FLOAT, ["B", 64])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outcome_of(text: str, *pays: str):
    model = Model.from_proto(mlp())
    x = np.random.default_rng(4).standard_normal((300, 64)).astype(np.float32)
    context = PassContext(
        calibration=Calibration.from_batches([{"x": x}], model, threads=1), costs=Costs(*pays), threads=1
    )
    return model, run_where_it_pays(Pipeline.parse(text), model, context)


@pytest.mark.parametrize("fit", ["prune-wanda-ols{sparsity=0.6}", "prune-wanda{sparsity=0.6},recover-bias"])
def test_what_gains_nothing_keeps_its_weights(fit: str) -> None:
    model, outcome = outcome_of(f"{fit},{LOWER}", "two")
    assert set(outcome.left_out) == {"one", "three"}
    before = {site.name: site for site in model.sites()}
    after = {site.name: site for site in outcome.model.sites()}
    assert set(after) == {"one", "three"}  # two is a sparse operator now
    for name, site in after.items():
        np.testing.assert_array_equal(site.numpy(), before[name].numpy())
    reasons = [skip.reason for reports in outcome.left_out.values() for r in reports for skip in r.skipped]
    assert any("dense is faster" in reason for reason in reasons)


def test_nothing_gains_nothing_changes() -> None:
    model, outcome = outcome_of(f"prune-sparsegpt{{sparsity=0.6}},recover-bias,{LOWER}")
    assert set(outcome.left_out) == {"one", "two", "three"}
    assert outcome.model.fingerprint() == model.fingerprint()


def test_one_run_where_all_gain() -> None:
    _, outcome = outcome_of(f"prune-wanda-ols{{sparsity=0.6}},{LOWER}", "one", "two", "three")
    assert not outcome.left_out
    assert not list(outcome.model.sites())


def test_weights_that_can_go_back_need_no_second_run() -> None:
    _, outcome = outcome_of(f"prune-magnitude{{sparsity=0.6}},{LOWER}", "two")
    assert not outcome.left_out
    restored = next(report for report in outcome.reports if report.pass_name == "restore-dense")
    assert {change.site for change in restored.changed} == {"one", "three"}


def test_optimize_says_why(tmp_path, monkeypatch) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(4).standard_normal((300, 64)).astype(np.float32))
    costs = Costs()
    monkeypatch.setattr("sparsecc.plan.opening.MeasuredCosts", lambda *_: costs)
    result = sparsecc.optimize(
        tmp_path / "m.onnx", method="wanda-ols", sparsity=0.6, calibration_data=tmp_path / "c.npz", threads=1
    )
    assert {site.layout for site in result.sites} == {"dense"}
    assert all(
        site.density == 1 and "would gain nothing: dense is faster" in site.reason for site in result.sites
    )
    assert result.rel_l2_to_input == 0
