"""The cost table: kept, exported, refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecc.errors import UsageError
from sparsecc.plan.costs import CostTable

FACTS = {"cpu": "a", "isa": "avx2"}


def test_measures_once_and_keeps(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.json"
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"dense": 2.0, "16x1": 1.0}

    table = CostTable(path, FACTS)
    assert table.get_or_measure("k", ("dense", "16x1"), measure) == {"dense": 2.0, "16x1": 1.0}
    assert table.get_or_measure("k", ("dense",), measure) == {"dense": 2.0}
    table.save()
    again = CostTable(path, FACTS)
    assert again.get_or_measure("k", ("dense", "16x1"), measure) == {"dense": 2.0, "16x1": 1.0}
    assert len(calls) == 1


def test_unknown_name_under_known_key_is_measured() -> None:
    table = CostTable(None, FACTS)
    table.put("k", {"dense": 2.0})
    assert table.get("k", ("dense", "2:4")) is None
    assert table.get_or_measure("k", ("dense", "2:4"), lambda: {"dense": 3.0, "2:4": 1.5}) == {
        "dense": 3.0,
        "2:4": 1.5,
    }


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name, keys in (("a.json", ("x", "y")), ("b.json", ("y", "x"))):
        table = CostTable(None, FACTS)
        for key in keys:
            table.put(key, {"dense": 1.0})
        table.save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "machine": {}, "times_ms": [1]}']
)
def test_not_a_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a sparsecc cost table"):
        CostTable(path, FACTS)


def test_table_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    CostTable(None, {**FACTS, "cpu": "b"}).save(path)
    with pytest.raises(UsageError, match=r"another machine.*cpu"):
        CostTable(path, FACTS)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    CostTable(None, FACTS).save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(UsageError, match="format 2"):
        CostTable(path, FACTS)


def test_save_failure_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    table = CostTable(path, FACTS)
    table.put("k", {"dense": 1.0})
    table.save()
    before = path.read_bytes()
    table.put("l", {"dense": 1.0})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsecc.ir.replacing.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        table.save()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
