"""Models with a figure of quality: how it is measured, and what they are calibrated on.

Samples that calibrate are spread evenly over the data and never among those measured on: the files are sorted by
class and by source, so that their last samples would be of other kinds than the first.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ROOT", "TASKS", "Batch", "Run", "Task", "cifar", "cifar_pictures", "load_evaluation", "minilm", "task", "tasks",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]

#: Networks for photographs, with the side of the picture that they read.
PICTURES = {"mobilenet_v1_0.25_128": 128, "mobilenet_v2_1.0_224": 224, "squeezenet1.0_pruned": 227}

TASKS = ("resnet20_cifar10", *PICTURES, "mnist_cntk", "minilm_l6_v2", "stories260K", "charrnn_shakespeare")

Batch = dict[str, NDArray[Any]]
Run = Callable[[Batch], list[NDArray[Any]]]


@dataclass(frozen=True)
class Task:
    """A model, how it is measured, and what it is calibrated on.

    Attributes:
        path: the model.
        metric: name of the figure.
        measure: gives the figure and the number of samples it was taken on.
        calibration: inputs, disjoint from the samples measured on.
        calibration_samples: how many samples they hold.
        activations: how its activations are quantised.
        correction: how much fitted weights make up for what layers before them lost; convolutional networks gain
            by all of it, deep transformers lose by it.
        higher_is_better: of the figure.
    """

    path: Path
    metric: str
    measure: Callable[[Run], tuple[float, int]]
    calibration: Sequence[Batch]
    calibration_samples: int
    activations: str = "static"
    correction: float = 1.0
    higher_is_better: bool = True


#: All samples that do not calibrate.
WHOLE = slice(None)


def tasks(data: Path, folder: Path, held_pairs: int = 256) -> dict[str, Task]:
    """All of them; ``folder`` takes files that are made on the way."""
    return {name: task(name, data, folder, held_pairs) for name in TASKS}


def task(name: str, data: Path, folder: Path, held_pairs: int = 256, part: slice = WHOLE) -> Task:
    """One of ``TASKS``, measured on ``part`` of the samples that do not calibrate."""
    evaluation = load_evaluation(data)
    if name == "resnet20_cifar10":
        return cifar(data, evaluation, part)
    if name in PICTURES:
        return pictures(data, evaluation, name, PICTURES[name], part=part)
    if name == "mnist_cntk":
        return mnist(data, evaluation, part=part)
    if name == "minilm_l6_v2":
        return minilm(data, evaluation, folder, held_pairs, part)
    made = {"stories260K": stories, "charrnn_shakespeare": characters}[name]
    return made(data, evaluation, folder, part=part)


def load_evaluation(data: Path) -> ModuleType:
    """Import the evaluation script that lies beside the data."""
    spec = importlib.util.spec_from_file_location("eval_dense", data / "eval_dense.py")
    if spec is None or spec.loader is None or not (data / "eval_dense.py").exists():
        raise click.UsageError(f"no eval_dense.py in {data}; give the folder of models and data with --data")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out(count: int, held: int) -> NDArray[np.bool_]:
    """Which of ``count`` samples calibrate: ``held``, spread evenly."""
    chosen = np.zeros(count, bool)
    chosen[np.arange(held) * count // held] = True
    return chosen


def measured(held: NDArray[np.bool_], part: slice) -> NDArray[np.intp]:
    """Numbers of the samples measured on: ``part`` of those that do not calibrate."""
    return np.flatnonzero(~held)[part]


def batched(x: NDArray[Any], name: str, size: int) -> list[Batch]:
    """Arrays of ``size`` samples."""
    return [{name: x[start : start + size]} for start in range(0, len(x), size)]


def cifar_pictures(data: Path) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """The pictures as the network reads them, ``[n, 3, 32, 32]``, and their labels."""
    archive = np.load(data / "images" / "cifar10_test_2500.npz")
    return normalized(archive["images"]), archive["labels"]


def normalized(pictures: NDArray[Any]) -> NDArray[np.float32]:
    """Bytes ``[..., H, W, 3]`` as the network reads them, ``[..., 3, H, W]``."""
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
    planes: NDArray[np.float32] = np.moveaxis(pictures, -1, -3).astype(np.float32) / 255
    return (planes - mean) / deviation


def cifar(data: Path, evaluation: ModuleType, part: slice = WHOLE) -> Task:
    """Every tenth picture calibrates, the others measure."""
    x, labels = cifar_pictures(data)
    held = held_out(len(x), len(x) // 10)
    own = measured(held, part)

    def measure(run: Run) -> tuple[float, int]:
        found = evaluation._accuracy(run, "input", x[own], labels[own], 100)
        return found["accuracy"], found["n"]

    calibration = batched(x[held], "input", 50)
    return Task(data / "models" / "resnet20_cifar10.onnx", "accuracy", measure, calibration, int(held.sum()))


def pictures(
    data: Path, evaluation: ModuleType, name: str, size: int, held: int = 100, part: slice = WHOLE
) -> Task:
    """Photographs: every fifth calibrates."""
    from PIL import Image

    folder = data / "images" / "imagenet224"
    prepare = evaluation.pre_caffe227 if size == 227 else evaluation.pre_tf(size)
    rows = evaluation._labels(folder)
    chosen = held_out(len(rows), held)
    background = 0 if size == 227 else 1  # outputs before those of the classes

    @cache
    def read(calibrating: bool) -> tuple[NDArray[np.float32], NDArray[Any]]:
        found = [rows[at] for at in (np.flatnonzero(chosen) if calibrating else measured(chosen, part))]
        x = [prepare(Image.open(folder / file).convert("RGB")).transpose(2, 0, 1) for file, _ in found]
        return np.stack(x).astype(np.float32), np.array([label for _, label in found])

    def measure(run: Run) -> tuple[float, int]:
        x, labels = read(calibrating=False)
        found = evaluation._accuracy(lambda feed: [run(feed)[0][:, background:]], "input", x, labels, 20)
        return found["accuracy"], found["n"]

    calibration = batched(read(calibrating=True)[0], "input", 20)
    return Task(data / "models" / f"{name}.onnx", "top-1", measure, calibration, held)


def mnist(data: Path, evaluation: ModuleType, held: int = 500, part: slice = WHOLE) -> Task:
    """Digits, one at a time: every tenth calibrates."""
    archive = np.load(data / "images" / "mnist_test_first5000.npz")
    x = archive["images"][:, None].astype(np.float32)
    labels, chosen = archive["labels"], held_out(len(x), held)
    own = measured(chosen, part)

    def measure(run: Run) -> tuple[float, int]:
        found = evaluation._accuracy(run, "Input3", x[own], labels[own], 1)
        return found["accuracy"], found["n"]

    calibration = batched(x[chosen], "Input3", 1)
    return Task(data / "models" / "mnist_cntk.onnx", "accuracy", measure, calibration, held)


def minilm(data: Path, evaluation: ModuleType, folder: Path, held: int = 256, part: slice = WHOLE) -> Task:
    """The sentences of ``held`` pairs calibrate."""
    tokens = dict(np.load(data / "text" / "stsb_dev_minilm_tokens.npz"))
    chosen = held_out(len(tokens["score"]), held)
    file = folder / "pairs.npz"
    own = measured(chosen, part)
    np.savez(file, **{name: array[own] for name, array in tokens.items()})

    def measure(run: Run) -> tuple[float, int]:
        found = evaluation.sts(str(file))(run)
        return found["spearman"], found["n"]

    ids = np.concatenate([tokens["ids_a"][chosen], tokens["ids_b"][chosen]])
    lengths = np.concatenate([tokens["len_a"][chosen], tokens["len_b"][chosen]])
    path = Path(evaluation.expand_minilm(str(data / "models" / "minilm_l6_v2"), str(folder)))
    return Task(path, "Spearman", measure, sentences(ids, lengths), 2 * held, "dynamic", 0.5)


def sentences(ids: NDArray[Any], lengths: NDArray[Any]) -> list[Batch]:
    """Batches of sentences of equal length: padding would count in the statistics."""
    batches = []
    for length in np.unique(lengths):
        x = ids[lengths == length][:, :length].astype(np.int64)
        batches.append(
            {"input_ids": x, "attention_mask": np.ones_like(x), "token_type_ids": np.zeros_like(x)}
        )
    return batches


def stories(data: Path, evaluation: ModuleType, folder: Path, held: int = 63, part: slice = WHOLE) -> Task:
    """Windows of 256 tokens: every third calibrates."""
    archive = dict(np.load(data / "text" / "tinystories_part1_tok512.npz"))
    windows = archive["tokens"]
    chosen = held_out(len(windows), held)
    file = folder / "stories.npz"
    np.savez(file, tokens=windows[measured(chosen, part)])

    def measure(run: Run) -> tuple[float, int]:
        found = evaluation.causal_lm(str(file))(run)
        return found["perplexity"], found["n"]

    calibration = batched(windows[chosen].astype(np.int64), "tokens", 8)
    path = data / "models" / "stories260K.onnx"
    return Task(path, "perplexity", measure, calibration, held, "dynamic", 0.5, higher_is_better=False)


def characters(
    data: Path,
    evaluation: ModuleType,
    folder: Path,
    held: int = 100,
    size: int = 200,
    part: slice = WHOLE,
) -> Task:
    """Windows of 200 characters, which run along the first axis: every fifth or so calibrates."""
    known = json.loads((data / "models" / "charrnn_shakespeare.vocab.json").read_text())
    text = [c for c in (data / "text" / "tinyshakespeare_tail.txt").read_text(encoding="utf-8") if c in known]
    windows = np.array(text[: len(text) // size * size]).reshape(-1, size)
    chosen = held_out(len(windows), held)
    file = folder / "characters.txt"
    file.write_text("".join(windows[measured(chosen, part)].reshape(-1)), encoding="utf-8")

    def measure(run: Run) -> tuple[float, int]:
        found = evaluation.char_rnn(str(file), "charrnn_shakespeare.vocab.json", size)(run)
        return found["bits_per_char"], found["n"]

    ids = np.vectorize(known.__getitem__, otypes=[np.int64])(windows[chosen]).T
    calibration = [{"tokens": np.ascontiguousarray(ids[:, at : at + 20])} for at in range(0, held, 20)]
    path = data / "models" / "charrnn_shakespeare.onnx"
    return Task(
        path, "bits per character", measure, calibration, held, "dynamic", 1.0, higher_is_better=False
    )
