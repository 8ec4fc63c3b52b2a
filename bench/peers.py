"""Other engines on the same layer. All are optional: one that cannot be used is named with the reason.

What each computes, and where that differs from ours in its favour:

- ``openvino``: dense, in fp32, bf16 and int8. Its int8 has a scale of x given beforehand, as a static model has.
- ``torch``: dense fp32, and its CSR product, which leaves y transposed.
- ``mkl``: CSR by ``mkl_sparse_s_mv``/``mm`` on row-major x and y; "x^T" gets x transposed and leaves y so.
- ``scipy``: CSR, given x transposed, leaving y so; never more than one thread.
- ``deepsparse``: dense and sparse fp32 from an ONNX file. Not maintained any more: 1.8.0 runs with numpy 1 only (with
  numpy 2 its results are wrong, which is noticed here), and its licence allows evaluation, so it is no requirement.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from layers import BYTES, EXACT, ROUNDED, Call, Engine, Layer, aligned, check, layer_model
from onnx import helper, numpy_helper

from sparsecc.sparse import Pattern, QuantizedTensor

Made = tuple[Call, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Peer:
    """An engine of others: what it needs to be there and how to make a call of one layer.

    ``sparse`` ones get the pruned weight, the others the dense one. ``works`` says more than the import of
    ``module`` does: it returns why the engine cannot be used here, or None.
    """

    name: str
    module: str
    make: Callable[[Layer], Made]
    sparse: bool = False
    spins: bool = True
    tolerance: float = EXACT
    works: Callable[[], str | None] = lambda: None

    def missing(self) -> str | None:
        """Return why the engine cannot be used, or None."""
        try:
            if self.module == "deepsparse":
                prepare_deepsparse()
            importlib.import_module(self.module)
        except Exception as error:  # a broken installation raises anything
            return one_line(error)
        return self.works()

    def engine(self, layer: Layer) -> Engine:
        """Return a call of a layer, run once and compared with NumPy.

        Raises:
            PeerError: it fails or computes something else.
        """
        try:
            call, result = self.make(layer)
            facts = {"pattern": layer.pattern, "sparsity": layer.sparsity} if self.sparse else {}
            engine = Engine(self.name, call, result, self.tolerance, spins=self.spins, **facts)
            check(engine, layer)
        except Exception as error:
            raise PeerError(one_line(error)) from error
        return engine


class PeerError(Exception):
    """A peer cannot do a layer, in one line."""


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150] or 'no message'}"


# ---- OpenVINO ------------------------------------------------------------------------------------------


@cache
def openvino_core() -> Any:
    import openvino

    return openvino.Core()


def openvino_compile(model: onnx.ModelProto | Path, precision: str, threads: int) -> Any:
    """Return an OpenVINO model compiled for one stream of ``threads`` threads."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    source = str(model) if isinstance(model, Path) else io.BytesIO(model.SerializeToString())
    core = openvino_core()
    return core.compile_model(core.read_model(source), "CPU", settings)


def openvino_call(model: onnx.ModelProto, precision: str, layer: Layer) -> Made:
    import openvino

    request = openvino_compile(model, precision, layer.threads).create_infer_request()
    y = aligned((layer.x.shape[0], layer.weight.shape[0]))
    request.set_input_tensor(openvino.Tensor(layer.x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
    return request.infer, lambda: y


def openvino_dense(precision: str) -> Callable[[Layer], Made]:
    def make(layer: Layer) -> Made:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        model = layer_model(node, {"w": np.ascontiguousarray(layer.weight.T)}, layer)
        return openvino_call(model, precision, layer)

    return make


def openvino_int8(layer: Layer) -> Made:
    """Static quantisation as QuantizeLinear/DequantizeLinear around the product."""
    tensor = QuantizedTensor.encode(layer.weight, Pattern.parse("16x4"))
    low, high = min(0.0, float(layer.x.min())), max(0.0, float(layer.x.max()))
    scale = np.float32((high - low) / 255 or 1.0)
    constants = {
        "codes": np.ascontiguousarray(tensor.decode_codes().T),
        "scales": tensor.scales,
        "zeros": np.zeros(len(tensor.scales), np.int8),
        "scale": np.array(scale),
        "zero": np.array(np.clip(round(-low / float(scale)), 0, 255), np.uint8),
    }
    model = layer_model(helper.make_node("MatMul", ["xd", "wd"], ["y"]), {}, layer)
    graph = model.graph
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    product = graph.node.pop()
    graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["wd"], axis=1),
            product,
        ]
    )
    return openvino_call(model, "f32", layer)


