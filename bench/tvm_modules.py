#!/usr/bin/env python3
"""Modules of TVM (`--emit tvm`) against the ONNX file they are made from, and against TVM's own lowering.

    python bench/tvm_modules.py minilm_l6 mobilenet_v2 resnet50 llama_block --json bench/results/tvm_modules.json

Models of ``models/zoo.py`` at real size with random weights, pruned at random to 16x1, go through `optimize` and to a
module; the two take turns in one process on one thread, CPU time of the calling thread. TVM's own lowering is that of
`tvm.compile` with default passes, for one BERT-base layer of 16 tokens without zeros, with the same instruction sets.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from sparsecc import verify
from sparsecc.algebra.tvm_codegen import processor
from sparsecc.api import optimize
from sparsecc.cli.output import print_table
from sparsecc.ir import Model
from sparsecc.plan import machine_facts
from sparsecc.runtime.tvm_module import TvmModule
from sparsecc.tvm import compile_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

import zoo  # noqa: E402

LAYER = {"layers": 1, "vocabulary": 1000}
TOKENS = 16


def against_onnx(name: str, sparsity: float, folder: Path, seconds: float) -> dict[str, Any]:
    """Times of a model as ONNX file and as module, in ms, and the ratio of the latter to the former."""
    dense, small, module = (folder / f"{name}{suffix}" for suffix in (".onnx", ".sparse.onnx", ".so"))
    Model.from_proto(zoo.build(name, pattern="16x1", sparsity=sparsity)).save(dense)
    optimize(dense, small, threads=1)
    model = Model.load(small)
    start = time.perf_counter()
    made = compile_model(model, module)
    compiled = time.perf_counter() - start
    inputs = verify.make_inputs(model, None, 0, made.shapes)
    result = verify.benchmark([small, module, dense], inputs, threads=1, max_seconds=seconds)
    onnx, tvm, before = (timing.median_ms for timing in result.models)
    return {
        "model": name,
        "sparsity": sparsity,
        "dense_onnxruntime_ms": before,
        "onnx_ms": onnx,
        "module_ms": tvm,
        "module_time_over_onnx": 1 / result.ratio_to_first[1],
        "kernels": made.kernels,
        "rel_l2": made.rel_l2,
        "compile_seconds": compiled,
        "rounds": result.rounds,
    }


def against_default(folder: Path, seconds: float) -> dict[str, Any]:
    """Times of a BERT-base layer as module of ours and by TVM's default passes, in ms, taking turns."""
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    model = Model.from_proto(zoo.build("bert_base", seq=TOKENS, **LAYER))
    made = compile_model(model, folder / "layer.so")
    inputs = verify.make_inputs(model, None, 0, made.shapes)
    built = tvm.compile(from_onnx(model.to_proto()), target=tvm.target.Target(processor()))
    machine = tvm.relax.VirtualMachine(built, tvm.cpu())
    module = TvmModule(made.path)
    tensors = [tvm.runtime.tensor(inputs[name]) for name in module.input_names]
    found = machine["main"](*tensors)
    found = found if isinstance(found, tvm.runtime.Tensor) else found[0]
    np.testing.assert_allclose(
        found.numpy(), module.run(inputs)[module.output_names[0]], rtol=1e-3, atol=1e-4
    )
    (ours, default), _ = verify.time_interleaved(
        [module.bound(inputs), lambda: machine["main"](*tensors)], clock="cpu", rounds=7, max_seconds=seconds
    )
    return {
        "model": f"bert_base, one layer, {TOKENS} tokens, dense",
        "module_ms": statistics.median(ours) * 1e3,
        "default_ms": statistics.median(default) * 1e3,
        "times_as_fast": statistics.median(d / o for o, d in zip(ours, default, strict=True)),
    }


@click.command()
@click.argument("models", nargs=-1)
@click.option("--sparsity", default=0.8, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Measuring time of a model.")
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(models: tuple[str, ...], sparsity: float, seconds: float, path: Path | None) -> None:
    """Measure MODELS of the zoo, and one layer against TVM's default."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [against_onnx(model, sparsity, folder, seconds) for model in models]
        default = against_default(folder, seconds)
    print_table(
        ("model", ">dense ms", ">ONNX ms", ">module ms", ">module / ONNX", ">rel L2"),
        [
            (
                row["model"], *(f"{row[key]:.2f}" for key in ("dense_onnxruntime_ms", "onnx_ms", "module_ms")),
                f"{row['module_time_over_onnx']:.3f}", f"{row['rel_l2']:.1e}",
            )
            for row in rows
        ],
    )  # fmt: skip
    print(
        f"{default['model']}: {default['module_ms']:.2f} ms, TVM's default passes {default['default_ms']:.1f} ms "
        f"({default['times_as_fast']:.0f} times as fast), one thread"
    )
    if path is not None:
        document = {"machine": machine_facts(), "threads": 1, "models": rows, "default": default}
        path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
