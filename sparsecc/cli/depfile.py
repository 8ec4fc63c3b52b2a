"""Which files an output was made from, told to Make, Ninja and CMake."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

import sparsecc
from sparsecc import runtime
from sparsecc.errors import RuntimeMissingError, UsageError

__all__ = ["depfile_option", "write_depfile"]

depfile_option = click.option(
    "--depfile",
    type=click.Path(),
    metavar="FILE",
    help="Write there which files the output depends on, as Make and Ninja read it.",
)


def write_depfile(path: str, target: str, sources: Iterable[str | Path | None]) -> None:
    """Write a rule of Make: ``target`` depends on ``sources`` and on this installation of sparsecc.

    Args:
        path: the file to write.
        target: the output, spelt as the build system does.
        sources: files and folders, with all that is in them; ``FILE.py:FUNCTION`` is its file. What is None or names
            no file, such as ``synthetic``, is left out.

    Raises:
        UsageError: the file cannot be written.
    """
    found = dict.fromkeys(file for source in (*sources, *_installation()) for file in _files(source))
    names = [_escaped(os.path.abspath(file)) for file in found]
    # A rule without anything for each: a file that is gone is then a reason to make the output, not an error.
    text = (
        f"{_escaped(target)}: \\\n  "
        + " \\\n  ".join(names)
        + "\n"
        + "".join(f"\n{name}:\n" for name in names)
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def _installation() -> Iterator[Path]:
    """Files that change when another sparsecc is installed."""
    yield Path(sparsecc.__file__)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout need not be installed
        files = importlib.metadata.distribution("sparsecc").files or ()
        yield from (Path(str(file.locate())) for file in files if file.name == "RECORD")
    with contextlib.suppress(RuntimeMissingError):
        yield Path(runtime.get_library_path())


def _files(source: str | Path | None) -> list[Path]:
    if source is None:
        return []
    path = Path(re.sub(r"(?<=\.py):\w+$", "", str(source)))
    if path.is_dir():
        return [path, *sorted(file for file in path.rglob("*") if file.is_file())]
    return [path] if path.is_file() else []


def _escaped(name: str) -> str:
    return re.sub(r"([#: ])", r"\\\1", name).replace("$", "$$")