def openvino_lacks(capability: str) -> Callable[[], str | None]:
    def why() -> str | None:
        if capability == "BF16" and in_child() is not None:
            return "not on the instruction set that OpenVINO is held to"
        known = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if capability in known else f"OpenVINO has no {capability} on this machine"

    return why


# ---- torch ---------------------------------------------------------------------------------------------


def torch_dense(layer: Layer) -> Made:
    import torch

    torch.set_num_threads(layer.threads)
    x, weight = torch.from_numpy(layer.x), torch.from_numpy(np.ascontiguousarray(layer.weight.T))
    y = torch.from_numpy(aligned((layer.x.shape[0], layer.weight.shape[0])))
    return (lambda: torch.mm(x, weight, out=y)), y.numpy


def torch_csr(layer: Layer) -> Made:
    import torch

    torch.set_num_threads(layer.threads)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    weight = csr(layer)
    parts = (weight.indptr, weight.indices, weight.data)
    matrix = torch.sparse_csr_tensor(*map(torch.from_numpy, parts), size=weight.shape, check_invariants=False)
    x = torch.from_numpy(np.ascontiguousarray(layer.x.T))
    y = torch.from_numpy(aligned((layer.weight.shape[0], layer.x.shape[0])))
    return (lambda: torch.mm(matrix, x, out=y)), lambda: y.numpy().T


# ---- MKL and scipy -------------------------------------------------------------------------------------


def csr(layer: Layer) -> Any:
    """Return the weight as a scipy CSR matrix with 32-bit indices."""
    from scipy import sparse

    return sparse.csr_matrix(layer.weight)


