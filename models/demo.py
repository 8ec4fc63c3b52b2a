"""``make demo``: compress the trained models of this repository and print what it brought.

Runs ``sparsecc optimize`` as a user would, then measures file size, latency (interleaved with the input model in plain
onnxruntime) and the accuracy on held-out data, before and after. Everything shown is measured while it runs.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc import runtime
from sparsecc.cli.output import format_bytes, print_table

MODELS = Path(__file__).resolve().parent
OUT = MODELS.parent / "out"


@dataclass(frozen=True)
class Demo:
    """One row: a model, the folder with its ``eval.py``, and the options given to ``optimize``."""

    model: str
    task: str
    options: tuple[str, ...]


DEMOS = (
    Demo("text_lm/text_lm_sparse16x1.onnx", "text_lm", ()),
    Demo("digits_cnn/digits_cnn_sparse16x1.onnx", "digits_cnn", ()),
    Demo("text_lm/text_lm.onnx", "text_lm", ("--pattern", "2:4", "--method", "wanda")),
)


def evaluate(task: str, model: Path) -> dict[str, Any]:
    """The task's metric for a model file, run with the operator library loaded."""
    source = MODELS / task / "eval.py"
    spec = importlib.util.spec_from_file_location(f"{task}_eval", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.evaluate(runtime.load(model, threads=1))
    return result


def optimize(demo: Demo) -> tuple[Path, dict[str, Any]]:
    """Run the command line on one model; its output path and its JSON."""
    source = MODELS / demo.model
    output = OUT / f"{source.stem}.optimized.onnx"
    command = ["optimize", str(source), "-o", str(output), "--threads", "1", *demo.options]
    command += ["--calibration-data", str(MODELS / demo.task / "calibration.npz")]
    shown = " ".join(command).replace(f"{MODELS.parent}/", "")
    print(f"$ sparsecc {shown}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "sparsecc", *command, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return output, json.loads(done.stdout)


def main() -> None:
    """Run all rows and print the table."""
    OUT.mkdir(exist_ok=True)
    rows = []
    for demo in DEMOS:
        output, report = optimize(demo)
        before, after = evaluate(demo.task, MODELS / demo.model), evaluate(demo.task, output)
        latency = report["latency"]
        lowered = sum(site["layout"] != "dense" for site in report["sites"])
        rows.append(
            (
                Path(demo.model).stem,
                f"{lowered} of {len(report['sites'])}",
                f"{format_bytes(report['bytes_before'])} -> {format_bytes(report['bytes_after'])}",
                f"{latency['before_ms']:.3g} -> {latency['after_ms']:.3g} ms ({latency['speedup']:.2f}x)",
                f"{before['metric']} {before['value']:.4f} -> {after['value']:.4f}",
            )
        )
    print()
    print_table(("model", "sparse sites", "file size", "latency, 1 thread", "held-out metric"), rows)
    print("\nLatency: medians of runs interleaved with the input model in onnxruntime fp32, on this machine.")


if __name__ == "__main__":
    main()
