"""Runs that were ended, however, and go on; the cache they go on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecc.errors import UsageError
from sparsecc.plan import begin
from tests.cli.conftest import Result

Run = Callable[..., Result]

#: Judges by the distance from the first model it sees, writes down each call, and ends the process at the one that a
#: file names.
JUDGE = """
import os, pathlib, signal
import numpy as np

folder = pathlib.Path(__file__).parent

def evaluate(run, data):
    calls = folder / "calls"
    calls.write_text(calls.read_text() + "x")
    found = np.concatenate([run(batch)["y"] for batch in data])
    first = folder / "first.npy"
    if not first.exists():
        np.save(first, found)
    end = folder / "end"
    if end.exists() and len(calls.read_text()) >= int(end.read_text()):
        end.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    wanted = np.load(first)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

evaluate.lower_is_better = True
"""


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "judge.py").write_text(JUDGE)
    (folder / "calls").write_text("")
    return folder


def calls(judge: Path) -> int:
    """How often the metric was asked since the last time."""
    count = len((judge / "calls").read_text())
    (judge / "calls").write_text("")
    return count


def asked(wide: Path, out: Path, data: Path, judge: Path, *more: object) -> list[str]:
    return [
        str(item)
        for item in (
            "optimize", wide, "-o", out, "--calibration-data", data, "--max-drop", "0.02", "--eval", judge / "judge.py",
            "--families", "factor-rrr", "--threads", 1, *more,
        )
    ]  # fmt: skip


def test_a_run_that_is_killed_goes_on(
    sparsecc: Run, wide: Path, data: Path, judge: Path, tmp_path: Path, root: Path
) -> None:
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    (judge / "end").write_text("5")
    command = asked(wide, out, data, judge)
    done = subprocess.run(
        [sys.executable, "-m", "sparsecc", *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(out.parent.iterdir()) == []
    assert calls(judge) == 5
    first = sparsecc(*command, "--resume", "--json")
    assert first.code == 0, first.err
    steps = json.loads(first.out)["metric"]["steps"]
    assert len(steps) > 1
    assert calls(judge) < 3 + len(steps), "what was judged before the end is judged no more"
    bytes_, again = out.read_bytes(), sparsecc(*command, "--json")
    assert again.code == 0, again.err
    assert calls(judge) == 2, "the input, and the model that is written"
    assert out.read_bytes() == bytes_
    assert json.loads(again.out)["metric"] == json.loads(first.out)["metric"]


def test_earlier_results_can_be_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path))
    begin("model", "data", 0).put("part", "key", {"is": 1})
    assert begin("model", "data", 0, resume=True).get("part", "key") == {"is": 1}
    fresh = begin("model", "data", 0, resume=False)
    assert fresh.get("part", "key") is None
    fresh.put("part", "key", {"is": 2})
    assert fresh.get("part", "key") == begin("model", "data", 0).get("part", "key") == {"is": 2}
    with pytest.raises(UsageError, match="nothing to resume"):
        begin("model", "data", 1, resume=True)


def test_nothing_to_resume(sparsecc: Run, wide: Path, data: Path, tmp_path: Path) -> None:
    for verb in (("plan", wide, "--max-drop", "1%"), ("analyze", wide)):
        done = sparsecc(*verb, "--calibration-data", data, "--resume")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "nothing to resume" in done.err
    done = sparsecc("optimize", wide, "-o", tmp_path / "out.onnx", "--resume")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--resume goes with a budget" in done.err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    (folder / "results" / "part").mkdir(parents=True)
    (folder / "costs-0123456789abcdef.json").write_text("{}")
    (folder / "results" / "part" / f"{'0' * 64}.json").write_text("{}1")
    (folder / "results" / "part" / f"{'1' * 64}.json.{'2' * 16}.tmp").write_text("{}12")
    (folder / "thesis.doc").write_text("mine")
    (folder / "results" / "notes.txt").write_text("mine")
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(folder))
    return folder


def test_cache_show(sparsecc: Run, cache: Path) -> None:
    shown = json.loads(sparsecc("cache", "show", "--json").out)
    assert shown["folder"] == str(cache)
    assert shown["nbytes"] == 2 + 3 + 4
    assert {row["kind"]: row["files"] for row in shown["kinds"]} == {"costs": 1, "part": 1, "unfinished": 1}
    assert "measured times of this machine" in sparsecc("cache", "show").out
    old = time.time() - 90000
    os.utime(cache / "costs-0123456789abcdef.json", (old, old))
    shown = json.loads(sparsecc("cache", "show", "--older-than", "1d", "--json").out)
    assert [row["kind"] for row in shown["kinds"]] == ["costs"]


def test_cache_clear_takes_only_its_own_files(sparsecc: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / f"{'3' * 64}.json"
    kept.write_text("{}")
    (cache / "results" / "link").symlink_to(kept.parent)
    assert sparsecc("cache", "clear", "--kind", "part").code == 0
    assert not (cache / "results" / "part" / f"{'0' * 64}.json").exists()
    assert json.loads(sparsecc("cache", "clear", "--json").out)["files"] == 2
    left = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert left == ["notes.txt", "thesis.doc"]
    assert kept.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--kind", "prats"), "did you mean 'part'"),
        (("--older-than", "long"), "such as 30d"),
        (("--all",), "--all"),
    ],
)
def test_cache_refuses(sparsecc: Run, cache: Path, options: tuple[str, ...], text: str) -> None:
    done = sparsecc("cache", "clear", *options)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert text in done.err
    assert (cache / "costs-0123456789abcdef.json").exists()


def test_no_cache_is_an_empty_one(sparsecc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path / "none"))
    assert json.loads(sparsecc("cache", "show", "--json").out)["nbytes"] == 0
    assert sparsecc("cache", "clear").code == 0
