"""``sparsecc analyze``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsecc.cli.arguments import (
    calibration_option,
    executor_option,
    families_option,
    fine_option,
    input_shapes_option,
    model_argument,
    num_samples_option,
    parse_input_shapes,
    resume_option,
    seed_option,
    threads_option,
)
from sparsecc.cli.output import format_bytes, json_option, print_json, print_table, progress_bar
from sparsecc.cli.planning import effort_line

if TYPE_CHECKING:
    from sparsecc.plan.analysis import Analysis
    from sparsecc.plan.items import Candidate, Item

__all__ = ["command"]


@click.command("analyze")
@model_argument
@click.option(
    "-o", "--output", type=click.Path(), metavar="FILE.json", help="Save the analysis, to plan with."
)
@calibration_option
@num_samples_option
@input_shapes_option
@click.option(
    "--eval",
    "metric",
    metavar="NAME|FILE.py[:func]",
    help="What counts: output-error (default), cosine, spearman, accuracy, perplexity, or a function (evaluate) that "
    "gets run(inputs) -> outputs and returns a number.",
)
@families_option
@fine_option
@click.option("--standard-ops-only", is_flag=True, help="Count on no sparse operators.")
@click.option("--costs", type=click.Path(), help="Cost table to use and extend.")
@executor_option
@resume_option
@seed_option
@threads_option
@json_option
def command(
    model: str,
    output: str | None,
    calibration_data: str | None,
    num_samples: int | None,
    input_shapes: tuple[str, ...],
    metric: str | None,
    families: str | None,
    fine: bool | None,
    standard_ops_only: bool,
    costs: str | None,
    executor: str | None,
    resume: bool | None,
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Show what each part of MODEL may become: time and error of every form, and how much the model cares.

    Parts are single sites, products that read the same value, and layers coupled through hidden units. Results are
    kept: a second run takes seconds.

    Example: sparsecc analyze model.onnx --calibration-data inputs.npz --eval accuracy -o analysis.json
    """
    from sparsecc import ir, plan
    from sparsecc.exec import open_executor
    from sparsecc.ir.files import model_files
    from sparsecc.ir.outputs import check_output
    from sparsecc.plan import analysis
    from sparsecc.target import Target

    original = ir.Model.load(model)
    if output is not None:
        check_output(output, [*model_files(model), metric, costs, calibration_data])
    target = Target.parse("cpu")
    library = plan.library_found(needed=False)
    with progress_bar() as progress, open_executor(executor) as workers:
        setting, notes = plan.open_setting(
            original,
            target=target,
            calibration_data=calibration_data,
            num_samples=num_samples,
            memory=None,
            input_shapes=parse_input_shapes(input_shapes),
            costs=costs,
            seed=seed,
            threads=plan.usable_threads(threads, target),
            overrides=(),
            reference=None,
            keep_slower=False,
            library=library,
            progress=progress,
        )
        data = setting.context.calibration_for("analyze")
        judged = None
        if metric is not None:
            labels = None if calibration_data is None else plan.read_labels(calibration_data)
            judged = plan.open_metric(
                metric, original, data, labels=labels, threads=setting.context.threads, library=library
            )
        found = analysis.analyze(
            setting,
            judged,
            custom_ops=not standard_ops_only,
            families=plan.FAMILIES if families is None else tuple(families.split(",")),
            fine=bool(fine),
            results=plan.begin(
                original.fingerprint(), data.fingerprint(), setting.context.seed, resume=resume
            ),
            executor=workers,
        )
    if output is not None:
        analysis.write_analysis(found, Path(output))
    if as_json:
        return print_json({"name": Path(model).name, **found.to_json(), "effort": found.effort.to_json()})
    print_parts(found)
    click.echo(effort_line(found.effort))
    for note in dict.fromkeys((*notes, *found.notes)):
        click.echo(f"note: {note}")
    if output is not None:
        click.echo(f"saved to {output}")


def print_parts(found: Analysis) -> None:
    """Write two tables: the parts, and their forms."""
    whole = sum(item.candidates[0].time.ms for item in found.items)
    rows = []
    for item in found.items:
        dense = item.candidates[0]
        shapes = "+".join("x".join(map(str, found.shapes[name])) for name in item.sites)
        share = f"{100 * dense.time.ms / whole:.1f} %" if whole and dense.time.ms else "-"
        rows.append(
            (item.name, len(item.sites), shapes, share, format_bytes(dense.bytes), f"{item.sensitivity:.3g}",
             len(item.candidates) - 1, dense.note)
        )  # fmt: skip
    columns = ("part", ">sites", "NxK", ">time", ">bytes", ">sensitivity", ">forms", "why not")
    print_table(columns, rows)
    click.echo("")
    curves = [
        (item.name, family, _points(item, candidates))
        for item in found.items
        for family, candidates in _by_family(item.candidates[1:])
    ]
    print_table(("part", "form", "error (times as fast, times smaller), mildest first"), curves)
    click.echo(
        f"\n{found.metric} {found.score:.6g}"
        + (
            ""
            if found.additivity is None
            else f"; all parts replaced at once lose {found.additivity:.2f} times what was predicted"
        )
    )


def _by_family(candidates: Iterable[Candidate]) -> list[tuple[str, list[Candidate]]]:
    """Candidates by the names of their passes, and patterns where they have one."""
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(" + ".join(_kind(spec) for spec in candidate.passes), []).append(candidate)
    return [(name, sorted(group, key=lambda item: item.error)) for name, group in found.items()]


def _kind(spec: str) -> str:
    """The pass, and its pattern if it has one."""
    from sparsecc.target.spec import parse_specs

    (parsed,) = parse_specs(spec)
    return " ".join([parsed.name, *([parsed.options["pattern"]] if "pattern" in parsed.options else [])])


def _points(item: Item, candidates: Iterable[Candidate]) -> str:
    dense = item.candidates[0]
    texts = []
    for candidate in candidates:
        faster = dense.time.ms / candidate.time.ms if candidate.time.ms > 0 else math.nan
        smaller = dense.bytes / candidate.bytes if candidate.bytes else math.inf
        texts.append(f"{candidate.error:.3f} ({faster:.2f}x, {smaller:.1f}x)")
    return "  ".join(texts)
