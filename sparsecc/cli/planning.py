"""Options of the verbs that plan, and what they print."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.arguments import executor_option, families_option, fine_option, level_option, resume_option
from sparsecc.cli.output import format_bytes, print_table
from sparsecc.errors import UsageError

if TYPE_CHECKING:
    from sparsecc.plan import Asked, Choice, Limits, Planner
    from sparsecc.plan.outlook import Effort

__all__ = ["asked_of", "decision_lines", "effort_line", "planning_options", "print_decisions"]

_OPTIONS = (
    level_option,
    click.option(
        "--budget-latency", metavar="5ms|0.5x", help="Most time of one run; x: times that of the input."
    ),
    click.option(
        "--budget-size", metavar="20MB|0.5x", help="Most bytes of the file; x: times that of the input."
    ),
    click.option(
        "--max-drop",
        metavar="1%|0.01",
        help="Most that the metric may lose, in % of the input's score or in its unit; the fastest such model is "
        "sought where no other budget is given.",
    ),
    click.option(
        "--eval",
        "metric",
        metavar="METRIC",
        help="What counts: output-error (default), cosine, spearman, accuracy, perplexity, or FILE.py[:func], a "
        "function (evaluate) that gets run(inputs) -> outputs and returns a number.",
    ),
    families_option,
    fine_option,
    click.option(
        "--attempts",
        type=click.IntRange(min=1),
        help="Most models that are made and measured.  [default: 6]",
    ),
    click.option(
        "--analysis",
        metavar="FILE.json",
        type=click.Path(),
        help="What 'sparsecc analyze' saved, to plan with.",
    ),
    executor_option,
    resume_option,
)

#: Those that say something about planning only.
_PLANNED = ("metric", "families", "fine", "attempts", "analysis", "executor", "resume")


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a planner to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked_of(*, needed: bool, level: int | None, **options: Any) -> Asked | None:
    """What the options ask of a planner; None where they ask for no budget and none is ``needed``.

    Args:
        needed: by the verb.
        level: of ``-O``; 2 and 3 are a budget.
        options: arguments of ``Asked``.

    Raises:
        UsageError: options that need a budget without one, or a budget at a level that loses nothing.
    """
    from sparsecc.plan import Asked, asked_at

    if needed and level is not None and level < 2:
        raise UsageError(f"-O{level} loses nothing, so there is nothing to plan: give -O2, -O3 or a budget")
    budget = [options[name] for name in ("budget_latency", "budget_size", "max_drop")]
    if not needed and (level or 0) < 2 and all(text is None for text in budget):
        given = [name for name in _PLANNED if options[name] is not None]
        if given or options.get("allow_partial"):
            name = {"metric": "eval"}.get(given[0], given[0]) if given else "allow-partial"
            raise UsageError(
                f"--{name} goes with a budget: give --max-drop, --budget-latency, --budget-size or -O2 too"
            )
        return None
    return asked_at(level, Asked(**options))


def print_decisions(planner: Planner, choice: Choice) -> None:
    """Write a table of what each item takes, and how that compares with what it has."""
    rows = []
    for item in planner.items:
        dense, taken = item.candidates[0], item.candidates[choice.chosen[item.name]]
        others = f"{len(item.candidates) - 1} other forms" if len(item.candidates) > 1 else dense.note
        rows.append(
            (
                item.name if len(item.sites) == 1 else f"{item.name} (+{len(item.sites) - 1})",
                taken.name,
                f"{dense.time.ms:.4g}",
                f"{taken.time.ms:.4g}",
                format_bytes(dense.bytes),
                format_bytes(taken.bytes),
                f"{taken.error:.3g}",
                f"{item.damage(taken):.2g}",
                taken.note or others,
            )
        )
    print_table(
        ("part", "form", ">ms", ">then", ">bytes", ">then", ">error", ">damage", "note"),
        rows,
    )


def decision_lines(planner: Planner, choice: Choice, limits: Limits) -> list[str]:
    """What is predicted of the whole model."""
    ms, nbytes = planner.predicted_ms(choice), planner.predicted_bytes(choice)
    drop = planner.predicted_drop(choice)
    allowed = "" if limits.drop is None else f", {limits.drop:.3g} allowed"
    return [
        f"predicted: {planner.ms_before:.4g} ms -> {ms:.4g} ms ({planner.ms_before / ms:.2f}x), "
        f"{format_bytes(planner.bytes_before)} -> {format_bytes(nbytes)}",
        f"{planner.metric.name} {planner.score_before:.6g}, predicted to lose {drop:.2g}{allowed}",
    ]


def effort_line(effort: Effort) -> str:
    """What planning took, and what was predicted of it."""
    from sparsecc.plan.outlook import duration, peak_bytes

    own = effort.predicted
    before = "" if own is None else f" ({duration(own.seconds)} and {format_bytes(own.bytes)} predicted)"
    made = f", {effort.models} models made in {duration(effort.making)}" if effort.models else ""
    return f"planned in {duration(effort.planning)} with {format_bytes(peak_bytes())} of memory{before}{made}"
