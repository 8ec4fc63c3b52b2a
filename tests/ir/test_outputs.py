"""Where results may go, told before the slow part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsecc.errors import UsageError
from sparsecc.ir.outputs import check_output


def test_a_new_file_and_one_of_an_earlier_run_are_fine(tmp_path: Path) -> None:
    source, old = tmp_path / "in.onnx", tmp_path / "old.onnx"
    source.touch()
    old.touch()
    check_output(tmp_path / "new.onnx", [source, None, "cosine", tmp_path])
    check_output(old, [source, tmp_path, "synthetic"])


def test_inputs_stay(tmp_path: Path) -> None:
    for name in ("in.onnx", "in.onnx.data", "judge.py", "inputs.npz"):
        (tmp_path / name).touch()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "in.onnx")
    for target, source in (
        ("in.onnx", "in.onnx"),
        ("link.onnx", "in.onnx"),
        ("in.onnx", "in.onnx.data"),
        ("judge.py", "judge.py:evaluate"),
        ("judge.py", "judge.py"),
        ("inputs.npz", "."),
    ):
        with pytest.raises(UsageError, match="is the input"):
            check_output(tmp_path / target, [tmp_path / source])


def test_no_place_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "no regular"),
        (tmp_path / "a" / "b", "create"),
    ):
        with pytest.raises(UsageError, match=text):
            check_output(path)
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who may write anywhere
    with pytest.raises(UsageError, match="cannot be written to"):
        check_output(tmp_path / "new.onnx")
