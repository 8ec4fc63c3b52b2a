"""What a bundle says about itself: ``manifest.json`` and ``README.md``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparsecc
from sparsecc.ir import Model, TensorSpec
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.runtime.elf import NativeFile

__all__ = ["FORMAT", "MANIFEST", "is_bundle", "manifest", "readme"]

MANIFEST = "manifest.json"
FORMAT = "sparsecc-bundle"
_FORMAT_VERSION = 1

#: (newest opset, newest IR version, first onnxruntime that reads both); the library itself needs 1.17.
_ONNXRUNTIME = ((20, 9, "1.17"), (21, 10, "1.18"))


def manifest(
    folder: Path, triple: str, model_file: str, model: Model, native: Sequence[NativeFile]
) -> dict[str, Any]:
    """Describe a complete folder.

    Args:
        folder: the bundle; every file in it is listed with its SHA-256.
        triple: the machine it is for.
        model_file: the model's path in the bundle.
        model: the model.
        native: the library, and the runner if there is one.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "format_version": _FORMAT_VERSION,
        "sparsecc": sparsecc.__version__,
        "target": triple,
        "model": {
            "path": model_file,
            "inputs": [_spec(item) for item in model.input_specs()],
            "outputs": [_spec(item) for item in model.output_specs()],
            "opset": model.opset,
            "ir_version": model.onnx.ir_version,
            "custom_operators": _custom_operators(model),
        },
        "requires": requirements(model, native),
        "files": [_file(path, folder) for path in paths],
    }


def requirements(model: Model, native: Sequence[NativeFile]) -> dict[str, str]:
    """Oldest versions that will do: of onnxruntime (not given for newer ONNX than is known here) and of the
    symbols of the C and C++ libraries.
    """
    needs: dict[str, str] = {}
    for opset, ir_version, release in _ONNXRUNTIME:
        if model.opset <= opset and model.onnx.ir_version <= ir_version:
            needs["onnxruntime"] = release
            break
    for name in sorted({name for file in native for name in file.needs}):
        versions = [file.needs[name] for file in native if name in file.needs]
        needs[name] = max(versions, key=lambda text: tuple(map(int, text.split("."))))
    return needs


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, which a new one may replace."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def readme(document: dict[str, Any]) -> str:
    """The text of ``README.md`` for a manifest."""
    model = document["model"]
    needs = ", ".join(f"{name} {version} or later" for name, version in document["requires"].items())
    inputs = " ".join(f"--input {item['name']}={item['name']}.npy" for item in model["inputs"])
    lines = [
        f"# {Path(model['path']).name} for {document['target']}",
        "",
        f"Made by sparsecc {document['sparsecc']}. `manifest.json` lists every file with its SHA-256. Needs {needs}.",
        "",
        "Python, with numpy and onnxruntime:",
        "",
        f"    python examples/run_model.py {inputs}",
        "",
        "C++, without onnxruntime's headers; its library is loaded when the program runs:",
        "",
        "    c++ -std=c++20 -O2 examples/cpp/*.cc -o example -ldl",
        f"    ./example {model['path']} lib/libsparsecc_ops.so libonnxruntime.so X.npy Y.npy",
        "",
        'With the C++ interface of onnxruntime: `options.RegisterCustomOpsLibrary("lib/libsparsecc_ops.so")` before',
        "the session is made. Without the library the model gives the same results, at the speed of dense layers.",
        "",
    ]
    if any(item["path"] == "bin/sparsecc-run" for item in document["files"]):
        lines[4:4] = [
            "Without Python; libonnxruntime.so lies in `lib`, where the system has it, or is named by --onnxruntime:",
            "",
            f"    bin/sparsecc-run {model['path']} {inputs} --repeat 100",
            "",
        ]
    return "\n".join(lines)


def _spec(item: TensorSpec) -> dict[str, Any]:
    shape = None if item.shape is None else [-1 if dim is None else dim for dim in item.shape]
    return {"name": item.name, "dtype": item.dtype, "shape": shape}


def _custom_operators(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for graph in model.graphs():
        for node in graph:
            if node.domain == DOMAIN:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _file(path: Path, folder: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"path": path.relative_to(folder).as_posix(), "nbytes": path.stat().st_size, "sha256": digest}
