"""``--emit tvm``: an ONNX model becomes one shared library that needs TVM's runtime and nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc.algebra.tvm_codegen import processor
from sparsecc.errors import UnsupportedModelError, UsageError, VerificationError
from sparsecc.ir import Model
from sparsecc.runtime.tvm_module import TvmModule
from sparsecc.tvm.importer import import_model, load_tvm
from sparsecc.tvm.link import INLINE_LIMIT, Toolchain, linker, toolchain
from sparsecc.tvm.prepare import Prepared, prepare
from sparsecc.tvm.record import write_record
from sparsecc.tvm.schedule import schedule
from sparsecc.tvm.standard import prepare_standard
from sparsecc.verify import compare_arrays, make_inputs, runner, worst_rel_l2

__all__ = ["Compiled", "check_target", "compile_model"]

#: Relative L2 distances that are allowed: sums in another order; bytes that are rounded the other way after that.
_FLOATS, _BYTES = 1e-4, 2e-2


@dataclass(frozen=True)
class Compiled:
    """What was written.

    Attributes:
        path: the module.
        weights: the file beside it, if its weights are too large for it.
        shapes: the shape of each input; a module runs with these only.
        kernels: nodes that run on our kernels.
        rel_l2: worst relative L2 distance of an output from that of onnxruntime, of the same module compiled for this
            machine where the target is another.
    """

    path: Path
    weights: Path | None
    shapes: dict[str, tuple[int, ...]]
    kernels: int
    rel_l2: float


def compile_model(
    model: Model,
    output: str | os.PathLike[str],
    *,
    target: str = "cpu",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    inline_limit: int = INLINE_LIMIT,
    seed: int = 0,
) -> Compiled:
    """Compile a model, which stays as it was, and compare the outputs; the file is either complete or not there.

    Args:
        model: as ``optimize`` wrote it, or any other.
        output: file to write, ``.so``.
        target: ``cpu``, this kind of machine, ``arm64``, 64-bit ARM with Linux, or ``cuda``, where standard operators
            stand for ours and zeros gain nothing.
        input_shapes: of inputs with symbolic dimensions; see ``calib.resolve_shapes`` for what is taken else.
        inline_limit: bytes of weights above which they go to ``<output>.weights``.
        seed: of the inputs on which it is compared with onnxruntime.

    Raises:
        MissingExtraError: TVM is not installed.
        RuntimeMissingError: no compiler or static library for the target.
        UnsupportedModelError: TVM's importer lacks operators of the model, or a shape is not known in advance.
        UsageError: the target is another one, shapes do not fit, or the file cannot be written.
    """
    path = Path(output)
    tools = check_target(target, path)
    prepared = (prepare_standard if target == "cuda" else prepare)(model, input_shapes)
    module = import_model(prepared)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sparsecc") as folder:
            record = _record(prepared, _device(target), Path(folder) / "record")
            beside = f"{path.name}.weights" if record.stat().st_size > inline_limit else ""
            made = here = _export(module, tools, record, beside, Path(folder) / "module.so")
            if target != "cpu":
                own = record if _device(target) == "cpu" else _record(prepared, "cpu", Path(folder) / "own")
                here = _export(module, check_target("cpu", path), own, beside, Path(folder) / "here.so")
            if beside:
                record = record.rename(Path(folder) / beside)
            distance = _distance(model, here, prepared, seed)
            weights = record.replace(path.parent / beside) if beside else None
            made.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return Compiled(path, weights, prepared.shapes, len(prepared.kernels), distance)


def check_target(target: str, output: Path) -> Toolchain:
    """Return the tools for a target; errors as for ``compile_model``, before anything slow."""
    load_tvm()
    if output.suffix != ".so":
        raise UsageError(
            f"--emit tvm writes a shared library: give -o a name that ends in .so, not {output.name}"
        )
    return toolchain(target, processor())


def _export(module: Any, tools: Toolchain, record: Path, beside: str, path: Path) -> Path:
    built = _built(module, tools.target)
    built.export_library(str(path), fcompile=linker(tools, record, beside))
    return path


def _distance(model: Model, path: Path, prepared: Prepared, seed: int) -> float:
    """The worst relative L2 distance of an output from that of onnxruntime."""
    inputs = make_inputs(model, None, seed, prepared.shapes)
    wanted, found = runner(model, library=True).run(inputs), TvmModule(path).run(inputs)
    distance = worst_rel_l2([compare_arrays(name, wanted[name], found[name]) for name in wanted])
    in_bytes = any("Int8" in item.record.op or "Quads" in item.record.op for item in prepared.kernels)
    allowed = _BYTES if in_bytes else _FLOATS
    if not distance <= allowed:
        raise VerificationError(
            f"the module's outputs differ from the model's: relative L2 {distance:.1e}, allowed {allowed:g}: leave out "
            "--emit tvm and report the model"
        )
    return distance


def _device(target: str) -> str:
    return "cuda" if target == "cuda" else "cpu"


def _record(prepared: Prepared, device: str, path: Path) -> Path:
    """Write the record of a module: its signature and the nodes that run on our kernels."""
    inputs = [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(prepared.shapes[spec.name])}
        for spec in prepared.model.input_specs()
    ]
    outputs = [spec.name for spec in prepared.model.output_specs()]
    signature = {"device": device, "inputs": inputs, "outputs": outputs}
    with path.open("wb") as file:
        write_record(
            json.dumps(signature, ensure_ascii=False), [item.record for item in prepared.kernels], file
        )
    return path


def _built(module: Any, target: Mapping[str, Any]) -> Any:
    """An executable of TVM's, not linked yet."""
    tvm = load_tvm()
    wanted = tvm.target.Target(dict(target))
    try:
        return tvm.compile(module, target=wanted, relax_pipeline=schedule(wanted))
    except Exception as error:  # TVM raises several kinds
        text = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"TVM cannot compile the model: {text}") from error
