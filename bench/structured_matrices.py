"""Structured matrices beside low rank: time of their chains, what moves numbers in them, errors of real layers.

    python bench/structured_matrices.py time                    dense / chain, by layer, rows of x and budget
    python bench/structured_matrices.py errors --data FOLDER    layers of MiniLM at 20, 30 and 40 % fewer numbers

Speeds are ratios of medians of interleaved runs of one process, one thread, processor time, on plain onnxruntime.
Errors are shares of the outputs' energy, each layer on what the dense model gives it, biases left alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from accuracy import save
from accuracy_tasks import ROOT, load_evaluation, minilm
from factorisation import _Measured, layer

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.passes.factor.base import FactorPass, rewrite
from sparsecc.pm import PassContext, Pipeline

OUTPUT = ROOT / "bench" / "results" / "structured_matrices.json"

#: Form -> pass and its options beside the budget.
FORMS = {
    "low rank": "factor-rrr{BUDGET}",
    "BTT, one row of panels": "factor-btt{BUDGET}",
    "BTT, 1 x 8": "factor-btt{BUDGET across=8}",
    "BTT, 4 x 4": "factor-btt{BUDGET down=4 across=4}",
    "Monarch": "factor-monarch{BUDGET}",
    "BLAST, 4 x 4": "factor-blast{BUDGET}",
    "BLAST, 8 x 8": "factor-blast{BUDGET blocks=8}",
    "BLAST, 16 x 16": "factor-blast{BUDGET blocks=16}",
    "8 blocks + low rank": "factor-blockdiag-lowrank{BUDGET}",
    "Kronecker": "factor-kronecker{BUDGET}",
}

#: What starts of fits know already: no sweeps over the form.
STARTS = {
    "BTT, one row of panels": "factor-btt{BUDGET sweeps=0}",
    "BTT, 4 x 4": "factor-btt{BUDGET down=4 across=4 sweeps=0}",
    "Monarch": "factor-monarch{BUDGET sweeps=0}",
    "Kronecker": "factor-kronecker{BUDGET sweeps=0}",
}

#: (outputs, inputs) of the layers that are timed.
LAYERS = ((384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072))
ROWS = (1, 16, 128, 512)
TIMED_RATIOS = (0.3, 0.5, 0.7)

#: Shares of the numbers that stay, and the layers of MiniLM.
RATIOS = (0.8, 0.7, 0.6)
SITES = "re:layer.2.(attention.self.query|attention.output.dense|intermediate.dense|output.dense)$"

#: Operators that multiply; the others move numbers.
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def spec_of(form: str, options: str) -> str:
    return form.replace("{BUDGET", "{" + options)


def chain(dense: ir.Model, spec: str, ratio: float) -> ir.Model | None:
    """The layer in a form of random values, which is all that time depends on, or None where it is refused."""
    (step,) = Pipeline.parse(spec).passes
    assert isinstance(step, FactorPass)
    model = dense.copy()
    model.infer_shapes()
    (site,) = model.sites()
    rows, columns = site.shape
    outline = step.outline(site, int(ratio * rows * columns), np.random.default_rng(0))
    if isinstance(outline, str):
        return None
    rewrite(model, site, outline.astype(site.dtype))
    return model


def moving_share(model: ir.Model, x: dict[str, Any], folder: Path) -> float:
    """Share of the time of all nodes that is not spent in products, by onnxruntime's own profile (in whole us)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for _ in range(30):
        session.run(None, x)
    least: dict[str, tuple[str, int]] = {}  # of a node: other work on the machine only adds to it
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            known = least.get(event["name"])
            if known is None or event["dur"] < known[1]:
                least[event["name"]] = event["args"]["op_name"], event["dur"]
    products = sum(micros for op, micros in least.values() if op in PRODUCTS)
    return 1 - products / max(1, sum(micros for _, micros in least.values()))


def timed(outputs: int, inputs: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Dense / chain and the share of what is no product, by form, budget and rows of x."""
    dense = layer(outputs, inputs)
    models = {
        (name, ratio): chain(dense, spec_of(form, "keep-slower=true"), ratio)
        for name, form in FORMS.items()
        for ratio in TIMED_RATIOS
    }
    known = {key: model for key, model in models.items() if model is not None}
    found: dict[str, Any] = {name: {} for name, _ in known}
    found["dense_ms"] = {}
    for rows in ROWS:
        x = {"x": np.random.default_rng(2).standard_normal((1, rows, inputs)).astype(np.float32)}
        result = verify.benchmark(
            [dense, *known.values()], x, threads=1, max_seconds=seconds * len(known), library=False
        )
        found["dense_ms"][str(rows)] = round(result.models[0].median_ms, 4)
        for (name, ratio), model, speed in zip(known, known.values(), result.ratio_to_first[1:], strict=True):
            found[name].setdefault(f"{ratio:g}", {})[str(rows)] = {
                "speed": round(float(speed), 3),
                "moving": round(moving_share(model, x, folder), 3),
            }
    return found


@click.group()
def main() -> None:
    """Measure one of them."""


@main.command("time")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file.")
@click.option("--seconds", default=0.1, show_default=True, help="Time spent on each chain.")
@click.option("--only", multiple=True, help="Only this layer, such as 768x768; may be repeated.")
def time_command(output: Path, seconds: float, only: tuple[str, ...]) -> None:
    """Time of chains of the right shapes with random values."""
    with tempfile.TemporaryDirectory() as folder:
        for outputs, inputs in LAYERS:
            name = f"{outputs}x{inputs}"
            if not only or name in only:
                _add(output, "time", name, timed(outputs, inputs, seconds, Path(folder)))


@main.command("errors")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file.")
def errors_command(data: Path, output: Path) -> None:
    """Errors of layers of MiniLM on their own."""
    with tempfile.TemporaryDirectory() as folder:
        task = minilm(data, load_evaluation(data), Path(folder), 256)
        model = ir.Model.load(task.path)
        Pipeline.parse("tidy").run(model, PassContext())
        calibration = _Measured(Calibration.from_batches(task.calibration, model, threads=1))
        specs = {**FORMS, **{f"{name}, not fitted": form for name, form in STARTS.items()}}
        for name, form in specs.items():
            rows: dict[str, Any] = {}
            for ratio in RATIOS:
                options = (
                    f'param-ratio={ratio:g} keep-slower=true sequential=false bias=false match="{SITES}"'
                )
                context = PassContext(calibration=calibration, threads=1)  # type: ignore[arg-type]
                (report,) = Pipeline.parse(spec_of(form, options)).run(model.copy(), context)
                for change in report.changed:
                    rows.setdefault(change.site, {})[f"{ratio:g}"] = {
                        "output_error": round(float(change.numbers["output_error"] or 0), 6),
                        "parameters": round(float(change.numbers["parameters"] or 0), 4),
                        "macs": change.numbers["macs"],
                    }
            _add(output, "errors", name, rows)


def _add(output: Path, part: str, key: str, value: Any) -> None:
    """Add one result to the file and say so."""
    results = dict(json.loads(output.read_text())["models"]) if output.exists() else {}
    results.setdefault(part, {})[key] = value
    save(output, results, "python bench/structured_matrices.py", 1)
    click.echo(f"{part}: {key}", err=True)


if __name__ == "__main__":
    main()
