"""The operator library's C interface from Python: packed weights run on NumPy arrays, without onnxruntime.

The interface is ``runtime/csrc/include/sparsecc/c_api.h``; the structures here mirror it field by field.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, RuntimeMissingError, UsageError
from sparsecc.runtime.native import get_library_path

__all__ = [
    "ACTIVATION_CODES",
    "VALUE_TYPES",
    "ConvGeometry",
    "NativeConv",
    "NativeMatMul",
    "isas",
    "library_version",
    "operator_table",
]

_ERROR_SIZE = 512

#: Result type and argument types by function name.
Signatures: TypeAlias = Mapping[str, tuple[Any, tuple[Any, ...]]]
_ISA_VARIABLE = "SPARSECC_ISA"

ACTIVATION_CODES: Mapping[str, int] = {
    name: code
    for code, name in enumerate(
        ("", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Gelu", "GeluTanh", "Silu", "HardSwish")
    )
}
"""``sparsecc_activation`` by operator name suffix."""


VALUE_TYPES: Mapping[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
"""``sparsecc_value_type`` by the name of NumPy's type."""


class PackedDesc(ctypes.Structure):
    """What the descriptors of packed weights begin with; ctypes puts the fields of subclasses behind these."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("struct_size", ctypes.c_size_t),
        ("layout_version", ctypes.c_int32),
        ("layout", ctypes.c_char_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("value_count", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("index_bytes", ctypes.c_int64),
    )

    held: Mapping[str, NDArray[Any]]
    """The arrays that are pointed to. The library copies them, so they only have to live until it returns."""

    value_types: ClassVar[Mapping[str, int]]
    """NumPy's names of the types that values may have, with their codes; others are made the first of them."""


class WeightDesc(PackedDesc):
    """``sparsecc_weight_desc``."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("activation", ctypes.c_int),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("isa", ctypes.c_char_p),
        ("value_type", ctypes.c_int32),
    )

    value_types = VALUE_TYPES


Desc = TypeVar("Desc", bound=PackedDesc)


class _Geometry(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        ("kernel", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        ("pad_begin", ctypes.c_int64 * 2),
        ("pad_end", ctypes.c_int64 * 2),
    )


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a 2-D convolution, (height, width) pairs."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad_begin: tuple[int, int] = (0, 0)
    pad_end: tuple[int, int] = (0, 0)
    groups: int = 1


@cache
def open_library(path: str) -> ctypes.CDLL:
    """Return the library at ``path`` with its fp32 functions declared; raises ``RuntimeMissingError``."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise RuntimeMissingError(
            f"the operator library cannot be loaded: {error} (rebuild with `make build`)"
        ) from error
    pointer, count, error_text = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_char_p, ctypes.c_size_t)
    signatures: Signatures = {
        "sparsecc_isas": (ctypes.c_char_p, ()),
        "sparsecc_int8_isas": (ctypes.c_char_p, ()),
        "sparsecc_version": (ctypes.c_char_p, ()),
        "sparsecc_operator_table": (ctypes.c_char_p, ()),
        "sparsecc_matmul_create": (ctypes.c_int, (pointer, pointer, *error_text)),
        "sparsecc_matmul_run": (ctypes.c_int, (pointer, pointer, count, pointer, pointer, *error_text)),
        "sparsecc_matmul_kernel": (ctypes.c_char_p, (pointer, count)),
        "sparsecc_matmul_balance": (ctypes.c_double, (pointer, count, count)),
        "sparsecc_matmul_destroy": (None, (pointer,)),
        "sparsecc_conv_create": (ctypes.c_int, (pointer, pointer, pointer, *error_text)),
        "sparsecc_conv_output_size": (ctypes.c_int, (pointer, pointer, pointer, *error_text)),
        "sparsecc_conv_run": (
            ctypes.c_int,
            (pointer, pointer, count, count, count, count, pointer, pointer, *error_text),
        ),
        "sparsecc_conv_add_run": (
            ctypes.c_int,
            (pointer, pointer, pointer, count, count, count, count, pointer, pointer, *error_text),
        ),
        "sparsecc_conv_kernel": (ctypes.c_char_p, (pointer,)),
        "sparsecc_conv_destroy": (None, (pointer,)),
    }
    declare(library, signatures)
    return library


def declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    """Tell ctypes the result and argument types of functions of ``library``; raises ``RuntimeMissingError``."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeMissingError(
                f"the operator library {library._name} is older than this package, it has no {name}: "
                "rebuild with `make build`"
            )
        function.restype, function.argtypes = result, arguments


def isas() -> tuple[str, ...]:
    """Return the instruction sets that the library has kernels for and this machine can run, best first.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
        UsageError: ``SPARSECC_ISA`` names none of them.
    """
    return usable_isas(get_library_path())


def usable_isas(path: str) -> tuple[str, ...]:
    """Return what ``isas`` does, of the library at ``path``; errors as there."""
    names = tuple(open_library(path).sparsecc_isas().decode().split())
    known = open_library(path).sparsecc_int8_isas().decode()  # the same, and variants that count as them
    wanted = os.environ.get(_ISA_VARIABLE)
    if wanted and wanted not in known.split():  # the library would say so again for every operator
        raise UsageError(f"{_ISA_VARIABLE} is '{wanted}', usable here: {known}; correct or unset it")
    return names


def library_version() -> str:
    """Return the version of the library, such as ``0.1.0``.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
    """
    return str(open_library(get_library_path()).sparsecc_version().decode())


def operator_table() -> tuple[str, ...]:
    """Return one line for every operator the library registers: ``name input-types -> output-types``.

    Raises:
        RuntimeMissingError: the library is missing or cannot be loaded.
    """
    return tuple(open_library(get_library_path()).sparsecc_operator_table().decode().splitlines())


def call(function: Callable[..., int], *arguments: Any, fault: type[Exception] = UsageError) -> None:
    """Call a function of the library that ends in a buffer for its message; raise ``fault`` with that if it fails."""
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if function(*arguments, error, _ERROR_SIZE):
        raise fault(error.value.decode(errors="replace"))


def encoded(isa: str | None) -> bytes | None:
    """Return the name of an instruction set as the library reads it; ``None`` leaves the choice to the library."""
    return None if isa is None else isa.encode()


class NativeHandle:
    """Something the library made and must free. Use as a context manager, or call ``close``.

    ``_family`` is the middle of its functions' names, ``sparsecc_<family>_run`` and so on.
    """

    _family: str

    def __init__(self, library: ctypes.CDLL) -> None:
        self._handle = ctypes.c_void_p()
        self._library = library

    def _call(self, function: str, *arguments: Any, fault: type[Exception] = UsageError) -> None:
        call(getattr(self._library, f"sparsecc_{self._family}_{function}"), *arguments, fault=fault)

    def close(self) -> None:
        """Free the packed weight. Calling it again does nothing."""
        if self._handle:
            getattr(self._library, f"sparsecc_{self._family}_destroy")(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def rows_and_result(
    x: NDArray[np.float32], shape: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x ``[..., K]`` as contiguous float32 and room for y ``[..., N]``, for a weight of ``shape`` (N, K).

    Raises:
        UsageError: x does not fit.
    """
    x = np.asarray(x, np.float32, order="C")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise UsageError(f"x has shape {x.shape}, expected a last dimension of {shape[1]}")
    return x, np.empty((*x.shape[:-1], shape[0]), np.float32)


