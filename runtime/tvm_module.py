"""Modules that ``sparsecc optimize --emit tvm`` made, run by TVM's Relax virtual machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import MissingExtraError, ModelError, RuntimeMissingError, UsageError

__all__ = ["TvmModule", "is_tvm_module", "shapes_for"]

_THREADS = "TVM_NUM_THREADS"

#: What was loaded: inode, time and size of each file.
_loaded: dict[Path, tuple[int, int, int]] = {}


def is_tvm_module(path: object) -> bool:
    """Whether ``path`` names a shared library, which an ONNX model never is."""
    if not isinstance(path, str | os.PathLike):
        return False
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def shapes_for(
    paths: Sequence[str], given: Mapping[str, tuple[int, ...]] | None
) -> Mapping[str, tuple[int, ...]] | None:
    """Return the shapes of inputs that the user gave, else those that the first module of TVM was compiled for.

    Raises:
        MissingExtraError, ModelError: as ``TvmModule``.
    """
    module = next((path for path in paths if is_tvm_module(path)), None)
    if given or module is None:
        return given
    return TvmModule(module).input_shapes


class TvmModule:
    """A compiled model.

    Attributes:
        name: the file, as messages call it.
        input_names: names of the inputs, in order.
        output_names: names of the outputs, in order.
        input_shapes: the shapes the module was compiled for, by name.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = 1) -> None:
        """Load a module, which runs code of that file, and pack its weights for this processor.

        Args:
            path: the file.
            threads: threads of TVM's pool, which all modules of the process share; None or 0 for TVM's choice.

        Raises:
            MissingExtraError: TVM is not installed.
            ModelError: the file is no module, not one of ``--emit tvm``, or one for another machine.
            RuntimeMissingError: it is for a device that is not here.
            UsageError: this process has loaded another file of that name before.
        """
        tvm = _load_tvm()
        self.name = str(path)
        _refuse_changed(Path(path).resolve())
        try:
            with _told(threads):
                loaded = tvm.runtime.load_module(str(Path(path).resolve()))
                signature = json.loads(str(loaded.get_function("sparsecc_signature", query_imports=True)()))
                self._device = tvm.device(signature["device"])
                if not self._device.exist:
                    raise RuntimeMissingError(
                        f"{self.name} is for {signature['device']}, of which there is none here"
                    )
                self._machine = tvm.relax.VirtualMachine(loaded, self._device)
                loaded.get_function("sparsecc_prepare", query_imports=True)()
        except RuntimeMissingError:
            raise
        except Exception as error:  # TVM raises several kinds
            raise ModelError(
                f"{self.name}: TVM cannot load it: {_one_line(error)} (made for another machine or by another "
                "release? run `sparsecc optimize --emit tvm` again)"
            ) from error
        self._tvm = tvm
        self._inputs = {item["name"]: item for item in signature["inputs"]}
        self.input_names = list(self._inputs)
        self.input_shapes = {name: tuple(item["shape"]) for name, item in self._inputs.items()}
        self.output_names: list[str] = list(signature["outputs"])

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once and return all outputs by name; entries that the model does not read are left out.

        Raises:
            UsageError: an input is missing, or its type or shape is not what the module was compiled for.
            ModelError: the module fails while it runs.
        """
        found = self._called(self._tensors(inputs))
        return dict(zip(self.output_names, (item.numpy() for item in found), strict=True))

    def bound(self, inputs: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """Return a call that runs the model on copies of ``inputs`` made once, for timing; errors as for ``run``."""
        tensors = self._tensors(inputs)
        self._called(tensors)
        main = self._machine["main"]
        return lambda: main(*tensors)

    def _tensors(self, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise UsageError(
                f"{self.name}: no array for input {', '.join(missing)}; the model reads {', '.join(self.input_names)}"
            )
        return [self._tensor(name, np.asarray(inputs[name])) for name in self.input_names]

    def _tensor(self, name: str, array: NDArray[Any]) -> Any:
        wanted = self._inputs[name]
        if list(array.shape) != wanted["shape"] or array.dtype.name != wanted["dtype"]:
            raise UsageError(
                f"{self.name}: input '{name}' is {array.dtype.name} {list(array.shape)}; the module was compiled for "
                f"{wanted['dtype']} {wanted['shape']} (--input-shape at `optimize --emit tvm` sets it)"
            )
        return self._tvm.runtime.tensor(array, self._device)

    def _called(self, tensors: list[Any]) -> list[Any]:
        try:
            result = self._machine["main"](*tensors)
        except Exception as error:  # TVM raises several kinds
            raise ModelError(f"{self.name}: fails while it runs: {_one_line(error)}") from error
        return [result] if isinstance(result, self._tvm.runtime.Tensor) else list(result)


def _refuse_changed(path: Path) -> None:
    """Libraries are known by their names: of a file that was replaced the system would give the old one again."""
    try:
        found = path.stat()
    except OSError:
        return  # loading says so
    state = (found.st_ino, found.st_mtime_ns, found.st_size)
    if _loaded.setdefault(path, state) != state:
        raise UsageError(
            f"{path} has changed since this process loaded it: load it in a new process, or rename it"
        )


@contextmanager
def _told(threads: int | None) -> Iterator[None]:
    """Have TVM's pool and our kernels use so many threads; both read the environment."""
    before = os.environ.get(_THREADS)
    if threads:
        os.environ[_THREADS] = str(threads)
        _load_tvm().get_global_func("runtime.config_threadpool")(0, threads)
    try:
        yield
    finally:
        if threads:
            os.environ.pop(_THREADS) if before is None else os.environ.update({_THREADS: before})


def _load_tvm() -> Any:
    try:
        import tvm
        import tvm.relax
    except ImportError as error:
        raise MissingExtraError("running a module of TVM needs it: pip install 'sparsecc[tvm]'") from error
    return tvm


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
