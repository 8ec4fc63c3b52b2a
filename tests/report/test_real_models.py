"""Pages of real runs: a trained model of this repository and one of another project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsecc
from sparsecc.ir import Model
from sparsecc.report import parse_document, render
from sparsecc.report.measured import measured_parts

pytest.importorskip("jinja2", reason="reports need Jinja2: pip install 'sparsecc[report]'")

PIPELINE = "tidy,prune-magnitude{pattern=%s sparsity=0.8},choose-layout{layout=%s},lower-sparse"


def _page(model: Path, layout: str, folder: Path) -> tuple[str, dict[str, object]]:
    """The page of a run with everything in it that can be measured, and its document as it would lie in a file."""
    out = folder / "out.onnx"
    result = sparsecc.optimize(model, out, pipeline=PIPELINE % (layout, layout), keep_slower=True, threads=1)
    document = {**result.to_json(), "model": str(model), **measured_parts(Model.load(out), Model.load(model))}
    document = json.loads(json.dumps(document))
    return render(document), document


def test_model_of_this_repository(root: Path, tmp_path: Path) -> None:
    page, document = _page(root / "models" / "text_lm" / "text_lm.onnx", "16x1", tmp_path)
    read = parse_document(document)
    assert {item.site for item in read.thumbnails} == {
        site.site for site in read.sites if site.layout == "16x1"
    }
    assert len(read.spectra) == 5
    assert read.partition
    assert read.latency is not None
    assert read.latency.after is not None
    assert read.latency.after.median == read.latency.after_ms
    for text in ('id="latency"', 'id="patterns"', 'id="spectra"', 'id="balance"', "text_lm.onnx → out.onnx"):
        assert text in page, text
    assert "/layers.0/" in page.replace("<wbr>", "")


def test_model_of_another_project(data_dir: Path, tmp_path: Path) -> None:
    page, document = _page(data_dir / "models" / "resnet20_cifar10.onnx", "unstructured", tmp_path)
    read = parse_document(document)
    sparse = {site.site for site in read.sites if site.layout == "unstructured"}
    assert len(sparse) == 18
    assert {item.site for item in read.thumbnails} == sparse
    assert len(read.spectra) == 20
    assert all(0.15 < (item.density or 0) < 0.25 for item in read.thumbnails)
    assert page.count('<th scope="row" data-value=') == 20
    assert str(data_dir) not in page
