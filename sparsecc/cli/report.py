"""``sparsecc report``."""

from __future__ import annotations

from pathlib import Path

import click

from sparsecc.cli.output import format_bytes, json_option, print_json
from sparsecc.errors import UsageError

__all__ = ["command"]


@click.command("report")
@click.argument("run", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="File to write; default RUN.html beside RUN.json.")
@click.option("--open/--no-open", "show", default=False, show_default=True, help="Show it in a browser.")
@json_option
def command(run: str, output: str | None, show: bool, as_json: bool) -> None:
    """Make one HTML page out of RUN, the JSON that `optimize --json`, `plan --json` or `analyze --json` printed.

    The page needs nothing else: no network, no scripts to run. Parts the document does not have are left out.

    Example: sparsecc report run.json -o run.html
    """
    from sparsecc.report import read_document, write_report

    source = Path(run)
    destination = source.with_suffix(".html") if output is None else Path(output)
    document = read_document(source)
    if destination.exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the input; give another file with -o")
    write_report(document, destination)
    nbytes = destination.stat().st_size
    if as_json:
        print_json({"output": str(destination), "nbytes": nbytes})
    else:
        click.echo(f"{destination}: {format_bytes(nbytes)}")
    if show:
        click.launch(str(destination))
