#!/usr/bin/env python3
"""Train the character language model, dense and with pruning in 16x1 blocks, and write the ONNX files.

The text is the King James Bible (1611, copyright expired) of the Debian package ``bible-kjv-text``, printed
by the program of ``bible-kjv``. PyTorch is needed only for this script; the trained models are in the
repository.

    apt-get install bible-kjv bible-kjv-text
    pip install torch numpy onnx onnxruntime click
    python models/text_lm/train.py

The model is a decoder with one pre-norm block (width 256, 4 heads, MLP 1024) over a context of 128
characters. Each position is the sum of the embeddings of its last four characters, which gives a shallow
model the local spelling for the price of three small tables.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from graph_builder import GraphBuilder  # noqa: E402
from training import GradualPruner, make_deterministic  # noqa: E402

WIDTH, HEADS, MLP, CONTEXT, VOCABULARY, HISTORY = 256, 4, 1024, 128, 64, 4
LINEARS = ("qkv", "output", "fc1", "fc2")
BATCH = 32


def read_chapters() -> list[str]:
    """Return the text of the 1189 chapters, one verse per line, without the verse numbers."""
    if shutil.which("bible") is None:
        raise click.ClickException("the text is not installed: apt-get install bible-kjv bible-kjv-text")
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True, text=True)
    chapters: dict[str, list[str]] = {}
    for line in printed.stdout.splitlines():
        chapter, verse = re.fullmatch(r"(\w+):\d+ (.*)", line).groups()
        chapters.setdefault(chapter, []).append(verse)
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def split_text(chapters: list[str]) -> tuple[dict[str, NDArray[np.uint8]], str]:
    """Split by chapter (the 10th of every 20 is held out, the 20th is for calibration) and encode.

    Returns:
        The codes of each part, and the alphabet; code ``i + 1`` is ``alphabet[i]``, 0 is "before the window".
    """
    alphabet = "".join(sorted(set("".join(chapters))))
    code = {character: i + 1 for i, character in enumerate(alphabet)}
    parts: dict[str, list[str]] = {"train": [], "test": [], "calibration": []}
    for i, chapter in enumerate(chapters):
        parts[{9: "test", 19: "calibration"}.get(i % 20, "train")].append(chapter)
    encoded = {name: np.array([code[c] for c in "".join(text)], np.uint8) for name, text in parts.items()}
    return encoded, alphabet


def windows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut codes into consecutive windows of `CONTEXT` inputs and one more character to predict."""
    count = len(codes) // (CONTEXT + 1)
    return codes[: count * (CONTEXT + 1)].reshape(count, CONTEXT + 1)


class LanguageModel(nn.Module):
    """Characters ``[B, 128]`` to the logits of each next character ``[B, 128, 64]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, WIDTH) for _ in range(HISTORY))
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.attention_norm, self.mlp_norm, self.final_norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for table in (self.positions, *(e.weight for e in self.embeddings)):
            nn.init.normal_(table, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.positions
        for age, table in enumerate(self.embeddings):
            x = x + table(functional.pad(ids, (age, 0))[:, :CONTEXT])
        heads = self.qkv(self.attention_norm(x)).view(-1, CONTEXT, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(context.transpose(1, 2).reshape(-1, CONTEXT, WIDTH))
        x = x + self.fc2(functional.gelu(self.fc1(self.mlp_norm(x))))
        return self.head(self.final_norm(x))


def batches(codes: NDArray[np.uint8], seed: int) -> Iterator[torch.Tensor]:
    """Yield random windows ``[BATCH, CONTEXT + 1]`` without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(codes) - CONTEXT, BATCH)
        yield torch.from_numpy(codes[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))


def train(
    model: LanguageModel,
    codes: NDArray[np.uint8],
    *,
    steps: int,
    rate: float,
    seed: int,
    bf16: bool,
    pruner: GradualPruner | None = None,
    teacher: LanguageModel | None = None,
) -> None:
    """Train in place with AdamW, a warm-up over 100 steps and a cosine decay.

    With a teacher, half of the loss is the distance to its predictions.
    """
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    began = time.monotonic()
    for step, batch in zip(range(1, steps + 1), batches(codes, seed), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch[:, :-1])
        predicted = functional.log_softmax(logits.float(), -1).flatten(0, 1)
        loss = functional.nll_loss(predicted, batch[:, 1:].flatten())
        bits = loss.item() / math.log(2)
        if teacher is not None:
            wanted = soft_targets(teacher, batch[:, :-1], bf16=bf16)
            loss = (loss + functional.kl_div(predicted, wanted, reduction="batchmean")) / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if pruner is not None:
            pruner.after_step(step)
        if step % 200 == 0:
            density = f", density {pruner.density():.3f}" if pruner is not None else ""
            click.echo(
                f"step {step}: {bits:.3f} bits per character{density}, {time.monotonic() - began:.0f} s"
            )


