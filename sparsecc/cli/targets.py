"""``sparsecc targets``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from sparsecc.cli.arguments import input_shapes_option, parse_input_shapes, seed_option, threads_option
from sparsecc.cli.output import json_option, print_json, print_table, progress_bar
from sparsecc.errors import UsageError

__all__ = ["command"]


@click.group("targets", invoke_without_command=True)
@click.option(
    "--export-costs", type=click.Path(), metavar="FILE", help="Write this machine's measured costs to FILE."
)
@json_option
@click.pass_context
def command(ctx: click.Context, export_costs: str | None, as_json: bool) -> None:
    """List the targets and what this machine is; export its measured costs for `optimize --costs`.

    `sparsecc targets profile` measures a cost table to plan with.

    Example: sparsecc targets --export-costs costs.json
    """
    if ctx.invoked_subcommand is not None:
        return
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


@command.command("profile")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="The cost table.")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(),
    help="Measure the products of this model, not the general grid; repeat for more models.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="Begin no new measurement after so long; the same command goes on from there.",
)
@input_shapes_option
@threads_option
@seed_option
@json_option
def profile(
    output: str,
    models: tuple[str, ...],
    seconds: float | None,
    input_shapes: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure what products cost on this machine in every form, dense ones beside them, into a cost table.

    Run it where the models will run; then plan anywhere with the file. Every measurement is saved at once: what was
    interrupted goes on when the command is given again.

    Example: sparsecc targets profile -o cpu.json --threads 1 --model model.onnx
    """
    import math

    from sparsecc import ir, plan
    from sparsecc.plan import profile as measuring
    from sparsecc.target import Target

    if not Path(output).resolve().parent.is_dir():
        raise UsageError(f"the folder of {output} does not exist; create it first")
    table = plan.CostTable.open(Path(output))
    count = threads or Target.host().cores or 1
    shapes = parse_input_shapes(input_shapes)
    products = [] if models else measuring.generic_products()
    for path in models:
        model = ir.Model.load(path)
        inputs = plan.runnable_inputs(model, None, seed, shapes or None)
        whole = measuring.profile_model(table, model, inputs, count)
        click.echo(f"{path}: {whole:.4g} ms", err=True)
        products += measuring.products_of(model, inputs)
    keys = measuring.planned(products, count, seed, library=measuring.has_library())
    left = [key for key in keys if not measuring.known(table, key)]
    click.echo(
        f"{len(keys)} measurements, {len(keys) - len(left)} of them there already; the others take about "
        f"{math.ceil(min(measuring.expected_seconds(left), seconds or math.inf) / 60)} min with {count} thread(s)",
        err=True,
    )
    with progress_bar() as progress:
        done, notes = measuring.profile(
            table, products, keys, seconds=math.inf if seconds is None else seconds, progress=progress
        )
    if as_json:
        print_json(
            {"output": output, "planned": len(keys), "measured": done, "threads": count, "notes": notes}
        )
        return
    for note in notes:
        click.echo(f"not measured: {note}", err=True)
    rest = len(keys) - done - len(notes)
    click.echo(
        f"{output}: {done} of {len(keys)} measured"
        + (f"; {rest} to go: give the command again" if rest else "")
    )
