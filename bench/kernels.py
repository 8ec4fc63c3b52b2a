"""fp32 kernels and the engines of others against dense onnxruntime, one linear layer at a time.

    python bench/kernels.py --json bench/results/kernels.json
    python bench/kernels.py --values fp32 --values fp16 --values bf16 --rows 1 --rows 16 --no-peers
    python bench/kernels.py --shape 768x768 --rows 1 --rows 128 --pattern 16x1 --sparsity 0.9 --no-peers

"sparsecc" is the operator in a session of onnxruntime, as a model runs it; "sparsecc, C" is its kernel called
through the C interface, without the time onnxruntime takes around every node (one thread only). See `layers` for how
times are taken and `peers` for the others (``pip install 'sparsecc[bench]'``; torch for CPUs
only comes from https://download.pytorch.org/whl/cpu).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from layers import (
    OURS,
    Engine,
    Layer,
    Result,
    aligned,
    cells_of,
    check,
    console,
    dense_fp32,
    dense_int8,
    layer_options,
    leaves_caller,
    pinned,
    pruned,
    results_of,
    sizes_of,
    table_of,
    time_engines,
    write_json,
)
from peers import Peer, PeerError, in_child, limited_openvino, usable

from sparsecc.sparse import FLOATS

PATTERNS = ("unstructured", "2:4", "1:4", "16x1", "32x1", "64x1")
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def engines_of(
    layer: Layer,
    cells: Sequence[tuple[str, float]],
    ours: Sequence[str],
    peers: Sequence[Peer],
    isa: str | None,
    failed: dict[str, str],
) -> Iterator[Engine]:
    """Yield the baselines, the dense peers and, for each cell (pattern, sparsity), ours and the sparse peers.

    Peers do not look at the pattern, so they get the zeros of the first pattern only. One that cannot do a layer
    goes to ``failed`` with the reason.
    """

    def others(zeros: Layer, sparse: bool) -> Iterator[Engine]:
        for peer in peers:
            if peer.sparse == sparse:
                try:
                    yield peer.engine(zeros)
                except PeerError as error:
                    failed[peer.name] = str(error)

    for engine in (dense_fp32(layer), dense_int8(layer)):
        check(engine, layer)
        yield engine
    yield from others(layer, sparse=False)
    if in_child() is not None:
        return
    rng = np.random.default_rng(1)
    for cell in cells:
        zeros = pruned(layer, cell, rng)
        for engine in (engine for name in ours for engine in OURS[name](zeros, isa)):
            check(engine, zeros)
            yield engine
        if cell[0] == cells[0][0]:
            yield from others(zeros, sparse=True)


def compare(
    ours: Sequence[str],
    bases: Sequence[str],
    *,
    shapes: Sequence[str],
    rows: Sequence[int],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    rounds: int,
    seconds: float,
    threads: int,
    isa: str | None,
    peers: bool,
    openvino_isa: str | None,
    path: Path | None,
) -> None:
    """Time some kinds of our kernels with all peers over layers, print tables and write JSON."""
    screen, cells = console(), cells_of(patterns, sparsities)
    there, missing = usable() if peers else ([], {})
    if in_child() is not None:
        there = [peer for peer in there if peer.module == "openvino"]
    results: list[Result] = []
    elsewhere: set[str] = set()
    with pinned(threads):
        for inputs, outputs, m in sizes_of(shapes, rows):
            rng = np.random.default_rng(0)
            x = aligned((m, inputs))
            x[:] = rng.standard_normal(x.shape)
            layer = Layer(x, rng.standard_normal((outputs, inputs)).astype(np.float32), threads)
            engines = list(engines_of(layer, cells, ours, there, isa, missing))
            elsewhere |= {engine.name for engine in engines if leaves_caller(engine)}
            times = time_engines(engines, threads, rounds, seconds)
            results += results_of(engines, times, (inputs, outputs, m))
            last = results[-1]
            screen.print(
                f"{inputs}x{outputs} M={m}: dense fp32 {last.fp32_microseconds:.0f} us, "
                f"int8 {last.int8_microseconds:.0f} us, {len(times[0])} rounds",
                style="dim",
            )
    if (child := in_child()) is not None:
        kept = [asdict(result) for result in results if result.engine.startswith("openvino")]
        child.write_text(json.dumps(kept))
        return
    if peers:
        results += [Result(**result) for result in limited_openvino(openvino_isa)]
    for base in bases:
        screen.print(table_of(results, base))
    for name, reason in missing.items():
        screen.print(f"not measured: {name} ({reason})", highlight=False)
    if threads == 1:
        names = ", ".join(sorted(elsewhere)) or "none"
        screen.print(f"engines with work outside the calling thread (counted): {names}", highlight=False)
    if path is not None:
        write_json(path, results, threads, rounds=rounds, missing=missing, elsewhere=sorted(elsewhere))


@click.command(context_settings={"show_default": True})
@click.option(
    "--values", multiple=True, type=click.Choice(tuple(FLOATS)), default=("fp32",), help="Stored so."
)
@layer_options(PATTERNS, SPARSITIES)
def main(values: Sequence[str], **options: object) -> None:
    """Time the sparse fp32 kernels and other engines against dense onnxruntime."""
    ours = [f"sparsecc {floats}" for floats in values]
    compare(ours, ("fp32",), **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
