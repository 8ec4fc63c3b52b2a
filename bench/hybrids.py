"""Hybrid forms of weights on real models: accuracy at one budget beside plain masks, and time of the rewritten layers.

    python bench/hybrids.py --data FOLDER

Rewrites a MiniLM sentence encoder and the CIFAR-10 ResNet with every hybrid pass, measures the task metric, and times
layers of MiniLM's and of larger shapes (one thread, interleaved with dense onnxruntime; the sparse part of each runs
on the operator library). Calibration samples are never among those measured on.
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
from accuracy_tasks import ROOT, Task, cifar, load_evaluation, minilm
from factorisation import layer

from sparsecc import emit, ir, verify
from sparsecc.calib import Calibration
from sparsecc.pm import PassContext, Pipeline

#: Pairs of sentences that calibrate MiniLM.
HELD_PAIRS = 256

#: Variant -> passes after tidy. Budgets: numbers that stay, dense factors counted.
VARIANTS = {
    "2:4 least squares (0.50)": "prune-wanda-ols{pattern=2:4 CORRECTION}",
    "2:4 SparseGPT (0.50)": "prune-sparsegpt{pattern=2:4 CORRECTION}",
    "2:4 ARMOR, blocks of 32": "prune-armor{CORRECTION}",
    "2:4 ARMOR, blocks of 16": "prune-armor{block=16 CORRECTION}",
    "unstructured least squares (0.50)": "prune-wanda-ols{sparsity=0.5 CORRECTION}",
    "sparse + rank, a quarter (0.50)": "sparse-lowrank{CORRECTION}",
    "sparse + rank, a quarter, as OATS leaves it (0.50)": "sparse-lowrank{CORRECTION rounds=0}",
    "3:8 + rank, a quarter (0.50)": "sparse-lowrank{pattern=3:8 CORRECTION}",
    "unstructured least squares (0.30)": "prune-wanda-ols{sparsity=0.7 CORRECTION}",
    "sparse + rank, a quarter (0.30)": "sparse-lowrank{sparsity=0.7 CORRECTION}",
    "sparse + rank, half (0.30)": "sparse-lowrank{sparsity=0.7 rank-share=0.5 CORRECTION}",
    "16x1 least squares (0.50)": "prune-wanda-ols{pattern=16x1 sparsity=0.5 CORRECTION}",
    "16x1 + rank, a quarter (0.50)": "sparse-lowrank{pattern=16x1 sparsity=0.5 CORRECTION}",
    "16x1 + rank, half (0.50)": "sparse-lowrank{pattern=16x1 sparsity=0.5 rank-share=0.5 CORRECTION}",
    "half of the tiles 2:4 (0.75)": "prune-tiles{sparsity=0.25 CORRECTION}",
    "half of the tiles 2:4, by OBS (0.75)": "prune-tiles{sparsity=0.25 score=obs CORRECTION}",
    "half of the outputs 2:4 (0.75)": "prune-tiles{sparsity=0.25 shape=ends CORRECTION}",
}

#: Layers of MiniLM whose errors are compared by themselves, and the variants that are.
ERROR_LAYERS = "re:layer.2.(attention.self.query|intermediate.dense)$"
ERROR_VARIANTS = [
    name for name in VARIANTS if "0.30" not in name and "SparseGPT" not in name and "OBS" not in name
]

#: (outputs, inputs) of the layers that are timed.
LAYERS = ((384, 384), (1536, 384), (384, 1536), (4096, 1024))
ROWS = (1, 16, 128)

#: Name -> pass, and the pattern its sparse product is lowered to.
FORMS = {
    "2:4": ("prune-wanda{pattern=2:4}", "2:4"),
    "2:4 ARMOR, blocks of 32": ("prune-armor{sweeps=2 rounds=1}", "2:4"),
    "half of the outputs 2:4": ("prune-tiles{sparsity=0.25 shape=ends}", "2:4"),
    "3:8 + rank, a quarter": ("sparse-lowrank{pattern=3:8 iterations=1 rounds=0}", "3:8"),
    "16x1": ("prune-wanda{pattern=16x1 sparsity=0.5}", "16x1"),
    "16x1 + rank, a quarter": ("sparse-lowrank{pattern=16x1 sparsity=0.5 iterations=1 rounds=0}", "16x1"),
}


def measure(task: Task, passes: str) -> dict[str, Any]:
    """What the passes make of the model of ``task``."""
    started = time.perf_counter()
    pipeline = f"tidy,{passes}".replace("CORRECTION", f"correction={task.correction}")
    if "cifar" in task.path.name:  # its layers are too small for ranks in steps of four
        pipeline = pipeline.replace("sparse-lowrank{", "sparse-lowrank{multiple=1 ")
    model = ir.Model.load(task.path)
    calibration = Calibration.from_batches(task.calibration, model, threads=1)
    reports = Pipeline.parse(pipeline).run(model, PassContext(calibration=calibration, threads=1))
    seconds = time.perf_counter() - started
    runnable = verify.session(model, threads=1)
    value, samples = task.measure(lambda feed: list(runnable.run(feed).values()))
    changed = reports[-1].changed
    return {
        "pipeline": pipeline,
        "value": round(value, 5),
        "samples": samples,
        "sites": len(changed),
        "sites_left": len(reports[-1].skipped),
        "mean_output_error": round(
            float(np.mean([item.numbers["output_error"] for item in changed] or [0])), 5
        ),
        "parameters": round(_mean_parameters(model, changed), 4),
        "seconds": round(seconds, 1),
    }


def _mean_parameters(model: ir.Model, changed: Any) -> float:
    """Share of the numbers of the changed sites that stay, factors counted."""
    shapes = {site.name: site.shape[0] * site.shape[1] for site in model.sites()}
    kept = [
        (item.numbers.get("parameters", item.numbers["density_after"]), shapes[item.site]) for item in changed
    ]
    return sum(share * size for share, size in kept) / max(1, sum(size for _, size in kept))


def errors(task: Task, variant: str) -> dict[str, Any]:
    """Error on the outputs of single layers, each on what the dense model gives it; biases are left alone."""
    passes = VARIANTS[variant].replace("CORRECTION", f'sequential=false match="{ERROR_LAYERS}" bias=false')
    model = ir.Model.load(task.path)
    calibration = Calibration.from_batches(task.calibration[::2], model, threads=1)
    reports = Pipeline.parse(f"tidy,{passes}").run(model, PassContext(calibration=calibration, threads=1))
    return {
        change.site: {
            "output_error": round(float(change.numbers["output_error"] or 0), 6),
            "parameters": round(
                float(change.numbers.get("parameters", change.numbers["density_after"]) or 0), 4
            ),
        }
        for change in reports[-1].changed
    }


def speed(outputs: int, inputs: int, forms: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Time of the dense layer / time of each form, by rows of x."""
    dense = layer(outputs, inputs)
    rng = np.random.default_rng(1)
    source = Calibration.from_batches(
        [{"x": rng.standard_normal((1, 64, inputs)).astype(np.float32)}], dense, threads=1
    )
    models = []
    for passes, pattern in forms.values():
        model = dense.copy()
        lowering = f"choose-layout{{match=layer layout={pattern}}},lower-sparse"
        reports = Pipeline.parse(f"{passes},{lowering}").run(
            model, PassContext(calibration=source, threads=1)
        )
        if not all(report.changed for report in reports):
            raise click.ClickException(f"{passes} left {outputs}x{inputs} as it is: {reports[0].skipped}")
        emit.finalize(model)
        models.append(model)
    found: dict[str, Any] = {}
    for rows in ROWS:
        x = {"x": rng.standard_normal((1, rows, inputs)).astype(np.float32)}
        result = verify.benchmark([dense, *models], x, threads=1, max_seconds=5)
        found[str(rows)] = {
            name: round(ratio, 3) for name, ratio in zip(forms, result.ratio_to_first[1:], strict=True)
        }
    return found


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["minilm_l6_v2", "resnet20_cifar10", "errors", "layers"]),
    help="Only this.",
)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Only this.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "bench" / "results" / "hybrids.json",
    help="JSON file; what it has of other models and variants stays.",
)
def main(data: Path, only: tuple[str, ...], variants: tuple[str, ...], output: Path) -> None:
    """Measure every variant of every model and the layers, and write OUTPUT."""
    document: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    document.update(command="python bench/hybrids.py", machine=platform.machine())
    evaluation = load_evaluation(data)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if not only or "errors" in only:
            task = minilm(data, evaluation, Path(folder), HELD_PAIRS)
            for variant in ERROR_VARIANTS:
                document.setdefault("errors", {})[variant] = errors(task, variant)
                output.write_text(json.dumps(document, indent=1) + "\n")
        for name in ("resnet20_cifar10", "minilm_l6_v2"):
            if only and name not in only:
                continue
            task = (
                cifar(data, evaluation)
                if "cifar" in name
                else minilm(data, evaluation, Path(folder), HELD_PAIRS)
            )
            own = document.setdefault("models", {}).setdefault(name, {})
            own.update(metric=task.metric, calibration_samples=task.calibration_samples)
            for variant in variants or VARIANTS:
                row = measure(task, VARIANTS[variant])
                if row["sites"]:  # small layers refuse some forms altogether
                    own.setdefault("variants", {})[variant] = row
                click.echo(f"{name}: {variant}: {row}", err=True)
                output.write_text(json.dumps(document, indent=1) + "\n")
    if not only or "layers" in only:
        for outputs, inputs in LAYERS:
            found = speed(outputs, inputs, FORMS)
            document.setdefault("layers", {})[f"{outputs}x{inputs}"] = found
            click.echo(f"{outputs}x{inputs}: {found}", err=True)
            output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
