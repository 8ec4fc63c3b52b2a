"""Find the operator library and register it with onnxruntime sessions.

Environment variables: ``SPARSECC_OPS_LIBRARY`` is the library to use; and, read by the library itself when it
is first used, ``SPARSECC_ISA`` (one of ``isas()``) forces a lower instruction set and ``SPARSECC_THREADS`` says
for how many threads the work of one operator is cut, whatever the session says.
"""

from __future__ import annotations

import importlib.resources
import os
import platform
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecc.errors import ModelError, RuntimeMissingError, UsageError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["get_library_path", "get_runner_path", "get_static_library", "load", "register", "triple_of"]

LIBRARY_VARIABLE = "SPARSECC_OPS_LIBRARY"
_TARGETS = ("cpu", "arm64", "cuda")
_LIBRARY = "lib/libsparsecc_ops.so"
_RUNNER = "bin/sparsecc-run"
_STATIC_LIBRARY = "lib/libsparsecc_tvm.a"
_MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
_ARM64 = "aarch64-linux"
_OLDEST_ONNXRUNTIME = (1, 17)
_THREADS = "sparsecc.threads"

# onnxruntime takes a second registration without a word and then refuses to make the session.
_registered: weakref.WeakSet[onnxruntime.SessionOptions] = weakref.WeakSet()


def get_library_path(target: str = "cpu", path: str | os.PathLike[str] | None = None) -> str:
    """Return the absolute path of the operator library.

    Looked for in this order: ``path``, the environment variable ``SPARSECC_OPS_LIBRARY``, the installed
    package, the checkout. The first two are binding: a file that is not there is an error, never a reason
    to look further.

    Args:
        target: ``cpu`` for this machine, or ``arm64``, which on another machine is the library that was
            cross-compiled in the checkout. The environment variable stands for the one of ``cpu`` only.
        path: an explicit library file.

    Raises:
        RuntimeMissingError: no library there; the message says how to get one.
        UsageError: an unknown target.
    """
    triple = triple_of(target)
    variable = os.environ.get(LIBRARY_VARIABLE) if triple == triple_of("cpu") else None
    for origin, given in (("path", path), (LIBRARY_VARIABLE, variable)):
        if given:
            return _existing(Path(given), origin)
    return _built(_LIBRARY, "operator library", triple)


def get_runner_path(target: str = "cpu") -> str:
    """Return the absolute path of ``sparsecc-run`` for a target; errors as ``get_library_path``."""
    return _built(_RUNNER, "runner", triple_of(target))


def get_static_library(target: str = "cpu") -> str:
    """Return the absolute path of the archive of kernels that modules of TVM are linked with.

    Errors as ``get_library_path``.
    """
    return _built(_STATIC_LIBRARY, "static library of kernels", triple_of(target))


def triple_of(target: str) -> str:
    """The machine that native code for a target is for, such as ``aarch64-linux``.

    Raises:
        RuntimeMissingError: ``cuda``, which has no native code.
        UsageError: an unknown target.
    """
    if target not in _TARGETS:
        raise UsageError(
            f"no operator library for target '{target}': known targets are {', '.join(_TARGETS)}"
        )
    if target == "cuda":
        raise RuntimeMissingError(
            "there is no operator library for cuda: onnxruntime's CUDA provider runs models without one, "
            "by the functions of standard operators in the file"
        )
    machine = platform.machine().lower()
    return _ARM64 if target == "arm64" else f"{_MACHINES.get(machine, machine)}-linux"


def _built(name: str, what: str, triple: str) -> str:
    """The file of native code for a machine, from the package or the checkout."""
    own = triple == triple_of("cpu")
    candidates = [base / name if own else base / triple / name for base in _package_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate.resolve())
    file, folders = Path(name).name, ", ".join(str(candidate.parent) for candidate in candidates)
    if not own:
        raise RuntimeMissingError(
            f"the {what} {file} for {triple} is not built (looked in {folders}): run `make arm64` in the checkout"
        )
    hint = f", or set {LIBRARY_VARIABLE} to the file" if name == _LIBRARY else ""
    raise RuntimeMissingError(
        f"the {what} {file} is not built (looked in {folders}): run `make build` in the checkout, or install "
        f"sparsecc from a wheel{hint}"
    )


def _existing(path: Path, origin: str) -> str:
    if not path.is_file():
        raise RuntimeMissingError(
            f"the operator library named by {origin} does not exist: {path} (correct or unset {origin}, "
            "or run `make build`)"
        )
    return str(path.resolve())


def _package_folders() -> Iterator[Path]:
    """Yield every folder the package consists of: an editable install has more than one."""
    seen = set()
    bases = importlib.resources.files("sparsecc.runtime")
    # A package with several folders is a MultiplexedPath, which keeps them in a private list.
    for base in (*getattr(bases, "_paths", [bases]), Path(__file__).parent):
        folder = Path(str(base)).resolve()
        if folder not in seen:
            seen.add(folder)
            yield folder


def register(session_options: onnxruntime.SessionOptions, path: str | os.PathLike[str] | None = None) -> None:
    """Register the sparse operators with ``session_options``; doing it again changes nothing.

    The operators cut their work for ``session_options.intra_op_num_threads`` as it stands now, so set it before.
    Left at 0, they find out while they run how many threads there are.

    Args:
        session_options: options of a session that is still to be created.
        path: an explicit library file, as in ``get_library_path``.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded, or onnxruntime is too old.
        UsageError: ``SPARSECC_ISA`` names no instruction set that is usable here.
    """
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < _OLDEST_ONNXRUNTIME:
        raise RuntimeMissingError(
            f"onnxruntime {onnxruntime.__version__} cannot load the operator library: "
            "install onnxruntime 1.17 or later"
        )
    library = get_library_path(path=path)
    if session_options in _registered:
        return
    if os.environ.get("SPARSECC_ISA"):
        from sparsecc.runtime.capi import usable_isas

        usable_isas(library)
    try:
        if session_options.intra_op_num_threads > 0:
            session_options.add_session_config_entry(_THREADS, str(session_options.intra_op_num_threads))
        session_options.register_custom_ops_library(library)
    except Exception as error:  # onnxruntime's exception classes are not public
        raise RuntimeMissingError(
            f"the operator library cannot be registered: {_one_line(error)} (a library built for another "
            "machine? rebuild with `make build`)"
        ) from error
    _registered.add(session_options)


def load(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    threads: int | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model with the sparse operators registered.

    Args:
        path: the model file.
        providers: onnxruntime execution providers; the CPU by default.
        session_options: options to add the operators to; new ones by default.
        threads: intra-op threads; onnxruntime's choice by default.

    Raises:
        RuntimeMissingError, UsageError: as ``register``.
        ModelError: onnxruntime refuses the model; the message is its own.
    """
    import onnxruntime

    options = session_options if session_options is not None else onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    register(options)
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=list(providers or ["CPUExecutionProvider"])
        )
    except Exception as error:  # onnxruntime's exception classes are not public
        raise ModelError(f"{os.fspath(path)}: onnxruntime refuses the model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
