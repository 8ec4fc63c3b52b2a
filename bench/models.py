#!/usr/bin/env python3
"""Whole models: the output of ``sparsecc optimize`` and other engines against dense onnxruntime.

Without arguments the zoo of ``models/zoo.py`` is built at real size with random weights and masks; an
argument may also be the path of an ``.onnx`` file, whose zeros are used as they are. For instance::

    python bench/models.py bert_base resnet50 --pattern 16x1 --pattern 16x4 --sparsity 0.8 --json out.json
    python bench/models.py models/text_lm/text_lm_sparse16x1.onnx --threads 1 --no-peers

All engines run in one process in turns; a speed-up is the median of the ratios per round. The dense time is
that of the file before optimisation in plain onnxruntime, with all of its own fusions. Everything that is quantised
or optimised starts from that same file; the error is the distance of the first output from that of dense
onnxruntime, relative to its length, and says nothing about accuracy where weights are random. Clocks and optional
engines are those of `layers` and `peers`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from layers import SPIN_SECONDS, clock_of, pinned
from model_engines import (
    Engine,
    Inputs,
    onnxruntime_engine,
    peer_engines,
    quantised_files,
    relative_error,
)
from peers import in_child, limited_openvino

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

import zoo  # noqa: E402

from sparsecc import calib, errors, ir, verify  # noqa: E402
from sparsecc.api import optimize  # noqa: E402
from sparsecc.passes.prune.magnitude import PruneMagnitude  # noqa: E402
from sparsecc.plan import machine_facts  # noqa: E402
from sparsecc.pm import PassContext  # noqa: E402
from sparsecc.sparse import Pattern  # noqa: E402
from sparsecc.verify.timing import time_interleaved  # noqa: E402

#: What is asked of `optimize`, by the name of the engine that runs the result.
OURS: dict[str, dict[str, Any]] = {"sparsecc fp32": {}, "sparsecc int8": {"quantize": "int8"}}


#: Sites that are pruned in the zoo: neither stems nor depthwise convolutions nor classifiers.
PRUNED = r"re:^(?!.*(stem|depthwise|classifier))"


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
    """One engine on one model; times in milliseconds, sizes in bytes.

    ``speedup`` is the median over the rounds of the ratio in each round. The ratio of the two minima, which a
    busy machine disturbs less, should agree with it. ``layouts`` counts the sites of our models by layout.
    """

    model: str
    pattern: str
    sparsity: float | None
    batch: int | None
    threads: int
    engine: str
    ms: float
    min_ms: float
    speedup: float
    speedup_of_minima: float
    error: float
    bytes: int
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
            self.engine,
            f"{self.ms:.2f}",
            f"{self.speedup:.2f}x",
            f"{self.speedup_of_minima:.2f}x",
            f"{self.error:.1e}",
            f"{self.bytes / 1e6:.1f}",
            f"{sparse_sites} of {sum(self.layouts.values())}" if self.layouts else "",
        ]


HEADER = [
    "model",
    "pattern",
    "zeros",
    "T",
    "engine",
    "ms",
    "speed-up",
    "of minima",
    "error",
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
                write_model(path, name, pattern, sparsity or 0.0, shape)
                yield Case(name, pattern, sparsity, path)
                path.unlink()


def write_model(path: Path, name: str, pattern: str, sparsity: float, shape: Mapping[str, int]) -> None:
    """Write a zoo model; blocks of several inputs are of several channels, as products of bytes want them."""
    parsed = Pattern.parse(pattern)
    if parsed.kind != "block" or parsed.cols == 1:
        onnx.save(zoo.build(name, pattern=pattern, sparsity=sparsity, **shape), path)
        return
    model = ir.Model.from_proto(zoo.build(name, pattern="dense", sparsity=0.0, **shape))
    PruneMagnitude(pattern=parsed, sparsity=sparsity, by_channel=True, match=PRUNED).run(model, PassContext())
    model.save(path)


def our_engines(
    case: Case, threads: int, folder: Path, inputs: Inputs, options: Mapping[str, Any]
) -> Iterator[tuple[Engine, dict[str, int]]]:
    """Yield what `optimize` makes of a file, with float weights and with bytes, and the sites by layout."""
    for name, asked in OURS.items():
        extra = dict(asked)
        if "quantize" in asked and any(site.op == "Conv" for site in ir.Model.load(case.path).sites()):
            np.savez(folder / "calibration.npz", **inputs)
            extra |= {"activations": "static", "calibration_data": folder / "calibration.npz"}
        output = folder / f"{name.replace(' ', '_')}.onnx"
        costs = folder / "costs.json"
        result = optimize(case.path, output, threads=threads, costs=costs, **{**options, **extra})
        engine = onnxruntime_engine(name, output, inputs, threads)
        yield engine, dict(Counter(site.layout for site in result.sites))


def measure(
    case: Case,
    threads: int,
    folder: Path,
    calibration: Path | None,
    *,
    peers: bool,
    seconds: float,
    **options: Any,
) -> tuple[list[Row], dict[str, str]]:
    """Run one file on every engine with a number of threads; also return why an engine is missing."""
    model = ir.Model.load(case.path)
    shapes = options["input_shapes"]
    source = None
    if calibration is not None:
        source = calib.Calibration.from_path(str(calibration), model, input_shapes=shapes)
    inputs = verify.make_inputs(model, source, shapes=shapes)
    options["calibration_data"] = calibration
    engines = [onnxruntime_engine("onnxruntime fp32", case.path, inputs, threads)]
    layouts: dict[str, dict[str, int]] = {}
    if in_child() is None:
        for engine, sites in our_engines(case, threads, folder, inputs, options):
            engines.append(engine)
            layouts[engine.name] = sites
    missing: dict[str, str] = {}
    if peers:
        files = quantised_files(case.path, inputs, folder)
        others, missing = peer_engines(case.path, inputs, files, threads)
        engines += others
    with pinned(threads):
        rows = time_models(case, engines, inputs, threads, layouts, seconds)
    return rows, missing


def time_models(
    case: Case,
    engines: Sequence[Engine],
    inputs: Inputs,
    threads: int,
    layouts: Mapping[str, dict[str, int]],
    seconds: float,
) -> list[Row]:
    """Time the engines in turns; the first is what the others are compared with."""
    engines[0].call()
    reference = np.asarray(engines[0].result(), np.float64)
    errors = [relative_error(engine, reference) for engine in engines]
    times, _ = time_interleaved(
        [engine.call for engine in engines],
        clock=clock_of(threads),
        max_seconds=seconds,
        pauses=[SPIN_SECONDS if threads > 1 and engine.spins else 0.0 for engine in engines],
    )
    batch = next((array.shape[0] for array in inputs.values() if array.ndim), None)
    return [
        Row(
            model=case.model,
            pattern=case.pattern,
            sparsity=case.sparsity,
            batch=batch,
            threads=threads,
            engine=engine.name,
            ms=statistics.median(taken) * 1e3,
            min_ms=min(taken) * 1e3,
            speedup=statistics.median(a / b for a, b in zip(times[0], taken, strict=True)),
            speedup_of_minima=min(times[0]) / min(taken),
            error=error,
            bytes=engine.size,
            layouts=layouts.get(engine.name, {}),
            rounds=len(taken),
        )
        for engine, taken, error in zip(engines, times, errors, strict=True)
    ]


def markdown(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def warn_if_busy(load: float) -> None:
    """Say so when other programs use the processor: ratios between models then mean little."""
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        click.echo(f"warning: load average {load:.1f} on {cores} cores; measure on an idle machine", err=True)


def write_report(path: Path, rows: Sequence[Row], missing: Mapping[str, str], load: float) -> None:
    """Write the rows, the facts of the machine and its load average before the first measurement."""
    report = {
        "machine": machine_facts(),
        "missing": dict(missing),
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
@click.option("--seconds", default=20.0, show_default=True, help="Longest timing of one model.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time other engines as well.")
@click.option("--openvino-isa", help="Time OpenVINO again, in its own process, held to this instruction set.")
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
    openvino_isa: str | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Measure every case with every number of threads; a case that fails is reported and skipped."""
    rows: list[Row] = []
    missing: dict[str, str] = {}
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
                    found, lacking = measure(case, count, folder, calibration_data, **options)
                except errors.SparseccError as error:
                    failed = True
                    click.echo(f"{case.model}, {case.pattern}, {count} threads: {error}", err=True)
                    continue
                rows += found
                missing |= lacking
                for row in found:
                    click.echo(markdown(row.cells()))
                if report is not None and in_child() is None:
                    write_report(report, rows, missing, load)
    if (child := in_child()) is not None:
        child.write_text(json.dumps([asdict(row) for row in rows if row.engine.startswith("openvino")]))
    elif options["peers"]:
        limited = [Row(**row) for row in limited_openvino(openvino_isa)]
        for row in limited:
            click.echo(markdown(row.cells()))
        if report is not None:
            write_report(report, rows + limited, missing, load)
    for name, reason in missing.items():
        click.echo(f"not measured: {name} ({reason})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
