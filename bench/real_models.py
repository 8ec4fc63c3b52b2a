"""`optimize` with nothing asked on real models: what it finds, what it gains, and that nothing is lost.

    python bench/real_models.py --data FOLDER --json bench/results/real_models.json

FOLDER holds `models/*.onnx`, evaluation data and `eval_dense.py` with their metrics (default: SPARSECC_TEST_DATA,
else ../shared/data). Every model must come out no slower than 1.02x dense and with the same metric, or be refused
with a reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import sparsecc
from sparsecc.cli.output import format_bytes, print_table
from sparsecc.errors import SparseccError
from sparsecc.plan import machine_facts

ROOT = Path(__file__).resolve().parents[1]

#: Shapes for models whose symbolic dimensions do not say what they want.
INPUT_SHAPES = {
    "silero_vad_16k_op15": {"input": (1, 576), "state": (2, 1, 128)},
    "minilm_l6_v2": {name: (1, 128) for name in ("input_ids", "attention_mask", "token_type_ids")},
    "stories260K": {"tokens": (1, 256)},
    "charrnn_shakespeare": {"tokens": (64, 1)},
}


def load_evaluation(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_dense", data / "eval_dense.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_paths(data: Path, evaluation: ModuleType, scratch: Path) -> dict[str, Path]:
    paths = {path.stem: path for path in sorted((data / "models").glob("*.onnx"))}
    folder = data / "models" / "minilm_l6_v2"
    if folder.is_dir():
        paths[folder.name] = Path(evaluation.expand_minilm(str(folder), str(scratch)))
    return paths


def input_shapes(name: str, path: Path) -> dict[str, tuple[int, ...]] | None:
    wanted = INPUT_SHAPES.get(name)
    if wanted is None:
        return None
    specs = {spec.name: spec for spec in sparsecc.load(path).input_specs()}
    return {key: shape for key, shape in wanted.items() if key in specs}


def measure(name: str, path: Path, evaluation: ModuleType, scratch: Path, threads: int) -> dict[str, Any]:
    output = scratch / f"{name}.sparse.onnx"
    row: dict[str, Any] = {"model": name, "threads": threads}
    try:
        result = sparsecc.optimize(path, output, threads=threads, input_shapes=input_shapes(name, path))
    except SparseccError as error:
        return {**row, "refused": str(error)}
    library = sparsecc.get_library_path()
    metric = evaluation.TABLE.get(name)
    if metric is not None:
        row["metric_before"] = metric(evaluation.onnx_runner(str(path)))
        row["metric_after"] = metric(evaluation.onnx_runner(str(output), custom_ops=[library]))
        row["metric_after_without_library"] = metric(evaluation.onnx_runner(str(output)))
    return {
        **row,
        "sites": len(result.sites),
        "lowered": sum(site.layout != "dense" for site in result.sites),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "speedup": result.latency.speedup,
        "before_ms": result.latency.before_ms,
        "after_ms": result.latency.after_ms,
        "max_rel_l2": result.max_rel_l2,
    }


def headline(metric: dict[str, Any] | None) -> str:
    """The first figure of a metric."""
    if not metric:
        return "-"
    name, value = next(iter(metric.items()))
    return f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of real models and their data.")
@click.option("--threads", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--only", multiple=True, help="Names of the models to run.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(data: Path | None, threads: tuple[int, ...], only: tuple[str, ...], output: Path | None) -> None:
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "eval_dense.py").exists():
        sys.exit(f"no eval_dense.py in {data}; give the folder of real models with --data")
    evaluation = load_evaluation(data)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, path in model_paths(data, evaluation, scratch).items():
            for count in threads if not only or name in only else ():
                rows.append(measure(name, path, evaluation, scratch, count))
                click.echo(f"{name}, {count} thread(s): done", err=True)
    table = [
        (
            row["model"],
            row["threads"],
            f"{row['lowered']} of {row['sites']}",
            f"{format_bytes(row['bytes_before'])} -> {format_bytes(row['bytes_after'])}",
            f"{row['speedup']:.2f}x",
            headline(row.get("metric_before")),
            headline(row.get("metric_after")),
            f"{row['max_rel_l2']:.1e}",
        )
        for row in rows
        if "refused" not in row
    ]
    columns = ("model", ">threads", ">lowered", ">size", ">speed", ">metric before", ">after", ">rel L2")
    print_table(columns, table)
    for row in rows:
        if "refused" in row:
            click.echo(f"{row['model']}: refused: {row['refused']}")
    if output is not None:
        output.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
