"""How much a model cares about errors of its parts, and the verb that shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from sparsecc.calib import Calibration, open_session
from sparsecc.cli.main import cli
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.plan import Results, sensitivity
from sparsecc.plan.analysis import Analysis, read_analysis
from sparsecc.plan.items import Candidate, Estimate, Item
from sparsecc.plan.metric import UserMetric
from sparsecc.plan.sensitivity import measure_sensitivity, replaced
from sparsecc.pm import PassContext, Pipeline

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((64, 64)).astype(np.float32) / 8 for name in ("w0", "w1", "w2")}


def build(scale: float = 0.1) -> Model:
    """The output is a loud product of ``a`` plus a quiet one, by ``scale``, of ``b``."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n,64] x, float[n,64] z) => (float[n,64] y) {
            [a] p = MatMul(x, w0)  [b] q0 = MatMul(z, w1)  q = Mul(q0, s)  [c] r = MatMul(x, w2)  t = Mul(r, s)
            h = Add(p, q)  y = Add(h, t)
        }"""
    )
    for name, array in {**WEIGHTS, "s": np.float32(scale)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return Model.from_proto(proto)


def batches() -> list[dict[str, np.ndarray]]:
    return [{name: RNG.standard_normal((64, 64)).astype(np.float32) for name in ("x", "z")} for _ in range(4)]


DATA = batches()
FORMS = ("factor-rrr{param-ratio=0.9}", "factor-rrr{param-ratio=0.6}")


def items(errors: tuple[float, float] = (0.3, 0.5)) -> list[Item]:
    dense = Candidate((), 0.0, Estimate(1.0, "measured"), 16384)
    forms = tuple(
        Candidate((spec,), error, Estimate(0.5, "measured"), 8192)
        for spec, error in zip(FORMS, errors, strict=True)
    )
    return [Item("a", ("a", "c"), (dense, *forms)), Item("b", ("b",), (dense, *forms))]


def lost(model: Model, sites: tuple[str, ...], spec: str) -> float:
    """Relative error of the output on 32 samples with these sites replaced, by brute force."""
    other = model.copy()
    context = PassContext(calibration=Calibration.from_batches(DATA, model))
    (pass_,) = Pipeline.parse(spec).passes
    dataclasses.replace(pass_, match=f"re:^({'|'.join(sites)})$").run(other, context)
    inputs = {name: array[:32] for name, array in DATA[0].items()}
    (before,), (after,) = (open_session(item).run(inputs).values() for item in (model, other))
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def test_sensitivity_is_the_damage_of_a_replacement_by_its_error() -> None:
    model = build()
    found = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model))
    expected = {name: lost(model, sites, FORMS[0]) for name, sites in (("a", ("a", "c")), ("b", ("b",)))}
    for item in found.items:
        assert found.replacements[item.name][0] == FORMS[0]
        assert found.replacements[item.name][1] == pytest.approx(expected[item.name], rel=1e-3)
    loud, quiet = (item.sensitivity for item in found.items)
    assert loud == pytest.approx((expected["a"] / 0.3) ** 2, rel=1e-2)
    assert loud > 20 * quiet > 0
    assert found.additivity == pytest.approx(1, rel=0.5)  # both add to one output
    assert found.scale == 1


def test_what_is_measured_as_nothing_is_held_above_a_floor() -> None:
    model = build(scale=0.0)
    found = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model))
    loud, silent = (item.sensitivity for item in found.items)
    assert found.replacements["b"][1] == 0
    assert 0 < silent < loud


def test_a_metric_gives_the_unit() -> None:
    model = build()

    def evaluate(run) -> float:  # 100 * squared relative error of the output
        (before,), (after,) = open_session(model).run(DATA[1]).values(), run(DATA[1]).values()
        return -100 * float(np.square(after - before).sum() / np.square(before).sum())

    metric = UserMetric(DATA, function=evaluate, where="here")
    plain = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model))
    found = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model), metric)
    assert found.scale == pytest.approx(100, rel=0.3)
    for one, other in zip(plain.items, found.items, strict=True):
        assert other.sensitivity == pytest.approx(found.scale * one.sensitivity)


def test_a_metric_that_does_not_suffer_is_said() -> None:
    model = build()
    metric = UserMetric(DATA, function=lambda run: 1.0, where="here")
    found = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model), metric)
    assert any("did not suffer" in note for note in found.notes)
    assert found.scale == 1


def test_known_replacements_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, results = build(), Results(tmp_path)
    first = measure_sensitivity(model, items(), Calibration.from_batches(DATA, model), results=results)

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sensitivity, "replaced", fail)
    assert (
        measure_sensitivity(model, items(), Calibration.from_batches(DATA, model), results=results) == first
    )
    changed = build(scale=0.2)
    with pytest.raises(AssertionError):
        measure_sensitivity(changed, items(), Calibration.from_batches(DATA, changed), results=results)


def test_a_replacement_that_fails_is_told() -> None:
    model = build()
    dense = items()[0].candidates[0]
    missing = Candidate(("prune-wanda{pattern=16x1}",), 0.1, Estimate(0.1, "measured"), 1)
    found = measure_sensitivity(
        model, [Item("z", ("z",), (dense, missing)), items()[1]], Calibration.from_batches(DATA, model)
    )
    assert set(found.replacements) == {"b"}


def test_replaced_changes_only_the_named_sites() -> None:
    model = build()
    other = replaced(model, ("a", "c"), ("prune-magnitude{sparsity=0.5}",), PassContext())
    kept = {site.name: np.count_nonzero(site.numpy()) / site.numpy().size for site in other.sites()}
    assert kept == {"a": 0.5, "b": 1.0, "c": 0.5}


def test_narrow_values_of_what_was_made_of_a_site_are_replaced_too() -> None:
    model = build()
    context = PassContext(calibration=Calibration.from_batches(DATA, model))
    other = replaced(model, ("a",), ("factor-rrr{param-ratio=0.5}", "quantize"), context)
    operators = [node.op_type for node in other.onnx.graph]
    assert operators.count("MatMulInteger") == 2
    assert operators.count("MatMul") == 2


def test_the_verb_saves_what_planning_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path / "cache"))
    build().save(tmp_path / "m.onnx")
    np.savez(
        tmp_path / "d.npz", **{name: np.concatenate([item[name] for item in DATA]) for name in ("x", "z")}
    )
    (tmp_path / "judge.py").write_text(
        "def evaluate(run, data):\n    return float(run(data[0])['y'].std())\n"
    )
    arguments = [
        "analyze",
        str(tmp_path / "m.onnx"),
        "--calibration-data",
        str(tmp_path / "d.npz"),
        "--threads",
        "1",
    ]
    arguments += ["--families", "factor-svd,quantize", "--eval", str(tmp_path / "judge.py")]
    path = tmp_path / "analysis.json"
    done = CliRunner().invoke(cli, [*arguments, "--json", "-o", str(path)], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document.pop("effort")["planning_seconds"] > 0
    assert document.pop("name") == "m.onnx"
    assert document == json.loads(path.read_text())
    assert document["metric"]["name"] == "eval"
    assert [entry["name"] for entry in document["items"]] == ["a", "b"]
    assert all(math.isfinite(entry["sensitivity"]) for entry in document["items"])
    found = Analysis.from_json(document)
    assert found.to_json() == document
    data = Calibration.from_path(str(tmp_path / "d.npz"), build())
    tidied = Model.load(tmp_path / "m.onnx")
    Pipeline.parse("tidy").run(tidied)
    assert read_analysis(path, tidied, data.fingerprint()).to_json() == document
    with pytest.raises(UsageError, match="is of other data"):
        read_analysis(path, tidied, "sha256:0")
    path.write_text("[]")
    with pytest.raises(UsageError, match="no analysis of sparsecc"):
        read_analysis(path, tidied, data.fingerprint())
    table = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "64x64" in table
    assert "eval" in table
    assert "sensitivity" in table


@pytest.mark.parametrize(("tokens", "wanted"), [(16, 32), (64, 32), (100, 21), (128, 16), (4096, 16)])
def test_outputs_are_compared_on_fewer_long_samples(tokens: int, wanted: int) -> None:
    batches = [{"x": np.zeros((5, tokens), np.float32)} for _ in range(8)]
    assert [len(batch["x"]) for batch in sensitivity._few(batches)] == [5] * (wanted // 5) + [wanted % 5]
