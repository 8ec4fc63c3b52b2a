"""The rooms import only in the agreed directions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Room -> rooms it may import besides itself. ``*``: everything.
ALLOWED = {
    "errors": set(),
    "sparse": {"errors"},
    "algebra": {"errors"},
    "target": {"sparse", "errors"},
    "ir": {"sparse", "algebra", "errors"},
    "pm": {"ir", "sparse", "target", "errors"},
    "calib": {"ir", "pm", "sparse", "target", "errors"},
    "emit": {"ir", "sparse", "algebra", "target", "errors", "runtime"},
    "verify": {"ir", "sparse", "errors", "runtime", "calib"},
    "report": {"ir", "sparse", "plan", "runtime", "errors"},
    "heal": {"ir", "pm", "calib", "errors"},
    "passes": {"pm", "ir", "sparse", "algebra", "target", "calib", "heal", "errors"},
    "runtime": {"errors"},
    "tvm": {
        "passes",
        "pm",
        "ir",
        "sparse",
        "algebra",
        "calib",
        "emit",
        "verify",
        "runtime",
        "errors",
        "__init__",
    },
    "bundle": {"ir", "runtime", "errors"},
    "exec": {"errors"},
    "plan": {"*"},
    "cli": {"*"},
    "planning": {"*"},
    "api": {"*"},
    "__init__": {"*"},
    "__main__": {"*"},
}
FOLDERS = {"passes": ROOT / "passes", "runtime": ROOT / "runtime"}


def _imports(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            whole = node.module == "sparsecc"
            names = [f"sparsecc.{alias.name}" for alias in node.names] if whole else [node.module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sparsecc.")}
    return rooms


def _modules() -> list[tuple[str, Path]]:
    modules = [(path.stem, path) for path in sorted((ROOT / "sparsecc").glob("*.py"))]
    for room in ALLOWED:
        folder = FOLDERS.get(room, ROOT / "sparsecc" / room)
        if folder.is_dir():
            modules += [(room, path) for path in sorted(folder.rglob("*.py"))]
    return modules


@pytest.mark.parametrize(("room", "path"), _modules(), ids=lambda item: str(item).removeprefix(f"{ROOT}/"))
def test_imports_only_what_its_room_may(room: str, path: Path) -> None:
    allowed = ALLOWED[room]
    if "*" in allowed:
        return
    extra = _imports(path) - allowed - {room}
    assert not extra, f"{path.relative_to(ROOT)} ({room}) imports {sorted(extra)}"


def test_kernels_include_no_runtime_header() -> None:
    folder = ROOT / "runtime" / "csrc"
    shims = {"ort", "run", "tvm"}
    sources = [p for p in folder.rglob("*.[ch]*") if p.relative_to(folder).parts[0] not in shims]
    assert sources
    for path in sources:
        assert "ort_abi" not in path.read_text(), path
        assert "onnxruntime" not in "".join(
            line for line in path.read_text().splitlines() if line.startswith("#include")
        ), path
