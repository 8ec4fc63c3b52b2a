"""How much faster our operators are on several threads than on one, one linear layer at a time.

    python bench/scaling.py --threads 2 --json bench/results/scaling.json

Each layer runs in two sessions of one process, on one thread and on several, in turns. The clock is wall time, so a
busy machine makes the several threads look worse than they are, never better: the ratio is that of the smallest times
of many short slices, in which the other cores were most likely free. The same of dense onnxruntime stands beside it.
How evenly the work itself is cut is in ``bench/balance.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from layers import (
    OURS,
    SPIN_SECONDS,
    Engine,
    Layer,
    aligned,
    cells_of,
    check,
    console,
    dense_fp32,
    dense_int8,
    machine,
    pinned,
    pruned,
    sizes_of,
)
from rich.table import Table

from sparsecc.verify.timing import time_interleaved

SHAPES = ("768x3072", "1024x4096", "4096x4096")
KINDS = {"fp32": ("unstructured", "16x1"), "int8": ("16x4",)}


@dataclass(frozen=True)
class Result:
    """One engine on one layer: smallest wall times in microseconds on one and on several threads."""

    inputs: int
    outputs: int
    rows: int
    engine: str
    pattern: str
    sparsity: float
    one_microseconds: float
    several_microseconds: float
    speedup: float


def pairs_of(layer: Layer, sparsity: float, threads: int) -> list[tuple[Engine, Engine]]:
    """Return every engine on one thread and on several."""
    layers = (layer, replace(layer, threads=threads))
    pairs = [tuple(make(each) for each in layers) for make in (dense_fp32, dense_int8)]
    for kind, patterns in KINDS.items():
        for cell in cells_of(patterns, (sparsity,)):
            zeros = [pruned(each, cell, np.random.default_rng(1)) for each in layers]
            pairs.append(tuple(OURS[f"sparsecc {kind}"](each, None)[0] for each in zeros))
            for engine, each in zip(pairs[-1], zeros, strict=True):
                check(engine, each)
    return [(one, several) for one, several in pairs]


def measure(sizes: tuple[int, int, int], sparsity: float, threads: int, rounds: int) -> list[Result]:
    """Measure one layer on every engine."""
    inputs, outputs, m = sizes
    rng = np.random.default_rng(0)
    x = aligned((m, inputs))
    x[:] = rng.standard_normal(x.shape)
    layer = Layer(x, rng.standard_normal((outputs, inputs)).astype(np.float32), 1)
    pairs = pairs_of(layer, sparsity, threads)
    calls = [engine.call for pair in pairs for engine in pair]
    pauses = [0.0, SPIN_SECONDS] * len(pairs)
    times, _ = time_interleaved(
        calls, clock="wall", rounds=rounds, max_seconds=30.0, slice_seconds=0.002, pauses=pauses
    )
    best = [min(taken) for taken in times]
    results = []
    for (engine, _), one, several in zip(pairs, best[::2], best[1::2], strict=True):
        microseconds = (round(one * 1e6, 1), round(several * 1e6, 1))
        facts = (engine.name, engine.pattern, engine.sparsity)
        results.append(Result(*sizes, *facts, *microseconds, round(one / several, 3)))
    return results


def table_of(results: list[Result], threads: int) -> Table:
    """One row per engine and layer, one column per number of rows of x."""
    table = Table(title=f"{threads} threads: times faster than one (smallest wall times)")
    rows = sorted({r.rows for r in results})
    for name in ("shape", "engine", "pattern", *(f"M={m}" for m in rows)):
        table.add_column(name, justify="right")
    for key in dict.fromkeys((r.inputs, r.outputs, r.engine, r.pattern) for r in results):
        found = {r.rows: r for r in results if (r.inputs, r.outputs, r.engine, r.pattern) == key}
        cells = [f"{found[m].speedup:.2f} ({found[m].one_microseconds:.0f} us)" for m in rows]
        table.add_row(f"{key[0]}x{key[1]}", key[2], key[3], *cells)
    return table


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="Inputs x outputs, e.g. 768x3072.")
@click.option("--rows", "-m", multiple=True, type=int, default=(1, 16, 128, 512), help="Rows of x.")
@click.option("--sparsity", type=float, default=0.9)
@click.option("--threads", type=click.IntRange(min=2), default=2)
@click.option("--rounds", type=int, default=41)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write results here.")
def main(
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    sparsity: float,
    threads: int,
    rounds: int,
    path: Path | None,
) -> None:
    """Time our operators on several threads against one."""
    results: list[Result] = []
    with pinned(threads):
        for sizes in sizes_of(shapes, rows):
            results += measure(sizes, sparsity, threads, rounds)
    console().print(table_of(results, threads))
    if path is not None:
        document = {"machine": machine(threads), "rounds": rounds, "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
