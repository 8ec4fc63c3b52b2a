"""Sparse matrices and tensors from files: Matrix Market ``.mtx`` and FROSTT ``.tns``, read in pieces."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Tensor
from sparsecc.errors import ModelError, UsageError

__all__ = ["read_matrix_market", "read_tensor", "read_tns"]

#: Bytes read at a time.
_PIECE = 1 << 22

#: Bytes of a line: more is no list of coordinates.
_LONGEST_LINE = 1 << 20

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

    Both may be compressed by gzip: ``.mtx.gz``, ``.tns.gz``.

    Raises:
        UsageError: another suffix, or the file is not what its suffix says; the message names the line.
    """
    name = Path(path).name.lower().removesuffix(".gz")
    if name.endswith(".mtx"):
        return read_matrix_market(path, format or "csr", progress)
    if name.endswith(".tns"):
        return read_tns(path, format or "csf", progress)
    raise UsageError(
        f"{path}: unknown kind of tensor file; known: .mtx (Matrix Market), .tns (FROSTT), both also with .gz"
    )


def read_matrix_market(
    path: str | os.PathLike[str], format: str = "csr", progress: Reading = _quiet
) -> Tensor:
    """Read a sparse matrix: coordinates, real, integer or pattern (all ones), general or symmetric.

    Raises:
        UsageError: it is no such file, of another kind, shorter than it says, or has wrong coordinates.
    """
    with _opened(path) as file:
        banner = _line(file).decode("latin-1").lower().split()
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
            line, number = _line(file), number + 1
        sizes = _integers(line, 3, f"{path}: line {number}")
        rows, columns, count = sizes
        table = _table(file, 2 + _FIELDS[field], number, b"%", progress)
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
    with _opened(path) as file:
        shape, number, start = _sizes_of(file)
        file.text.seek(start)
        table = _table(file, None if shape is None else len(shape) + 1, number, b"#", progress)
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


class _File(NamedTuple):
    """An open file.

    Attributes:
        path: its name.
        text: what is in it.
        stored: the file itself, whose bytes may be compressed.
    """

    path: str | os.PathLike[str]
    text: BinaryIO
    stored: BinaryIO


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_File]:
    """Open a file, by its suffix also one compressed by gzip."""
    try:
        stored = Path(path).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    with stored:
        if Path(path).suffix.lower() != ".gz":
            yield _File(path, stored, stored)
            return
        try:
            with gzip.GzipFile(fileobj=stored) as text:
                yield _File(path, cast(BinaryIO, text), stored)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: no whole gzip file ({error})") from error


def _line(file: _File) -> bytes:
    """Read one line."""
    found = file.text.readline(_LONGEST_LINE + 1)
    if len(found) > _LONGEST_LINE:
        raise UsageError(f"{file.path}: a line of more than {_LONGEST_LINE} bytes")
    return found


def _integers(line: bytes, count: int, where: str) -> list[int]:
    parts = line.split()
    if len(parts) != count or not all(part.isdigit() for part in parts):
        raise UsageError(f"{where}: expected {count} sizes, got {line[:60].decode('latin-1').strip()!r}")
    sizes = [int(part.lstrip(b"0")[: _MOST_DIGITS + 1] or b"0") for part in parts]
    if max(sizes, default=0) >= _TOO_LARGE:
        raise UsageError(f"{where}: sizes must be below {_TOO_LARGE}")
    return sizes


def _sizes_of(file: _File) -> tuple[tuple[int, ...] | None, int, int]:
    """The sizes in a header of order and sizes, if there is one; how many lines come before the entries, and bytes."""
    number, start = 0, 0
    lines: list[bytes] = []
    ends: list[tuple[int, int]] = []
    while len(lines) < 2 and (line := _line(file)):
        number += 1
        line = line.partition(b"#")[0]
        if line.strip():
            lines.append(line)
            ends.append((number, file.text.tell()))
        elif not lines:
            start = file.text.tell()
    if len(lines) == 2 and len(lines[0].split()) == 1 and lines[0].strip().isdigit():
        (modes,) = _integers(lines[0], 1, f"{file.path}: line {ends[0][0]}")
        sizes = _integers(lines[1], modes, f"{file.path}: line {ends[1][0]}")
        return tuple(sizes), *ends[1]
    return None, (ends[0][0] - 1 if ends else number), start


def _pieces(file: _File, mark: bytes, progress: Reading) -> Iterator[bytes]:
    """Yield whole lines, many at a time, without comments, which are from the mark to the end of their line."""
    total, rest, name = os.fstat(file.stored.fileno()).st_size, b"", f"reading {Path(file.path).name}"
    comment = re.compile(mark + rb"[^\r\n]*")
    while piece := file.text.read(_PIECE):
        progress(name, file.stored.tell(), total)
        head, end, tail = piece.rpartition(b"\n")
        if end:
            yield comment.sub(b"", rest + head)
            rest = tail
        else:
            rest += piece
        if len(rest) > max(_LONGEST_LINE, _PIECE):
            raise UsageError(f"{file.path}: a line of more than {_LONGEST_LINE} bytes")
    progress(name, total, total)
    if rest:
        yield comment.sub(b"", rest)


def _table(file: _File, columns: int | None, number: int, mark: bytes, progress: Reading) -> _Table:
    """Read lines of coordinates and a value; ``columns`` None: as many as the first line has."""
    entries: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    valued = columns != 2
    for piece in _pieces(file, mark, progress):
        if columns is None:
            columns = len(next((line for line in piece.splitlines() if line.strip()), b"").split()) or None
        if columns is not None:
            found = _numbers(piece, columns, file.path, number)
            places = found[:, :-1] if valued else found
            entries.append(_coordinates(places, file.path))
            values.append(found[:, -1] if valued else np.ones(len(found)))
        number += piece.count(b"\n") + 1
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