def describe(
    kind: type[Desc],
    layout: str,
    shape: tuple[int, int],
    values: NDArray[Any],
    indices: NDArray[np.uint8],
    *,
    activation: str = "",
    alpha: float = 0.0,
    beta: float = 0.0,
    isa: str | None = None,
    layout_version: int = 1,
    **per_output: NDArray[np.float32] | None,
) -> Desc:
    """Return the descriptor of a packed weight; it keeps alive what it points to.

    Args:
        kind: ``WeightDesc`` or ``Int8WeightDesc``.
        layout: as in ``NativeMatMul``, like all that follows.
        shape: (N outputs, K inputs).
        values: the kept values.
        indices: the gap stream.
        activation: a key of ``ACTIVATION_CODES``.
        alpha: first parameter of the activation.
        beta: second parameter of the activation.
        isa: instruction set or ``None``.
        layout_version: version of the packed format.
        per_output: float32 ``[N]`` or ``None`` by the name of the field: ``bias``, ``scales``.

    Raises:
        UsageError: one of ``per_output`` has another shape.
    """
    for name, array in per_output.items():
        if array is not None and array.shape != shape[:1]:
            raise UsageError(f"{name} has shape {array.shape}, the weight has {shape[0]} outputs")
    type_name = values.dtype.name if values.dtype.name in kind.value_types else next(iter(kind.value_types))
    held = {
        "values": np.ascontiguousarray(values, values.dtype if type_name == values.dtype.name else type_name),
        "indices": np.ascontiguousarray(indices, np.uint8),
        **{
            name: np.ascontiguousarray(array, np.float32)
            for name, array in per_output.items()
            if array is not None
        },
    }
    desc = kind(
        struct_size=ctypes.sizeof(kind), layout_version=layout_version, layout=layout.encode(),
        outputs=shape[0], inputs=shape[1], value_count=held["values"].size, index_bytes=held["indices"].size,
        activation=ACTIVATION_CODES[activation], alpha=alpha, beta=beta, isa=encoded(isa),
        **{name: array.ctypes.data for name, array in held.items()},
    )  # fmt: skip
    desc.held = held
    if isinstance(desc, WeightDesc):
        desc.value_type = kind.value_types[type_name]
    return desc


class _NativeOp(NativeHandle):
    """One packed fp32 weight in the library's own form."""

    def __init__(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[Any],
        indices: NDArray[np.uint8],
        *,
        bias: NDArray[np.float32] | None,
        activation: str,
        alpha: float,
        beta: float,
        isa: str | None,
        layout_version: int,
        geometry: _Geometry | None = None,
    ) -> None:
        path = get_library_path()
        super().__init__(open_library(path))
        if isa is None:
            usable_isas(path)
        desc = describe(
            WeightDesc, layout, shape, values, indices, bias=bias, activation=activation, alpha=alpha, beta=beta,
            isa=isa, layout_version=layout_version,
        )  # fmt: skip
        arguments = [desc] if geometry is None else [desc, geometry]
        self._call("create", *map(ctypes.byref, arguments), ctypes.byref(self._handle), fault=ModelError)


def geometry_struct(geometry: ConvGeometry) -> _Geometry:
    """Return ``sparsecc_conv_geometry``."""
    return _Geometry(geometry.groups, geometry.kernel, geometry.stride, geometry.dilation,
                     geometry.pad_begin, geometry.pad_end)  # fmt: skip


