"""Dictionaries of outputs: error and time of sparse codes in every pattern beside low rank, at one budget.

    python bench/dictionaries.py errors --data FOLDER    six layers of MiniLM, calibrated and on other sentences
    python bench/dictionaries.py layers                  time of dense layers / time of atoms and sparse codes

Errors are shares of the energy of a layer's outputs on what the dense model gives it; biases are left alone. Speeds are
ratios of medians of interleaved runs of one process, one thread, sparse operators of our library.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from accuracy_tasks import ROOT, load_evaluation, minilm
from factorisation import layer, output_errors

from sparsecc import emit, ir, verify
from sparsecc.calib import Calibration
from sparsecc.passes.prune.gram import quadratic_error
from sparsecc.pm import PassContext, Pipeline

OUTPUT = ROOT / "bench" / "results" / "dictionaries.json"

#: Share of the numbers that stay.
RATIOS = (0.8, 0.7, 0.6, 0.5)
ERROR_RATIOS = RATIOS[:3]

PATTERNS = ("unstructured", "4x1", "16x1", "2:4", "1:4")

#: Layers whose errors are compared: one block of MiniLM.
BLOCK = "encoder.layer.2."

#: Methods beside the dictionaries: pass and what differs from its defaults.
OTHERS = {
    "SVD": "factor-svd{OPTIONS}",
    "ASVD": "factor-asvd{OPTIONS FIT}",
    "whitened SVD": "factor-rrr{OPTIONS FIT}",
}
DICTIONARIES = {"COMPOT": "factor-compot", "CoSpaDi": "factor-cospadi", "ROCKET": "factor-rocket"}

#: (outputs, inputs) of layers that are timed: those of MiniLM and of BERT-base; and rows of x.
LAYERS = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))
ROWS = (1, 16, 128)


def error_specs() -> dict[str, str]:
    """Pipelines by method and pattern."""
    specs = dict(OTHERS)
    for method, name in DICTIONARIES.items():
        for pattern in PATTERNS if method == "COMPOT" else PATTERNS[:2]:
            specs[f"{method} {pattern}"] = f"{name}{{OPTIONS FIT pattern={pattern}}}"
    return specs


def errors(data: Path, folder: Path, found: dict[str, Any], write: Callable[[], None]) -> None:
    """Add the errors of each layer by method and budget to ``found``: on calibration data and on other sentences."""
    task = minilm(data, load_evaluation(data), folder, 512)
    dense = ir.Model.load(task.path)
    Pipeline.parse("tidy").run(dense, PassContext())
    sites = {site.name: site for site in dense.sites() if site.name.startswith(BLOCK)}
    sources = [Calibration.from_batches(task.calibration[part::2], dense, threads=1) for part in (0, 1)]
    other = sources[1].gram(dense, list(sites.values()))
    for method, spec in error_specs().items():
        for ratio in ERROR_RATIOS:
            if f"{ratio:g}" in found.get(method, {}):
                continue
            model = dense.copy()
            options = f'param-ratio={ratio:g} keep-slower=true match="{BLOCK}*"'
            text = spec.replace("OPTIONS", options).replace("FIT", "sequential=false bias=false")
            (report,) = Pipeline.parse(text).run(model, PassContext(calibration=sources[0], threads=1))
            parts = {site.name: site.numpy().astype(np.float64) for site in model.sites()}
            seen = output_errors(report, dense, model, sources[0])
            for change, error in zip(report.changed, seen, strict=True):
                first, second = [parts[name] for name in parts if name.startswith(f"{change.site}.")]
                weight = sites[change.site].numpy().astype(np.float64)
                lost = quadratic_error(second @ first - weight, other[change.site])
                found.setdefault(method, {}).setdefault(f"{ratio:g}", {})[change.site.removeprefix(BLOCK)] = {
                    "output_error": round(error, 6),
                    "other_sentences": round(lost / quadratic_error(weight, other[change.site]), 6),
                    "parameters": round(float(change.numbers["parameters"] or 0), 4),
                }
            write()


def speeds(outputs: int, inputs: int) -> dict[str, Any]:
    """Time of the dense layer / time of each form, and bytes of its constants / those of the dense one, by rows."""
    dense = layer(outputs, inputs)
    x = np.random.default_rng(1).standard_normal((1, 64, inputs)).astype(np.float32)
    source = Calibration.from_batches([{"x": x}], dense, threads=1)
    models: dict[str, ir.Model] = {}
    for ratio in RATIOS:
        for pattern in ("low rank", *PATTERNS):
            options = f"param-ratio={ratio:g} keep-slower=true"
            spec = f"factor-svd{{{options}}}"
            if pattern != "low rank":
                spec = (
                    f"factor-rocket{{{options} pattern={pattern} rounds=0}},"
                    f"choose-layout{{match=layer.codes layout={pattern}}},lower-sparse"
                )
            model = dense.copy()
            reports = Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))
            if all(report.changed for report in reports):
                emit.finalize(model)
                models[f"{pattern} {ratio:g}"] = model
    sizes = [_constants(model) for model in (dense, *models.values())]
    found: dict[str, Any] = {
        "bytes": {name: round(size / sizes[0], 4) for name, size in zip(models, sizes[1:], strict=True)}
    }
    for rows in ROWS:
        batch = {"x": np.random.default_rng(2).standard_normal((1, rows, inputs)).astype(np.float32)}
        timed = verify.benchmark([dense, *models.values()], batch, threads=1, max_seconds=8)
        ratios = [round(float(item), 3) for item in timed.ratio_to_first[1:]]
        found[str(rows)] = dict(zip(models, ratios, strict=True))
    return found


def _constants(model: ir.Model) -> int:
    values = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in values if tensor is not None)


@click.command()
@click.argument("part", type=click.Choice(["errors", "layers"]))
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option(
    "--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file; the rest of it stays."
)
@click.option("--layer", "only", multiple=True, help="Only layers of OUTPUTSxINPUTS.")
def main(part: str, data: Path, output: Path, only: tuple[str, ...]) -> None:
    """Measure PART and write OUTPUT."""
    document: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    document.update(command="python bench/dictionaries.py", machine=platform.machine())

    def write() -> None:
        output.write_text(json.dumps(document, indent=1) + "\n")

    if part == "errors":
        with tempfile.TemporaryDirectory() as folder:
            errors(data, Path(folder), document.setdefault("errors", {}), write)
        return
    for outputs, inputs in LAYERS:
        if only and f"{outputs}x{inputs}" not in only:
            continue
        document.setdefault("layers", {})[f"{outputs}x{inputs}"] = speeds(outputs, inputs)
        write()


if __name__ == "__main__":
    main()
