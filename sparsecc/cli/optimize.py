"""``sparsecc optimize``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from sparsecc.cli.depfile import depfile_option, write_depfile
from sparsecc.cli.emit import emission, emit_option
from sparsecc.cli.output import format_bytes, json_option, print_json, print_table, progress_bar
from sparsecc.cli.planning import asked_of, effort_line, planning_options
from sparsecc.errors import UsageError

if TYPE_CHECKING:
    from sparsecc.api import OptimizeResult
    from sparsecc.pm import PassReport

__all__ = ["command"]

#: Most notes of one pass that are printed.
_MOST_NOTES = 12


@click.command("optimize")
@model_argument
@click.option(
    "-o", "--output", type=click.Path(), help="File to write; default MODEL.sparse.onnx beside the input."
)
@click.option(
    "--target", default="cpu", show_default=True, help="Where it will run: cpu (this machine), arm64, cuda."
)
@emit_option
@click.option("--recipe", "-c", type=click.Path(), help="TOML recipe: a pipeline and per-site overrides.")
@click.option(
    "--pipeline",
    help="Pipeline text, for instance 'tidy,prune-magnitude{pattern=2:4},choose-layout,lower-sparse'.",
)
@click.option(
    "--pattern", help="Prune to unstructured, N:M (N kept of every M) or RxC (R outputs x C inputs)."
)
@click.option(
    "--sparsity", type=click.FloatRange(0, 1, max_open=True), help="Fraction of the weights to remove."
)
@click.option(
    "--method",
    help="How to prune: magnitude, or with calibration data wanda, dass, wanda-ols, sparsegpt, alps or obc (the last "
    "four also change the weights that stay); tiles, armor and sparse-lowrank split or factorise weights; structured "
    "removes channels, neurons and heads, depth whole residual blocks. Or smaller operators in the place of weights: "
    "svd or, with calibration data, rrr, rrr-shared, whitened-svd, asvd, fwsvd, cur, interpolative, compot, cospadi, "
    "rocket, btt, monarch, blast, blockdiag-lowrank, kronecker, tensor-train; faust for fast transforms; spatial-svd, "
    "tucker, cp, separable or best for convolutions; embedding, modegpt, mobe; slab, seedlm, bitstack pack bits.",
)
@click.option(
    "--flops-ratio",
    type=float,
    help="With --method structured or depth: share of the multiplications to keep, e.g. 0.7.",
)
@click.option(
    "--blocks", type=click.IntRange(min=1), help="With --method depth: how many residual blocks to remove."
)
@click.option(
    "--param-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    help="With methods that factorise (without --method rrr, or svd where there is no calibration data): share of the "
    "numbers of each weight that its factors may hold.  [default: 0.7]",
)
@click.option(
    "--fisher", metavar="NPZ", type=click.Path(), help="With --method fwsvd: squared gradients by site."
)
@click.option(
    "--allocate",
    is_flag=True,
    help="With methods that factorise: deal the numbers to sites by their spectra instead of all alike.",
)
@click.option(
    "--permute", is_flag=True, help="Reorder channels before pruning, so that the pattern costs less."
)
@click.option(
    "--recover",
    metavar="NAMES",
    help="After pruning, with calibration data: bias, bn, ols, align, heal, or several with commas between them.",
)
@click.option(
    "--reference",
    metavar="MODEL",
    type=click.Path(),
    help="Where the input was pruned before: the dense model that --recover aims at.",
)
@click.option("--quantize", metavar="TYPE", help="Quantise to int8 wherever that is measured faster.")
@click.option(
    "--activations", help="With --quantize: ranges of activations, dynamic (at run time) or static."
)
@click.option(
    "--values",
    default="fp32",
    show_default=True,
    help="Store the values of sparse weights as fp32, fp16 or bf16 (rounded; arithmetic stays fp32).",
)
@click.option("--match", default="*", show_default=True, help="Which sites: a glob, or re:EXPRESSION.")
@planning_options
@click.option(
    "--allow-partial", is_flag=True, help="Write the closest model also where it misses the budget."
)
@click.option("--report", metavar="FILE.html", type=click.Path(), help="Write a report of the run, too.")
@calibration_option
@num_samples_option
@click.option(
    "--memory",
    metavar="GB",
    type=click.FloatRange(0, min_open=True),
    help="Gigabytes that what calibration measures may take before it goes to files.  [default: 0.8]",
)
@input_shapes_option
@click.option(
    "--standard-ops-only", is_flag=True, help="Emit no custom operators: runs anywhere, at dense speed."
)
@click.option(
    "--keep-slower",
    is_flag=True,
    help="Lower every site with zeros (to --pattern if given), also where dense is faster.",
)
@click.option(
    "--costs",
    type=click.Path(),
    help="Cost table file to use and extend instead of the cached one; to plan for another machine, the one that "
    "'sparsecc targets profile' made there.",
)
@seed_option
@threads_option
@click.option(
    "--dump-between-passes", type=click.Path(), metavar="DIR", help="Save the model after every pass."
)
@click.option("--stop-after", metavar="PASS", help="Stop the pipeline after this pass.")
@click.option("--verify-each", is_flag=True, help="Compare outputs after every lossless pass.")
@click.option("--time-passes", is_flag=True, help="Print how long each pass took.")
@depfile_option
@json_option
def command(
    model: str,
    output: str | None,
    target: str,
    emit: str,
    recipe: str | None,
    pipeline: str | None,
    pattern: str | None,
    sparsity: float | None,
    method: str | None,
    flops_ratio: float | None,
    blocks: int | None,
    param_ratio: float | None,
    fisher: str | None,
    allocate: bool,
    permute: bool,
    recover: str | None,
    reference: str | None,
    quantize: str | None,
    activations: str | None,
    values: str,
    match: str,
    calibration_data: str | None,
    num_samples: int | None,
    memory: float | None,
    input_shapes: tuple[str, ...],
    standard_ops_only: bool,
    keep_slower: bool,
    costs: str | None,
    seed: int,
    threads: int,
    dump_between_passes: str | None,
    stop_after: str | None,
    verify_each: bool,
    time_passes: bool,
    report: str | None,
    depfile: str | None,
    as_json: bool,
    **planning: Any,
) -> None:
    """Make MODEL smaller and faster where that is measured; never overwrites it.

    Without --pattern, --sparsity, --method, --quantize, --values, --recipe, --pipeline or a budget nothing is lost:
    only zeros that the weights already have are used. A site where no sparse form beats dense stays dense, and the
    table says why.

    With a budget (--max-drop, --budget-latency, --budget-size, or -O2 and -O3) the form of each part is chosen by
    measured time, size and error; models are made and measured until one keeps it.

    Example: sparsecc optimize model.onnx -o small.onnx --pattern 16x1 --sparsity 0.8

    Example: sparsecc optimize model.onnx -o small.onnx -O2 --eval accuracy --calibration-data inputs.npz
    """
    from sparsecc import api
    from sparsecc.ir.files import model_files

    level = planning.pop("level")
    asked = asked_of(needed=False, level=level, **planning)
    if report is not None:
        from sparsecc.report import check_report

        goes_to = api.default_output(Path(model)) if output is None else Path(output)
        if Path(report).resolve() == goes_to.resolve():
            raise UsageError(
                f"the model and the report would both be {report}: give another file with --report"
            )
        read = (planning["analysis"], planning["metric"], reference, fisher, recipe, costs, calibration_data)
        check_report(Path(report), [model, *read])
    shapes = parse_input_shapes(input_shapes)
    with emission(emit, model, output, target) as made, progress_bar() as progress:
        result = api.optimize(
            model,
            made.onnx,
            target=target,
            recipe=recipe,
            pipeline=pipeline,
            pattern=pattern,
            sparsity=sparsity,
            method=method,
            flops_ratio=flops_ratio,
            blocks=blocks,
            param_ratio=param_ratio,
            fisher=fisher,
            allocate=allocate,
            permute=permute,
            recover=recover,
            reference=reference,
            quantize=quantize,
            activations=activations,
            values=values,
            match=match,
            calibration_data=calibration_data,
            num_samples=num_samples,
            memory=memory,
            input_shapes=shapes,
            standard_ops_only=standard_ops_only,
            keep_slower=keep_slower,
            costs=costs,
            seed=seed,
            threads=threads,
            dump=dump_between_passes,
            stop_after=stop_after,
            verify_each=verify_each,
            level=level,
            asked=asked,
            progress=progress,
        )
        if report is not None:
            from sparsecc.report import write_report

            try:
                write_report(_document(result, Path(model), target, seed), Path(report))
            except OSError as error:
                why = error.strerror or error
                raise UsageError(
                    f"the report cannot be written to {report}: {why}; the model is in {result.output}"
                ) from error
        result = made.finish(result, shapes)
    if depfile is not None:
        named = (recipe, reference, fisher, costs, calibration_data, planning["metric"], planning["analysis"])
        write_depfile(depfile, output or str(result.output), (*model_files(model), *named))
    if as_json:
        print_json(result.to_json())
        return
    rows = [
        (d.site, d.op, f"{d.shape[0]}x{d.shape[1]}", f"{d.density:.3f}", d.layout, d.reason)
        for d in result.sites
    ]
    print_table(("site", "op", "NxK", ">density", "layout", "why"), rows)
    if time_passes:
        print_table(("pass", ">seconds"), [(item.spec, f"{item.seconds:.2f}") for item in result.reports])
    for item in result.reports:
        for line in [*_first(item.notes), *_first(_modules(item, result))]:
            click.echo(f"{item.pass_name}: {line}")
    for name, reason in result.not_sites:
        click.echo(f"not a site: {name}: {reason}")
    click.echo("")
    for line in _summary(result):
        click.echo(line)


def _document(result: OptimizeResult, source: Path, target: str, seed: int) -> dict[str, Any]:
    """Everything that a report can show of a run."""
    from sparsecc import ir
    from sparsecc.ir.files import file_sha256
    from sparsecc.report.measured import measured_parts
    from sparsecc.report.planned import provenance

    digests = {"input": file_sha256(source), "output": file_sha256(result.output)}
    return {
        "model": source.name,
        "target": target,
        **result.to_json(),
        **measured_parts(ir.Model.load(result.output), ir.Model.load(source)),
        "provenance": provenance(["sparsecc", *sys.argv[1:]], seed, digests),
    }


def _modules(report: PassReport, result: OptimizeResult) -> list[str]:
    """What became smaller without being a site of the table: modules, tables, groups of units."""
    told = {decision.site for decision in result.sites}
    if not report.pass_name.startswith(("prune-", "factor-")):
        return []
    return [f"{item.site}: {item.detail}" for item in report.changed if item.site not in told]


def _first(notes: Sequence[str]) -> list[str]:
    """The first few notes of a pass; a file made with --json has them all."""
    rest = len(notes) - _MOST_NOTES
    return [*notes[:_MOST_NOTES], *([f"... and {rest} more (--json lists all)"] if rest > 0 else [])]


def _latency_line(result: OptimizeResult) -> str:
    """What became of the time of one run, and how that is known."""
    latency = result.latency
    times = f"{latency.before_ms:.4g} ms -> {latency.after_ms:.4g} ms ({latency.speedup:.2f}x"
    threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
    if latency.source == "predicted":
        return f"predicted latency {times}, +-{latency.uncertainty or 0:.0%}, {threads}); not measured"
    loaded = "operator library loaded" if result.library else "no operator library"
    return f"latency {times}, {threads}, {loaded}, medians of interleaved runs)"


def _summary(result: OptimizeResult) -> list[str]:
    verified = "with and without" if result.library else "without"
    lines = [
        f"{result.output}: {format_bytes(result.bytes_before)} -> {format_bytes(result.bytes_after)} "
        f"({result.bytes_before / max(1, result.bytes_after):.2f}x smaller)",
        _latency_line(result),
        f"verified {verified} the operator library: relative L2 {result.max_rel_l2:.1e}",
        f"relative L2 to the input model: {result.rel_l2_to_input:.1e}",
    ]
    if result.planned is not None:
        planner, best = result.planned.planner, result.planned.verdict.best
        lines.append(
            f"{planner.metric.name} {planner.score_before:.6g} -> {best.score:.6g}, "
            f"{len(result.planned.verdict.attempts)} models made"
            + (" and measured" if result.latency.source == "measured" else ", judged here")
        )
        lines.append(effort_line(planner.effort))
        missed = ", ".join(result.planned.verdict.misses)
        lines += [f"note: the budget is missed: {missed}"] if missed else []
    return [*lines, *(f"note: {note}" for note in result.notes)]
