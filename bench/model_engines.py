"""Whole models as other engines run them: what `models` compares with. See `peers` for the engines themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from peers import PEERS, in_child, one_line, openvino_compile, openvino_lacks

from sparsecc import verify

Inputs = Mapping[str, NDArray[Any]]
DEEPSPARSE = next(peer for peer in PEERS if peer.name == "deepsparse sparse")


@dataclass(frozen=True)
class Engine:
    """One way to run a model: ``call`` runs it once, ``result`` returns its first output of the last run."""

    name: str
    call: Callable[[], object]
    result: Callable[[], NDArray[Any]]
    size: int
    spins: bool = False


def onnxruntime_engine(name: str, path: Path, inputs: Inputs, threads: int) -> Engine:
    """Return a session with bound inputs and outputs; the operator library is there if the file needs it."""
    session = verify.session(path, library=name.startswith("sparsecc"), threads=threads)
    binding = session.raw.io_binding()
    for key, array in session.feeds(dict(inputs)).items():
        binding.bind_cpu_input(key, array)
    for output in session.output_names:
        binding.bind_output(output)
    return Engine(
        name,
        lambda: session.raw.run_with_iobinding(binding),
        lambda: np.asarray(binding.get_outputs()[0].numpy()),
        path.stat().st_size,
    )


def openvino_engine(name: str, path: Path, inputs: Inputs, threads: int) -> Engine:
    """Return an OpenVINO request with its inputs set; the precision is the end of ``name``."""
    import openvino

    compiled = openvino_compile(path, "bf16" if name.endswith("bf16") else "f32", threads)
    request = compiled.create_infer_request()
    for key, array in inputs.items():
        request.set_tensor(key, openvino.Tensor(np.ascontiguousarray(array)))
    return Engine(
        name,
        request.infer,
        lambda: np.array(request.get_output_tensor(0).data),
        path.stat().st_size,
        spins=True,
    )


def deepsparse_engine(name: str, path: Path, inputs: Inputs, threads: int) -> Engine:
    """Return DeepSparse on a file, whose zeros it uses."""
    from deepsparse import compile_model

    batch = next(iter(inputs.values())).shape[0]
    engine = compile_model(str(path), batch_size=batch, num_cores=threads)
    arrays = [np.ascontiguousarray(inputs[key]) for key in engine.input_names]
    kept: list[NDArray[Any]] = []

    def call() -> None:
        kept[:] = engine.run(arrays)

    return Engine(name, call, lambda: kept[0], path.stat().st_size, spins=True)


class _Once(CalibrationDataReader):
    def __init__(self, inputs: Inputs) -> None:
        self._left = [dict(inputs)]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None


def quantised_files(path: Path, inputs: Inputs, folder: Path) -> dict[str, Path]:
    """Write what onnxruntime's own tool makes of a model, weights per channel.

    Returns:
        ``static`` has QuantizeLinear/DequantizeLinear with ranges from ``inputs``; ``dynamic`` is there for models
        without convolutions and quantises while running.
    """
    logging.disable(logging.WARNING)  # it recommends a preparation that changes nothing here
    try:
        convolutional = any(node.op_type == "Conv" for node in onnx.load(path).graph.node)
        files = {"static": folder / "static.onnx"}
        quantize_static(
            path,
            files["static"],
            _Once(inputs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if convolutional else ["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        if not convolutional:
            files["dynamic"] = folder / "dynamic.onnx"
            quantize_dynamic(path, files["dynamic"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return files


def peer_engines(
    path: Path, inputs: Inputs, files: Mapping[str, Path], threads: int
) -> tuple[list[Engine], dict[str, str]]:
    """Return the engines of others for a model, and why one is missing."""
    engines: list[Engine] = []
    missing: dict[str, str] = {}

    def add(make: Callable[[str, Path, Inputs, int], Engine], name: str, file: Path) -> None:
        try:
            engines.append(make(name, file, inputs, threads))
            engines[-1].call()
        except Exception as error:  # engines of others raise anything
            missing[name] = one_line(error)

    if in_child() is None:
        for form, file in files.items():
            add(onnxruntime_engine, f"onnxruntime int8 {form}", file)
    for precision, file in (("fp32", path), ("bf16", path), ("int8", files["static"])):
        name = f"openvino {precision}"
        try:
            lack = openvino_lacks(precision.upper())()
        except ImportError as error:
            lack = one_line(error)
        if lack is None:
            add(openvino_engine, name, file)
        else:
            missing[name] = lack
    if in_child() is None:
        lack = DEEPSPARSE.missing()
        if lack is None:
            add(deepsparse_engine, DEEPSPARSE.name, path)
        else:
            missing[DEEPSPARSE.name] = lack
    return engines, missing


def relative_error(engine: Engine, reference: NDArray[Any]) -> float:
    """Run an engine and return the distance of its first output from the reference, relative to its length."""
    engine.call()
    found = np.asarray(engine.result(), np.float64)
    return float(np.linalg.norm(found - reference) / (np.linalg.norm(reference) or 1.0))