class NativeMatMul(_NativeOp):
    """``y = act(x W^T + bias)`` by the library's kernel, on the calling thread, without onnxruntime.

    Args:
        layout: ``unstructured``, ``N:M`` or ``RxC``.
        shape: (N outputs, K inputs).
        values: the kept values (``[blocks, R, C]`` or flat), of a type in ``VALUE_TYPES``.
        indices: uint8, the gap stream.
        bias: ``[N]`` or ``None``.
        activation: a key of ``ACTIVATION_CODES``.
        alpha: slope of LeakyRelu, lower bound of Clip.
        beta: upper bound of Clip.
        isa: one of ``isas()``; ``None`` is the best (or ``SPARSECC_ISA``).
        layout_version: version of the packed format.

    Raises:
        ModelError: the packed weight is malformed; the message is the library's.
        RuntimeMissingError: the library is missing or cannot be loaded.
    """

    _family = "matmul"

    def __init__(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[Any],
        indices: NDArray[np.uint8],
        *,
        bias: NDArray[np.float32] | None = None,
        activation: str = "",
        alpha: float = 0.0,
        beta: float = 0.0,
        isa: str | None = None,
        layout_version: int = 1,
    ) -> None:
        self.shape = shape
        super().__init__(
            layout, shape, values, indices, bias=bias, activation=activation, alpha=alpha, beta=beta,
            isa=isa, layout_version=layout_version,
        )  # fmt: skip

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return y, ``[..., N]``, of x, float32 ``[..., K]``.

        Raises:
            UsageError: x does not fit.
        """
        x, y = rows_and_result(x, self.shape)
        rows = x.size // self.shape[1]
        self._call("run", self._handle, x.ctypes.data, rows, y.ctypes.data, None)
        return y

    def kernel(self, rows: int) -> str:
        """Return the name of the kernel that would run for that many rows of x."""
        return str(self._library.sparsecc_matmul_kernel(self._handle, rows).decode())

    def balance(self, rows: int, parts: int) -> float:
        """Return the work of the largest part over the mean part when that many rows are cut for ``parts`` threads.

        From the stored weights alone; 1 is perfect. ``parts`` is rounded up to a power of two of at most 64.
        """
        return float(self._library.sparsecc_matmul_balance(self._handle, rows, parts))


class NativeConv(_NativeOp):
    """A convolution by the library's kernel, on the calling thread, without onnxruntime.

    Args:
        layout: as in ``NativeMatMul``.
        shape: (Cout, Cin / groups * kh * kw).
        values: as in ``NativeMatMul``.
        indices: as in ``NativeMatMul``.
        geometry: kernel, strides, pads, dilations, groups.
        bias: ``[Cout]`` or ``None``.
        activation: as in ``NativeMatMul``.
        alpha: as in ``NativeMatMul``.
        beta: as in ``NativeMatMul``.
        isa: as in ``NativeMatMul``.
        layout_version: as in ``NativeMatMul``.

    Raises:
        ModelError: the packed weight or the geometry is malformed; the message is the library's.
        RuntimeMissingError: the library is missing or cannot be loaded.
    """

    _family = "conv"

    def __init__(
        self,
        layout: str,
        shape: tuple[int, int],
        values: NDArray[Any],
        indices: NDArray[np.uint8],
        geometry: ConvGeometry,
        *,
        bias: NDArray[np.float32] | None = None,
        activation: str = "",
        alpha: float = 0.0,
        beta: float = 0.0,
        isa: str | None = None,
        layout_version: int = 1,
    ) -> None:
        self.shape = shape
        self.channels = shape[1] // (geometry.kernel[0] * geometry.kernel[1]) * geometry.groups
        super().__init__(
            layout, shape, values, indices, bias=bias, activation=activation, alpha=alpha, beta=beta,
            isa=isa, layout_version=layout_version,
            geometry=geometry_struct(geometry),
        )  # fmt: skip

    def __call__(
        self, x: NDArray[np.float32], added: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return y, ``[B, Cout, H', W']``, of x, float32 ``[B, C, H, W]``, and of what is added under the activation.

        Raises:
            UsageError: x does not fit, or ``added`` is not of the shape of y.
        """
        x = np.asarray(x, np.float32, order="C")
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise UsageError(f"x has shape {x.shape}, expected [B,{self.channels},H,W]")
        size = (ctypes.c_int64 * 2)()
        self._call("output_size", self._handle, (ctypes.c_int64 * 2)(*x.shape[2:]), size)
        y = np.empty((x.shape[0], self.shape[0], *size), np.float32)
        if added is None:
            self._call("run", self._handle, x.ctypes.data, *x.shape, y.ctypes.data, None)
            return y
        added = np.asarray(added, np.float32, order="C")
        if added.shape != y.shape:
            raise UsageError(f"added has shape {added.shape}, the result {y.shape}")
        self._call("add_run", self._handle, x.ctypes.data, added.ctypes.data, *x.shape, y.ctypes.data, None)
        return y

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        return str(self._library.sparsecc_conv_kernel(self._handle).decode())
