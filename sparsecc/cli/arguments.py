"""Options that several verbs share, so that each means one thing everywhere."""

from __future__ import annotations

import re

import click

from sparsecc.errors import UsageError

__all__ = [
    "calibration_option",
    "executor_option",
    "families_option",
    "fine_option",
    "input_shapes_option",
    "level_option",
    "model_argument",
    "num_samples_option",
    "parse_input_shapes",
    "resume_option",
    "seed_option",
    "threads_option",
]

model_argument = click.argument("model", type=click.Path())
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default="all cores",
    help="Threads the model runs on.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    envvar="SPARSECC_SEED",
    show_default=True,
    help="Root of all randomness.",
)
calibration_option = click.option(
    "--calibration-data",
    metavar="PATH",
    help="Inputs: an .npz, a folder of .npz or <input>.npy files, FILE.py[:func], or 'synthetic'.",
)
num_samples_option = click.option(
    "--num-samples", type=click.IntRange(min=1), help="Most calibration samples to use."
)
executor_option = click.option(
    "--executor",
    metavar="WHERE",
    help="Where layers are fitted: threads of this process (default), or dask://HOST:PORT, a Dask cluster that runs.",
)
families_option = click.option(
    "--families",
    metavar="PASS,…",
    help="Passes whose forms are tried, of those with a search range (docs/passes.md).",
)
fine_option = click.option(
    "--fine/--no-fine",
    default=None,
    help="Try amounts between those of the search ranges, too; takes about twice as long.  [default: --no-fine]",
)
level_option = click.option(
    "-O",
    "level",
    type=click.IntRange(0, 3),
    metavar="0|1|2|3",
    help="How much to do: -O0 only tidies; -O1 (default without a budget) loses nothing and measures layouts for the "
    "zeros that are there; -O2 plans, and loses at most 1 % (--max-drop); -O3 plans with more families, --fine and "
    "--attempts 12. Other options win.",
)
resume_option = click.option(
    "--resume/--no-resume",
    default=None,
    help="Whether what an earlier run on this model and data left is used: --resume demands some, --no-resume ignores "
    "it; by default it is used if it is there.",
)
input_shapes_option = click.option(
    "--input-shapes",
    multiple=True,
    metavar="NAME:D,D,…",
    help="Shape of an input with symbolic dimensions, for instance x:1,3,224,224; repeat for more inputs.",
)


def parse_input_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes given as ``NAME:D,D,…``.

    Raises:
        UsageError: a text of another form.
    """
    shapes = {}
    for text in texts:
        match = re.fullmatch(r"(.+):((?:\d+(?:,\d+)*)?)", text)
        if match is None:
            raise UsageError(f"--input-shapes {text}: expected NAME:D,D,… such as x:1,3,224,224")
        shapes[match[1]] = tuple(int(dim) for dim in match[2].split(",") if dim)
    return shapes
