"""``sparsecc resize``."""

from __future__ import annotations

import click

from sparsecc.cli.arguments import model_argument
from sparsecc.cli.output import format_bytes, json_option, print_json

__all__ = ["command"]


@click.command("resize")
@model_argument
@click.option(
    "--bytes",
    "nbytes",
    type=click.IntRange(min=1),
    required=True,
    help="Most bytes of the model, its data file included; 'sparsecc inspect' says between which sizes.",
)
@click.option("-o", "--output", type=click.Path(), required=True, help="File to write.")
@json_option
def command(model: str, nbytes: int, output: str, as_json: bool) -> None:
    """Take from MODEL, whose weights are stacks of planes, the planes that bring most for that many bytes.

    MODEL is made by 'sparsecc optimize --method bitstack'. Nothing is computed, and of a model with a data file only
    what stays is read.

    Example: sparsecc resize model.stack.onnx --bytes 8000000 -o model.8MB.onnx
    """
    from sparsecc.api import resize

    result = resize(model, output, nbytes=nbytes)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(
        f"{result.planes} of {result.planes_before} planes, {format_bytes(result.bytes_before)} -> "
        f"{format_bytes(result.bytes_after)}: {result.output}"
    )
