"""Where results may go: checked before the slow part, so that nothing is lost at its end."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sparsecc.errors import UsageError

__all__ = ["check_output"]


def check_output(path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str] | None] = ()) -> None:
    """Raise unless a file can be written to ``path`` that replaces none of ``inputs``.

    Args:
        path: of a file, or of a model, which may have a data file ``PATH.data`` beside it.
        inputs: files, folders, or ``FILE.py:FUNCTION`` that the run reads; None and what is no path count for nothing.

    Raises:
        UsageError: it is a folder, a device or an input, or its folder does not exist or cannot be written to.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; give a file name with -o")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is no regular file and is not replaced; give another name with -o")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"the folder of {target} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder of {target} cannot be written to; give another place")
    for written in (target, target.with_name(f"{target.name}.data")):
        for given in inputs:
            source = None if given is None else Path(re.sub(r"(\.py):\w*$", r"\1", os.fspath(given)))
            if source is not None and written.exists() and _holds(source, written):
                raise UsageError(f"{written} is the input {source.name}; give another file with -o")


def _holds(source: Path, written: Path) -> bool:
    """Whether an input is this file, or a folder of inputs that it lies in."""
    if not source.exists():
        return False
    if source.is_dir():
        return written.suffix in (".npy", ".npz") and written.resolve().parent.samefile(source)
    return written.samefile(source)
