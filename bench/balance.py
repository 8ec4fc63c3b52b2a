"""How evenly the stored weights of an operator are dealt to threads, on masks from even to very skewed.

    python bench/balance.py --json bench/results/balance.json

A number is the work of the largest part over the mean part (1 is perfect), as the library reports it for its own
table. Nothing is timed: it follows from the mask alone, and is the same on every machine with as many outputs to a
vector. The second number is that of the table which `partition{packed=true}` stores in the file, its cuts moved to the
nearest border between groups of outputs that a kernel computes together. Weights are packed as on a machine of 64
threads, which only matters to single weights with many rows of x: they come in chunks no smaller than it needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
from layers import console
from numpy.typing import NDArray
from rich.table import Table

from sparsecc.runtime import NativeInt8MatMul, NativeMatMul
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor

PARTS = (2, 4, 8, 16, 32, 64)
OUTPUTS, INPUTS, KEPT = 4096, 1024, 0.1
OVERHEAD = 4  # of a group, in blocks, as the library counts it


def masks(pattern: Pattern) -> Mapping[str, NDArray[np.bool_]]:
    """Masks [OUTPUTS, INPUTS] of ``pattern`` by name, each with about ``KEPT`` of the weights kept."""
    rng = np.random.default_rng(0)
    rows = max(1, pattern.rows)
    grid = OUTPUTS // rows, INPUTS // max(1, pattern.cols)
    order = np.arange(1, grid[0] + 1)
    shares = {
        "uniform": np.full(grid[0], KEPT),
        "growing": np.linspace(0, 2 * KEPT, grid[0]),
        "half empty": np.where(order <= grid[0] // 2, 2 * KEPT, 0),
        "one full row": np.where(order == 7, 1, KEPT),
        "power law": np.minimum(1, 4 / order**0.5) if grid[0] > 1000 else np.minimum(1, 1 / order**0.5),
    }
    kept = {name: rng.random(grid) < share[:, None] for name, share in shares.items()}
    return {name: np.kron(each, np.ones((rows, max(1, pattern.cols)), bool)) for name, each in kept.items()}


def balances(layout: str, kind: str, mask: NDArray[np.bool_], rows: int) -> list[float]:
    """The balance for every number of parts."""
    weight = (mask * np.random.default_rng(1).uniform(0.5, 1, mask.shape)).astype(np.float32)
    pattern = Pattern.parse(layout)
    if kind == "int8":
        bytes_ = QuantizedTensor.encode(weight, pattern)
        with NativeInt8MatMul(layout, mask.shape, bytes_.values, bytes_.indices, bytes_.scales) as int8:
            return [int8.balance(parts) for parts in PARTS]
    packed = SparseTensor.encode(weight, pattern)
    with NativeMatMul(layout, mask.shape, packed.values, packed.indices) as op:
        return [op.balance(rows, parts) for parts in PARTS]


def table_balances(pattern: Pattern, mask: NDArray[np.bool_], group: int) -> list[float]:
    """The balance of the table in the file for every number of parts, in groups of so many outputs."""
    rows = max(1, pattern.rows)
    stored = mask[::rows, :: max(1, pattern.cols)].sum(1)  # in each row of blocks
    before = np.concatenate([[0], np.cumsum(stored + 1)])
    borders = np.arange(0, len(stored) + 1, group // rows)
    work = np.concatenate([[0], np.cumsum(np.add.reduceat(stored, borders[:-1]) + OVERHEAD)])
    found = []
    for parts in PARTS:
        cuts = np.arange(parts + 1) * before[-1] // parts
        nearest = abs(before[borders][:, None] - cuts).argmin(0)
        share = np.diff(work[nearest])
        found.append(float(share.max() / share.mean()))
    return found


@click.command()
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write results here.")
def main(path: Path | None) -> None:
    """Print the balance of every kind of weight on every mask, the library's own / the stored table's."""
    os.environ["SPARSECC_THREADS"] = str(PARTS[-1])
    table = Table(title=f"largest part / mean part, {INPUTS}x{OUTPUTS}, about {1 - KEPT:.0%} zeros")
    for name in ("weight", "rows", "mask", *(f"{parts} parts" for parts in PARTS)):
        table.add_column(name, justify="right")
    results = []
    for kind, layout, rows, group in (
        ("fp32", "unstructured", 1, 16), ("fp32", "unstructured", 128, 64), ("fp32", "16x1", 1, 32),
        ("int8", "16x4", 1, 16),
    ):  # fmt: skip
        for name, mask in masks(Pattern.parse(layout)).items():
            found = balances(layout, kind, mask, rows)
            stored = table_balances(Pattern.parse(layout), mask, group)
            pairs = (f"{own:.2f} / {other:.2f}" for own, other in zip(found, stored, strict=True))
            table.add_row(f"{kind} {layout}", str(rows), name, *pairs)
            results.append({"weight": f"{kind} {layout}", "rows": rows, "mask": name, "parts": PARTS,
                            "balance": [round(value, 4) for value in found],
                            "table_balance": [round(value, 4) for value in stored]})  # fmt: skip
    console().print(table)
    if path is not None:
        path.write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
