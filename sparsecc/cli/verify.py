"""``sparsecc verify``."""

from __future__ import annotations

import click

from sparsecc.cli.arguments import (
    calibration_option,
    input_shapes_option,
    num_samples_option,
    parse_input_shapes,
    seed_option,
)
from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]


@click.command("verify")
@click.argument("reference", type=click.Path())
@click.argument("model", type=click.Path())
@click.option(
    "--tolerance", type=float, default=1e-5, show_default=True, help="Largest relative L2 distance allowed."
)
@click.option(
    "--library/--no-library", default=True, show_default=True, help="Load the operator library for MODEL."
)
@calibration_option
@num_samples_option
@input_shapes_option
@seed_option
@json_option
def command(
    reference: str,
    model: str,
    tolerance: float,
    library: bool,
    calibration_data: str | None,
    num_samples: int | None,
    input_shapes: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> int:
    """Run REFERENCE and MODEL on the same inputs and compare every output. Exit code 4 if they differ.

    MODEL may be a module of TVM, made by `sparsecc optimize --emit tvm`; that runs code of the file.

    Example: sparsecc verify model.onnx model.sparse.onnx
    """
    from sparsecc import calib, ir
    from sparsecc import verify as engine
    from sparsecc.runtime.tvm_module import is_tvm_module, shapes_for

    first = ir.Model.load(reference)
    second = model if is_tvm_module(model) else ir.Model.load(model)
    shapes = shapes_for([model], parse_input_shapes(input_shapes))
    data = None
    if calibration_data is not None:
        data = calib.Calibration.from_path(
            calibration_data, first, num_samples=num_samples, seed=seed, input_shapes=shapes
        )
    inputs = data if data is not None else engine.make_inputs(first, None, seed, shapes)
    diffs = engine.compare(first, second, inputs, library=(True, library))
    passed = all(diff.rel_l2 <= tolerance for diff in diffs)
    if as_json:
        print_json(
            {
                "reference": reference,
                "model": model,
                "tolerance": tolerance,
                "passed": passed,
                "outputs": [diff.to_json() for diff in diffs],
            }
        )
    else:
        rows = [
            (
                d.name,
                f"{d.max_abs:.3e}",
                f"{d.rel_l2:.3e}",
                f"{d.cosine:.8f}",
                "-" if d.argmax_agreement is None else f"{d.argmax_agreement:.4f}",
            )
            for d in diffs
        ]
        print_table(("output", ">max abs", ">rel L2", ">cosine", ">argmax agreement"), rows)
        click.echo(f"\n{'PASSED' if passed else 'FAILED'}: relative L2 allowed {tolerance:g}")
    return 0 if passed else 4
