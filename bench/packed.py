"""Packed weights: bytes of the file against the task's metric, and what a session pays to unpack them.

    python bench/packed.py --data FOLDER

One row per file: bytes of all files of the model, its metric, and in a process of its own processor seconds to start a
session, memory right after it and at its peak. Beside them the dense model, its weights as float16 with a Cast behind
each, and as int8 (pass ``quantize``). ``bitstack`` is fitted once; the smaller sizes are taken from that file as
``sparsecc resize`` does. Layers are packed alike, whether or not a layer gains. Calibration samples are never measured
on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir
from accuracy import save
from accuracy_tasks import ROOT, Task
from factorisation import tasks

from sparsecc import emit, ir, verify
from sparsecc.calib import Calibration
from sparsecc.ir.files import file_bytes
from sparsecc.pm import PassContext, Pipeline

OUTPUT = ROOT / "bench" / "results" / "packed.json"

#: Pipelines by name; OPTIONS takes small layers where a model has no others.
VARIANTS = {
    "dense": "",
    "float16": "",
    "int8": "tidy,quantize",
    "seedlm 4": "tidy,factor-seedlm{OPTIONS}",
    "seedlm 3": "tidy,factor-seedlm{OPTIONS bits=3}",
    "slab 8": "tidy,factor-slab{OPTIONS param-ratio=0.25}",
    "slab 5": "tidy,factor-slab{OPTIONS param-ratio=0.16}",
    "bitstack": "tidy,factor-bitstack{OPTIONS planes=8 param-ratio=0.35}",
}

#: Planes per site, on the average, of the models taken from the stack.
DEPTHS = (2, 3, 4, 5, 6)

#: What a session costs, measured where nothing else has run.
START = """
import json, sys, time
import onnxruntime

def memory(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) / 1024

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
before, started = memory("VmRSS"), time.process_time()
session = onnxruntime.InferenceSession(sys.argv[1], options)
print(json.dumps({"start_cpu_seconds": round(time.process_time() - started, 2),
                  "memory_mb": round(memory("VmRSS") - before), "peak_mb": round(memory("VmHWM") - before)}))
"""


def in_half(model: ir.Model) -> None:
    """Store the weights of all sites as float16 with a Cast behind each."""
    for site in model.sites():
        weight, graph = site.weight, site.node.graph
        if (
            weight.producer() is not None
            or weight.const_value is None
            or not isinstance(graph, onnx_ir.Graph)
        ):
            continue
        half = weight.const_value.numpy().astype(np.float16)
        node = onnx_ir.Node("", "Cast", [], [onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT.value)])
        node.outputs[0].name = f"{weight.name}.float"
        onnx_ir.convenience.replace_all_uses_with(weight, node.outputs[0])
        node.resize_inputs(1)
        node.replace_input_with(0, weight)
        graph.insert_before(graph[0], node)
        weight.const_value = onnx_ir.Tensor(half, name=weight.name)
        weight.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)


def judged(model: ir.Model, task: Task, path: Path) -> dict[str, Any]:
    """Write and measure."""
    emit.finalize(model)
    model.save(path)
    loaded = verify.session(path, threads=1)
    value, count = task.measure(lambda feed: list(loaded.run(feed).values()))
    started = subprocess.run(
        [sys.executable, "-c", START, str(path)], check=True, capture_output=True, text=True
    )
    return {
        "bytes": file_bytes(path),
        "value": round(value, 5),
        "samples": count,
        **json.loads(started.stdout),
    }


def rows(name: str, variant: str, task: Task, folder: Path) -> dict[str, Any]:
    """What one variant gives: a row, or for the stack one for each size."""
    model = ir.Model.load(task.path)
    small = " min-elements=1024" if name == "stories260K" else ""
    pipeline = VARIANTS[variant].replace("OPTIONS", f"keep-slower=true{small}")
    row: dict[str, Any] = {"pipeline": pipeline}
    if pipeline:
        started = time.process_time()
        calibration = Calibration.from_batches(task.calibration, model, threads=1)
        report = Pipeline.parse(pipeline).run(model, PassContext(calibration=calibration, threads=1))[-1]
        errors = [
            change.numbers["output_error"] for change in report.changed if "output_error" in change.numbers
        ]
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        row |= {"output_error": round(float(np.mean(errors)), 5)} if errors else {}
    if variant == "float16":
        in_half(model)
    path = folder / "model.onnx"
    planes = ir.Planes.of(model)
    if planes is None:
        return {variant: {**row, **judged(model, task, path)}}
    found = {}
    for depth in (*DEPTHS, len(planes.order) / len(planes.sites)):
        count = min(round(depth * len(planes.sites)), len(planes.order))
        found[f"{variant}, {depth:g} planes"] = {**row, **judged(planes.first(model, count), task, path)}
        row.pop("output_error", None)  # of all planes
    return found


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))  # fmt: skip
@click.option("--only", multiple=True, help="Measure only this model; may be repeated.")
@click.option("--variant", "variants", multiple=True, help="Measure only this variant; may be repeated.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT)
def main(data: Path, only: tuple[str, ...], variants: tuple[str, ...], output: Path) -> None:
    """Measure and write what there is."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, task in tasks(data, folder).items():
            for variant in VARIANTS:
                if (only and name not in only) or (variants and variant not in variants):
                    continue
                found = rows(name, variant, task, folder)
                click.echo(f"{name}: {found}", err=True)
                results = dict(json.loads(output.read_text())["models"]) if output.exists() else {}
                held = results.setdefault(name, {"metric": task.metric, "variants": {}})
                held["variants"].update(found)
                save(output, results, "python bench/packed.py", 1)


if __name__ == "__main__":
    main()
