"""Modules of TVM for ARM: cross-compiled here, run by TVM's aarch64 runtime on the emulated machine."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import machine
import numpy as np

from sparsecc import verify
from sparsecc.ir import Model
from sparsecc.tvm import compile_model

__all__ = ["run_modules"]

TOLERANCE = "1e-5"
OURS = ("digits_cnn", "text_lm")
REAL = ("resnet20_cifar10", "charrnn_shakespeare", "mobilenet_v1_0.25_128")


def run_modules(folder: Path, library: Path) -> bool:
    """Compile models for ARM and compare what they give there with onnxruntime here; return whether all agreed."""
    try:
        wheels = machine.more_wheels("apache-tvm", importlib.metadata.version("apache-tvm"))
    except importlib.metadata.PackageNotFoundError:
        print("modules skipped: TVM is not installed here: pip install 'sparsecc[tvm]'")
        return True
    except machine.MissingError as error:
        print(f"modules skipped: no TVM for that machine: {error}")
        return True
    arguments: list[str | Path] = []
    for path in _models():
        model, module = Model.load(path), folder / f"{path.stem}.so"
        made = compile_model(model, module, target="arm64")
        inputs = verify.make_inputs(model, None, 0, made.shapes)
        outputs = verify.session(model).run(inputs)
        arrays = {f"in {name}": array for name, array in inputs.items()}
        np.savez(module.with_suffix(".npz"), **arrays, **{f"out {name}": y for name, y in outputs.items()})
        arguments += [module, module.with_suffix(".npz")]
    path = os.pathsep.join(str(part) for part in (machine.ROOT, machine.WORK / "site", wheels))
    script = machine.ROOT / "tests" / "arm64" / "run_module.py"
    process = machine.python([script, TOLERANCE, *arguments], cpu="max", library=library, PYTHONPATH=path)
    text, _ = process.communicate()
    print(text.strip(), flush=True)
    return process.returncode == 0


def _models() -> list[Path]:
    data = Path(os.environ.get("SPARSECC_TEST_DATA", machine.ROOT.parent / "shared" / "data")) / "models"
    found = [machine.ROOT / "models" / name / f"{name}_sparse16x1.onnx" for name in OURS]
    return [*found, *(path for name in REAL if (path := data / f"{name}.onnx").exists())]
