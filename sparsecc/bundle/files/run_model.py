"""Run the model of this bundle: needs numpy and onnxruntime, nothing of sparsecc.

Without --input the inputs are ones, dimensions of any size 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BUNDLE = Path(__file__).resolve().parents[1]


def open_session(threads: int = 0) -> onnxruntime.InferenceSession:
    """Open the model with the operator library; ``threads`` 0 is onnxruntime's choice."""
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("sparsecc.threads", str(threads))
    options.register_custom_ops_library(str(BUNDLE / "lib" / "libsparsecc_ops.so"))
    model = str(BUNDLE / manifest["model"]["path"])
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ones(item: Any) -> np.ndarray[Any, Any]:
    """An input of ones that fits what the model declares."""
    types = {"tensor(float)": "float32", "tensor(double)": "float64"}
    name = types.get(item.type, item.type.removeprefix("tensor(").removesuffix(")"))
    return np.ones([dim if isinstance(dim, int) else 1 for dim in item.shape], np.dtype(name))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--output", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    session = open_session(options.threads)
    files = dict(text.split("=", 1) for text in options.input)
    inputs = {
        item.name: np.load(files[item.name]) if item.name in files else ones(item)
        for item in session.get_inputs()
    }
    names = [item.name for item in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    for name, array in outputs.items():
        print(f"{name}: {array.dtype} {array.shape}")
    for text in options.output:
        name, file = text.split("=", 1)
        np.save(file, outputs[name])


if __name__ == "__main__":
    main()
