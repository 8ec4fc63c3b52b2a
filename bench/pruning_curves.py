"""What each pruning method costs in accuracy over sparsities and patterns: the figures of docs/pruning.md.

Prunes the CIFAR-10 ResNet and the MiniLM sentence encoder with every method and pattern, without labels and without
training, measures them, and writes a JSON file that ``python docs/generate.py`` draws::

    python bench/pruning_curves.py --data FOLDER

Calibration samples are never among the samples measured on. Runs that are in the file already, with the same
pipeline, are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from accuracy import prune, save
from accuracy_tasks import ROOT, Run, Task, cifar, load_evaluation, minilm

from sparsecc import ir, verify

#: Passes by the name that the page uses; CORRECTION is the model's own (``accuracy_tasks.Task``).
METHODS = {
    "magnitude": "prune-magnitude{OPTIONS}",
    "Wanda": "prune-wanda{OPTIONS}",
    "Wanda + OLS": "prune-wanda-ols{OPTIONS correction=CORRECTION}",
    "SparseGPT": "prune-sparsegpt{OPTIONS correction=CORRECTION}",
    "ALPS": "prune-alps{OPTIONS correction=CORRECTION}",
    "ExactOBS": "prune-obc{OPTIONS correction=CORRECTION}",
}

#: Methods that leave layers of a model out.
UNFIT = {"ExactOBS minilm_l6_v2"}

#: Options of the passes by the name that the page uses.
PATTERNS = {
    "50 %": "sparsity=0.5",
    "60 %": "sparsity=0.6",
    "70 %": "sparsity=0.7",
    "80 %": "sparsity=0.8",
    "2:4": "pattern=2:4",
    "4:8": "pattern=4:8",
    "16x1 50 %": "pattern=16x1 sparsity=0.5",
}

#: Pairs of sentences that MiniLM is measured on, from the first, and that calibrate it, from the last.
PAIRS, HELD_PAIRS = 600, 256


def tasks(data: Path, folder: Path) -> dict[str, Task]:
    evaluation = load_evaluation(data)

    def similarity(run: Run) -> tuple[float, int]:
        found = evaluation.sts("stsb_dev_minilm_tokens.npz", limit=PAIRS)(run)
        return found["spearman"], found["n"]

    sentences = minilm(data, evaluation, folder, HELD_PAIRS)
    return {
        "resnet20_cifar10": cifar(data, evaluation),
        "minilm_l6_v2": dataclasses.replace(sentences, measure=similarity),
    }


def variants() -> Iterator[tuple[str, str, str]]:
    """Yield method, pattern and pipeline of every run, the quick ones first."""
    yield "dense", "", ""
    for method, step in METHODS.items():
        for pattern, options in PATTERNS.items():
            yield method, pattern, f"tidy,{step.replace('OPTIONS', options)}"


def measured(task: Task, pipeline: str, threads: int) -> dict[str, Any]:
    """Prune and measure; ``prune_cpu_seconds`` is processor time, calibration included."""
    model, row = ir.Model.load(task.path), {"pipeline": ""}
    started = time.process_time()
    if pipeline:
        row = prune(model, task, pipeline, threads)
        row["prune_cpu_seconds"] = round(time.process_time() - started, 1)
    session = verify.session(model, threads=threads)
    value, count = task.measure(lambda feed: list(session.run(feed).values()))
    return {**row, "value": value, "samples": count}


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
    help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
)
@click.option("--only", multiple=True, help="Measure only this model; may be repeated.")
@click.option("--method", "methods", multiple=True, help="Measure only this method; may be repeated.")
@click.option("--pattern", "patterns", multiple=True, help="Measure only this pattern; may be repeated.")
@click.option("--again", is_flag=True, help="Repeat runs that are in the file.")
@click.option("--threads", default=1, show_default=True, help="Threads of every session.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "bench" / "results" / "pruning_curves.json",
    help="JSON file.",
)
def main(
    data: Path,
    only: tuple[str, ...],
    methods: tuple[str, ...],
    patterns: tuple[str, ...],
    again: bool,
    threads: int,
    output: Path,
) -> None:
    """Measure what OUTPUT does not have yet; it is written after every run."""
    results: dict[str, Any] = json.loads(output.read_text())["models"] if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: task for name, task in tasks(data, Path(folder)).items() if name in only or not only}
        for method, pattern, pipeline in variants():
            for name, task in chosen.items():
                found = results.setdefault(
                    name,
                    {
                        "metric": task.metric,
                        "calibration_samples": task.calibration_samples,
                        "variants": {},
                    },
                )["variants"].setdefault(method, {})
                if (methods and method not in methods) or (patterns and pattern not in patterns):
                    continue
                wanted = pipeline.replace("CORRECTION", str(task.correction))
                known = found.get(pattern, {}).get("pipeline") == wanted and not again
                if known or f"{method} {name}" in UNFIT:
                    continue
                found[pattern] = measured(task, wanted, threads)
                click.echo(f"{name}: {method} {pattern} {found[pattern]['value']:.4f}", err=True)
                save(output, results, "python bench/pruning_curves.py", threads)


if __name__ == "__main__":
    main()
