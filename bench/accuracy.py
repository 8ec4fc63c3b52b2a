"""Accuracy of pruned and of quantised models on real data, without any fine-tuning.

Prunes the models of ``accuracy_tasks.py`` with every method and pattern of the table, quantises them (MiniLM with
dynamic, the others with static activations) beside onnxruntime's own quantiser, measures the task metric of each and
writes a JSON file and a table::

    python bench/accuracy.py --data FOLDER

Calibration samples are never among the samples measured on; both counts are in the results.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from accuracy_tasks import ROOT, Batch, Task, tasks

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import density

#: Column of the table and pipeline; the first is the model as it is.
VARIANTS = {
    "dense": "",
    "50 % magnitude": "tidy,prune-magnitude{sparsity=0.5}",
    "50 % Wanda": "tidy,prune-wanda{sparsity=0.5}",
    "4:8 magnitude": "tidy,prune-magnitude{pattern=4:8}",
    "4:8 Wanda": "tidy,prune-wanda{pattern=4:8}",
    "2:4 magnitude": "tidy,prune-magnitude{pattern=2:4}",
    "2:4 Wanda": "tidy,prune-wanda{pattern=2:4}",
    "50 % Wanda + OLS": "tidy,prune-wanda-ols{sparsity=0.5 correction=CORRECTION}",
    "50 % SparseGPT": "tidy,prune-sparsegpt{sparsity=0.5 correction=CORRECTION}",
    "50 % ALPS": "tidy,prune-alps{sparsity=0.5 correction=CORRECTION}",
    "2:4 Wanda + OLS": "tidy,prune-wanda-ols{pattern=2:4 correction=CORRECTION}",
    "2:4 SparseGPT": "tidy,prune-sparsegpt{pattern=2:4 correction=CORRECTION}",
    "2:4 ALPS": "tidy,prune-alps{pattern=2:4 correction=CORRECTION}",
    "2:4 permuted ALPS": "tidy,permute{pattern=2:4},prune-alps{pattern=2:4 correction=CORRECTION}",
    "70 % magnitude": "tidy,prune-magnitude{sparsity=0.7}",
    "70 % SparseGPT": "tidy,prune-sparsegpt{sparsity=0.7 correction=CORRECTION}",
    "70 % ALPS": "tidy,prune-alps{sparsity=0.7 correction=CORRECTION}",
    "70 % LAMP ALPS": "tidy,allocate{sparsity=0.7},prune-alps{sparsity=0.7 correction=CORRECTION}",
    "16x1 50 % Wanda": "tidy,prune-wanda{pattern=16x1 sparsity=0.5}",
    "16x1 50 % Wanda + OLS": "tidy,prune-wanda-ols{pattern=16x1 sparsity=0.5 correction=CORRECTION}",
    "16x1 50 % permuted Wanda + OLS": (
        "tidy,permute{pattern=16x1 sparsity=0.5},prune-wanda-ols{pattern=16x1 sparsity=0.5 correction=CORRECTION}"
    ),
    "16x1 50 % ALPS": "tidy,prune-alps{pattern=16x1 sparsity=0.5 correction=CORRECTION}",
    "16x1 50 % permuted ALPS": (
        "tidy,permute{pattern=16x1 sparsity=0.5},prune-alps{pattern=16x1 sparsity=0.5 correction=CORRECTION}"
    ),
    "int8": "tidy,quantize{activations=ACTIVATIONS}",
    "int8 least squares": "tidy,quantize{activations=ACTIVATIONS method=mse}",
    "int8 onnxruntime": "onnxruntime",
    "50 % Wanda int8": "tidy,prune-wanda{sparsity=0.5},quantize{activations=ACTIVATIONS}",
    "4x1 50 % Wanda int8": "tidy,prune-wanda{pattern=4x1 sparsity=0.5},quantize{activations=ACTIVATIONS}",
    "16x4 50 % Wanda int8": "tidy,prune-wanda{pattern=16x4 sparsity=0.5},quantize{activations=ACTIVATIONS}",
}


def prune(model: ir.Model, task: Task, pipeline: str, threads: int) -> dict[str, Any]:
    """Run the pipeline on ``model`` and say what it did to its sites."""
    context = PassContext(calibration=Calibration.from_batches(task.calibration, model, threads=threads))
    reports = Pipeline.parse(pipeline).run(model, context)
    quantised = len(reports[-1].changed) if reports[-1].pass_name == "quantize" else 0
    report = next((item for item in reports if item.pass_name.startswith("prune-")), None)
    if report is None:
        return {"pipeline": pipeline, "sites_quantized": quantised}
    pruned = {change.site for change in report.changed}
    sites = [site for site in model.sites() if site.name in pruned]
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    kept = sum(density(site.numpy()) * site.shape[0] * site.shape[1] for site in sites)
    return {
        "pipeline": pipeline,
        "sites_pruned": len(sites),
        "sites_left": len(report.skipped),
        "sites_quantized": quantised,
        "weights_pruned_in": weights,
        "density": round(kept / weights, 6) if weights else 1.0,
    }


def measure_variant(task: Task, pipeline: str, threads: int) -> dict[str, Any]:
    started = time.perf_counter()
    pipeline = pipeline.replace("ACTIVATIONS", task.activations).replace("CORRECTION", str(task.correction))
    if pipeline == "onnxruntime":
        model, row = (
            onnxruntime_quantized(task, task.activations),
            {"pipeline": f"onnxruntime's quantize_{task.activations}"},
        )
    else:
        model = ir.Model.load(task.path)
        row = prune(model, task, pipeline, threads) if pipeline else {"pipeline": ""}
    runnable = verify.session(model, threads=threads)
    value, count = task.measure(lambda feed: list(runnable.run(feed).values()))
    return {**row, "value": value, "samples": count, "seconds": round(time.perf_counter() - started, 1)}


def onnxruntime_quantized(task: Task, activations: str, *, unsigned: bool = False) -> ir.Model:
    """The model as onnxruntime's own tool quantises it: int8 weights, one scale per output, QDQ if static.

    Static activations are int8, the tool's default, or with ``unsigned`` uint8.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(task.calibration)

        def get_next(self) -> Batch | None:
            return next(self.batches, None)

    source = task.path.resolve()
    with tempfile.TemporaryDirectory() as folder:
        prepared, path = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        if activations == "dynamic":
            weight = quantization.QuantType.QInt8
            quantization.quantize_dynamic(task.path, path, per_channel=True, weight_type=weight)
        else:
            with contextlib.chdir(folder):  # it leaves files where it runs
                quantization.shape_inference.quant_pre_process(source, prepared)
            kind = quantization.QuantType.QUInt8 if unsigned else quantization.QuantType.QInt8
            quantization.quantize_static(prepared, path, Reader(), per_channel=True, activation_type=kind)
        return ir.Model.from_proto(ir.Model.load(path).to_proto())


