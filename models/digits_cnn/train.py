#!/usr/bin/env python3
"""Train the digit classifier, dense and with pruning in 16x1 blocks, and write the ONNX files.

The data are the 1797 handwritten digits (8x8, grey 0 to 16) that scikit-learn carries. PyTorch and
scikit-learn are needed only for this script; the trained models and the held-out part are in the repository.

    pip install torch numpy onnx onnxruntime scikit-learn click
    python models/digits_cnn/train.py
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from graph_builder import GraphBuilder  # noqa: E402
from training import GradualPruner, make_deterministic  # noqa: E402

CHANNELS = (1, 64, 128, 128, 128)
POOL_AFTER = 2  # index of the convolution whose result is halved
BATCH = 64

Parts = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]


def split_digits(seed: int) -> Parts:
    """Shuffle and split: 540 images are held out, 100 are for calibration, 1157 to train on."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order].astype(np.int64)
    bounds = {"test": slice(0, 540), "calibration": slice(540, 640), "train": slice(640, None)}
    return {name: (images[part], labels[part]) for name, part in bounds.items()}


def to_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale grey values to 0..1 and add the channel axis: ``[B, 8, 8]`` to ``[B, 1, 8, 8]``."""
    return images[:, None].astype(np.float32) / 16


class Classifier(nn.Module):
    """Four 3x3 convolutions with batch normalisation, one pooling step, global average, linear."""

    def __init__(self) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(CHANNELS))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in pairs)
        self.head = nn.Linear(CHANNELS[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.relu(norm(conv(x)))
            if i == POOL_AFTER:
                x = functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move every image by up to one pixel in each direction."""
    padded = functional.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images)), generator=generator)
    parts = [image[:, r : r + 8, c : c + 8] for image, r, c in zip(padded, rows, columns, strict=True)]
    return torch.stack(parts)


def train(
    model: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    rate: float,
    seed: int,
    pruner: GradualPruner | None = None,
) -> None:
    """Train in place with AdamW and a cosine decay."""
    steps = epochs * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for picked in order[: len(images) // BATCH * BATCH].split(BATCH):
            step += 1
            logits = model(shifted(images[picked], generator))
            loss = functional.cross_entropy(logits, labels[picked], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if pruner is not None:
                pruner.after_step(step)
        if epoch % 10 == 9:
            density = f", density {pruner.density():.3f}" if pruner is not None else ""
            click.echo(f"epoch {epoch + 1}: loss {loss.item():.4f}{density}")
    model.eval()


def to_onnx(model: Classifier, name: str) -> onnx.ModelProto:
    """Write the model as a plain graph of dynamic batch, with batch normalisation folded in."""
    graph, x = GraphBuilder(opset=17), "image"
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
        weight = (conv.weight * scale[:, None, None, None]).detach().numpy()
        bias = (norm.bias - norm.running_mean * scale).detach().numpy()
        scope = f"/convs.{i}"
        x = graph.conv(scope, x, *CHANNELS[i : i + 2], 3, weight=weight, bias_value=bias)
        x = graph.op("Relu", scope, x)
        if i == POOL_AFTER:
            x = graph.op("MaxPool", scope, x, kernel_shape=[2, 2], strides=[2, 2])
    x = graph.op("Flatten", "/head", graph.op("GlobalAveragePool", "/head", x), axis=1)
    weight = graph.constant("head.weight", model.head.weight.detach().numpy())
    logits = graph.op(
        "Gemm", "/head", x, weight, graph.constant("head.bias", model.head.bias.detach().numpy()), transB=1
    )
    return graph.finish(
        name, [("image", TensorProto.FLOAT, ("batch", 1, 8, 8))], [("logits", logits, ("batch", 10))]
    )


@click.command(help=__doc__.split("\n")[0])
@click.option("--epochs", default=60, show_default=True, help="Epochs of the dense model.")
@click.option("--prune-epochs", default=60, show_default=True, help="Further epochs of the sparse model.")
@click.option("--sparsity", default=0.9, show_default=True, help="Zeros in each convolution but the first.")
@click.option("--seed", default=0, show_default=True, help="Seed of split, initial weights and batches.")
@click.option(
    "--threads", default=1, show_default=True, help="PyTorch threads; another number, other rounding."
)
@click.option(
    "--output", default=HERE, type=click.Path(file_okay=False, path_type=Path), help="Folder to write."
)
def main(epochs: int, prune_epochs: int, sparsity: float, seed: int, threads: int, output: Path) -> None:
    """Split the data, train both models, write models and data."""
    make_deterministic(seed, threads)
    output.mkdir(parents=True, exist_ok=True)
    parts = split_digits(seed)
    np.savez_compressed(output / "test.npz", images=parts["test"][0], labels=parts["test"][1])
    batches = to_input(parts["calibration"][0])[:, None]  # 100 batches of one
    np.savez_compressed(output / "calibration.npz", image=batches)
    images, labels = torch.from_numpy(to_input(parts["train"][0])), torch.from_numpy(parts["train"][1])

    model = Classifier()
    train(model, images, labels, epochs=epochs, rate=3e-3, seed=seed)
    onnx.save(to_onnx(model, "digits_cnn"), output / "digits_cnn.onnx")
    weights = {f"convs.{i}": conv.weight for i, conv in enumerate(model.convs) if i > 0}
    ramp = prune_epochs * (len(images) // BATCH) // 2
    pruner = GradualPruner(weights, sparsity=sparsity, ramp=ramp)
    train(model, images, labels, epochs=prune_epochs, rate=3e-3, seed=seed + 1, pruner=pruner)
    onnx.save(to_onnx(model, "digits_cnn_sparse16x1"), output / "digits_cnn_sparse16x1.onnx")


if __name__ == "__main__":
    main()
