"""What a built library or program says about itself: the machine, its size without symbols, what it needs."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from sparsecc.errors import RuntimeMissingError

__all__ = ["NativeFile", "read_native"]

_HEADER = struct.Struct("<HHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ALLOCATED = 2  # a section's flag: it is in memory when the file runs
_NO_BITS = 8  # a section's type: it takes no room in the file
_STRINGS = 3
_MACHINES = {62: "x86_64-linux", 183: "aarch64-linux"}
_SYMBOL_VERSION = re.compile(rb"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)+)\0")


@dataclass(frozen=True)
class NativeFile:
    """A shared library or program.

    Attributes:
        path: the file.
        triple: the machine it runs on, such as ``aarch64-linux``; ``""`` if it is another one.
        nbytes: of the file.
        stripped_nbytes: of what is loaded when it runs: the size without symbols and debugging information,
            to within some hundred bytes.
        needs: newest symbol versions by library, for instance ``{"GLIBC": "2.34", "GLIBCXX": "3.4.30"}``.
    """

    path: Path
    triple: str
    nbytes: int
    stripped_nbytes: int
    needs: dict[str, str]


def read_native(path: str | os.PathLike[str]) -> NativeFile:
    """Read the headers of a 64-bit ELF file.

    Raises:
        RuntimeMissingError: it is none, or damaged.
    """
    source = Path(path)
    data = source.read_bytes()
    try:
        machine, sections = _sections(data)
        strings = b"".join(
            data[offset : offset + size] for kind, flags, offset, size in sections
            if kind == _STRINGS and flags & _ALLOCATED
        )  # fmt: skip
    except (struct.error, ValueError):
        raise RuntimeMissingError(
            f"{source} is no 64-bit library or program for Linux: build it anew"
        ) from None
    loaded = sum(size for kind, flags, _, size in sections if flags & _ALLOCATED and kind != _NO_BITS)
    return NativeFile(source, _MACHINES.get(machine, ""), len(data), loaded, _newest(strings))


def _sections(data: bytes) -> tuple[int, list[tuple[int, int, int, int]]]:
    """The machine's number, and (type, flags, offset, size) of every section."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError
    fields = _HEADER.unpack_from(data, 16)
    machine, begin, size, count = fields[1], fields[5], fields[10], fields[11]
    rows = [_SECTION.unpack_from(data, begin + number * size) for number in range(count)]
    return machine, [(row[1], row[2], row[4], row[5]) for row in rows]


def _newest(strings: bytes) -> dict[str, str]:
    found: dict[str, tuple[int, ...]] = {}
    for library, version in _SYMBOL_VERSION.findall(strings):
        name, number = library.decode(), tuple(int(part) for part in version.split(b"."))
        found[name] = max(number, found.get(name, ()))
    return {name: ".".join(map(str, found[name])) for name in sorted(found)}
