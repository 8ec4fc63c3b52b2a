"""``sparsecc plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsecc.cli.arguments import (
    calibration_option,
    input_shapes_option,
    model_argument,
    num_samples_option,
    parse_input_shapes,
    seed_option,
    threads_option,
)
from sparsecc.cli.output import json_option, print_json, progress_bar
from sparsecc.cli.planning import asked_of, decision_lines, effort_line, planning_options, print_decisions

__all__ = ["command"]


@click.command("plan")
@model_argument
@click.option(
    "-o", "--output", type=click.Path(), metavar="FILE.toml", help="Save the plan, for optimize --recipe."
)
@click.option("--target", default="cpu", show_default=True, help="Where it will run; see optimize.")
@calibration_option
@num_samples_option
@input_shapes_option
@planning_options
@click.option("--standard-ops-only", is_flag=True, help="Count on no sparse operators.")
@click.option(
    "--costs",
    type=click.Path(),
    help="Cost table to use and extend; of the target where that is another machine.",
)
@seed_option
@threads_option
@json_option
def command(
    model: str,
    output: str | None,
    target: str,
    calibration_data: str | None,
    num_samples: int | None,
    input_shapes: tuple[str, ...],
    standard_ops_only: bool,
    costs: str | None,
    seed: int,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what `optimize` would do within a budget: the form of each part, and what is predicted; make nothing.

    The saved plan is a recipe: change the choice of a part, and `optimize --recipe` makes that model.

    Example: sparsecc plan model.onnx --max-drop 1% --eval accuracy --calibration-data inputs.npz -o plan.toml
    """
    from sparsecc import ir, plan, planning
    from sparsecc.ir.files import model_files
    from sparsecc.ir.outputs import check_output
    from sparsecc.plan.outlook import duration
    from sparsecc.target import Target

    asked = asked_of(needed=True, **options)
    assert asked is not None, "needed"
    source = Path(model)
    original = ir.Model.load(source)
    if output is not None:
        read = (asked.analysis, asked.metric, costs, calibration_data)
        check_output(output, [*model_files(source), *read])
    wanted = Target.parse(target)
    threads = plan.usable_threads(threads, wanted, costs)
    with progress_bar() as progress:
        setting, notes = plan.open_setting(
            original,
            target=wanted,
            calibration_data=calibration_data,
            num_samples=num_samples,
            memory=None,
            input_shapes=parse_input_shapes(input_shapes),
            costs=costs,
            seed=seed,
            threads=threads,
            overrides=(),
            reference=None,
            keep_slower=False,
            library=plan.library_found(needed=False),
            progress=progress,
        )
        found = planning.prospect(
            setting, asked, source, calibration_data, standard_ops_only=standard_ops_only
        )
    if output is not None:
        plan.write_plan(output, found.plan_file(source))
    if as_json:
        told = {**found.to_json(), "notes": [*notes, *found.notes]}
        return print_json({"model": source.name, "target": target, **told})
    print_decisions(found.planner, found.choice)
    click.echo("")
    for line in decision_lines(found.planner, found.choice, found.limits):
        click.echo(line)
    click.echo(effort_line(found.planner.effort))
    own = found.planner.effort.predicted
    if own is not None:
        most, each = asked.attempts or plan.ATTEMPTS, duration(own.model_seconds)
        click.echo(f"optimize goes on from here: up to {most} models, about {each} each")
    for note in dict.fromkeys((*notes, *found.notes)):
        click.echo(f"note: {note}")
    if output is not None:
        click.echo(f"saved to {output}: sparsecc optimize {source.name} --recipe {Path(output).name}")
