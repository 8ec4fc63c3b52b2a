"""Removal and permutation of units and blocks on real models: accuracy, multiplications left, plain onnxruntime's time.

    python bench/structured.py --data FOLDER

Removes channels and blocks of the CIFAR-10 ResNet, hidden neurons, heads and layers of a MiniLM sentence encoder and of
a small LLaMA (grouped queries, rotary positions) with and without compensation, times each against the model as it is
(plain onnxruntime, one thread, interleaved), lets layers of MiniLM share weights, and prunes it to 16x1 blocks with and
without another order of its channels. Calibration samples are never among those measured on.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
from accuracy_tasks import ROOT, Run, Task, cifar, load_evaluation, minilm

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
        "1 of 9 blocks": "tidy,prune-depth",
        "1 of 9 blocks, only taken out": "tidy,prune-depth{compensation=none}",
        "2 of 9 blocks": "tidy,prune-depth{blocks=2}",
        "2 of 9 blocks, only taken out": "tidy,prune-depth{blocks=2 compensation=none}",
        "2 of 9 blocks, then least squares": "tidy,prune-depth{blocks=2},recover-ols{correction=1.0}",
        "30 %: 2 blocks, then channels": "tidy,prune-depth{blocks=2},prune-structured{refit=all}",
        "30 %: 2 blocks, then channels, then least squares": (
            "tidy,prune-depth{blocks=2},prune-structured{refit=all},recover-ols{correction=1.0}"
        ),
        "30 %: 2 blocks, then channels, only cut": (
            "tidy,prune-depth{blocks=2 compensation=none},prune-structured{compensation=none}"
        ),
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
        "1 of 6 layers": "tidy,prune-depth{span=2}",
        "1 of 6 layers, only taken out": "tidy,prune-depth{span=2 compensation=none}",
        "2 of 6 layers": "tidy,prune-depth{blocks=2 span=2}",
        "2 of 6 layers, only taken out": "tidy,prune-depth{blocks=2 span=2 compensation=none}",
        "2 of 6 layers, then least squares": "tidy,prune-depth{blocks=2 span=2},recover-ols,recover-bias",
        "2 of 6 layers share the weights of 2 others": "tidy,share-weights{pairs=2 span=2 max-error=9.0}",
        "2 of 6 layers share the weights of 2 others, as they are": (
            "tidy,share-weights{pairs=2 span=2 max-error=9.0 compensation=none}"
        ),
    },
    "stories260K": {
        "dense": "tidy",
        "20 % of the multiplications": "tidy,prune-structured{flops-ratio=0.8 multiple=4}",
        "20 % of the multiplications, only cut": (
            "tidy,prune-structured{flops-ratio=0.8 multiple=4 compensation=none}"
        ),
        "20 % of the multiplications, then least squares": (
            "tidy,prune-structured{flops-ratio=0.8 multiple=4},recover-ols,recover-bias"
        ),
    },
}


def stories(data: Path, evaluation: ModuleType, held: int = 40) -> Task:
    """The last ``held`` windows of 256 tokens calibrate."""
    file = "tinystories_part1_tok512.npz"
    with np.load(data / "text" / file) as archive:
        tokens = next(archive[name] for name in archive.files if archive[name].ndim == 2).astype(np.int64)

    def measure(run: Run) -> tuple[float, int]:
        windows = len(tokens) - held
        return evaluation.causal_lm(file, limit=windows)(run)["perplexity"], windows

    calibration = [
        {"tokens": tokens[start : start + 8]} for start in range(len(tokens) - held, len(tokens), 8)
    ]
    return Task(
        data / "models" / "stories260K.onnx", "perplexity", measure, calibration, held, "dynamic", 0.5
    )


def task_of(name: str, data: Path, folder: Path) -> Task:
    """The model of this name, with what measures it."""
    evaluation = load_evaluation(data)
    if name.startswith("minilm"):
        return minilm(data, evaluation, folder, 256)
    return (cifar if "cifar" in name else stories)(data, evaluation)


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
    if "input" not in shape:  # tokens
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
@click.option("--variant", "chosen", multiple=True, help="Measure only this variant, and dense.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "bench" / "results" / "structured.json",
    help="JSON file; what it has of other models, and with --variant of other variants, stays.",
)
def main(data: Path, only: tuple[str, ...], chosen: tuple[str, ...], output: Path) -> None:
    """Measure every variant and write OUTPUT."""
    results: dict[str, Any] = json.loads(output.read_text())["models"] if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variants in VARIANTS.items():
            if only and name not in only:
                continue
            task = task_of(name, data, Path(folder))
            rows: dict[str, Any] = results.get(name, {}).get("variants", {}) if chosen else {}
            dense: ir.Model | None = None
            for variant, pipeline in variants.items():
                if chosen and variant not in (*chosen, "dense"):
                    continue
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
