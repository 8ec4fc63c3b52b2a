"""Real models through `optimize --quantize int8`, with and without pruning: accuracy and latency in one table.

    python bench/real_int8.py --data FOLDER --json bench/results/real_int8.json

One sample a run; models, metrics and calibration samples are those of ``bench/accuracy.py``. Nothing is fine-tuned:
what pruning costs here is what one-shot pruning costs. Latency is that of the whole file against the input file in
onnxruntime, in turns in one process, as `optimize` measures it; "int8 dense" is what onnxruntime makes of the same
quantised model without sparse operators.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from accuracy_tasks import ROOT, Task, tasks

import sparsecc
from sparsecc import verify
from sparsecc.cli.output import print_table
from sparsecc.errors import SparseccError
from sparsecc.plan import machine_facts

#: Name of the row and what is asked of `optimize` besides quantising.
VARIANTS: dict[str, dict[str, Any]] = {
    "int8 dense": {"standard_ops_only": True},
    "int8": {},
    "unstructured 50 %": {"sparsity": 0.5, "method": "wanda"},
    "4x1 50 %": {"pattern": "4x1", "sparsity": 0.5, "method": "wanda"},
    "16x4 50 %": {"pattern": "16x4", "sparsity": 0.5, "method": "wanda"},
}
SAMPLES = 64  # for calibration, of one picture or sentence each


def write_samples(task: Task, folder: Path) -> Path:
    """Write single calibration samples as a folder that `optimize` reads."""
    folder.mkdir()
    count = 0
    for batch in task.calibration:
        for row in range(len(next(iter(batch.values())))):
            if count < SAMPLES:
                np.savez(
                    folder / f"{count:03}.npz",
                    **{name: array[row : row + 1] for name, array in batch.items()},
                )
                count += 1
    return folder


def measure(
    name: str, task: Task, variant: str, samples: Path, scratch: Path, threads: int
) -> dict[str, Any]:
    """Optimise one model one way; return its figures."""
    row: dict[str, Any] = {"model": name, "variant": variant, "threads": threads, "metric": task.metric}
    output = scratch / "out.onnx"
    try:
        result = sparsecc.optimize(
            task.path, output, threads=threads, quantize="int8", activations=task.activations,
            calibration_data=samples, num_samples=SAMPLES, **VARIANTS[variant],
        )  # fmt: skip
    except SparseccError as error:
        return {**row, "refused": str(error)}
    runnable = verify.session(output, threads=threads)
    value, count = task.measure(lambda feed: list(runnable.run(feed).values()))
    layouts: dict[str, int] = {}
    for site in result.sites:
        layouts[site.layout] = layouts.get(site.layout, 0) + 1
    return {
        **row, "value": value, "samples": count, "speedup": result.latency.speedup,
        "before_ms": result.latency.before_ms, "after_ms": result.latency.after_ms,
        "max_rel_l2": result.max_rel_l2, "layouts": layouts,
        "bytes_before": result.bytes_before, "bytes_after": result.bytes_after,
    }  # fmt: skip


def dense_value(task: Task, threads: int) -> float:
    """The metric of the model as it is."""
    runnable = verify.session(task.path, threads=threads)
    return task.measure(lambda feed: list(runnable.run(feed).values()))[0]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of real models and their data.")
@click.option("--only", multiple=True, help="Names of the models to run.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Only this.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(
    data: Path | None, only: tuple[str, ...], variants: tuple[str, ...], threads: int, output: Path | None
) -> None:
    """Print accuracy and latency of every variant of every model."""
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "eval_dense.py").exists():
        sys.exit(f"no eval_dense.py in {data}; give the folder of real models with --data")
    rows: list[dict[str, Any]] = []
    table = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, task in tasks(data, scratch).items():
            if only and name not in only:
                continue
            samples = write_samples(task, scratch / f"samples_{name}")
            dense = dense_value(task, threads)
            table.append((name, "as it is", "", "1.00x", f"{dense:.4f}", "", ""))
            rows.append({"model": name, "variant": "as it is", "metric": task.metric, "value": dense})
            for variant in variants or VARIANTS:
                row = measure(name, task, variant, samples, scratch, threads)
                rows.append(row)
                click.echo(f"{name}: {variant} done", err=True)
                if "refused" in row:
                    table.append((name, variant, "refused", "", "", "", row["refused"]))
                    continue
                sites = ", ".join(f"{count} {layout}" for layout, count in sorted(row["layouts"].items()))
                table.append(
                    (name, variant, f"{row['before_ms']:.3f} -> {row['after_ms']:.3f}", f"{row['speedup']:.2f}x",
                     f"{row['value']:.4f}", f"{row['max_rel_l2']:.1e}", sites)
                )  # fmt: skip
    print_table(("model", "variant", ">ms", ">speed", ">metric", ">rel L2", "sites"), table)
    if output is not None:
        output.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
