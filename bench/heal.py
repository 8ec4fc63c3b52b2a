"""What healing brings back: a sentence encoder and a small ResNet, pruned far and trained without labels.

Prunes with ``prune-alps``, heals with ``heal`` on unlabelled inputs, and measures the task metric before and after on
other samples. Needs PyTorch (``pip install 'sparsecc[heal]'``)::

    python bench/heal.py --data FOLDER

A case takes up to an hour of one core and resumes from its checkpoint (``--work``) when it was interrupted; the time is
that of the processor, since one thread needs half as much of it as two.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import accuracy_tasks as accuracy
import click
import heal_data
import numpy as np

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.heal import require_torch
from sparsecc.pm import PassContext, Pipeline

#: Pairs of STS-B dev that measure; the sentences of the others heal.
MEASURED_PAIRS = 600
#: Every fifth picture heals, the others measure.
EVERY = 5
#: Batches of parts of sentences, and sentences per batch.
SENTENCE_BATCHES, SENTENCES = 500, 32
#: Batches of pictures, and pictures per batch.
PICTURE_BATCHES, PICTURES = 500, 64


@dataclass(frozen=True)
class Case:
    """A model pruned to a pattern, the largest drop of its metric that is aimed at, and how long it is healed."""

    model: str
    pattern: str
    sparsity: float
    most: float
    steps: int

    @property
    def name(self) -> str:
        """How the case is called on the command line and in the results."""
        return f"{self.model} {self.pattern} {self.sparsity:g}"


CASES = (
    Case("minilm_l6_v2", "16x1", 0.7, 0.015, 6500),
    Case("minilm_l6_v2", "16x4", 0.6, 0.015, 2400),
    Case("minilm_l6_v2", "unstructured", 0.8, 0.010, 6500),
    Case("resnet20_cifar10", "16x1", 0.6, 0.02, 6000),
    Case("resnet20_cifar10", "unstructured", 0.8, 0.015, 5000),
)

#: Options of ``heal`` by model; bfloat16 wants a processor that has it.
HEAL = {
    "minilm_l6_v2": "learning-rate=0.0015 precision=bfloat16 patience=25 holdout=0.06",
    "resnet20_cifar10": "learning-rate=0.003 precision=bfloat16 patience=25 holdout=0.06",
}


@dataclass(frozen=True)
class Task:
    """A model, and how it is measured.

    Attributes:
        path: the model.
        metric: name of the figure.
        calibration: inputs that pruning is calibrated on.
        healing: inputs to heal on.
        samples: how many sentences or pictures both were made of.
        measure: gives the figure, on other samples, and their number.
    """

    path: Path
    metric: str
    calibration: list[accuracy.Batch]
    healing: list[accuracy.Batch]
    samples: int
    measure: Callable[[accuracy.Run], tuple[float, int]]


def minilm(data: Path, evaluation: ModuleType, folder: Path) -> Task:
    """Heals on sentences of pairs that measure nothing, parts of them, and parts of other text."""
    rows, vocabulary = heal_data.pair_sentences(data, MEASURED_PAIRS)
    others = heal_data.text_sentences(data / "text" / "wikitext2_valid.txt", vocabulary)

    def measure(run: accuracy.Run) -> tuple[float, int]:
        found = evaluation.sts("stsb_dev_minilm_tokens.npz", limit=MEASURED_PAIRS)(run)
        return found["spearman"], found["n"]

    return Task(
        Path(evaluation.expand_minilm(str(data / "models" / "minilm_l6_v2"), str(folder))),
        "Spearman",
        heal_data.sentences(rows, [], 0, SENTENCES),
        heal_data.sentences(rows, others, SENTENCE_BATCHES, SENTENCES),
        len(rows) + len(others),
        measure,
    )


def cifar(data: Path, evaluation: ModuleType) -> Task:
    """Heals on every fifth picture and on parts of larger ones of another set, shifted, mirrored and mixed."""
    from PIL import Image

    x, labels = accuracy.cifar_pictures(data)
    held = np.arange(len(x)) % EVERY == 0
    others = [
        np.asarray(Image.open(path).convert("RGB"))
        for path in sorted((data / "images" / "imagenet224").glob("*.jpg"))
    ]

    def measure(run: accuracy.Run) -> tuple[float, int]:
        found = evaluation._accuracy(run, "input", x[~held], labels[~held], 100)
        return found["accuracy"], found["n"]

    return Task(
        data / "models" / "resnet20_cifar10.onnx",
        "accuracy",
        accuracy.batched(x[held], "input", PICTURES),
        heal_data.pictures(x[held], others, PICTURE_BATCHES, PICTURES),
        int(held.sum()) + len(others),
        measure,
    )


def measure_case(case: Case, task: Task, options: str, threads: int, work: Path) -> dict[str, Any]:
    """Prune, heal and measure one case."""
    model = ir.Model.load(task.path)

    def value(of: ir.Model) -> float:
        session = verify.session(of, threads=threads)
        return task.measure(lambda feed: list(session.run(feed).values()))[0]

    dense = value(model)
    amount = f"pattern={case.pattern} sparsity={case.sparsity:g}"
    pipeline = f"tidy,prune-alps{{{amount}}}"
    context = PassContext(
        calibration=Calibration.from_batches(task.calibration, model, threads=threads), threads=threads
    )
    Pipeline.parse("tidy").run(model)
    reference = model.copy()
    Pipeline.parse(pipeline).run(model, context)
    pruned = value(model)
    checkpoint = work / f"{case.name.replace(' ', '_')}.ckpt"
    resumed = checkpoint.exists()
    context.reference = reference
    context.calibration = Calibration.from_batches(task.healing, model, threads=threads)
    wall, cpu = time.perf_counter(), time.process_time()
    (report,) = Pipeline.parse(f"heal{{{options} checkpoint={checkpoint}}}").run(model, context)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    session = verify.session(model, threads=threads)
    healed, samples = task.measure(lambda feed: list(session.run(feed).values()))
    return {
        "pipeline": f"{pipeline},heal{{{options}}}",
        "metric": task.metric,
        "samples": samples,
        "healed_on": task.samples,
        "healed_on_made": sum(len(next(iter(batch.values()))) for batch in task.healing),
        "dense": dense,
        "pruned": pruned,
        "healed": healed,
        "drop_aimed_at": case.most,
        "notes": report.notes,
        "processor_minutes": round(cpu / 60, 1),
        "wall_minutes": round(wall / 60, 1),
        "resumed": resumed,
        "threads": threads,
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| case | dense | pruned | healed | drop | aimed at | processor minutes |", "|---" * 7 + "|"]
    for name, row in results.items():
        drop = row["dense"] - row["healed"]
        lines.append(
            f"| {name} | {row['dense']:.4f} | {row['pruned']:.4f} | {row['healed']:.4f} | {drop:.4f} | "
            f"{row['drop_aimed_at']:g} | {row['processor_minutes']:g} |"
        )
    return "\n".join(lines)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=lambda: os.environ.get("SPARSECC_TEST_DATA", accuracy.ROOT.parent / "shared" / "data"),
    help="Folder of models and data (default: SPARSECC_TEST_DATA).",
)
@click.option(
    "--case", "names", multiple=True, type=click.Choice([case.name for case in CASES]), help="Only this."
)
@click.option("--steps", type=int, help="Other than the case's, for a first look.")
@click.option("--threads", default=1, show_default=True, help="Threads of PyTorch and of every session.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of checkpoints; default: none kept.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=accuracy.ROOT / "bench" / "results" / "heal.json",
    help="JSON file.",
)
def main(
    data: Path, names: tuple[str, ...], steps: int | None, threads: int, work: Path | None, output: Path
) -> None:
    """Measure the cases, write OUTPUT and print the table. What OUTPUT has of other cases stays."""
    require_torch()
    import torch

    results: dict[str, Any] = json.loads(output.read_text())["cases"] if output.exists() else {}
    evaluation = accuracy.load_evaluation(data)
    with tempfile.TemporaryDirectory() as folder:
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if names and case.name not in names:
                continue
            bert = case.model == "minilm_l6_v2"
            task = minilm(data, evaluation, Path(folder)) if bert else cifar(data, evaluation)
            options = f"steps={steps or case.steps} {HEAL[case.model]}"
            results[case.name] = measure_case(case, task, options, threads, work or Path(folder))
            click.echo(f"{case.name}: {results[case.name]['healed']:.4f}", err=True)
            document = {
                "command": "python bench/heal.py",
                "machine": platform.machine(),
                "torch": torch.__version__,
                "cases": results,
            }
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(table(results))


if __name__ == "__main__":
    main()
