"""The native files for a machine: found, and checked to be for it."""

from __future__ import annotations

import os

from sparsecc import runtime
from sparsecc.errors import RuntimeMissingError, UsageError
from sparsecc.runtime.elf import NativeFile, read_native

__all__ = ["TRIPLES", "find_library", "find_runner"]

TRIPLES = ("aarch64-linux", "x86_64-linux")
"""Machines that bundles can be for."""


def find_library(triple: str, path: str | os.PathLike[str] | None = None) -> NativeFile:
    """Return the operator library for a machine; ``path`` is an explicit file.

    Raises:
        UsageError: an unknown machine.
        RuntimeMissingError: it was not built, or is for another machine; the message says how to build it.
    """
    target = _target(triple)
    if target is None and path is None:
        raise RuntimeMissingError(
            f"there is no operator library for {triple} here and none is cross-compiled for it: run `make build` in a "
            "checkout on such a machine, copy runtime/lib/libsparsecc_ops.so and give it with --library"
        )
    return _checked(runtime.get_library_path(target or "cpu", path), triple)


def find_runner(triple: str) -> NativeFile | None:
    """Return ``sparsecc-run`` for a machine, or None if it was not built."""
    target = _target(triple)
    if target is None:
        return None
    try:
        return _checked(runtime.get_runner_path(target), triple)
    except RuntimeMissingError:
        return None


def _target(triple: str) -> str | None:
    if triple not in TRIPLES:
        raise UsageError(f"unknown target '{triple}': known are {', '.join(TRIPLES)}")
    known = {runtime.triple_of(target): target for target in ("arm64", "cpu")}
    return known.get(triple)


def _checked(path: str, triple: str) -> NativeFile:
    file = read_native(path)
    if file.triple != triple:
        raise RuntimeMissingError(
            f"{path} is for {file.triple or 'another machine'}, not {triple}: correct SPARSECC_OPS_LIBRARY or "
            "--library, or build it anew"
        )
    return file