class MatrixDescription(ctypes.Structure):
    """``struct matrix_descr`` of mkl_spblas.h."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


MKL_GENERAL = MatrixDescription(20, 0, 0)
MKL_PLAIN, MKL_ROW_MAJOR, MKL_COLUMN_MAJOR = 10, 101, 102  # no transpose; layouts of dense matrices
MKL_SEQUENTIAL, MKL_INTEL = 1, 0  # threading layers


@cache
def mkl(sequential: bool) -> ctypes.CDLL:
    """Return MKL from the wheel; its threading layer is chosen once per process."""
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # idle threads of its pool sleep at once
    folder = Path(sys.prefix) / "lib"
    library = ctypes.CDLL(str(sorted(folder.glob("libmkl_rt.so*"))[-1]))
    library.MKL_Set_Threading_Layer(MKL_SEQUENTIAL if sequential else MKL_INTEL)
    return library


def mkl_missing() -> str | None:
    found = any((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    return None if found else f"the mkl wheel is not installed in {sys.prefix}"


def mkl_checked(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"MKL sparse status {status}")


def mkl_csr(transposed: bool) -> Callable[[Layer], Made]:
    """Product of W and x^T: x is taken as it lies (its columns are the vectors) or, ``transposed``, as [K, M]."""

    def make(layer: Layer) -> Made:
        library, weight = mkl(layer.threads == 1), csr(layer)
        library.MKL_Set_Num_Threads(layer.threads)
        rows, (outputs, inputs) = layer.x.shape[0], layer.weight.shape
        pointers = [weight.indptr, weight.indptr[1:], weight.indices, weight.data]
        handle = ctypes.c_void_p()
        addresses = [ctypes.c_void_p(array.ctypes.data) for array in pointers]
        mkl_checked(library.mkl_sparse_s_create_csr(ctypes.byref(handle), 0, outputs, inputs, *addresses))
        order = MKL_ROW_MAJOR if transposed else MKL_COLUMN_MAJOR
        if rows == 1:
            mkl_checked(library.mkl_sparse_set_mv_hint(handle, MKL_PLAIN, MKL_GENERAL, 100000))
        else:
            mkl_checked(library.mkl_sparse_set_mm_hint(handle, MKL_PLAIN, MKL_GENERAL, order, rows, 100000))
        mkl_checked(library.mkl_sparse_optimize(handle))
        x = aligned((inputs, rows) if transposed else (rows, inputs))
        x[:] = layer.x.T if transposed else layer.x
        y = aligned((outputs, rows) if transposed else (rows, outputs))
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        to, out = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
        steps = (rows, rows) if transposed else (inputs, outputs)
        mv, mm = library.mkl_sparse_s_mv, library.mkl_sparse_s_mm

        def call() -> object:
            if rows == 1:
                return mv(MKL_PLAIN, one, handle, MKL_GENERAL, to, zero, out)
            return mm(MKL_PLAIN, one, handle, MKL_GENERAL, order, to, rows, steps[0], zero, out, steps[1])

        call.holds = (weight, x)  # type: ignore[attr-defined]  # MKL keeps pointers only
        return call, lambda: y.T if transposed else y

    return make


def scipy_csr(layer: Layer) -> Made:
    weight, x = csr(layer), np.ascontiguousarray(layer.x.T)
    kept: list[np.ndarray] = [x]

    def call() -> object:
        kept[0] = weight @ x
        return kept[0]

    return call, lambda: kept[0].T


# ---- DeepSparse ----------------------------------------------------------------------------------------


def prepare_deepsparse() -> None:
    """Give deepsparse the module of onnx that it imports and that onnx has dropped; nothing is to be sent home."""
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    mapping = types.ModuleType("onnx.mapping")
    numbers = [number for number in onnx.TensorProto.DataType.values() if number]
    vars(mapping)["TENSOR_TYPE_TO_NP_TYPE"] = {n: helper.tensor_dtype_to_np_dtype(n) for n in numbers}
    sys.modules.setdefault("onnx.mapping", mapping)


def deepsparse(layer: Layer) -> Made:
    from deepsparse import compile_model

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = layer_model(node, {"w": np.ascontiguousarray(layer.weight.T)}, layer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(model, path)
        engine = compile_model(str(path), batch_size=layer.x.shape[0], num_cores=layer.threads)
    kept: list[np.ndarray] = [layer.x]

    def call() -> object:
        kept[0] = engine.run([layer.x])[0]
        return kept[0]

    return call, lambda: kept[0]


PEERS = (
    Peer("openvino fp32", "openvino", openvino_dense("f32")),
    Peer(
        "openvino bf16", "openvino", openvino_dense("bf16"), tolerance=ROUNDED, works=openvino_lacks("BF16")
    ),
    Peer("openvino int8", "openvino", openvino_int8, tolerance=BYTES, works=openvino_lacks("INT8")),
    Peer("torch fp32", "torch", torch_dense),
    Peer("torch csr", "torch", torch_csr, sparse=True),
    Peer("mkl csr", "scipy", mkl_csr(False), sparse=True, works=mkl_missing),
    Peer("mkl csr, x^T", "scipy", mkl_csr(True), sparse=True, works=mkl_missing),
    Peer("scipy csr", "scipy", scipy_csr, sparse=True, spins=False),
    Peer("deepsparse fp32", "deepsparse", deepsparse),
    Peer("deepsparse sparse", "deepsparse", deepsparse, sparse=True),
)


def usable(peers: Sequence[Peer] = PEERS) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that are there, and why the others are not."""
    reasons = {peer.name: peer.missing() for peer in peers}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return [peer for peer in peers if peer.name not in missing], missing


# ---- OpenVINO as on a machine without AMX --------------------------------------------------------------

CHILD = "SPARSECC_BENCH_OPENVINO_ONLY"  # where a child process writes; set in no other


def has_amx() -> bool:
    """Whether the processor has AMX."""
    facts = Path("/proc/cpuinfo")
    return facts.exists() and " amx_int8 " in facts.read_text()


def in_child() -> Path | None:
    """Return where this process has to write its results, if it is the child of `limited_openvino`."""
    path = os.environ.get(CHILD)
    return Path(path) if path else None


def limited_openvino(isa: str | None) -> Iterator[dict[str, Any]]:
    """Run this very command again with OpenVINO held to an instruction set, and yield the child's results.

    oneDNN reads the variable once per process, so that this cannot be interleaved with the rest: the child's ratios
    are to onnxruntime in the child.
    """
    isa = isa or ("AVX512_CORE_VNNI" if has_amx() else None)
    if isa is None or in_child() is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        environment = os.environ | {CHILD: str(path), "ONEDNN_MAX_CPU_ISA": isa}
        subprocess.run([sys.executable, *sys.argv], env=environment, check=True, stdout=subprocess.DEVNULL)
        for result in json.loads(path.read_text()):
            yield result | {"engine": f"{result['engine']} ({isa})"}
