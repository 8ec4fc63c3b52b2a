"""``sparsecc inspect`` of matrix and tensor files: the balance of expressions, and errors of one line."""

from __future__ import annotations

import gzip
import json
import os
import pty
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecc.algebra.cases import EXPRESSIONS

Run = Callable[..., "object"]
KEYS = ["work", "parts", "max", "mean", "lambda", "bound", "split_seconds"]


@pytest.fixture
def skewed(tmp_path: Path) -> Path:
    """A matrix of 40 x 40 with one full row and a diagonal."""
    places = sorted({(20, column) for column in range(1, 41)} | {(row, row) for row in range(1, 41)})
    path = tmp_path / "skewed.mtx"
    lines = [f"{row} {column} 1.5" for row, column in places]
    header = f"%%MatrixMarket matrix coordinate real general\n40 40 {len(lines)}\n"
    path.write_text(header + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    path = tmp_path / "cube.tns"
    path.write_text("".join(f"{1 + n % 4} {1 + n % 5} {1 + n % 7} {n}\n" for n in range(60)))
    return path


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("parts", [1, 7, 500])
def test_every_expression_stays_within_its_bound(
    sparsecc: Run, skewed: Path, cube: Path, name: str, parts: int
) -> None:
    path = cube if name in ("mttkrp", "ttv", "ttm", "inner") else skewed
    result = sparsecc("inspect", path, "--expr", name, "--parts", parts, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert list(found)[: len(KEYS)] == KEYS
    assert found["parts"] == parts
    assert found["mean"] <= found["max"] <= found["bound"]
    assert found["lambda"] == pytest.approx(found["max"] / found["mean"])
    assert found["row_lambda"] >= 1
    assert found["split_seconds"] > 0


def test_progress_is_drawn_on_a_terminal(cube: Path, tmp_path: Path) -> None:
    path = tmp_path / "cube.tns.gz"
    path.write_bytes(gzip.compress(cube.read_bytes()))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sparsecc", "inspect", str(path), "--expr", "ttv", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16)
    os.close(ours)
    assert b"reading cube.tns.gz" in drawn
    assert b"100%" in drawn
    assert json.loads(done.stdout)["work"] > 0


def test_figures_of_a_product_by_hand(sparsecc: Run, skewed: Path) -> None:
    found = json.loads(sparsecc("inspect", skewed, "--expr", "spmv", "--parts", 8, "--json").out)
    assert (found["work"], found["mean"], found["phases"]) == (119, 119 / 8, 1)  # 79 entries, 40 rows
    assert found["max"] == found["bound"] == 15
    assert found["row_lambda"] == pytest.approx(49 / (119 / 8))  # the full row, four others, and five rows


def test_one_cut_for_all_phases_is_compared_where_there_are_several(sparsecc: Run, skewed: Path) -> None:
    found = json.loads(sparsecc("inspect", skewed, "--expr", "spgemm", "--parts", 8, "--json").out)
    assert found["phases"] == 2
    assert found["single_lambda"] > found["lambda"]
    shown = sparsecc("inspect", skewed, "--expr", "spgemm", "--parts", 8).out
    assert f"one cut for all phases  {found['single_lambda'] * found['mean']:>7.0f}" in shown
    assert "one cut" not in sparsecc("inspect", skewed, "--expr", "spmv", "--parts", 8).out
    one = json.loads(sparsecc("inspect", skewed, "--expr", "add", "--parts", 8, "--json").out)
    assert one["single_lambda"] == one["lambda"]


def test_expressions_operands_and_formats_of_ones_own(sparsecc: Run, skewed: Path) -> None:
    for arguments in (
        ("--expr", "y(i) = A(i,j) * x(j)", "--format", "dcsr"),
        ("--expr", "ij,jk->ik", "--operand", "B=transposed"),
        ("--expr", "C(i,j) = A(i,j) + B(i,j)", "--operand", f"B={skewed}"),
        ("--expr", "spmm", "--columns", 3, "--format", "csc"),
        (),
    ):
        result = sparsecc("inspect", skewed, *arguments)
        assert result.code == 0, result.err
        lines = result.out.splitlines()
        assert [line.split("  ")[0] for line in lines if line[:5] in ("balan", "equal")] == [
            "balanced parts",
            "equal rows",
            "equal entries",
        ]
        assert "no part has more than" in lines[-1]


def test_a_matrix_of_very_many_rows_takes_no_room_for_them(sparsecc: Run, tmp_path: Path) -> None:
    path = tmp_path / "hyper.mtx"
    header = "%%MatrixMarket matrix coordinate real general\n2000000000 1500000000 3\n"
    path.write_text(header + "7 5 1\n1999999999 1 2\n1 1500000000 3\n")
    for name, work in (("spmv", 6), ("add", 12), ("spgemm", 12)):  # 3 survivors, 3 products
        result = sparsecc("inspect", path, "--expr", name, "--parts", 2, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["work"] == work
    assert "(compressed,compressed)" in sparsecc("inspect", path).out


def test_picture(sparsecc: Run, skewed: Path, cube: Path, tmp_path: Path) -> None:
    for path, name in ((skewed, "add"), (cube, "inner")):
        result = sparsecc("inspect", path, "--expr", name, "--parts", 4, "--picture", tmp_path / "a.svg")
        assert result.code == 0, result.err
        texts = [item.text for item in ET.parse(tmp_path / "a.svg").iter() if item.tag.endswith("text")]
        assert texts[0].startswith(f"{path.name}: ")
    assert "phase 1 of 3" in texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--expr", "nothing"), "no expression 'nothing'; known: spmv"),
        (("--expr", "y(i) = A(i,j) x"), "expected the end"),
        (("--expr", "mttkrp"), "takes 3 modes, the tensor has 2"),
        (("--expr", "add", "--operand", "C=same"), "has no operand C; it has A, B"),
        (("--expr", "add", "--operand", "B=other"), "no operand 'other'"),
        (("--expr", "add", "--operand", "B"), "expected NAME=FILE"),
        (("--expr", "add", "--operand", "B=absent.mtx"), "absent.mtx: cannot be read"),
        (("--format", "csf5"), "unknown format 'csf5'"),
        (("--parts", "0"), "--parts"),
        (("--expr", "spmm", "--columns", "4611686018427387904"), "more than NumPy can address"),
        (("--parts", "99999999"), "at most"),
        (("--picture", "/nowhere/a.svg"), "cannot be written"),
    ],
)
def test_errors_are_one_line(sparsecc: Run, skewed: Path, arguments: tuple[str, ...], message: str) -> None:
    result = sparsecc("inspect", skewed, *arguments)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1


def test_broken_files_and_options_of_other_files(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    broken = tmp_path / "a.mtx"
    broken.write_text("%%MatrixMarket matrix coordinate real general\n2 2 1\n1 x 1\n")
    result = sparsecc("inspect", broken)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "line 3: expected 3 numbers" in result.err
    result = sparsecc("inspect", mlp, "--expr", "spmv")
    assert result.code == 2
    assert "are for .mtx and .tns files" in result.err
    result = sparsecc("inspect", broken, "--partition")
    assert (result.code, "are for models" in result.err) == (2, True)
