"""Sessions of onnxruntime whose failures are one-line errors of sparsecc."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SparseccError, UnsupportedModelError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.mapped import array_of, is_mapped

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Arrays", "ModelLike", "Register", "Session", "model_name", "open_session", "run_error"]

#: A model in memory, or the path of a file.
ModelLike = Model | str | Path

#: Arrays by tensor name.
Arrays = Mapping[str, NDArray[Any]]

#: Adds operator libraries to the options of a session.
Register = Callable[["onnxruntime.SessionOptions"], None]

#: Above this many bytes of weights a model in memory no longer fits one protobuf message (limit 2 GiB).
_INLINE_LIMIT = 1_000_000_000

#: A weight in a file of this size is handed over as an array, too: a message would be a copy in memory.
_MAPPED_TENSOR = 1 << 20

#: Weights smaller than this stay in the protobuf: onnxruntime reads shapes and axes there.
_INLINE_TENSOR = 4096

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disable": "ORT_DISABLE_ALL",
}

#: What onnxruntime says, and what the user should read. First match wins; group 1 goes into the message.
_UNSUPPORTED = (
    (r"Error No Op registered for (\S+)", "operator {0} is unknown to onnxruntime at the model's opset"),
    (
        r"Fatal error: (\S+?)\(-?\d+\) is not a registered function/op",
        "operator {0} is unknown to onnxruntime",
    ),
    (r"Could not find an implementation for (\S+)", "onnxruntime has no CPU kernel for {0}"),
    (r"Unsupported model IR version: (\d+)", "ONNX IR version {0} is too new for the installed onnxruntime"),
    (r"Opset (\d+) is under development", "opset {0} is too new for the installed onnxruntime"),
    (r"No opset import for domain '?([^']*?)'?(?:[\s.]|$)", "no opset version is imported for domain '{0}'"),
)


class Session:
    """An onnxruntime session on the CPU.

    Attributes:
        name: what errors call the model.
        raw: the ``onnxruntime.InferenceSession``.
        input_names: names of the inputs, in order.
        output_names: names of the outputs, in order.
    """

    def __init__(
        self, raw: onnxruntime.InferenceSession, name: str, weights: Sequence[onnxruntime.OrtValue] = ()
    ) -> None:
        self.raw = raw
        self.name = name
        self._weights = weights  # onnxruntime reads the arrays it was given and does not keep them alive
        self.input_names = [item.name for item in raw.get_inputs()]
        self.output_names = [item.name for item in raw.get_outputs()]

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run once and return the named outputs, or all of them.

        Arrays whose names the model does not read are left out, so that two models can be fed the same
        inputs.

        Raises:
            UsageError: an input is missing, or its type or shape does not fit.
            ModelError: the model fails while it runs.
        """
        names = self.output_names if outputs is None else list(outputs)
        try:
            values = self.raw.run(names, self.feeds(inputs))
        except Exception as error:
            raise run_error(error, self.name) from error
        return dict(zip(names, values, strict=True))

    def feeds(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The entries of ``inputs`` that the model reads.

        Raises:
            UsageError: one is missing.
        """
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise UsageError(
                f"{self.name}: no array for input {', '.join(missing)}; "
                f"the model reads {', '.join(self.input_names)}"
            )
        # Not np.ascontiguousarray, which makes a vector of a scalar.
        return {name: np.asarray(inputs[name], order="C") for name in self.input_names}


def open_session(
    model: ModelLike,
    *,
    register: Register | None = None,
    threads: int | None = 1,
    optimization: str = "all",
) -> Session:
    """Return a CPU session of a model in memory or a file.

    Weights of a model in memory that together exceed what one protobuf message can hold, or that lie in files, are
    handed to onnxruntime as arrays, so that nothing is written to disk or copied.

    Args:
        model: the model or its path.
        register: adds operator libraries to the options of the session; without it, only operators that
            onnxruntime knows and functions inside the model run.
        threads: threads of the session's pool; ``None`` or 0 for onnxruntime's choice (all physical cores).
        optimization: ``all``, ``extended``, ``basic`` or ``disable``.

    Raises:
        ModelError: the file is missing or is not a model onnxruntime accepts.
        UnsupportedModelError: it uses an operator, opset or IR version onnxruntime does not know.
        UsageError: ``optimization`` or ``threads`` is not a valid choice.
    """
    import onnxruntime

    options = _options(threads, optimization)
    if register is not None:
        register(options)
    name = model_name(model)
    source, weights = _source(model, options)
    try:
        raw = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise load_error(error, name) from error
    return Session(raw, name, weights)


def model_name(model: ModelLike) -> str:
    """How messages call ``model``: the name of its file, or ``the model``."""
    path = model.path if isinstance(model, Model) else Path(model)
    return path.name if path is not None else "the model"


def _options(threads: int | None, optimization: str) -> onnxruntime.SessionOptions:
    import onnxruntime

    if optimization not in _LEVELS:
        raise UsageError(f"optimization level '{optimization}' is unknown; choose {', '.join(_LEVELS)}")
    if threads is not None and threads < 0:
        raise UsageError(f"threads must be 0 (all cores) or more, got {threads}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimization])
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # the exception says it all; onnxruntime would print it to stderr as well
    # Idle pools of other sessions in this process must not burn the cores that the running one needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _source(
    model: ModelLike, options: onnxruntime.SessionOptions
) -> tuple[str | bytes, list[onnxruntime.OrtValue]]:
    """What onnxruntime loads: a path, or the bytes of a model in memory; and the weights handed over beside it."""
    if not isinstance(model, Model):
        return str(model), []
    weights = [value.const_value for value in model.onnx.graph.initializers.values()]
    held = [tensor for tensor in weights if tensor is not None]
    if sum(tensor.nbytes for tensor in held) <= _INLINE_LIMIT and not any(map(_is_large_file, held)):
        return bytes(model.to_proto().SerializeToString()), []
    return _detached_bytes(model, options)


def _is_large_file(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether copies of a weight, which lies in a file, are worth avoiding."""
    array = array_of(tensor)
    return array is not None and array.nbytes >= _MAPPED_TENSOR and is_mapped(array)


def _detached_bytes(
    model: Model, options: onnxruntime.SessionOptions
) -> tuple[bytes, list[onnxruntime.OrtValue]]:
    """Bytes of ``model`` without its large weights, which ``options`` hands to onnxruntime, and these."""
    import onnxruntime

    copy = model.copy()
    names, values = [], []
    for name, value in copy.onnx.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_TENSOR:
            continue
        names.append(name)
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(tensor.numpy(), order="C")))
        value.const_value = onnx_ir.ExternalTensor(
            "in-memory",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir="",
        )
    options.add_external_initializers(names, values)
    return bytes(onnx_ir.to_proto(copy.onnx).SerializeToString()), values


