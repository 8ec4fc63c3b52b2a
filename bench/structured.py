"""Structured removal and permutation on real models: accuracy, multiplications left and plain onnxruntime's time.

    python bench/structured.py --data FOLDER

Removes channels of the CIFAR-10 ResNet and hidden neurons of a MiniLM sentence encoder with and without compensation,
times each against the model as it is (plain onnxruntime, one thread, interleaved), and prunes MiniLM to 16x1 blocks
with and without another order of its channels. Calibration samples are never among those measured on.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from accuracy import ROOT, Task, cifar, load_evaluation, minilm

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.pm import PassContext, Pipeline

#: Model -> variant -> pipeline; the first is the model as it is.
VARIANTS = {
    "resnet20_cifar10": {
        "dense": "tidy",
        "30 % of the multiplications": "tidy,prune-structured{multiple=16}",
        "30 % of the multiplications, only cut": "tidy,prune-structured{multiple=16 compensation=none}",
        "30 % of the multiplications, multiple of 8": "tidy,prune-structured",
        "30 % of the multiplications, multiple of 8, only cut": "tidy,prune-structured{compensation=none}",
    },
    "minilm_l6_v2": {
        "dense": "tidy",
        "30 % of the multiplications": "tidy,prune-structured{multiple=16}",
        "30 % of the multiplications, only cut": "tidy,prune-structured{multiple=16 compensation=none}",
        "50 % of the hidden neurons": "tidy,prune-structured{flops-ratio=0.667 match=*intermediate*}",
        "unstructured 50 % Wanda": "tidy,prune-wanda{sparsity=0.5}",
        "16x1 50 % Wanda": "tidy,prune-wanda{pattern=16x1 sparsity=0.5}",
        "16x1 50 % Wanda, permuted, least squares": (
            "tidy,permute{pattern=16x1 sparsity=0.5},prune-wanda-ols{pattern=16x1 sparsity=0.5}"
        ),
        "16x1 50 % Wanda, least squares": "tidy,prune-wanda-ols{pattern=16x1 sparsity=0.5}",
    },
}


def measure(task: Task, pipeline: str, threads: int) -> tuple[ir.Model, dict[str, Any]]:
    """The model that the pipeline makes, and what is known about it."""
    started = time.perf_counter()
    model = ir.Model.load(task.path)
    context = PassContext(calibration=Calibration.from_batches(task.calibration, model, threads=threads))
    reports = Pipeline.parse(pipeline).run(model, context)
    seconds = time.perf_counter() - started
    runnable = verify.session(model, threads=threads)
    value, samples = task.measure(lambda feed: list(runnable.run(feed).values()))
    notes = [note for report in reports for note in report.notes]
    return model, {
        "pipeline": pipeline,
        "value": round(value, 5),
        "samples": samples,
        "bytes": model.nbytes,
        "notes": notes,
        "seconds": round(seconds, 1),
    }


def speed(dense: ir.Model, model: ir.Model, task: Task) -> float:
    """Time of the dense model / time of this one, plain onnxruntime on one thread."""
    shape = {name: array[:1] for name, array in task.calibration[0].items()}
    if "input_ids" in shape:
        shape = {name: np.full((1, 128), array.flat[0], array.dtype) for name, array in shape.items()}
    result = verify.benchmark([dense, model], shape, threads=1, library=False)
    return round(result.ratio_to_first[1], 3)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Measure only this model.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "bench" / "results" / "structured.json",
    help="JSON file; what it has of other models stays.",
)
def main(data: Path, only: tuple[str, ...], output: Path) -> None:
    """Measure every variant and write OUTPUT."""
    evaluation = load_evaluation(data)
    results: dict[str, Any] = json.loads(output.read_text())["models"] if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variants in VARIANTS.items():
            if only and name not in only:
                continue
            task = cifar(data, evaluation) if "cifar" in name else minilm(data, evaluation, Path(folder), 256)
            rows: dict[str, Any] = {}
            dense: ir.Model | None = None
            for variant, pipeline in variants.items():
                model, rows[variant] = measure(task, pipeline, 1)
                dense = dense or model
                if model.nbytes < dense.nbytes:
                    rows[variant]["times_faster"] = speed(dense, model, task)
                click.echo(f"{name}: {variant}: {rows[variant]}", err=True)
            results[name] = {
                "metric": task.metric,
                "calibration_samples": task.calibration_samples,
                "variants": rows,
            }
    document = {"command": "python bench/structured.py", "machine": platform.machine(), "models": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
