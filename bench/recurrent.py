"""Recurrent models pruned in one shot: speed against dense onnxruntime, and what the pruning costs.

    python bench/recurrent.py --data FOLDER --json bench/results/recurrent.json
    python bench/recurrent.py --data FOLDER --quality-only --sparsity 0.5 --sparsity 0.9

FOLDER holds the models `charrnn_shakespeare` (two LSTM layers) and `silero_vad_16k_op15` (an LSTM inside an If) with
their text and recording (default: SPARSECC_TEST_DATA, else ../shared/data). The character model is timed on 64
characters, on one, and, with its states made inputs and outputs, on one character after another. Nothing is fine-tuned
after pruning, so quality is the price of the zeros alone, not what healing would leave of it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

import sparsecc
from sparsecc.cli.output import print_table
from sparsecc.plan import machine_facts
from sparsecc.pm import PassContext, Pipeline
from sparsecc.verify import benchmark

ROOT = Path(__file__).resolve().parents[1]
CHARRNN, SILERO = "charrnn_shakespeare", "silero_vad_16k_op15"
PATTERNS = ("16x1", "4x1", "1:4", "unstructured")
WINDOW = 200  # characters of text that start from a zero state
CONTEXT, FRAME = 64, 512  # samples of the recording: kept from before, new

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], list[Array]]


def with_states(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the character model with the states of its LSTMs as inputs and outputs."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for number, node in enumerate(n for n in model.graph.node if n.op_type == "LSTM"):
        hidden = helper.get_node_attr_value(node, "hidden_size")
        names = [f"{state}{number}" for state in "hc"]
        node.input.extend(["", *names])
        del node.output[1:]
        node.output.extend(f"{name}_next" for name in names)
        for name in names:
            shape = [1, "B", hidden]
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            model.graph.output.append(helper.make_tensor_value_info(f"{name}_next", TensorProto.FLOAT, shape))
    return model


def cases(data: Path, scratch: Path) -> dict[str, tuple[Path, str, dict[str, tuple[int, ...]]]]:
    """Return what is timed: file, model it is from, input shapes; by name."""
    charrnn, silero = (data / "models" / f"{name}.onnx" for name in (CHARRNN, SILERO))
    stateful = scratch / "charrnn_states.onnx"
    onnx.save(with_states(onnx.load(charrnn)), stateful)
    states = {f"{state}{number}": (1, 1, 128) for number in (0, 1) for state in "hc"}
    return {
        "character LSTM, 64 characters": (charrnn, CHARRNN, {"tokens": (64, 1)}),
        "character LSTM, 1 character": (charrnn, CHARRNN, {"tokens": (1, 1)}),
        "character LSTM, step with state": (stateful, CHARRNN, {"tokens": (1, 1), **states}),
        "silero VAD, 32 ms": (silero, SILERO, {"input": (1, CONTEXT + FRAME), "state": (2, 1, 128)}),
    }


def runner(model: bytes | Path, library: bool = False) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        sparsecc.register(options)
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = {item.name: item for item in session.get_inputs()}

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        batch = feeds["tokens"].shape[1] if "tokens" in feeds else 1
        zeros = {
            name: np.zeros((1, batch, int(item.shape[2])), np.float32)
            for name, item in names.items()
            if name not in feeds
        }
        return list(session.run(None, {**feeds, **zeros}))

    return run


def bits_per_character(data: Path, run: Run) -> float:
    """Cross-entropy of the next character in windows of text, all in one batch."""
    vocabulary = json.loads((data / "models" / f"{CHARRNN}.vocab.json").read_text())
    text = (data / "text" / "tinyshakespeare_tail.txt").read_text()
    ids = np.array([vocabulary[c] for c in text if c in vocabulary], np.int64)
    tokens = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).T.copy()
    logits = run({"tokens": tokens})[0][:-1].astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    right = np.take_along_axis(logits, tokens[1:, :, None], 2)[..., 0]
    return float((log_sum - right).mean() / np.log(2))


def speech_probability(data: Path, run: Run) -> Array:
    """The detector's output for every frame of the recording, its state handed on."""
    with wave.open(str(data / "audio" / "speech_60s_16k.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
    found = []
    for start in range(0, len(samples) - FRAME + 1, FRAME):
        frame = samples[start : start + FRAME]
        feeds = {"input": np.concatenate([context, frame])[None], "state": state, "sr": np.array(16000)}
        probability, state = run(feeds)[:2]
        found.append(float(probability[0, 0]))
        context = frame[-CONTEXT:]
    return np.array(found)


def quality(data: Path, model: str, dense: Run, pruned: Run) -> dict[str, float]:
    if model == CHARRNN:
        before, after = (bits_per_character(data, run) for run in (dense, pruned))
        return {"bits_per_char_dense": before, "bits_per_char": after}
    before_, after_ = (speech_probability(data, run) for run in (dense, pruned))
    return {
        "mean_abs_difference": float(np.abs(before_ - after_).mean()),
        "same_decision": float(((before_ > 0.5) == (after_ > 0.5)).mean()),
    }


def prune_all(path: Path, pattern: str, sparsity: float) -> bytes:
    """The model with every site pruned, dense operators."""
    model = sparsecc.load(path)
    implied = ":" in pattern
    Pipeline.parse(
        f"tidy,prune-magnitude{{pattern={pattern}{'' if implied else f' sparsity={sparsity}'}}}"
    ).run(model, PassContext())
    return bytes(model.to_proto().SerializeToString())


def measure_speed(
    name: str, case: tuple[Path, str, dict[str, tuple[int, ...]]], data: Path, scratch: Path,
    pattern: str, sparsity: float, threads: int,
) -> dict[str, Any]:  # fmt: skip
    path, model, shapes = case
    output = scratch / f"{path.stem}.{pattern.replace(':', 'of')}.onnx"
    result = sparsecc.optimize(
        path, output, pattern=pattern, sparsity=None if ":" in pattern else sparsity, input_shapes=shapes,
        threads=threads,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {
        "tokens": rng.integers(0, 60, shapes.get("tokens", (1, 1))),
        "sr": np.array(16000),
        **{
            key: rng.standard_normal(shape).astype(np.float32) / 10
            for key, shape in shapes.items()
            if key != "tokens"
        },
    }
    timed = benchmark([path, output], inputs, threads=threads, max_seconds=20)
    return {
        "case": name,
        "pattern": pattern,
        "sparsity": 0.75 if pattern == "1:4" else sparsity,
        "threads": threads,
        "dense_us": timed.models[0].median_ms * 1e3,
        "sparse_us": timed.models[1].median_ms * 1e3,
        "speedup": timed.ratio_to_first[1],
        "lowered": [site.site for site in result.sites if site.layout != "dense"],
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        **quality(data, model, runner(path), runner(output, library=True)),
    }


def cost_of(row: Mapping[str, Any]) -> str:
    if "bits_per_char" in row:
        return f"{row['bits_per_char_dense']:.3f} -> {row['bits_per_char']:.3f} bits/char"
    return f"{row['mean_abs_difference']:.3f} mean |difference|, {row['same_decision']:.1%} same decision"


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both; a new one replaces an old one of the same settings."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("case", "model", "pattern", "sparsity", "threads"))

    rows = {key(row): row for row in (*old, *new)}
    return list(rows.values())


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of real models and their data.")
@click.option("--pattern", "patterns", multiple=True, default=PATTERNS, show_default=True)
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=(0.8,), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--only", default="", help="Part of the names of the cases to time.")
@click.option("--quality-only", is_flag=True, help="Prune every site and measure quality; time nothing.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File to add the figures to.")
def main(
    data: Path | None, patterns: tuple[str, ...], sparsities: tuple[float, ...], threads: int, only: str,
    quality_only: bool, output: Path | None,
) -> None:  # fmt: skip
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "models" / f"{CHARRNN}.onnx").exists():
        sys.exit(f"no models/{CHARRNN}.onnx in {data}; give the folder of real models with --data")
    document: dict[str, Any] = {"speed": [], "quality": []}
    if output is not None and output.exists():
        document = json.loads(output.read_text())
    speed: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for pattern in patterns:
            for sparsity in sparsities if ":" not in pattern else sparsities[:1]:
                if quality_only:
                    for model in (CHARRNN, SILERO):
                        path = data / "models" / f"{model}.onnx"
                        pruned = runner(prune_all(path, pattern, sparsity))
                        found = quality(data, model, runner(path), pruned)
                        zeros = 0.75 if pattern == "1:4" else sparsity
                        kept.append({"model": model, "pattern": pattern, "sparsity": zeros, **found})
                    continue
                for name, case in cases(data, Path(folder)).items():
                    if only in name:
                        row = measure_speed(name, case, data, Path(folder), pattern, sparsity, threads)
                        speed.append(row)
                        click.echo(f"{name}, {pattern}: done", err=True)
    table = [
        (r["case"], f"{r['pattern']} {r['sparsity']:.0%}", f"{r['dense_us']:.1f}", f"{r['sparse_us']:.1f}",
         f"{r['speedup']:.2f}x", cost_of(r))
        for r in speed
    ] + [(r["model"], f"{r['pattern']} {r['sparsity']:.0%}", "", "", "", cost_of(r)) for r in kept]  # fmt: skip
    print_table(("case", "zeros", ">dense us", ">sparse us", ">speed", "quality"), table)
    if output is not None:
        document = {
            "machine": machine_facts(),
            "speed": merged(document["speed"], speed),
            "quality": merged(document["quality"], kept),
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
