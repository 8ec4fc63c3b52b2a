#!/usr/bin/env python3
"""Whole models: the output of ``sparsecc optimize`` against dense onnxruntime on the same machine.

Without arguments the zoo of ``models/zoo.py`` is built at real size with random weights and masks; an
argument may also be the path of an ``.onnx`` file, whose zeros are used as they are. For instance::

    python bench/models.py bert_base resnet50 --pattern 16x1 --pattern unstructured --json out.json
    python bench/models.py models/text_lm/text_lm_sparse16x1.onnx --threads 1

Both models run in one process in turns; the speed-up is the median of the ratios per round. The dense time is
that of the file before optimisation in plain onnxruntime, with all of its own fusions.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

import zoo  # noqa: E402

from sparsecc import calib, errors, ir, verify  # noqa: E402
from sparsecc.api import optimize  # noqa: E402
from sparsecc.plan import machine_facts  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One model file to measure.

    Attributes:
        model: Name in the zoo or path given by the user.
        pattern: Pattern of the zeros, ``as is`` for a file.
        sparsity: Share of zeros asked for; None where the pattern or the file decides.
        path: The file.
    """

    model: str
    pattern: str
    sparsity: float | None
    path: Path


@dataclass(frozen=True)
class Row:
    """One line of the result; times in milliseconds, sizes in bytes.

    ``speedup`` is the median over the rounds of the ratio in each round. The ratio of the two minima, which a
    busy machine disturbs less, should agree with it.
    """

    model: str
    pattern: str
    sparsity: float | None
    batch: int | None
    threads: int
    dense_ms: float
    sparse_ms: float
    speedup: float
    dense_min_ms: float
    sparse_min_ms: float
    bytes_before: int
    bytes_after: int
    layouts: dict[str, int]
    rounds: int

    def cells(self) -> list[str]:
        """The cells of a markdown table."""
        sparse_sites = sum(count for layout, count in self.layouts.items() if layout != "dense")
        return [
            self.model,
            self.pattern,
            "" if self.sparsity is None else f"{self.sparsity:.0%}",
            str(self.threads),
            f"{self.dense_ms:.2f}",
            f"{self.sparse_ms:.2f}",
            f"{self.speedup:.2f}x",
            f"{self.dense_min_ms / self.sparse_min_ms:.2f}x",
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f}",
            f"{sparse_sites} of {sum(self.layouts.values())}",
        ]


HEADER = [
    "model",
    "pattern",
    "zeros",
    "T",
    "dense ms",
    "sparsecc ms",
    "speed-up",
    "of minima",
    "MB",
    "sparse sites",
]


def build_cases(
    names: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    folder: Path,
    **shape: int,
) -> Iterator[Case]:
    """Yield the cases one by one, writing each zoo model into ``folder`` and removing it afterwards."""
    for name in names:
        if name not in zoo.ZOO:
            yield Case(name, "as is", None, Path(name))
            continue
        for pattern in patterns:
            implied = pattern == "dense" or ":" in pattern
            for sparsity in [None] if implied else sparsities:
                path = folder / f"{name}.onnx"
                onnx.save(zoo.build(name, pattern=pattern, sparsity=sparsity or 0.0, **shape), path)
                yield Case(name, pattern, sparsity, path)
                path.unlink()


