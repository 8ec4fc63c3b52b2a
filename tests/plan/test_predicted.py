"""Planning for a machine that is elsewhere: times come from its cost table, and nothing is measured here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sparsecc
from sparsecc import ir, plan, verify
from sparsecc.cli.main import run
from sparsecc.errors import MeasurementError, RuntimeMissingError, UsageError
from sparsecc.passes.lower.linear_form import linear_form
from sparsecc.plan import CostTable, profile
from sparsecc.plan.alone import form_ends, part_model
from sparsecc.plan.cost_model import CostModel
from sparsecc.plan.part_data import PartCalibration
from sparsecc.plan.part_forms import sketched
from sparsecc.plan.predicted import PredictedCosts
from sparsecc.plan.workload import ProfileKey, call_key, model_key
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import Layout, Pattern
from sparsecc.target import Target

BOARD = {
    "machine": "aarch64",
    "cpu": "a board",
    "isa": "neon",
    "cores": "4",
    "onnxruntime": "1",
    "sparsecc": "1",
}
WHOLE, EACH = 10.0, 4.0  # ms of the model and of each of its two products
PLANNED = [
    "--target",
    "arm64",
    "--max-drop",
    "60%",
    "--attempts",
    "1",
    "--families",
    "prune-structured,prune-sparsegpt",
]


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("measured on this machine")

    monkeypatch.setattr(verify, "benchmark", refuse)
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two products with an activation between them, and inputs beside it."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[1,16,64] x) => (float[1,16,64] y) {
            [up] a = MatMul(x, w) b = Add(a, c) h = Relu(b) [down] d = MatMul(h, v) y = Add(d, e) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (64, 128)), ("v", (128, 64)), ("c", (128,)), ("e", (64,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    np.savez(tmp_path / "inputs.npz", x=rng.standard_normal((8, 16, 64)).astype(np.float32))
    return path


def table_of(path: Path, *, sparse: float, facts: dict[str, str] | None = None, threads: int = 1) -> Path:
    """A table in which blocks 16x1 take ``sparse`` times their density of what is dense, and half of a product half."""
    model = ir.Model.load(path)
    inputs = {"x": np.zeros((1, 16, 64), np.float32)}
    table = CostTable(None, facts or BOARD)
    table.put(call_key(threads), {"empty": 0.0})
    table.put(model_key(model, inputs, threads), {"dense": WHOLE})
    works = [product.work for product in profile.products_of(model, inputs)]
    halves = [
        replace(work, **{side: getattr(work, side) // 2}) for work, side in zip(works, "nk", strict=True)
    ]
    for work, ms in [*((work, EACH) for work in works), *((work, EACH / 2) for work in halves)]:
        for share in (0.5, 0.2, 0.08):
            key = ProfileKey(work, "pattern 16x1", share, threads, 1, 0)
            table.put(str(key), {"dense": ms, "16x1": ms * sparse * share})
    saved = path.with_name(f"costs{sparse}.json")
    table.save(saved)
    return saved


def costs_of(source: Path, **options: Any) -> PredictedCosts:
    costs = PredictedCosts(
        CostModel.load(table_of(source, **options)), {"x": np.zeros((1, 16, 64), np.float32)}
    )
    assert costs.open_model(ir.Model.load(source)) == WHOLE
    return costs


def test_times_are_those_of_the_table(source: Path) -> None:
    costs, model = costs_of(source, sparse=0.5), ir.Model.load(source)
    assert costs.model_ms(model).source == "measured"
    Pipeline.parse("tidy,prune-magnitude{pattern=16x1 sparsity=0.8}").run(model, PassContext())
    site = model.sites()[0]
    block = Layout(Pattern.parse("16x1"))
    times = costs.site_times_ms(model, site, [block, Layout(Pattern.parse("2:4"))])
    assert times["dense"] == EACH
    assert times["16x1"] == pytest.approx(EACH * 0.5 * 0.2, rel=0.03)
    assert times["2:4"] == math.inf  # not profiled, so never the fastest
    with pytest.raises(MeasurementError, match="no profile of 2:4"):
        costs.site_times_ms(model, site, [Layout(Pattern.parse("2:4"))])
    Pipeline.parse("choose-layout{layout=16x1}").run(model, PassContext())
    found = costs.model_ms(model)
    assert (found.ms, found.source) == (pytest.approx(WHOLE - 2 * EACH * (1 - 0.1), rel=0.02), "interpolated")
    assert 0 < found.spread < 1
    assert costs.model_ms(model, ()).ms == WHOLE
    assert costs.relative_time(model, frozenset({"up"})) == pytest.approx(
        (WHOLE - EACH * 0.9) / WHOLE, rel=0.02
    )
    with pytest.raises(MeasurementError, match="another machine"):
        costs.relative_time_of(model, model)


def test_parts_take_what_their_products_take(source: Path) -> None:
    costs, model = costs_of(source, sparse=0.5), ir.Model.load(source)
    site = model.sites()[0]

    def prune(part: ir.Model, own: ir.Site) -> None:
        Pipeline.parse("prune-magnitude{pattern=16x1 sparsity=0.5}").run(part, PassContext())

    cost = costs.rewritten(model, site, prune, "blocks", custom_ops=True)
    assert (cost.dense_ms, cost.source) == (EACH, "measured")
    assert cost.ms == pytest.approx(EACH * 0.25, rel=0.03)
    assert cost.bytes < cost.dense_bytes
    assert costs.rewritten(model, site, prune, "blocks", custom_ops=False).ms == EACH
    asked: list[str] = []
    alone = part_model([form_ends(linear_form(model, site, site.node))], (1, 16, 64), model)
    for name in ("one", "one", "two"):  # parts of one shape are priced once
        found, sparse = costs.part_rewritten(
            alone, lambda _, name=name: asked.append(name), name, custom_ops=False
        )
        assert (found.dense_ms, found.ms, sparse) == (EACH, EACH, False)
    assert asked == ["one", "two"]

    def other(part: ir.Model, own: ir.Site) -> None:
        noise = PassContext(calibration=PartCalibration.of_noise(part))
        assert sketched(part, ["factor-monarch{keep-slower=true min-elements=1}"], noise) is None

    before = model.fingerprint()
    with pytest.raises(MeasurementError, match="on the target"):
        costs.rewritten(model, site, other, "monarch", custom_ops=True)
    assert model.fingerprint() == before


@pytest.mark.parametrize(("sparse", "taken"), [(0.5, "prune-sparsegpt"), (20.0, "prune-structured")])
def test_the_choice_follows_the_other_machine(
    source: Path, sparse: float, taken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(source, sparse=sparse)
    content = table.read_bytes()
    data = ["--calibration-data", str(source.with_name("inputs.npz"))]
    assert run(["plan", str(source), *PLANNED, "--costs", str(table), *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (item,) = found["items"]
    assert item["candidates"][item["chosen"]]["name"].startswith(taken)
    assert item["candidates"][0]["ms"] == pytest.approx(2 * EACH)
    assert {candidate["source"] for candidate in item["candidates"]} <= {"measured", "interpolated"}
    assert any("another machine, not measured here: a board" in note for note in found["notes"])
    assert table.read_bytes() == content


def test_what_is_made_is_judged_here_and_timed_nowhere(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = table_of(source, sparse=0.5), source.with_name("out.onnx")
    data = ["--calibration-data", str(source.with_name("inputs.npz"))]
    assert run(["optimize", str(source), "-o", str(output), *PLANNED, "--costs", str(table), *data]) == 0
    told = capsys.readouterr().out
    assert "predicted latency 10 ms -> " in told
    assert "not measured" in told
    assert "medians of interleaved" not in told
    result = sparsecc.optimize(
        source,
        output,
        target="arm64",
        costs=table,
        pattern="16x1",
        sparsity=0.8,
        calibration_data="synthetic",
    )
    assert result.latency.source == "predicted"
    assert result.latency.after_ms == pytest.approx(WHOLE - 2 * EACH * 0.9, rel=0.02)
    assert {site.layout for site in result.sites} == {"16x1"}
    slow = sparsecc.optimize(
        source, output, target="arm64", costs=table_of(source, sparse=9.0), pattern="16x1", sparsity=0.8
    )
    assert {site.layout for site in slow.sites} == {"dense"}
    assert slow.latency.speedup == 1


def test_other_machines_are_told_apart(source: Path) -> None:
    table = table_of(source, sparse=0.5)
    with pytest.raises(RuntimeMissingError, match="cuda"):
        plan.usable_threads(0, Target("cuda"), table)
    with pytest.raises(RuntimeMissingError, match="targets profile"):
        plan.usable_threads(0, Target("arm64"))
    with pytest.raises(UsageError, match=r"cores 4.*arm64\{isa=neon cores=4\}"):
        plan.usable_threads(0, Target("arm64", cores=2), table)
    with pytest.raises(UsageError, match="plan for that machine with --target 'arm64"):
        CostTable.open(table)
    with pytest.raises(UsageError, match="not 3"):
        plan.usable_threads(3, Target("arm64"), table)
    assert plan.usable_threads(0, Target("arm64", isa="neon"), table) == 1
    server = table_of(source, sparse=0.7, facts={**BOARD, "machine": "x86_64", "isa": "amx"}, threads=2)
    assert plan.usable_threads(0, Target("cpu", isa="amx"), server) == 2
    with pytest.raises(UsageError, match="another machine than arm64"):
        plan.usable_threads(0, Target("arm64"), server)
    assert plan.usable_threads(3, Target("cpu"), server) == 3  # this machine, whose table it is not


def test_a_model_that_was_not_profiled_there_is_refused(source: Path) -> None:
    table = table_of(source, sparse=0.5)
    costs = PredictedCosts(CostModel.load(table), {"x": np.zeros((1, 8, 64), np.float32)})
    with pytest.raises(UsageError, match=r"targets profile .*--input-shapes x:1,8,64"):
        costs.open_model(ir.Model.load(source))
