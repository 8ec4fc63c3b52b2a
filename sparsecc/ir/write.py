"""From an onnx-ir model to a protobuf or to files that are either the old ones or complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir

from sparsecc.errors import UsageError
from sparsecc.ir.mapped import array_of, release
from sparsecc.ir.slots import Slot, Tensor, stub, swapped, tensor_slots

__all__ = [
    "INLINE_LIMIT",
    "fingerprint",
    "to_proto",
    "to_skeleton",
    "weight_nbytes",
    "write_model",
    "written_nbytes",
]

INLINE_LIMIT = 1_500_000_000
"""Bytes of weights above which they never go inside one protobuf (its own limit is 2 GiB)."""

_EXTERNAL_FROM = 1024
_SKELETON_KEEPS = 4096
_SKELETON_KEEPS_INTEGERS = 1 << 20
_SHAPE_TYPES = (onnx_ir.DataType.INT64, onnx_ir.DataType.INT32)
_PAGE_FROM = 1 << 16

#: Bytes that the lengths around a tensor may take beside its own.
_LENGTHS = 12


def weight_nbytes(model: onnx_ir.Model) -> int:
    """Return the bytes of all tensors, each tensor once."""
    return sum({id(t): int(t.nbytes) for t in (slot.get() for slot in tensor_slots(model))}.values())


def to_proto(model: onnx_ir.Model) -> onnx.ModelProto:
    """Return the protobuf with all weights inside.

    Raises:
        UsageError: they are more than ``INLINE_LIMIT``.
    """
    _refuse_large(sum(int(slot.get().nbytes) for slot in tensor_slots(model)))
    return onnx_ir.serde.serialize_model(model)


def to_skeleton(model: onnx_ir.Model) -> onnx.ModelProto:
    """Return the protobuf with tensors above 4 KiB cut to one element; enough for shape inference.

    Integers that shapes may be computed from stay up to 1 MiB: cut short, they would give wrong shapes.
    """

    def place(_: Slot, tensor: Tensor) -> Tensor:
        keeps = _SKELETON_KEEPS_INTEGERS if tensor.dtype in _SHAPE_TYPES else _SKELETON_KEEPS
        return stub(tensor) if tensor.nbytes > keeps else tensor

    with swapped(model, place):
        return onnx_ir.serde.serialize_model(model)


def fingerprint(model: onnx_ir.Model) -> str:
    """Return the sha256 of graph and weights, wherever and however these are stored.

    The model's own ``metadata_props`` do not count: that is where the fingerprint gets written.
    """
    digest = hashlib.sha256()
    for slot in tensor_slots(model):
        tensor = slot.get()
        digest.update(f"{tensor.name}|{tensor.dtype.name}|{list(tensor.shape)}|".encode())
        if isinstance(tensor, onnx_ir.StringTensor):
            digest.update(repr(list(tensor.string_data())).encode())
        else:
            digest.update(tensor.tobytes())
            _release(tensor)
    with swapped(model, lambda _, tensor: stub(tensor)):
        skeleton = onnx_ir.serde.serialize_model(model)
    skeleton.ClearField("metadata_props")
    digest.update(skeleton.SerializeToString(deterministic=True))
    return digest.hexdigest()


def write_model(model: onnx_ir.Model, path: Path, external: bool) -> None:
    """Write ``path``, and with ``external`` the weights of 1 KiB or more to ``<name>.data`` beside it.

    Everything is written and synced under temporary names in the same folder first; then data and model are
    renamed. A failure leaves the old files; a killed process leaves temporary files, which the next save to
    the same name removes. Equal models give equal bytes.

    Raises:
        UsageError: the folder is missing, not writable or full, the path is no place for a file, or the model is
            too large for one file.
    """
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; give a file name")
    if path.exists() and not path.is_file():  # the renaming would put a file in the place of /dev/null
        raise UsageError(f"cannot write {path}: it is a pipe, a socket or a device; give a file name")
    try:
        _remove_stale(path)
        with contextlib.ExitStack() as stack:
            files = _write_all(model, path, external, stack)
            _rename_all(files)
            _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place "
            "(nothing was changed)"
        ) from None


def written_nbytes(model: onnx_ir.Model, path: Path, external: bool) -> int:
    """Return the bytes of the files that ``write_model`` would write; at most a few per tensor too many."""
    tokens: dict[int, onnx_ir.ExternalTensor] = {}
    data = inside = 0
    for offset, tensor in _layout(_external_tensors(model)) if external else ():
        tokens[id(tensor)] = _token(tensor, _data_path(path).name, offset)
        data = offset + int(tensor.nbytes)

    def place(slot: Slot, tensor: Tensor) -> Tensor:
        nonlocal inside
        if slot.is_initializer and id(tensor) in tokens:
            return tokens[id(tensor)]
        inside += int(tensor.nbytes) + _LENGTHS
        return stub(tensor)

    with swapped(model, place):
        graph = int(onnx_ir.serde.serialize_model(model).ByteSize())
    return data + inside + graph


def _data_path(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _write_all(
    model: onnx_ir.Model, path: Path, external: bool, stack: contextlib.ExitStack
) -> list[tuple[Path, Path]]:
    """Write all temporary files; return (temporary, final) pairs in renaming order."""
    pairs: list[tuple[Path, Path]] = []
    tokens: dict[int, onnx_ir.ExternalTensor] = {}
    if external and (tensors := _external_tensors(model)):
        data_path = _data_path(path)
        temporary, file = stack.enter_context(_temporary(path))
        for offset, tensor in _layout(tensors):
            file.seek(offset)
            _write_tensor(tensor, file)
            _release(tensor)
            tokens[id(tensor)] = _token(tensor, data_path.name, offset)
        _finish(file)
        pairs.append((temporary, data_path))
    _refuse_large(sum(int(t.nbytes) for t in (s.get() for s in tensor_slots(model)) if id(t) not in tokens))

    def place(slot: Slot, tensor: Tensor) -> Tensor:
        return tokens.get(id(tensor), tensor) if slot.is_initializer else tensor

    with swapped(model, place):
        data = onnx_ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    temporary, file = stack.enter_context(_temporary(path))
    file.write(data)
    _finish(file)
    return [*pairs, (temporary, path)]


def _external_tensors(model: onnx_ir.Model) -> list[Tensor]:
    """Return the initializers to write outside, each tensor once, sorted by name."""
    found = {
        id(tensor): tensor
        for tensor in (slot.get() for slot in tensor_slots(model) if slot.is_initializer)
        if tensor.nbytes >= _EXTERNAL_FROM and tensor.dtype != onnx_ir.DataType.STRING
    }
    return sorted(found.values(), key=lambda tensor: tensor.name or "")


def _layout(tensors: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset, tensor): large ones start a page, so that they can be mapped, others 64 bytes."""
    end = 0
    for tensor in tensors:
        align = 4096 if tensor.nbytes >= _PAGE_FROM else 64
        offset = -(-end // align) * align
        end = offset + int(tensor.nbytes)
        yield offset, tensor


def _token(tensor: Tensor, location: str, offset: int) -> onnx_ir.ExternalTensor:
    return onnx_ir.ExternalTensor(
        location,
        offset,
        int(tensor.nbytes),
        tensor.dtype,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    if isinstance(tensor, onnx_ir.Tensor):  # writes arrays without a copy
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())


def _release(tensor: Tensor) -> None:
    if (array := array_of(tensor)) is not None:
        release(array)


def _refuse_large(nbytes: int) -> None:
    if nbytes > INLINE_LIMIT:
        raise UsageError(
            f"{nbytes} bytes of weights are too many for one file ({INLINE_LIMIT}): save with external data"
        )


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Give a new locked file beside ``path``; it is gone after the block unless renamed.

    The lock tells a file in work from one left by a killed process.
    """
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(name, "xb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield name, file
        finally:
            name.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    for name in sorted(path.parent.glob(f".{_escaped(path.name)}.*.tmp")):
        with contextlib.suppress(OSError), open(name, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            name.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename_all(pairs: list[tuple[Path, Path]]) -> None:
    """Rename every temporary file to its final name, or put everything back.

    With a data file, an old model must never meet new data: it is moved aside before the data is replaced,
    so that a kill in between leaves no model rather than a wrong one.
    """
    aside: list[tuple[Path, Path]] = []
    done: list[Path] = []
    try:
        for temporary, final in reversed(pairs) if len(pairs) > 1 else ():
            if final.exists():
                kept = temporary.with_suffix(".old")
                os.replace(final, kept)
                aside.append((kept, final))
        for temporary, final in pairs:
            os.replace(temporary, final)
            done.append(final)
    except BaseException:
        for final in done:
            final.unlink(missing_ok=True)
        for kept, final in reversed(aside):
            os.replace(kept, final)
        raise
    for kept, _ in aside:
        kept.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
