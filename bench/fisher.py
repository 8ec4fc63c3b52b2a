"""Squared gradients of a model by the names of its sites, without labels, for ``factor-fwsvd``.

    python bench/fisher.py MODEL --calibration-data PATH -o fisher.npz

The loss is the likelihood of outputs that the model itself draws, whose squared gradients are the Fisher information:
of outputs with normal noise (``features``), or of classes along the last axis by their softmax (``classes``). The graph
runs in PyTorch as for healing (``pip install 'sparsecc[heal]'``). ``--kind rows`` is what FWSVD weighs outputs with;
``--kind kronecker`` finds the Kronecker product nearest to the whole information by power iteration, for GFWSVD.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.errors import SparseccError, UsageError
from sparsecc.heal import require_torch
from sparsecc.ir import Model, Site
from sparsecc.pm import Pipeline

Gradients = dict[str, NDArray[np.float64]]


def gradients(
    model: Model, calibration: Calibration, outputs: str, draws: int, seed: int
) -> Iterator[Gradients]:
    """Yield the gradient ``[N, K]`` of each site that can be trained, per batch and draw, the same in every run.

    Draws of single outputs are independent and their gradients have mean zero, so that the expected square of the sum
    over a batch is the sum of the expected squares.
    """
    import torch

    from sparsecc.heal.graph import TorchGraph
    from sparsecc.heal.loss import attended

    graph = TorchGraph(model)
    sites = [site for site in model.sites() if _suits(site) and site.weight in graph.constants]
    weights = [graph.constants[site.weight].requires_grad_() for site in sites]
    names = [str(value.name) for value in model.onnx.graph.outputs]
    for number, batch in enumerate(calibration):
        found = [value.float() for value in graph.run(batch, names).values() if value.is_floating_point()]
        kept = attended(batch)
        if kept is not None:  # padding is no output
            mask = torch.from_numpy(kept)
            found = [value[mask] if value.shape[:2] == mask.shape else value for value in found]
        for draw in range(draws):
            generator = torch.Generator().manual_seed(seed + number * draws + draw)
            loss = torch.stack([_likelihood(value, outputs, generator) for value in found]).sum()
            slopes = torch.autograd.grad(loss, weights, retain_graph=draw + 1 < draws, allow_unused=True)
            yield {
                site.name: _matrix(site, slope.numpy())
                for site, slope in zip(sites, slopes, strict=True)
                if slope is not None
            }


def _likelihood(output: Any, outputs: str, generator: Any) -> Any:
    """The logarithm of the likelihood of one draw, up to a constant."""
    import torch

    if outputs == "features":
        return (output * torch.randn(output.shape, generator=generator)).sum()
    chances = torch.log_softmax(output.reshape(-1, output.shape[-1]), -1)
    classes = torch.multinomial(chances.detach().exp(), 1, generator=generator)
    return chances.gather(1, classes).sum()


def _suits(site: Site) -> bool:
    return (
        site.op in ("MatMul", "Gemm", "Conv")
        and site.groups == 1
        and site.scope == "main"
        and site.quantization is None
    )


def _matrix(site: Site, stored: NDArray[Any]) -> NDArray[np.float64]:
    matrix = stored.T if site.transposed else stored.reshape(site.shape)
    return np.asarray(matrix, np.float64)


def rows_of(steps: Iterator[Gradients]) -> dict[str, NDArray[np.float64]]:
    """Sums of squared gradients over the rows of each site."""
    sums: dict[str, NDArray[np.float64]] = {}
    for step in steps:
        for name, slope in step.items():
            sums[f"{name}.rows"] = sums.get(f"{name}.rows", 0.0) + np.square(slope).sum(1)
    return sums


def kronecker(start: Any, rounds: int) -> dict[str, NDArray[np.float64]]:
    """``A [K, K]`` and ``B [N, N]`` of each site, found in turns; ``start`` begins a run over the same gradients.

    The product nearest to the sum of all ``vec(g) vec(g)^T`` (Van Loan and Pitsianis, 1993): with ``B`` fixed the best
    ``A`` is the sum of all ``g^T B g`` over the squared norm of ``B``, and the other way round.
    """
    outputs: dict[str, NDArray[np.float64]] = {}
    inputs: dict[str, NDArray[np.float64]] = {}
    for number in range(2 * rounds):
        own, other = (inputs, outputs) if number % 2 else (outputs, inputs)
        sums: dict[str, NDArray[np.float64]] = {}
        for step in start():
            for name, slope in step.items():
                side = slope.T if number % 2 else slope
                weighed = side if name not in other else side @ other[name]
                sums[name] = sums.get(name, 0.0) + weighed @ side.T
        for name, total in sums.items():
            own[name] = total / (float(np.trace(total)) / len(total) or 1.0)
    return {
        **{f"{name}.A": matrix for name, matrix in inputs.items()},
        **{f"{name}.B": matrix for name, matrix in outputs.items()},
    }


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calibration-data", required=True, help="As for sparsecc optimize; every batch is one sample."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .npz to write.")
@click.option("--kind", default="rows", show_default=True, type=click.Choice(["rows", "kronecker"]))
@click.option("--outputs", default="features", show_default=True, type=click.Choice(["features", "classes"]))
@click.option("--draws", default=4, show_default=True, help="Draws per batch.")
@click.option("--rounds", default=2, show_default=True, help="Rounds of power iteration, two runs each.")
@click.option("--num-samples", type=int, help="At most so many samples.")
@click.option("--seed", default=0, show_default=True)
def main(
    model: Path, calibration_data: str, output: Path, kind: str, outputs: str, draws: int, rounds: int,
    num_samples: int | None, seed: int,
) -> None:  # fmt: skip
    """Write the squared gradients of MODEL, after ``tidy`` as optimize runs it."""
    try:
        require_torch()
        loaded = Model.load(model)
        Pipeline.parse("tidy").run(loaded)
        calibration = Calibration.from_path(calibration_data, loaded, num_samples=num_samples, seed=seed)
        found = measure(loaded, calibration, kind, outputs, draws, rounds, seed)
    except SparseccError as error:
        sys.exit(f"error: {error}")
    np.savez(output, **{name: array.astype(np.float32) for name, array in found.items()})
    click.echo(f"{output}: {len(found)} arrays")


def measure(
    model: Model,
    calibration: Calibration,
    kind: str = "rows",
    outputs: str = "features",
    draws: int = 4,
    rounds: int = 2,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """The arrays of the file, by name.

    Raises:
        UsageError: a gradient is not finite.
        UnsupportedModelError: the graph has operators that healing cannot run.
    """

    def start() -> Iterator[Gradients]:
        return gradients(model, calibration, outputs, draws, seed)

    found = rows_of(start()) if kind == "rows" else kronecker(start, rounds)
    bad = [name for name, array in found.items() if not np.isfinite(array).all()]
    if bad:
        raise UsageError(f"gradients of {bad[0]} are NaN or infinite on these inputs: give others")
    return found


if __name__ == "__main__":
    main()
