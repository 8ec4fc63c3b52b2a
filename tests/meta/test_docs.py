"""The pages made from code are up to date, and what the README shows works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from sparsecc.cli.main import cli


def _generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", root / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["passes.md", "operators.md", "pruning.md", "pruning.svg"])
def test_generated_page_is_up_to_date(root: Path, name: str) -> None:
    assert (root / "docs" / name).read_text() == _generator(root).PAGES[name](), "run `make docs`"


def test_readme_python_example_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    models = root / "models"
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert list(tmp_path.glob("*.onnx"))


def test_readme_names_only_verbs_that_exist(root: Path) -> None:
    text = (root / "README.md").read_text() + (root / "docs" / "concepts.md").read_text()
    verbs = set(re.findall(r"\bsparsecc ([a-z]+)(?= )", text)) - {"and", "is", "as", "on", "makes", "uses"}
    assert verbs
    known = set(cli.list_commands(None))  # type: ignore[arg-type]
    assert verbs <= known, verbs - known


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/concepts.md",
        "docs/pruning.md",
        "docs/report.md",
        "docs/deploy.md",
        "docs/arm.md",
    ],
)
def test_links_inside_the_repository_exist(root: Path, page: str) -> None:
    source = root / page
    for link in re.findall(r"\]\(([^)#:]+)\)", source.read_text()):
        assert (source.parent / link).exists(), f"{page}: {link}"
