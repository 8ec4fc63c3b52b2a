"""Budgets on the command line: plans, the guard and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecc import verify
from sparsecc.ir import Model
from sparsecc.report import parse_document
from tests.cli.conftest import Result

Run = Callable[..., Result]

FAMILIES = ("--families", "factor-rrr", "--threads", 1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured and fitted for one test serves the others."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(kept))


def loss(before: Path, after: Path, data: Path) -> float:
    """Relative distance of the outputs on all calibration data."""
    inputs = {"x": np.load(data)["x"]}
    first, second = (verify.session(Model.load(path)).run(inputs)["y"] for path in (before, after))
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


def test_a_plan_is_a_recipe(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.toml"
    ask = ("--calibration-data", data, "--max-drop", "20%", *FAMILIES)
    done = sparsecc("plan", wide, "-o", saved, *ask)
    assert done.code == 0, done.err
    assert "predicted:" in done.out
    assert "fc1" in done.out
    document = json.loads(sparsecc("plan", wide, *ask, "--json").out)
    parsed = parse_document(document)
    assert parsed.items
    assert any(item.chosen for item in parsed.items)
    assert parsed.predicted is not None
    assert parsed.predicted.ms is not None
    outputs = []
    for name in ("one.onnx", "two.onnx"):
        done = sparsecc("optimize", wide, "-o", tmp_path / name, "--recipe", saved, "--calibration-data", data,
                        "--threads", 1)  # fmt: skip
        assert done.code == 0, done.err
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) < wide.stat().st_size


def test_the_guard_holds_and_says_so(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = sparsecc(
        "optimize", wide, "-o", out, "--calibration-data", data, "--max-drop", "0.1", *FAMILIES, "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    parse_document(document)
    assert document["metric"]["held"]
    assert loss(wide, out, data) <= 0.1
    assert document["metric"]["after"] == pytest.approx(loss(wide, out, data), rel=1e-3)
    assert document["latency"]["speedup"] > 0.97


def test_nothing_is_lost_where_nothing_may_be(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = sparsecc(
        "optimize", wide, "-o", out, "--calibration-data", data, "--max-drop", "0.0001", *FAMILIES
    )
    assert done.code == 0, done.err
    assert loss(wide, out, data) <= 1e-4


def test_a_size_is_kept(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = sparsecc(
        "optimize", wide, "-o", out, "--calibration-data", data, "--budget-size", "0.7x", *FAMILIES
    )
    assert done.code == 0, done.err
    assert out.stat().st_size <= 0.7 * wide.stat().st_size
    assert "models made and measured" in done.out


@pytest.mark.parametrize(
    ("budget", "code", "text"),
    [
        (("--budget-latency", "0.0001x"), 5, "cannot be reached: the least predicted are"),
        (("--budget-size", "10"), 5, "cannot be reached"),
        (("--budget-size", "0.5x", "--max-drop", "0"), 4, "--max-drop"),
        (("--max-drop", "much"), 2, "expected 1%"),
        (("--max-drop", "1%", "--pattern", "2:4"), 2, "contradict"),
        (("--max-drop", "1%", "--eval", "beauty"), 2, "unknown metric 'beauty'"),
        (("--max-drop", "1%", "--families", "tidy"), 2, "declares no search range"),
        (("--eval", "cosine"), 2, "--eval goes with a budget"),
        (("--allow-partial",), 2, "--allow-partial goes with a budget"),
        (("-O1", "--max-drop", "1%"), 2, "-O1 loses nothing"),
        (("-O0", "--pattern", "2:4"), 2, "-O0 only tidies and contradicts pattern"),
        (("-O2", "--method", "wanda"), 2, "contradicts method"),
        (("-O4",), 2, "4 is not in the range"),
    ],
)
def test_what_cannot_be(
    sparsecc: Run, wide: Path, data: Path, tmp_path: Path, budget: tuple[Any, ...], code: int, text: str
) -> None:
    out = tmp_path / "out.onnx"
    families = () if {"--families", "--eval", "--allow-partial", "-O0", "-O4"} & set(budget) else FAMILIES
    done = sparsecc("optimize", wide, "-o", out, "--calibration-data", data, *budget, *families)
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert text in done.err
    assert not out.exists()
    assert (tmp_path / "out.rejected.onnx").exists() == (code == 4)


def test_a_budget_needs_inputs(sparsecc: Run, wide: Path) -> None:
    done = sparsecc("plan", wide)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--calibration-data" in done.err


def test_a_function_judges(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "import numpy as np\n"
        "def evaluate(run, data):\n"
        "    return float(np.mean([run(batch)['y'].var() for batch in data]))\n"
    )
    out = tmp_path / "out.onnx"
    done = sparsecc("optimize", wide, "-o", out, "--calibration-data", data, "--max-drop", "30%", "--eval",
                    tmp_path / "judge.py", *FAMILIES, "--json")  # fmt: skip
    assert done.code == 0, done.err
    metric = json.loads(done.out)["metric"]
    assert metric["name"] == "eval"
    assert metric["after"] >= 0.7 * metric["before"]


@pytest.mark.parametrize("level", ["-O0", "-O1"])
def test_levels_that_lose_nothing(sparsecc: Run, wide: Path, tmp_path: Path, level: str) -> None:
    out = tmp_path / "out.onnx"
    done = sparsecc("optimize", wide, "-o", out, level, "--threads", 1, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["rel_l2_to_input"] <= 1e-6
    assert (document["pipeline"] == "tidy") == (level == "-O0")
    done = sparsecc("plan", wide, level)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "nothing to plan" in done.err


def test_a_model_without_a_score_is_taken_back(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    judge, out = tmp_path / "judge.py", tmp_path / "out.onnx"
    judge.write_text(
        "import numpy as np\nfirst = []\n"
        "def evaluate(run, data):\n"
        "    y = np.concatenate([run(batch)['y'] for batch in data])\n"
        "    first.append(y)\n"
        "    return 1.0 if np.allclose(y, first[0], rtol=1e-3, atol=1e-4) else float('nan')\n"
    )
    ask = ("--calibration-data", data, "--eval", judge, "--no-resume", *FAMILIES)
    done = sparsecc("optimize", wide, "-o", out, "--max-drop", "0.5", *ask, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    steps = document["metric"]["steps"]
    assert steps[0]["value"] is None
    assert not steps[0]["held"]
    assert document["metric"]["after"] == 1.0
    assert loss(wide, out, data) < 1e-3
    small = tmp_path / "small.onnx"
    done = sparsecc("optimize", wide, "-o", small, "--budget-size", "0.6x", *ask)
    assert (done.code, done.err.count("\n")) == (4, 1), done.err
    assert "nan is no score" in done.err
    assert not small.exists()


def test_level_two_plans_and_holds(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = sparsecc("optimize", wide, "-o", out, "-O2", "--calibration-data", data, *FAMILIES, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["metric"]["max_drop"] == pytest.approx(0.01)
    assert loss(wide, out, data) <= 0.01


@pytest.mark.parametrize(
    ("verb", "target", "text"),
    [
        (("plan", "--max-drop", "1%"), "inputs.npz", "is the input"),
        (("plan", "--max-drop", "1%"), "wide.onnx", "is the input"),
        (("plan", "--max-drop", "1%", "--eval", "judge.py:evaluate"), "judge.py", "is the input"),
        (("plan", "--max-drop", "1%"), "no/plan.toml", "does not exist"),
        (("analyze",), "inputs.npz", "is the input"),
        (("analyze",), "wide.onnx", "is the input"),
        (("optimize", "--max-drop", "1%", "-o", "new.onnx", "--report"), "new.onnx", "would both be"),
        (("optimize", "--max-drop", "1%", "-o", "new.onnx", "--report"), "inputs.npz", "is the input"),
    ],
)
def test_what_is_read_is_never_replaced(
    sparsecc: Run, wide: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str, ...], target: str, text: str,
) -> None:  # fmt: skip
    if "--report" in verb:
        pytest.importorskip("jinja2", reason="reports need Jinja2: pip install 'sparsecc[report]'")
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text("def evaluate(run):\n    return 1.0\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    option = () if "--report" in verb else ("-o",)
    done = sparsecc(*verb, *option, target, wide, "--calibration-data", data)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert text in done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_rejected_model_does_not_replace_the_input(sparsecc: Run, wide: Path, data: Path) -> None:
    again = wide.rename(wide.with_name("small.rejected.onnx"))
    before = again.read_bytes()
    done = sparsecc("optimize", again, "-o", again.with_name("small.onnx"), "--calibration-data", data,
                    "--budget-size", "0.5x", "--max-drop", "0", *FAMILIES)  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "small.rejected.onnx is the input" in done.err
    assert again.read_bytes() == before
