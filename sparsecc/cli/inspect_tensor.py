"""``sparsecc inspect`` of a tensor file: how evenly the work of an expression over it is cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.output import print_json, print_table, progress_bar
from sparsecc.errors import SpecError, UsageError

if TYPE_CHECKING:
    from sparsecc.algebra import Tensor
    from sparsecc.algebra.work import Plan

__all__ = ["TENSOR_SUFFIXES", "balance_document", "inspect_tensor"]

TENSOR_SUFFIXES = (".mtx", ".tns", ".mtx.gz", ".tns.gz")
_MOST_PARTS = 1 << 22


def inspect_tensor(
    path: str,
    expr: str | None,
    parts: int,
    *,
    operands: Sequence[str],
    columns: int,
    form: str | None,
    picture: str | None,
    as_json: bool,
) -> None:
    """Print the balance of ``expr`` over the tensor in the file, and draw it if a file for the picture is given.

    Raises:
        UsageError: the file cannot be read, or the expression, an operand or the picture's path is wrong.
    """
    from sparsecc.algebra.cases import case
    from sparsecc.algebra.work import plan

    given = _parsed(operands)
    if parts > _MOST_PARTS:
        raise UsageError(f"--parts {parts}: at most {_MOST_PARTS}")
    with progress_bar() as progress:
        tensor = _read(path, form, progress)
        others = {
            name: _read(source, form, progress) if _is_file(source) else source
            for name, source in given.items()
        }
    assignment, made = case(expr or ("spmv" if len(tensor.shape) == 2 else "add"), tensor, others, columns)
    found = plan(assignment, made, parts, convert=True)
    document = balance_document(found, parts)
    if picture is not None:
        _draw(found, picture, f"{Path(path).name}: {assignment}")
    if as_json:
        print_json(document)
        return
    shape = " x ".join(map(str, tensor.shape))
    click.echo(f"{assignment}, A: {shape}, {len(tensor.values)} entries ({','.join(tensor.formats)})\n")
    mean = document["mean"]
    rows = [
        (name, f"{balance * mean:.0f}", f"{mean:.{1 if mean >= 10 else 3}f}", f"{balance:.3f}")
        for name, balance in (
            ("balanced parts", document["lambda"]),
            ("equal rows", found.row_balance),
            ("equal entries", found.entry_balance),
            *([("one cut for all phases", found.single_balance)] if len(found.every_phase) > 1 else []),
        )
    ]
    print_table((f"{parts} parts", ">largest", ">mean", ">lambda"), rows)
    phases = len(found.every_phase)
    click.echo(
        f"\nwork {document['work']} in {phases} phase{'' if phases == 1 else 's'}; no part has more than "
        f"{document['bound']}; cut in {1e3 * document['split_seconds']:.1f} ms"
    )


def _parsed(operands: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in operands:
        name, equals, source = text.partition("=")
        if not equals or not name or not source or name in found:
            raise UsageError(
                f"--operand {text}: expected NAME=FILE, NAME=same, NAME=shifted or NAME=transposed, once"
            )
        found[name] = source
    return found


def _is_file(source: str) -> bool:
    return source.lower().endswith(TENSOR_SUFFIXES)


def _read(path: str, form: str | None, progress: Any) -> Tensor:
    from sparsecc.algebra import read_tensor
    from sparsecc.algebra.cases import usual_format

    try:
        if form is not None:
            return read_tensor(path, form, progress)
        entries = read_tensor(path, "coo", progress)
        return entries.converted(usual_format(entries.shape, len(entries.values)))
    except SpecError as error:
        raise UsageError(f"{path}: {error}") from error


def balance_document(found: Plan, parts: int) -> dict[str, Any]:
    """Return the JSON document; phases follow each other, so that their largest parts add up."""
    from sparsecc.algebra import split

    seconds = 0.0
    for phase in found.every_phase:
        start = time.perf_counter()
        split(list(phase.walks.values()), parts)
        seconds += time.perf_counter() - start
    return {
        "work": found.work,
        "parts": parts,
        "max": found.largest,
        "mean": found.mean,
        "lambda": found.balance,
        "bound": found.bound,
        "split_seconds": seconds,
        "row_lambda": found.row_balance,
        "entry_lambda": found.entry_balance,
        "single_lambda": found.single_balance,
        "phases": len(found.every_phase),
    }


def _draw(found: Plan, path: str, title: str) -> None:
    from sparsecc.algebra.baselines import entry_split, row_split
    from sparsecc.algebra.picture import cuts_svg

    phases = found.every_phase
    if not phases:
        raise UsageError(f"--picture {path}: {title} has no work to draw")
    first = phases[0]
    others = [("equal rows", row_split(first)), ("equal entries", entry_split(first))]
    if len(phases) > 1:
        title += f" (phase 1 of {len(phases)})"
    text = cuts_svg(list(first.walks.values()), first.table, others, title)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--picture {path}: cannot be written ({error.strerror})") from error