def load_error(error: Exception, name: str) -> Exception:
    """The error of sparsecc for what onnxruntime raised while it loaded the model called ``name``."""
    if isinstance(error, SparseccError | MemoryError):
        return error
    text = str(error)
    for pattern, message in _UNSUPPORTED:
        found = re.search(pattern, text)
        if found:
            return UnsupportedModelError(
                f"{name}: {message.format(found.group(1).rstrip('.,'))}; "
                "load the library that defines it or export the model for an older opset"
            )
    kind = type(error).__name__
    if kind == "NoSuchFile":
        return ModelError(f"{name}: no such file; check the path")
    if kind == "InvalidProtobuf" or "No graph was found" in text:
        return ModelError(f"{name}: not an ONNX model (damaged or another format); export it again")
    return ModelError(f"{name}: onnxruntime refuses the model: {_brief(text)}")


def run_error(error: Exception, name: str) -> Exception:
    """The error of sparsecc for what onnxruntime raised while it ran the model called ``name``."""
    if isinstance(error, SparseccError | MemoryError):
        return error
    text = _brief(str(error))
    if type(error).__name__ == "InvalidArgument":
        return UsageError(f"{name}: the inputs do not fit the model: {text}")
    return ModelError(f"{name}: fails while running on these inputs: {text}")


def _brief(text: str, limit: int = 300) -> str:
    """One line of a message without status prefix and source location, cut at ``limit`` characters."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+\.(?:cc|h|cpp):\d+ .*?\) ", "", text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
