"""``sparsecc benchmark``."""

from __future__ import annotations

import click

from sparsecc.cli.arguments import (
    calibration_option,
    input_shapes_option,
    parse_input_shapes,
    seed_option,
    threads_option,
)
from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]


@click.command("benchmark")
@click.argument("models", nargs=-1, required=True, type=click.Path())
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Time spent measuring."
)
@calibration_option
@input_shapes_option
@seed_option
@threads_option
@json_option
def command(
    models: tuple[str, ...],
    seconds: float,
    calibration_data: str | None,
    input_shapes: tuple[str, ...],
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Time MODELS against each other on the same inputs, interleaved in one process, operator library loaded.

    MODELS after the first may be modules of TVM, made by `sparsecc optimize --emit tvm`; that runs code of these files.

    The ratio is (time of the first model) / (time of this one): 2.0 is twice as fast as the first.

    Example: sparsecc benchmark model.onnx model.sparse.onnx --threads 1
    """
    from sparsecc import calib, ir
    from sparsecc import verify as engine
    from sparsecc.runtime.tvm_module import is_tvm_module, shapes_for
    from sparsecc.target import Target

    first = ir.Model.load(models[0])
    others = [path if is_tvm_module(path) else ir.Model.load(path) for path in models[1:]]
    shapes = shapes_for(models, parse_input_shapes(input_shapes))
    data = None
    if calibration_data is not None:
        data = calib.Calibration.from_path(calibration_data, first, seed=seed, input_shapes=shapes)
    inputs = engine.make_inputs(first, data, seed, shapes)
    count = threads or Target.host().cores or 1
    result = engine.benchmark([first, *others], inputs, threads=count, max_seconds=seconds)
    if as_json:
        print_json(
            {
                "models": [
                    {"path": path, "median_ms": t.median_ms, "min_ms": t.min_ms, "iterations": t.iterations}
                    for path, t in zip(models, result.models, strict=True)
                ],
                "ratio_to_first": list(result.ratio_to_first),
                "threads": count,
            }
        )
        return
    rows = [
        (path, f"{t.median_ms:.3f}", f"{t.min_ms:.3f}", t.iterations, f"{ratio:.3f}")
        for path, t, ratio in zip(models, result.models, result.ratio_to_first, strict=True)
    ]
    print_table(("model", ">median ms", ">min ms", ">iterations", ">times as fast"), rows)
    click.echo(f"\n{count} thread{'s' if count > 1 else ''}, medians of interleaved runs")
