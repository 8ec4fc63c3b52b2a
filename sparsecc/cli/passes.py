"""``sparsecc passes``."""

from __future__ import annotations

import inspect as python_inspect

import click

from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]


@click.command("passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show pass NAME with its options.

    Example: sparsecc passes prune-wanda
    """
    from sparsecc.pm import get_pass, list_passes

    if name is None:
        infos = list_passes()
        if as_json:
            print_json([{"name": i.name, "summary": i.summary, "origin": i.origin} for i in infos])
        else:
            print_table(("pass", "what it does", "from"), [(i.name, i.summary, i.origin) for i in infos])
        return
    pass_type = get_pass(name)
    options = pass_type.option_infos()
    if as_json:
        print_json(
            {
                "name": name,
                "doc": python_inspect.getdoc(pass_type) or "",
                "requires_calibration": pass_type.requires_calibration,
                "lossless": pass_type.lossless,
                "options": [{"name": o.name, "type": o.type, "default": o.default} for o in options],
            }
        )
        return
    click.echo(f"{name}\n\n{python_inspect.getdoc(pass_type) or ''}\n")
    rows = [(o.name, o.type, "required" if o.default is None else o.default) for o in options]
    print_table(("option", "type", "default"), rows)
