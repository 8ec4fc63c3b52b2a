"""``sparsecc targets``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]


@click.command("targets")
@click.option(
    "--export-costs", type=click.Path(), metavar="FILE", help="Write this machine's measured costs to FILE."
)
@json_option
def command(export_costs: str | None, as_json: bool) -> None:
    """List the targets and what this machine is; export its measured costs for `optimize --costs`.

    Example: sparsecc targets --export-costs costs.json
    """
    from sparsecc import plan
    from sparsecc.target import TARGET_NAMES, Target, host_features

    host = Target.host()
    if export_costs is not None:
        table = plan.CostTable.open()
        table.save(Path(export_costs))
        click.echo(f"{export_costs}: {len(table)} measured entries of this machine", err=True)
        return
    available = {"cpu": "this machine" if host.name == "cpu" else "the operator library of an x86 machine"}
    rows = [
        (name, name in available, available.get(name, "no operator library in this version"))
        for name in TARGET_NAMES
    ]
    if as_json:
        print_json(
            {
                "host": asdict(host),
                "features": host_features(),
                "targets": [{"name": n, "available": ok, "detail": why} for n, ok, why in rows],
            }
        )
        return
    print_table(("target", "available", "detail"), [(n, "yes" if ok else "no", why) for n, ok, why in rows])
    click.echo(f"\nthis machine: {host}")
    click.echo(f"for int8 and bf16: {' '.join(host_features()) or 'nothing'}")