def table(results: Mapping[str, Any]) -> str:
    lines = ["| model (metric, samples) | " + " | ".join(VARIANTS) + " |", "|---" * (len(VARIANTS) + 1) + "|"]
    for name, result in results.items():
        rows = result["variants"]
        cells = [f"{rows[variant]['value']:.4f}" if variant in rows else "-" for variant in VARIANTS]
        lines.append(f"| {name} ({result['metric']}, {result['samples']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rule(results: Mapping[str, Any]) -> str:
    """What the best fitted method loses beside what magnitude loses, at the same pattern and sparsity."""
    lines = ["| model | pattern | magnitude loses | best method | loses | share |", "|---" * 6 + "|"]
    for name, result in results.items():
        rows, sign = result["variants"], 1 if result.get("higher_is_better", True) else -1
        for pattern in ("50 %", "2:4"):
            fitted = [
                f"{pattern} {method}" for method in ("Wanda + OLS", "SparseGPT", "ALPS", "permuted ALPS")
            ]
            measured = {item: sign * rows[item]["value"] for item in fitted if item in rows}
            if not measured or "dense" not in rows or f"{pattern} magnitude" not in rows:
                continue
            best = max(measured, key=measured.__getitem__)
            dense, plain = (sign * rows[item]["value"] for item in ("dense", f"{pattern} magnitude"))
            lost, share = dense - measured[best], (dense - measured[best]) / max(dense - plain, 1e-9)
            lines.append(f"| {name} | {pattern} | {dense - plain:.4f} | {best} | {lost:.4f} | {share:.2f} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option("--only", multiple=True, help="Measure only this model; may be repeated.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Only this.")
@click.option(
    "--held-pairs", default=128, show_default=True, help="Pairs of sentences that calibrate MiniLM."
)
@click.option("--threads", default=1, show_default=True, help="Threads of every session.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "bench" / "results" / "accuracy.json",
    help="JSON file.",
)
def main(
    data: Path, only: tuple[str, ...], variants: tuple[str, ...], held_pairs: int, threads: int, output: Path
) -> None:
    """Measure every variant of every model, write OUTPUT and print the table.

    What OUTPUT has of other models and variants stays.
    """
    results: dict[str, Any] = json.loads(output.read_text())["models"] if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks(data, Path(folder), held_pairs).items():
            if only and name not in only:
                continue
            rows = results.get(name, {}).get("variants", {})
            for variant, pipeline in VARIANTS.items():
                if variants and variant not in variants:
                    continue
                rows[variant] = measure_variant(task, pipeline, threads)
                click.echo(f"{name}: {variant} {rows[variant]['value']:.4f}", err=True)
                results[name] = {
                    "metric": task.metric,
                    "higher_is_better": task.higher_is_better,
                    "samples": rows[variant]["samples"],
                    "calibration_samples": task.calibration_samples,
                    "variants": rows,
                }
                save(output, results, f"python bench/accuracy.py --held-pairs {held_pairs}", threads)
    click.echo(table(results))
    click.echo(rule(results))


def save(output: Path, results: Mapping[str, Any], command: str, threads: int) -> None:
    """Write what there is: a run that is stopped loses one variant."""
    import onnxruntime

    document = {
        "command": command,
        "machine": platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "models": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
