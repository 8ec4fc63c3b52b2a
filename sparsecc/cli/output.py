"""Printing: tables for people, JSON for programs, progress bars on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from sparsecc.pm import Progress, no_progress
from sparsecc.report.text import format_bytes

__all__ = ["format_bytes", "json_option", "print_json", "print_table", "progress_bar"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")

#: Table width when stdout is not a terminal: wide enough that nothing is cut.
_WIDE = 180


def print_json(document: Any) -> None:
    """Write ``document`` to stdout as indented JSON."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """``value`` with infinities and NaN as text: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    """Write a table to stdout. Columns whose name starts with ``>`` are aligned right; cells are plain text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            Text(column.removeprefix(">")), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: names from a model are never markup
    width = None if sys.stdout.isatty() else _WIDE
    Console(file=sys.stdout, width=width, highlight=False).print(table)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback that draws on stderr when that is a terminal, and does nothing otherwise."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(file=sys.stderr), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield advance
