"""How evenly the work of sparse tensor algebra is cut: ours, equal rows and equal entries.

    python bench/partition.py --json bench/results/partition.json

Real matrices and tensors from a folder (``--data``, else ``$SPARSECC_TEST_DATA/matrices``) and generated ones:
power-law rows, one giant row, nothing at all, few entries in very many rows. Work and parts follow from the operands
alone and are the same on every machine; only ``split_seconds`` is a time, of the NumPy splitter on one thread. The
benchmark fails if a part has more work than the bound.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from layers import console
from rich.table import Table

from sparsecc.algebra import Tensor, read_tensor
from sparsecc.algebra.cases import EXPRESSIONS, case
from sparsecc.algebra.work import plan
from sparsecc.cli.inspect_tensor import balance_document
from sparsecc.errors import UsageError

PARTS = (2, 64, 4096, 65536)
SIZE = 20_000


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], form: str) -> Tensor:
    places = np.unique(np.stack([rows, columns], 1), axis=0)
    return Tensor.from_coordinates(places, np.ones(len(places), np.float32), shape, form)


def power_law(rng: np.random.Generator) -> Tensor:
    """Lengths of rows fall with the power 1.5 of their rank; ranks are shuffled."""
    lengths = np.minimum(SIZE, 1 + 60_000 / np.arange(1, SIZE + 1) ** 1.5).astype(int)
    rows = np.repeat(rng.permutation(SIZE), lengths)
    return _matrix(rows, rng.integers(0, SIZE, len(rows)), (SIZE, SIZE), "csr")


def giant_row(rng: np.random.Generator) -> Tensor:
    """One row is full, the others have ten entries or so."""
    rows = np.concatenate([np.full(200_000, 77), rng.integers(0, SIZE, 20_000)])
    columns = np.concatenate([np.arange(200_000), rng.integers(0, 200_000, 20_000)])
    return _matrix(rows, columns, (SIZE, 200_000), "csr")


def nothing(rng: np.random.Generator) -> Tensor:
    """A million empty rows."""
    none = np.zeros(0, np.int64)
    return _matrix(none, none, (1_000_000, 1000), "csr")


def hypersparse(rng: np.random.Generator) -> Tensor:
    """Five thousand entries in 10^9 rows, half of them in a few."""
    rows = np.concatenate([rng.integers(0, 10**9, 2500), rng.integers(0, 10, 2500)])
    return _matrix(rows, rng.integers(0, 10**6, 5000), (10**9, 10**6), "dcsr")


GENERATED: dict[str, Callable[[np.random.Generator], Tensor]] = {
    "power law": power_law, "one giant row": giant_row, "nothing": nothing, "hypersparse": hypersparse,
}  # fmt: skip


def tensors(data: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Real ones, then generated ones."""
    for path in sorted(data.iterdir()) if data is not None and data.is_dir() else ():
        if path.suffix in (".mtx", ".tns"):
            yield path.name, read_tensor(path)
    for name, make in GENERATED.items():
        yield name, make(np.random.default_rng(0))


def measured(tensor: Tensor, expression: str, parts: int) -> dict[str, Any] | None:
    """The balance; None if the expression does not take the tensor."""
    try:
        assignment, operands = case(expression, tensor)
    except UsageError:
        return None
    found = balance_document(plan(assignment, operands, parts, convert=True), parts)
    assert found["max"] <= found["bound"], (expression, parts, found)
    return found


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of .mtx and .tns files.")
@click.option(
    "--expr", "expressions", multiple=True, type=click.Choice(list(EXPRESSIONS)), help="Only these."
)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write results here.")
def main(data: Path | None, expressions: tuple[str, ...], path: Path | None) -> None:
    """Print the balance of every expression on every tensor that it takes."""
    if data is None and "SPARSECC_TEST_DATA" in os.environ:
        data = Path(os.environ["SPARSECC_TEST_DATA"]) / "matrices"
    table = Table(title="largest part / mean part")
    for name in ("tensor", "expression", "parts", "work", "ours", "bound", "rows", "entries", "split ms"):
        table.add_column(name, justify="right")
    results = []
    for name, tensor in tensors(data):
        for expression in expressions or EXPRESSIONS:
            for parts in PARTS:
                found = measured(tensor, expression, parts)
                if found is None:
                    break
                table.add_row(
                    name, expression, str(parts), str(found["work"]), f"{found['lambda']:.3f}",
                    f"{found['bound'] / found['mean'] if found['mean'] else 1:.3f}", f"{found['row_lambda']:.3f}",
                    f"{found['entry_lambda']:.3f}", f"{1e3 * found['split_seconds']:.2f}",
                )  # fmt: skip
                results.append({"tensor": name, "shape": tensor.shape, "entries": len(tensor.values),
                                "expression": expression,
                                **{key: round(value, 6) for key, value in found.items()}})  # fmt: skip
    console().print(table)
    if path is not None:
        lines = ",\n".join(json.dumps(result) for result in results)
        path.write_text(f'{{"results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