@torch.no_grad()
def soft_targets(teacher: LanguageModel, ids: torch.Tensor, *, bf16: bool) -> torch.Tensor:
    """Probabilities of the next characters ``[B * 128, 64]`` according to the teacher."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = teacher(ids)
    return functional.softmax(logits.float(), -1).flatten(0, 1)


def to_onnx(model: LanguageModel, name: str) -> onnx.ModelProto:
    """Write the model as a plain graph: batch is dynamic, the context is fixed."""
    arrays = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    graph = GraphBuilder(opset=17)

    def norm(scope: str, key: str, x: str) -> str:
        return graph.layer_norm(scope, x, WIDTH, parameters=(arrays[f"{key}.weight"], arrays[f"{key}.bias"]))

    def linear(scope: str, key: str, x: str) -> str:
        weight = arrays[f"{key}.weight"]
        return graph.linear(scope, x, *weight.shape[::-1], weight=weight, bias_value=arrays[f"{key}.bias"])

    x = norm("/layers.0/attention/norm", "attention_norm", residual := _embed(graph, arrays))
    q, k, v = graph.split(
        "/layers.0/attention/qkv", linear("/layers.0/attention/qkv", "qkv", x), [WIDTH] * 3, -1
    )
    y = linear("/layers.0/attention/output", "output", _attend(graph, "/layers.0/attention", q, k, v))
    residual = graph.op("Add", "/layers.0/attention/residual", residual, y)
    y = linear("/layers.0/mlp/fc1", "fc1", norm("/layers.0/mlp/norm", "mlp_norm", residual))
    y = linear("/layers.0/mlp/fc2", "fc2", graph.gelu("/layers.0/mlp/gelu", y))
    residual = graph.op("Add", "/layers.0/mlp/residual", residual, y)
    logits = linear("/head", "head", norm("/final_norm", "final_norm", residual))
    return graph.finish(
        name,
        [("ids", TensorProto.INT64, ("batch", CONTEXT))],
        [("logits", logits, ("batch", CONTEXT, VOCABULARY))],
    )


def _embed(graph: GraphBuilder, arrays: dict[str, NDArray[np.float32]]) -> str:
    """Sum the tables of the last `HISTORY` characters and of the position."""
    x = graph.constant("positions.weight", arrays["positions"])
    padded = graph.op("Pad", "/embeddings", "ids", graph.ints([0, HISTORY - 1, 0, 0]))
    for age in range(HISTORY):
        scope = f"/embeddings/{age}"
        start = HISTORY - 1 - age
        bounds = (graph.ints([i]) for i in (start, start + CONTEXT, 1))
        ids = "ids" if age == 0 else graph.op("Slice", scope, padded, *bounds)
        table = graph.constant(f"embeddings.{age}.weight", arrays[f"embeddings.{age}.weight"])
        x = graph.op("Add", scope, graph.op("Gather", scope, table, ids), x)
    return x


def _attend(graph: GraphBuilder, scope: str, q: str, k: str, v: str) -> str:
    """Causal attention over ``[B, CONTEXT, WIDTH]`` projections."""
    size = WIDTH // HEADS

    def heads(part: str, x: str, perm: list[int]) -> str:
        x = graph.op("Reshape", f"{scope}/{part}", x, graph.ints([0, CONTEXT, HEADS, size]))
        return graph.op("Transpose", f"{scope}/{part}", x, perm=perm)

    scores = graph.op(
        "MatMul", f"{scope}/scores", heads("query", q, [0, 2, 1, 3]), heads("key", k, [0, 2, 3, 1])
    )
    scores = graph.op("Mul", f"{scope}/scores", scores, graph.scalar(1 / math.sqrt(size)))
    mask = np.triu(np.full((CONTEXT, CONTEXT), -10000, np.float32), k=1)
    scores = graph.op("Add", f"{scope}/scores", scores, graph.constant("causal_mask", mask))
    probabilities = graph.op("Softmax", scope, scores, axis=-1)
    y = graph.op("MatMul", f"{scope}/context", probabilities, heads("value", v, [0, 2, 1, 3]))
    y = graph.op("Transpose", f"{scope}/context", y, perm=[0, 2, 1, 3])
    return graph.op("Reshape", f"{scope}/context", y, graph.ints([0, CONTEXT, WIDTH]))


@click.command(help=__doc__.split("\n")[0])
@click.option("--steps", default=4000, show_default=True, help="Training steps of the dense model.")
@click.option("--prune-steps", default=6000, show_default=True, help="Further steps of the sparse model.")
@click.option("--sparsity", default=0.8, show_default=True, help="Zeros in each linear layer of the block.")
@click.option("--seed", default=0, show_default=True, help="Seed of initial weights and batches.")
@click.option(
    "--threads", default=1, show_default=True, help="PyTorch threads; another number, other rounding."
)
@click.option("--bf16/--fp32", default=True, show_default=True, help="Arithmetic of the forward pass.")
@click.option(
    "--output", default=HERE, type=click.Path(file_okay=False, path_type=Path), help="Folder to write."
)
def main(
    steps: int, prune_steps: int, sparsity: float, seed: int, threads: int, bf16: bool, output: Path
) -> None:
    """Read the text, train both models, write models and data."""
    make_deterministic(seed, threads)
    output.mkdir(parents=True, exist_ok=True)
    codes, alphabet = split_text(read_chapters())
    characters = np.array(list("\0" + alphabet))
    np.savez_compressed(output / "test.npz", windows=windows(codes["test"]), alphabet=characters)
    calibration = windows(codes["calibration"])
    spread = calibration[:: len(calibration) // 64][:64, None, :-1]  # 64 batches of one
    np.savez_compressed(output / "calibration.npz", ids=spread.astype(np.int64))

    model = LanguageModel()
    train(model, codes["train"], steps=steps, rate=2e-3, seed=seed, bf16=bf16)
    onnx.save(to_onnx(model, "text_lm"), output / "text_lm.onnx")
    weights = {name: getattr(model, name).weight for name in LINEARS}
    pruner = GradualPruner(weights, sparsity=sparsity, ramp=prune_steps // 3)
    teacher = copy.deepcopy(model)
    train(
        model,
        codes["train"],
        steps=prune_steps,
        rate=2e-3,
        seed=seed + 1,
        bf16=bf16,
        pruner=pruner,
        teacher=teacher,
    )
    onnx.save(to_onnx(model, "text_lm_sparse16x1"), output / "text_lm_sparse16x1.onnx")


if __name__ == "__main__":
    main()
