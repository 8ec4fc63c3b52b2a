"""Patterns of really pruned networks (DLMC, .smtx): one linear layer each, sparse against dense onnxruntime.

    python bench/dlmc.py --data FOLDER --json bench/results/dlmc.json

FOLDER holds `matrices/dlmc/**/*.smtx` (default: SPARSECC_TEST_DATA, else ../shared/data). Values are random; the
pattern is what was trained.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparsecc
from sparsecc.cli.output import print_table
from sparsecc.plan import machine_facts

ROOT = Path(__file__).resolve().parents[1]


def read_smtx(path: Path) -> npt.NDArray[np.bool_]:
    """The pattern as a mask [rows, columns]; the file is "rows, cols, nnz", row offsets, column indices."""
    head, offsets, columns = path.read_text().splitlines()[:3]
    rows, width, _ = (int(part) for part in head.split(","))
    starts = np.array(offsets.split(), np.int64)
    mask = np.zeros((rows, width), bool)
    mask[np.repeat(np.arange(rows), np.diff(starts)), np.array(columns.split(), np.int64)] = True
    return mask


def linear_model(mask: npt.NDArray[np.bool_], seed: int) -> onnx.ModelProto:
    """A MatMul by W^T, with W [N, K] random where the mask is set."""
    outputs, inputs = mask.shape
    weight = np.random.default_rng(seed).standard_normal(mask.shape, dtype=np.float32) * mask
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(path: Path, root: Path, rows: int, threads: int, scratch: Path) -> dict[str, Any]:
    mask = read_smtx(path)
    source = scratch / f"{path.stem}.onnx"
    onnx.save(linear_model(mask, 0), source)
    shapes = {"x": (rows, mask.shape[1])}
    result = sparsecc.optimize(source, scratch / "out.onnx", threads=threads, input_shapes=shapes)
    return {
        "pattern": str(path.relative_to(root).with_suffix("")),
        "shape": list(mask.shape),
        "sparsity": round(1 - float(mask.mean()), 4),
        "rows": rows,
        "threads": threads,
        "layout": result.sites[0].layout,
        "speedup": result.latency.speedup,
        "bytes_ratio": result.bytes_after / result.bytes_before,
    }


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with matrices/dlmc.")
@click.option("--rows", type=int, multiple=True, default=(1, 128), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(data: Path | None, rows: tuple[int, ...], threads: int, output: Path | None) -> None:
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    root = data / "matrices" / "dlmc"
    paths = sorted(root.rglob("*.smtx"))
    if not paths:
        sys.exit(f"no .smtx file under {data}/matrices/dlmc; give the folder with --data")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            results += [measure(path, root, count, threads, Path(folder)) for count in rows]
    print_table(
        ("pattern", "NxK", ">sparsity", ">rows", "layout", ">speed", ">size"),
        [
            (
                r["pattern"],
                "x".join(map(str, r["shape"])),
                f"{r['sparsity']:.3f}",
                r["rows"],
                r["layout"],
                f"{r['speedup']:.2f}x",
                f"{r['bytes_ratio']:.0%}",
            )
            for r in results
        ],
    )
    if output is not None:
        output.write_text(json.dumps({"machine": machine_facts(), "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