def measure(case: Case, threads: int, folder: Path, calibration: Path | None, **options: Any) -> Row:
    """Optimise one file for a number of threads and time the result against the file."""
    output = folder / "optimised.onnx"
    seconds = options.pop("seconds")
    result = optimize(
        case.path,
        output,
        threads=threads,
        costs=folder / "costs.json",
        calibration_data=calibration,
        **options,
    )
    model = ir.Model.load(case.path)
    shapes = options["input_shapes"]
    source = None
    if calibration is not None:
        source = calib.Calibration.from_path(str(calibration), model, input_shapes=shapes)
    inputs = verify.make_inputs(model, source, shapes=shapes)
    timing = verify.benchmark(
        [case.path, output], inputs, threads=threads, library=[False, True], max_seconds=seconds
    )
    before, after = timing.models
    row = Row(
        model=case.model,
        pattern=case.pattern,
        sparsity=case.sparsity,
        batch=next((array.shape[0] for array in inputs.values() if array.ndim), None),
        threads=threads,
        dense_ms=before.median_ms,
        sparse_ms=after.median_ms,
        speedup=timing.ratio_to_first[1],
        dense_min_ms=before.min_ms,
        sparse_min_ms=after.min_ms,
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        layouts=dict(Counter(site.layout for site in result.sites)),
        rounds=timing.rounds,
    )
    output.unlink()
    return row


def markdown(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def warn_if_busy(load: float) -> None:
    """Say so when other programs use the processor: ratios between models then mean little."""
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        click.echo(f"warning: load average {load:.1f} on {cores} cores; measure on an idle machine", err=True)


def write_report(path: Path, rows: Sequence[Row], load: float) -> None:
    """Write the rows, the facts of the machine and its load average before the first measurement."""
    report = {
        "machine": machine_facts(),
        "load_average": load,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def parse_shapes(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]] | None:
    """Turn ``NAME:1,128`` into a mapping of shapes."""
    try:
        pairs = (value.rsplit(":", 1) for value in values)
        return {name: tuple(int(size) for size in sizes.split(",")) for name, sizes in pairs} or None
    except ValueError as error:
        raise click.BadParameter("must be NAME:SIZE,SIZE, for instance ids:1,128") from error


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1)
@click.option("--pattern", "patterns", multiple=True, default=["16x1"], show_default=True, help="Zoo: zeros.")
@click.option(
    "--sparsity", "sparsities", multiple=True, default=[0.9], show_default=True, help="Zoo: share of zeros."
)
@click.option("--threads", multiple=True, default=[1, 2], show_default=True, help="Threads of the sessions.")
@click.option("--batch", default=1, show_default=True, help="Zoo: inputs per run.")
@click.option("--seq", default=128, show_default=True, help="Zoo: tokens per sequence.")
@click.option("--seed", default=0, show_default=True, help="Of weights, masks and inputs.")
@click.option(
    "--input-shape", "input_shapes", multiple=True, callback=parse_shapes, help="NAME:SIZE,SIZE of a file."
)
@click.option("--calibration-data", type=click.Path(exists=True, path_type=Path), help="Inputs for a file.")
@click.option("--pipeline", help="Pipeline text instead of the preset of optimize.")
@click.option("--keep-slower", is_flag=True, help="Lower every sparse site even where dense is faster.")
@click.option("--seconds", default=20.0, show_default=True, help="Longest timing of one row.")
@click.option(
    "--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="File for the results."
)
def main(
    names: tuple[str, ...],
    patterns: tuple[str, ...],
    sparsities: tuple[float, ...],
    threads: tuple[int, ...],
    batch: int,
    seq: int,
    calibration_data: Path | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Measure every case with every number of threads; a case that fails is reported and skipped."""
    rows: list[Row] = []
    load = os.getloadavg()[0]
    warn_if_busy(load)
    click.echo(markdown(HEADER))
    click.echo(markdown(["---"] * len(HEADER)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = {"batch": batch, "seq": seq, "seed": options["seed"]}
        failed = False
        for case in build_cases(names or sorted(zoo.ZOO), patterns, sparsities, folder, **shape):
            for count in threads:
                try:
                    rows.append(measure(case, count, folder, calibration_data, **options))
                except errors.SparseccError as error:
                    failed = True
                    click.echo(f"{case.model}, {case.pattern}, {count} threads: {error}", err=True)
                    continue
                click.echo(markdown(rows[-1].cells()))
                if report is not None:
                    write_report(report, rows, load)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
