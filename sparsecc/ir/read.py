"""From a file or a protobuf to an onnx-ir model, with every way it can be wrong told apart."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir

from sparsecc.errors import ModelError, UnsupportedModelError
from sparsecc.ir.check import check_tensor, require_regular
from sparsecc.ir.densify import densify_sparse_constants, graph_protos, node_protos
from sparsecc.ir.external import ExternalFiles
from sparsecc.ir.slots import Tensor, all_graphs, stub, swapped, tensor_slots

__all__ = ["FROZEN_INPUTS", "adopt_proto", "check_structure", "one_line", "read_proto", "tensor_protos"]

_PROTO_LIMIT = 1 << 31
_OLDEST_OPSET = 7
FROZEN_INPUTS = "sparsecc.frozen_inputs"  # key of onnx-ir's meta store, which is not written to files
_FREE_INITIALIZERS = 4  # the first IR version whose initializers need not be graph inputs


def read_proto(path: Path) -> onnx.ModelProto:
    """Return the protobuf of the file, external weights left where they are.

    Raises:
        ModelError: missing, a folder, unreadable, empty, text, truncated, or no ONNX model.
    """
    try:
        require_regular(path)
        data = path.read_bytes() if path.stat().st_size < _PROTO_LIMIT else None
    except FileNotFoundError:
        raise ModelError(f"no such model file: {path}") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder: give the .onnx file in it") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if data is None:
        raise ModelError(
            f"{path} is larger than 2 GiB, too large for ONNX: keep its weights in an external file"
        )
    if not data:
        raise ModelError(f"{path} is empty: export or download the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:  # protobuf's DecodeError; which class that is depends on its back end
        raise ModelError(f"{path} {_what_it_is(data)}") from None
    if not proto.HasField("graph"):
        raise ModelError(f"{path} {_what_it_is(data)}")
    return proto


def _what_it_is(data: bytes) -> str:
    with contextlib.suppress(UnicodeDecodeError):
        if data[:512].decode("ascii").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
            return "is a text file, not an ONNX model: give the .onnx file itself"
    if data[0] == 8:  # every ONNX writer puts the field ir_version first
        return "is truncated or damaged: export or download the model again"
    return "is not an ONNX model: give an .onnx file"


def adopt_proto(proto: onnx.ModelProto, files: ExternalFiles) -> onnx_ir.Model:
    """Return the onnx-ir model of ``proto``, which is used up; ``files`` hold its external weights.

    Sparse constants become dense, external weights become checked memory mappings, and
    initializers stop being graph inputs: old exporters made all of them inputs, which nobody overrides and
    which keeps onnxruntime from folding them.

    Raises:
        ModelError: the model is not valid; its subclasses as their names say.
    """
    _check_versions(proto)
    densify_sparse_constants(proto, files)
    for inline in tensor_protos(proto):
        check_tensor(inline)
    try:
        with _quiet_onnx_ir():
            model = onnx_ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx-ir raises many kinds on a broken model
        if isinstance(_innermost(error), NotImplementedError):
            what = one_line(error).partition(".")[0]
            raise UnsupportedModelError(f"onnx-ir cannot hold the model: {what}; export it without") from None
        raise ModelError(f"not a valid ONNX model: {one_line(error)}") from None
    check_structure(model)
    for slot in tensor_slots(model):
        if isinstance(tensor := slot.get(), onnx_ir.ExternalTensor):
            slot.set(files.map(tensor))
    if model.ir_version >= _FREE_INITIALIZERS:  # before that, being an input did not make it overridable
        model.meta[FROZEN_INPUTS] = tuple(str(v.name) for v in model.graph.inputs if v.is_initializer())
    model.graph.inputs[:] = [value for value in model.graph.inputs if not value.is_initializer()]
    model.ir_version = max(model.ir_version, _FREE_INITIALIZERS)
    return model


def check_structure(model: onnx_ir.Model) -> None:
    """Raise ``ModelError`` with one line unless onnx.checker accepts the model. Weights are not touched."""
    for graph in all_graphs(model):
        for node in graph:
            _check_texts(node)

    def place(_: object, tensor: Tensor) -> Tensor:
        return stub(tensor, empty=True)

    try:
        with swapped(model, place):
            skeleton = onnx_ir.serde.serialize_model(model)
    except onnx_ir.serde.SerdeError as error:
        raise ModelError(f"not a valid ONNX model: {one_line(error)}") from None
    for info in (*skeleton.graph.input, *skeleton.graph.output):
        # The checker wants a shape there; onnxruntime runs models whose inputs have no known rank.
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"not a valid ONNX model: {one_line(error)}") from None


def _check_texts(node: onnx_ir.Node) -> None:
    """Refuse text attributes that are no UTF-8, which onnx-ir keeps as bytes; custom operators may have them."""
    for name, attr in node.attributes.items():
        if node.domain == "" and attr.type == onnx_ir.AttributeType.STRING and isinstance(attr.value, bytes):
            raise ModelError(f"not a valid ONNX model: text {name!r} of node {node.name!r} is no UTF-8")


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the innermost cause of ``error`` as a single line of at most ``limit`` characters."""
    error = _innermost(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _check_versions(proto: onnx.ModelProto) -> None:
    if not proto.opset_import or not proto.ir_version:
        raise ModelError(
            "not a valid ONNX model: it has no operator set or IR version; the file may be truncated"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise UnsupportedModelError(
            f"model has ONNX IR version {proto.ir_version}, the installed onnx knows up to "
            f"{onnx.IR_VERSION}: upgrade onnx or export with an older one"
        )
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not _OLDEST_OPSET <= entry.version <= newest:
            raise UnsupportedModelError(
                f"model has opset {entry.version}, supported are {_OLDEST_OPSET} to {newest}: "
                "convert it with onnx.version_converter or export it again"
            )


def tensor_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every dense tensor: initializers and attributes of all graphs and functions."""
    for graph in graph_protos(proto):
        yield from graph.initializer
    for node in node_protos(proto):
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.TENSOR:
                yield attr.t
            yield from attr.tensors


@contextlib.contextmanager
def _quiet_onnx_ir() -> Iterator[None]:
    """Silence onnx-ir's warnings about invalid models: the checker says the same as an error."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # unknown keys of external data
            yield
    finally:
        logger.setLevel(level)
