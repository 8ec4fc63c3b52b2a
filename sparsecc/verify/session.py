"""Sessions of onnxruntime with the native operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from sparsecc.calib import Arrays, ModelLike, Session, open_session
from sparsecc.calib.engine import Register, model_name
from sparsecc.calib.stepwise import Stepwise
from sparsecc.errors import ModelError
from sparsecc.ir import Model
from sparsecc.ir.files import file_bytes
from sparsecc.runtime.tvm_module import TvmModule, is_tvm_module

__all__ = ["Runner", "runner", "session"]

#: Bytes of weights above which a model runs in parts: onnxruntime holds them twice.
_WHOLE = 1_500_000_000

#: Bytes of activations kept in memory between parts.
_BYTE_BUDGET = 256 << 20


class Runner(Protocol):
    """What gives the outputs of a model."""

    @property
    def name(self) -> str:
        """How messages call the model."""

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once and return the outputs by name; errors as for ``Session``."""


class _InParts:
    """Runs a model part after part, each with its own weights only."""

    def __init__(self, model: Model, threads: int | None, register: Register | None) -> None:
        self.name = model_name(model)
        self.output_names = [spec.name for spec in model.output_specs()]
        self._model = model
        self._threads = threads
        self._register = register

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        steps = Stepwise(
            self._model.copy,
            lambda: iter([dict(inputs)]),
            byte_budget=_BYTE_BUDGET,
            threads=self._threads,
            register=self._register,
        )
        (outputs,) = steps.run(self.output_names, (), ())
        return outputs


def runner(model: ModelLike, *, library: bool = False, threads: int | None = 1) -> Runner:
    """Return a session, for a model with more than 1.5 GB of weights what runs it in parts, or a module of TVM.

    Raises:
        ModelError, UnsupportedModelError, RuntimeMissingError, UsageError: as for ``session``, some of them only when
            it runs.
        MissingExtraError: the model is a module of TVM, which is not installed.
    """
    if is_tvm_module(model):
        return TvmModule(str(model), threads=threads)
    large = model.nbytes > _WHOLE if isinstance(model, Model) else _is_large_file(Path(model))
    if not large:
        return session(model, library=library, threads=threads)
    whole = model if isinstance(model, Model) else Model.load(model)
    if not library:
        return _InParts(whole, threads, None)
    from sparsecc import runtime

    return _InParts(whole, threads, runtime.register)


def _is_large_file(path: Path) -> bool:
    try:
        return file_bytes(path) > _WHOLE
    except (ModelError, OSError):
        return False  # the session says what is wrong with it


def session(
    model: ModelLike,
    *,
    library: bool = False,
    threads: int | None = 1,
    optimization: str = "all",
) -> Session:
    """Return a CPU session of a model in memory or a file.

    Args:
        model: the model or its path.
        library: register the native operators, so that they run in place of their function bodies.
        threads: threads of the session's pool; ``None`` or 0 for onnxruntime's choice (all physical cores).
        optimization: ``all``, ``extended``, ``basic`` or ``disable``.

    Raises:
        ModelError: the file is missing or is not a model onnxruntime accepts.
        UnsupportedModelError: it uses an operator, opset or IR version onnxruntime does not know.
        RuntimeMissingError: ``library`` is set and the native library is not there.
        UsageError: ``optimization`` or ``threads`` is not a valid choice.
    """
    if not library:
        return open_session(model, threads=threads, optimization=optimization)
    from sparsecc import runtime

    return open_session(model, register=runtime.register, threads=threads, optimization=optimization)
