"""Making a bundle: all of it under a temporary name first, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc import runtime
from sparsecc.bundle.manifest import MANIFEST, is_bundle, manifest, readme
from sparsecc.bundle.native import find_library, find_runner
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.ir.files import model_files

__all__ = ["Bundle", "make_bundle"]

_FILES = Path(__file__).parent / "files"
#: Sources of the runner that the C++ example uses, in ``csrc`` of ``sparsecc.runtime``.
_CPP_SOURCES = (
    "run/array.h",
    "run/array.cc",
    "run/backend.h",
    "run/error.h",
    "run/options.h",
    "run/ort_backend.cc",
    "run/ort_session_abi.h",
    "ort/ort_abi.h",
)
_PROGRAM = 0o755
_PLAIN = 0o644


@dataclass(frozen=True)
class Bundle:
    """A finished bundle.

    Attributes:
        folder: where it is.
        manifest: what ``manifest.json`` says.
        native: files that the library and, where it was built, the runner were copied from.
    """

    folder: Path
    manifest: dict[str, Any]
    native: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(int(item["nbytes"]) for item in self.manifest["files"])


def make_bundle(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    triple: str,
    library: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    licenses: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
) -> Bundle:
    """Put a model, the operator library for a machine and what shows their use into one folder.

    Equal inputs give equal bytes. The folder appears complete or not at all.

    Args:
        model: the model; its bytes and those of its external data are copied as they are.
        output: the folder to make.
        triple: ``aarch64-linux`` or ``x86_64-linux``.
        library: the operator library to take instead of the one that was built here.
        report: a report to put in.
        licenses: licence texts of the model and its weights to put beside ours.
        force: replace ``output`` if it is a bundle.

    Raises:
        ModelError: the model cannot be read.
        RuntimeMissingError: the library for that machine was not built.
        UsageError: ``output`` exists, cannot be written, or a file to put in does not exist.
    """
    destination, source = Path(output), Path(model)
    _check_place(destination, force)
    native = [find_library(triple, library)]
    runner = find_runner(triple)
    loaded = Model.load(source)
    extras = _extras(report, licenses)
    with _temporary(destination) as folder:
        for part in model_files(source):
            _copy(part, folder / "model" / os.path.relpath(part, source.parent))
        _copy(native[0].path, folder / "lib" / "libsparsecc_ops.so", _PROGRAM)
        if runner is not None:
            native.append(runner)
            _copy(runner.path, folder / "bin" / "sparsecc-run", _PROGRAM)
        for name, extra in extras.items():
            _copy(extra, folder / name)
        for name, example in _examples().items():
            _copy(example, folder / "examples" / name)
        document = _describe(folder, triple, f"model/{source.name}", loaded, native)
        _put(folder, destination)
    return Bundle(destination, document, tuple(file.path for file in native))


def _describe(folder: Path, triple: str, name: str, model: Model, native: list[Any]) -> dict[str, Any]:
    """Write README and manifest, the manifest last: it lists everything else."""
    document = manifest(folder, triple, name, model, native)
    _write(folder / "README.md", readme(document))
    document = manifest(folder, triple, name, model, native)
    _write(folder / MANIFEST, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return document


def _check_place(destination: Path, force: bool) -> None:
    if not destination.exists() and not destination.is_symlink():
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if not force:
        raise UsageError(f"{destination} exists: give another folder with -o, or --force to replace a bundle")
    if destination.is_symlink() or not is_bundle(destination):
        raise UsageError(
            f"{destination} is no bundle, so --force does not replace it; give another folder with -o"
        )


def _extras(
    report: str | os.PathLike[str] | None, licenses: Sequence[str | os.PathLike[str]]
) -> dict[str, Path]:
    """Files that were asked for by their place in the bundle; all of them exist."""
    extras = {"licenses/sparsecc-LICENSE": _FILES / "LICENSE"}
    if report is not None:
        extras[f"report{Path(report).suffix}"] = Path(report)
    for path in map(Path, licenses):
        name = f"licenses/{path.name}"
        if name in extras:
            raise UsageError(f"two licence texts are called {path.name}: rename one of them")
        extras[name] = path
    for path in extras.values():
        if not path.is_file():
            raise UsageError(f"{path} does not exist or is no file; correct --report or --license")
    return extras


def _examples() -> dict[str, Path]:
    sources = Path(runtime.__file__).parent / "csrc"
    return {
        "run_model.py": _FILES / "run_model.py",
        "cpp/example.cc": _FILES / "example.cc",
        **{f"cpp/{Path(name).name}": sources / name for name in _CPP_SOURCES},
    }


def _copy(source: Path, destination: Path, mode: int = _PLAIN) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    destination.chmod(mode)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(_PLAIN)


@contextlib.contextmanager
def _temporary(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, gone after the block unless it was renamed."""
    folder = destination.parent / f".{destination.name}.{secrets.token_hex(4)}.tmp"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise UsageError(
            f"cannot write {destination}: {error.strerror or error}; free space or choose another place "
            "(nothing was changed)"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, destination: Path) -> None:
    """Rename the folder to its place; a bundle that is there goes once the new one has its name."""
    if not destination.is_dir() or not any(destination.iterdir()):
        os.replace(folder, destination)
        return
    aside = folder.with_suffix(".old")
    os.replace(destination, aside)
    try:
        os.replace(folder, destination)
    except BaseException:
        os.replace(aside, destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)
