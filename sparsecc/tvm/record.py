"""The nodes that run on our kernels, as a module of TVM holds them: operator, attributes and constants of each.

``runtime/csrc/tvm/record.cc`` reads what is written here. Numbers are little-endian; a text is its length (uint32) and
UTF-8. After 16 bytes that name the format come the signature (a text), the number of nodes, the nodes, and the tensors,
each at a multiple of 64 from the beginning. Equal nodes give equal bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import onnx_ir as ir

from sparsecc.errors import UnsupportedModelError

__all__ = ["NodeRecord", "write_record"]

_MAGIC = b"SPARSECC-TVM-1\n\0"
_ALIGNMENT = 64
_TYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.UINT8,
        ir.DataType.INT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
    }
)


@dataclass(frozen=True)
class NodeRecord:
    """A node.

    Attributes:
        name: for messages.
        op: name of the operator.
        attributes: int, float, text or list of ints, by name.
        constants: for every input, in order, its value, or None where it is computed.
    """

    name: str
    op: str
    attributes: dict[str, int | float | str | tuple[int, ...]]
    constants: tuple[ir.TensorProtocol | None, ...]


def write_record(signature: str, nodes: Sequence[NodeRecord], file: BinaryIO) -> None:
    """Write a record; a tensor that several nodes read is stored once.

    Raises:
        UnsupportedModelError: a constant is of a type that no operator takes.
    """
    tensors = {id(tensor): tensor for node in nodes for tensor in node.constants if tensor is not None}
    for tensor in tensors.values():
        if tensor.dtype not in _TYPES:
            raise UnsupportedModelError(
                f"a constant '{tensor.name}' of type {tensor.dtype.name}: no kernel takes it"
            )
    begin = len(_head(signature, nodes, dict.fromkeys(tensors, 0)))
    places, end = {}, begin
    for key, tensor in tensors.items():
        places[key] = _aligned(end)
        end = places[key] + tensor.nbytes
    file.write(_head(signature, nodes, places))
    at = begin
    for key, tensor in tensors.items():
        file.write(b"\0" * (places[key] - at))
        file.write(tensor.tobytes())
        at = places[key] + tensor.nbytes


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _head(signature: str, nodes: Sequence[NodeRecord], places: dict[int, int]) -> bytes:
    parts = [_MAGIC, _text(signature), struct.pack("<I", len(nodes))]
    for node in nodes:
        parts += _node(node, places)
    return b"".join(parts)


def _node(node: NodeRecord, places: dict[int, int]) -> Iterator[bytes]:
    yield _text(node.name) + _text(node.op) + struct.pack("<I", len(node.attributes))
    for name, value in node.attributes.items():
        yield _text(name)
        if isinstance(value, str):
            yield b"s" + _text(value)
        elif isinstance(value, float):
            yield b"f" + struct.pack("<f", value)
        elif isinstance(value, int):
            yield b"i" + struct.pack("<q", value)
        else:
            yield b"l" + _numbers(value)
    yield struct.pack("<I", len(node.constants))
    for tensor in node.constants:
        if tensor is None:
            yield b"\0"
        else:
            shape = tuple(int(dim) for dim in tensor.shape.numpy())
            yield b"\1" + struct.pack("<i", int(tensor.dtype)) + _numbers(shape)
            yield struct.pack("<Q", places[id(tensor)])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(values)}q", len(values), *values)
