"""Sparse matrices and tensors from files: Matrix Market ``.mtx`` and FROSTT ``.tns``, read in pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Tensor
from sparsecc.errors import ModelError, UsageError

__all__ = ["read_matrix_market", "read_tensor", "read_tns"]

#: Bytes read at a time.
_PIECE = 1 << 24

#: From here on a coordinate could not be told from its neighbour once it is read as a float.
_TOO_LARGE = 1 << 53

#: Digits of a size: more cannot be one below ``_TOO_LARGE``.
_MOST_DIGITS = 16

_FIELDS = {"real": 1, "double": 1, "integer": 1, "pattern": 0}
_SYMMETRIES = ("general", "symmetric", "skew-symmetric")


class Reading(Protocol):
    """Told how much of a file is read."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes."""


def _quiet(description: str, done: int, total: int) -> None:
    """Ignore progress."""


def read_tensor(
    path: str | os.PathLike[str], format: str | None = None, progress: Reading = _quiet
) -> Tensor:
    """Read a file by its suffix: ``.mtx`` as CSR, ``.tns`` as CSF unless ``format`` says otherwise.

    Raises:
        UsageError: another suffix, or the file is not what its suffix says; the message names the line.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".mtx":
        return read_matrix_market(path, format or "csr", progress)
    if suffix == ".tns":
        return read_tns(path, format or "csf", progress)
    raise UsageError(f"{path}: unknown kind of tensor file; known: .mtx (Matrix Market), .tns (FROSTT)")


def read_matrix_market(
    path: str | os.PathLike[str], format: str = "csr", progress: Reading = _quiet
) -> Tensor:
    """Read a sparse matrix: coordinates, real, integer or pattern (all ones), general or symmetric.

    Raises:
        UsageError: it is no such file, of another kind, shorter than it says, or has wrong coordinates.
    """
    with _opened(path) as stream:
        banner = stream.readline().decode("latin-1").lower().split()
        if len(banner) != 5 or banner[:2] != ["%%matrixmarket", "matrix"]:
            raise UsageError(f"{path}: line 1 is no Matrix Market banner")
        _, _, layout, field, symmetry = banner
        if layout != "coordinate" or field not in _FIELDS or symmetry not in _SYMMETRIES:
            raise UsageError(
                f"{path}: {layout} {field} {symmetry} is not read; known: coordinate, {'/'.join(_FIELDS)}, "
                f"{'/'.join(_SYMMETRIES)}"
            )
        number, line = 1, b"%"
        while line.lstrip().startswith(b"%") or (line and not line.strip()):
            line, number = stream.readline(), number + 1
        sizes = _integers(line, 3, f"{path}: line {number}")
        rows, columns, count = sizes
        table = _table(stream, path, 2 + _FIELDS[field], number, progress)
    if len(table.entries) != count:
        raise UsageError(f"{path}: {len(table.entries)} entries, the header says {count}")
    values = table.values if _FIELDS[field] else np.ones(count)
    entries = table.entries
    if symmetry != "general":
        if rows != columns:
            raise UsageError(f"{path}: a {symmetry} matrix of {rows} x {columns}")
        other = entries[:, 0] != entries[:, 1]
        sign = -1.0 if symmetry == "skew-symmetric" else 1.0
        entries = np.concatenate([entries, entries[other][:, ::-1]])
        values = np.concatenate([values, sign * values[other]])
    return _tensor(path, entries, values, (rows, columns), format)


def read_tns(path: str | os.PathLike[str], format: str = "csf", progress: Reading = _quiet) -> Tensor:
    """Read a tensor: a line per entry, coordinates from 1 on, then the value.

    The two lines with order and sizes that ParTI writes first are understood; without them sizes are the largest
    coordinates. Entries at the same place are added up, as in files of counts.

    Raises:
        UsageError: it is no such file, or has wrong coordinates.
    """
    with _opened(path) as stream:
        shape, number, start = _sizes_of(stream, path)
        stream.seek(start)
        table = _table(stream, path, None if shape is None else len(shape) + 1, number, progress)
    entries = table.entries
    if not entries.shape[1]:
        raise UsageError(f"{path}: no entries, which are lines of coordinates and a value")
    if shape is None:
        shape = tuple(int(size) for size in entries.max(0, initial=-1) + 1)
    return _tensor(path, entries, table.values, shape, format, sum_duplicates=True)


class _Table(NamedTuple):
    """Coordinates from 0 on, ``[entries, modes]``, and values ``[entries]``."""

    entries: NDArray[np.int64]
    values: NDArray[np.float64]


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def _integers(line: bytes, count: int, where: str) -> list[int]:
    parts = line.split()
    if len(parts) != count or not all(part.isdigit() for part in parts):
        raise UsageError(f"{where}: expected {count} sizes, got {line[:60].decode('latin-1').strip()!r}")
    sizes = [int(part.lstrip(b"0")[: _MOST_DIGITS + 1] or b"0") for part in parts]
    if max(sizes, default=0) >= _TOO_LARGE:
        raise UsageError(f"{where}: sizes must be below {_TOO_LARGE}")
    return sizes


def _sizes_of(stream: BinaryIO, path: str | os.PathLike[str]) -> tuple[tuple[int, ...] | None, int, int]:
    """The sizes in a header of order and sizes, if there is one; how many lines come before the entries, and bytes."""
    number, start = 0, 0
    lines: list[bytes] = []
    ends: list[tuple[int, int]] = []
    while len(lines) < 2 and (line := stream.readline()):
        number += 1
        if line.strip() and not line.lstrip().startswith(b"#"):
            lines.append(line)
            ends.append((number, stream.tell()))
        elif not lines:
            start = stream.tell()
    if len(lines) == 2 and len(lines[0].split()) == 1 and lines[0].strip().isdigit():
        (modes,) = _integers(lines[0], 1, f"{path}: line {ends[0][0]}")
        sizes = _integers(lines[1], modes, f"{path}: line {ends[1][0]}")
        return tuple(sizes), *ends[1]
    return None, (ends[0][0] - 1 if ends else number), start


def _pieces(stream: BinaryIO, path: str | os.PathLike[str], progress: Reading) -> Iterator[bytes]:
    """Yield whole lines, many at a time."""
    total, rest = os.fstat(stream.fileno()).st_size, b""
    while piece := stream.read(_PIECE):
        progress(f"reading {Path(path).name}", stream.tell(), total)
        head, end, tail = piece.rpartition(b"\n")
        if end:
            yield rest + head
            rest = tail
        else:
            rest += piece
    progress(f"reading {Path(path).name}", total, total)
    if rest:
        yield rest


def _table(
    stream: BinaryIO, path: str | os.PathLike[str], columns: int | None, number: int, progress: Reading
) -> _Table:
    """Read lines of coordinates and a value; ``columns`` None: as many as the first line has."""
    entries: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    valued = columns != 2
    for piece in _pieces(stream, path, progress):
        if columns is None:
            columns = len(next((line for line in piece.splitlines() if line.strip()), b"").split()) or None
        if columns is None:
            continue
        found = _numbers(piece, columns, path, number)
        number += piece.count(b"\n") + 1
        places = found[:, :-1] if valued else found
        entries.append(_coordinates(places, path))
        values.append(found[:, -1] if valued else np.ones(len(found)))
    modes = (columns or 1) - valued
    if not entries:
        return _Table(np.zeros((0, modes), np.int64), np.zeros(0))
    return _Table(np.concatenate(entries), np.concatenate(values))


def _numbers(piece: bytes, columns: int, path: str | os.PathLike[str], number: int) -> NDArray[np.float64]:
    """The numbers ``[lines, columns]`` of some lines, of which ``number`` come before."""
    try:
        if _even(piece, columns) and b"_" not in piece:  # which Python lets stand between digits
            return np.array(piece.split(), np.float64).reshape(-1, columns)
    except ValueError:
        pass
    for at, line in enumerate(piece.splitlines(), number + 1):
        parts = line.split()
        if parts and (len(parts) != columns or not all(_is_number(part) for part in parts)):
            text = line[:60].decode("latin-1")
            raise UsageError(f"{path}: line {at}: expected {columns} numbers, got {text!r}")
    raise UsageError(f"{path}: not {columns} numbers on every line")


def _even(piece: bytes, columns: int) -> bool:
    """Whether each line has so many words, or none."""
    text = np.frombuffer(piece, np.uint8)
    begins = text > ord(" ")
    begins[1:] &= text[:-1] <= ord(" ")
    ends = np.flatnonzero((text == ord("\n")) | (text == ord("\r")))
    words = np.cumsum(begins, dtype=np.int32)
    counts = np.diff(np.concatenate([[0], words[ends], words[-1:]]))
    return bool(((counts == 0) | (counts == columns)).all())


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return b"_" not in text


def _coordinates(found: NDArray[np.float64], path: str | os.PathLike[str]) -> NDArray[np.int64]:
    if (
        not np.isfinite(found).all()
        or (found != np.floor(found)).any()
        or (found < 1).any()
        or (found >= _TOO_LARGE).any()
    ):
        raise UsageError(f"{path}: coordinates must be whole numbers from 1 to {_TOO_LARGE - 1}")
    return found.astype(np.int64) - 1


def _tensor(
    path: str | os.PathLike[str],
    entries: NDArray[np.int64],
    values: NDArray[np.float64],
    shape: tuple[int, ...],
    format: str,
    *,
    sum_duplicates: bool = False,
) -> Tensor:
    try:
        return Tensor.from_coordinates(entries, values, shape, format, sum_duplicates=sum_duplicates)
    except ModelError as error:
        raise UsageError(f"{path}: {error}") from error
