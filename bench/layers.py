"""One linear layer as every engine computes it: what the benchmarks of kernels share.

All engines of a layer read the same float32 ``x`` and run in this process in turn, slice by slice, for many rounds;
a ratio is the median over the rounds of (baseline time / engine time), so that drift of the machine hits all alike.
Baselines are onnxruntime's fp32 MatMul and its ``DynamicQuantizeMatMul``; what quantises counts quantising.

With one thread the clock is the processor time of the whole process: an engine that hands its work to a thread of
its own pays for it like one that works on the calling thread. With more it is wall time, which is only worth
something on an idle machine, and there is a pause after every engine whose threads go on spinning when idle.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper
from rich.console import Console
from rich.table import Table

from sparsecc.runtime import (
    NativeInt8MatMul,
    NativeMatMul,
    int8_isas,
    isas,
    library_version,
    register,
)
from sparsecc.sparse import FLOATS, Floats, Pattern, QuantizedTensor, SparseTensor, keep_mask, rounded
from sparsecc.verify.timing import Clock, time_interleaved

SHAPES = ("384x1536", "768x768", "768x3072", "3072x768", "1024x4096", "4096x4096")  # inputs x outputs
ROWS = (1, 16, 128, 512)
DOMAINS = {"": 17, "com.microsoft": 1, "ai.sparsecc": 1}
ORT, ORT_INT8 = "onnxruntime fp32", "onnxruntime int8"
EXACT, ROUNDED, BYTES = 1e-5, 0.02, 0.05  # relative distances allowed: fp32, bf16, int8
STORED = {"fp32": EXACT, "fp16": 1e-3, "bf16": 5e-3}  # the same for weights stored so
SPIN_SECONDS = 0.12  # after which the idle threads of every engine seen here have gone to sleep

Call = Callable[[], object]
Command = TypeVar("Command", bound=Callable[..., object])


@dataclass(frozen=True)
class Layer:
    """``y [M, N] = x [M, K] weight^T`` with ``weight`` float32 [N, K], pruned for the engines that use zeros."""

    x: np.ndarray
    weight: np.ndarray
    threads: int
    pattern: str = "dense"
    sparsity: float = 0.0


@dataclass(frozen=True)
class Engine:
    """Something that computes one layer: ``call`` runs it once, ``result`` returns what it computed last."""

    name: str
    call: Call
    result: Callable[[], np.ndarray]
    tolerance: float = EXACT
    kernel: str = ""
    spins: bool = False
    pattern: str = "dense"
    sparsity: float = 0.0


@dataclass(frozen=True)
class Result:
    """One engine on one layer. Ratios are baseline time over its time; times in microseconds."""

    inputs: int
    outputs: int
    rows: int
    pattern: str
    sparsity: float
    engine: str
    kernel: str
    microseconds: float
    fp32_microseconds: float
    int8_microseconds: float
    ratio_to_fp32: float
    ratio_to_int8: float


# ---- engines that are always there ---------------------------------------------------------------------


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 zeros on a cache line, where onnxruntime's own allocator puts tensors."""
    size = int(np.prod(shape))
    whole = np.zeros(size + 16, np.float32)
    skip = -whole.ctypes.data % 64 // 4
    return whole[skip : skip + size].reshape(shape)


def layer_model(node: onnx.NodeProto, constants: dict[str, np.ndarray], layer: Layer) -> onnx.ModelProto:
    """Return the model of one node x -> y."""
    rows, outputs = layer.x.shape[0], layer.weight.shape[0]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, layer.x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, outputs])],
        [ir.to_proto(ir.Tensor(array, name=name)) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid(name, version) for name, version in DOMAINS.items()]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def session_engine(
    name: str, node: onnx.NodeProto, constants: dict[str, np.ndarray], layer: Layer, **facts: Any
) -> Engine:
    """Return a session of one node that reads ``layer.x`` and writes y through bound buffers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = layer.threads
    register(options)
    model = layer_model(node, constants, layer)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    y = aligned((layer.x.shape[0], layer.weight.shape[0]))
    binding.bind_cpu_input("x", layer.x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    call = partial(session.run_with_iobinding, binding)
    return Engine(name, call, lambda: y, spins=True, pattern=layer.pattern, sparsity=layer.sparsity, **facts)


def dense_fp32(layer: Layer) -> Engine:
    """Return onnxruntime's MatMul."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return session_engine(ORT, node, {"w": np.ascontiguousarray(layer.weight.T)}, layer)


def dense_int8(layer: Layer) -> Engine:
    """Return onnxruntime's DynamicQuantizeMatMul: int8 weights, one scale per output, x quantised inside."""
    tensor = QuantizedTensor.encode(layer.weight, Pattern.parse("16x4"))
    constants = {"w": np.ascontiguousarray(tensor.decode_codes().T), "scale": tensor.scales}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")
    return session_engine(ORT_INT8, node, constants, layer, tolerance=BYTES)


def sparse_floats(layer: Layer, isa: str | None, floats: Floats = "fp32") -> list[Engine]:
    """Return our fp32 operator, values stored as ``floats``, and, on one thread, its kernel through the C interface."""
    weight = rounded(layer.weight, floats)
    tensor = SparseTensor.encode(weight, Pattern.parse(layer.pattern)).stored_as(floats)
    op = NativeMatMul(str(tensor.pattern), tensor.shape, tensor.values, tensor.indices, isa=isa)
    facts = {"kernel": op.kernel(layer.x.shape[0]), "tolerance": STORED[floats]}
    constants = {
        "values": tensor.values,
        "indices": tensor.indices,
        "shape": np.array(tensor.shape, np.int64),
        "bias": np.zeros(tensor.shape[0], np.float32),
    }
    operator = "BlockSparseMatMul" if tensor.pattern.kind == "block" else "SparseMatMul"
    return our_engines(f"sparsecc {floats}", operator, constants, layer, op, facts)


def sparse_int8(layer: Layer, isa: str | None) -> list[Engine]:
    """Return our int8 operator, which quantises x inside, and its kernel through the C interface."""
    tensor = QuantizedTensor.encode(layer.weight, Pattern.parse(layer.pattern))
    op = NativeInt8MatMul(layer.pattern, tensor.shape, tensor.values, tensor.indices, tensor.scales, isa=isa)
    constants = {
        "values": tensor.values,
        "indices": tensor.indices,
        "shape": np.array(tensor.shape, np.int64),
        "scales": tensor.scales,
        "bias": np.zeros(tensor.shape[0], np.float32),
    }
    facts = {"kernel": op.kernel(layer.x.shape[0]), "tolerance": BYTES}
    operator = "BlockSparseMatMulInt8" if tensor.pattern.kind == "block" else "SparseMatMulInt8"
    return our_engines("sparsecc int8", operator, constants, layer, op, facts)


OURS: dict[str, Callable[[Layer, str | None], list[Engine]]] = {
    **{f"sparsecc {floats}": partial(sparse_floats, floats=floats) for floats in FLOATS},
    "sparsecc int8": sparse_int8,
}


def our_engines(
    name: str,
    operator: str,
    constants: dict[str, np.ndarray],
    layer: Layer,
    op: NativeMatMul | NativeInt8MatMul,
    facts: dict[str, Any],
) -> list[Engine]:
    """Return the operator in a session, as a model runs it, and the kernel without onnxruntime around it."""
    node = helper.make_node(operator, ["x", *constants], ["y"], domain="ai.sparsecc",
                            layout=layer.pattern, layout_version=1)  # fmt: skip
    engines = [session_engine(name, node, constants, layer, **facts)]
    if layer.threads == 1:
        y = aligned((layer.x.shape[0], layer.weight.shape[0]))
        error = ctypes.create_string_buffer(256)
        run = getattr(op._library, f"sparsecc_{op._family}_run")
        arguments = (op._handle, layer.x.ctypes.data, layer.x.shape[0], y.ctypes.data, None, error, 256)

        def call() -> object:
            return run(*arguments)

        call.holds = op  # type: ignore[attr-defined]  # the packed weight must outlive the call
        engines.append(
            Engine(f"{name}, C", call, lambda: y, pattern=layer.pattern, sparsity=layer.sparsity, **facts)
        )
    return engines


# ---- measuring -----------------------------------------------------------------------------------------


class WrongResultError(Exception):
    """An engine computes something else than the product."""


def check(engine: Engine, layer: Layer) -> None:
    """Run an engine once and compare it with NumPy.

    Raises:
        WrongResultError: it computes something else.
    """
    engine.call()
    expected = layer.x @ layer.weight.T
    error = float(np.linalg.norm(engine.result() - expected) / (np.linalg.norm(expected) or 1.0))
    if not error <= engine.tolerance:
        what = " ".join(filter(None, (engine.name, engine.pattern, engine.kernel)))
        raise WrongResultError(f"{what} differs from NumPy by {error:.1e}")


def leaves_caller(engine: Engine, attempts: int = 5) -> bool:
    """Whether threads other than the calling one do some of the work, every time it is looked at."""
    for _ in range(attempts):  # a thread that just starts or stops is no worker
        caller, process = time.thread_time(), time.process_time()
        stop = time.perf_counter() + 0.004
        while time.perf_counter() < stop:
            engine.call()
        caller, process = time.thread_time() - caller, time.process_time() - process
        if process - caller < 0.1 * process:
            return False
    return True


def clock_of(threads: int) -> Clock:
    """Return the clock that is fair to engines with threads of their own."""
    return "process" if threads == 1 else "wall"


def time_engines(engines: Sequence[Engine], threads: int, rounds: int, seconds: float) -> list[list[float]]:
    """Return the seconds per call of each engine in each round."""
    pauses = [SPIN_SECONDS if threads > 1 and engine.spins else 0.0 for engine in engines]
    calls = [engine.call for engine in engines]
    times, _ = time_interleaved(
        calls, clock=clock_of(threads), rounds=rounds, max_seconds=seconds, pauses=pauses
    )
    return times


def results_of(
    engines: Sequence[Engine], times: list[list[float]], sizes: tuple[int, int, int]
) -> Iterator[Result]:
    """Compare every engine with the first two, which are the baselines."""
    fp32, int8 = times[:2]
    for engine, taken in zip(engines, times, strict=True):
        to_fp32, to_int8 = (
            round(statistics.median(a / b for a, b in zip(base, taken, strict=True)), 3)
            for base in (fp32, int8)
        )
        own, fp32_us, int8_us = (round(statistics.median(t) * 1e6, 2) for t in (taken, fp32, int8))
        yield Result(*sizes, engine.pattern, engine.sparsity, engine.name, engine.kernel, own, fp32_us, int8_us,
                     to_fp32, to_int8)  # fmt: skip


def pruned(layer: Layer, cell: tuple[str, float], rng: np.random.Generator) -> Layer:
    """Return the layer with random zeros of a pattern."""
    text, sparsity = cell
    pattern = Pattern.parse(text)
    mask = keep_mask(rng.random(layer.weight.shape), pattern, None if pattern.kind == "nm" else sparsity)
    return Layer(layer.x, layer.weight * mask, layer.threads, text, sparsity)


def cells_of(patterns: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    """Pair patterns with sparsities; N:M has only its own."""
    cells: list[tuple[str, float]] = []
    for text in patterns:
        pattern = Pattern.parse(text)
        implied = [1 - pattern.n / pattern.m] if pattern.kind == "nm" else []
        cells += [(text, sparsity) for sparsity in implied or sparsities]
    return cells


# ---- reporting -----------------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, object]:
    """Return what the figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": clock_of(threads),
        "isas": list(isas()),
        "int8_isas": list(int8_isas()),
        "sparsecc": library_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Stay on that many cores, so that neither side is helped by another."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table_of(results: Sequence[Result], base: str) -> Table:
    """Times faster than a baseline: geometric mean over the shapes, smallest and largest in brackets."""
    table = Table(title=f"times faster than dense onnxruntime {base}: geometric mean over shapes (min-max)")
    rows = sorted({r.rows for r in results})
    for name in ("pattern", "zeros", "engine", *(f"M={m}" for m in rows)):
        table.add_column(name, justify="right")
    for key in dict.fromkeys((r.pattern, r.sparsity, r.engine) for r in results):
        cells = []
        for m in rows:
            ratios = [
                float(getattr(r, f"ratio_to_{base}"))
                for r in results
                if (r.pattern, r.sparsity, r.engine, r.rows) == (*key, m)
            ]
            spread = f" ({min(ratios):.1f}-{max(ratios):.1f})" if len(ratios) > 1 else ""
            cells.append(f"{statistics.geometric_mean(ratios):.2f}{spread}" if ratios else "")
        table.add_row(key[0], f"{key[1]:.0%}" if key[1] else "", key[2], *cells)
    return table


def write_json(path: Path, results: Sequence[Result], threads: int, **facts: object) -> None:
    """Write results with the facts of the machine."""
    document = {"machine": machine(threads), **facts, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def layer_options(patterns: Sequence[str], sparsities: Sequence[float]) -> Callable[[Command], Command]:
    """Return a decorator with the options that every benchmark of layers has."""
    options = [
        click.option("--shape", "shapes", multiple=True, default=SHAPES, help="Inputs x outputs: 768x3072."),
        click.option("--rows", "-m", multiple=True, type=int, default=ROWS, help="Rows of x."),
        click.option(
            "--pattern", "patterns", multiple=True, default=patterns, help="unstructured, N:M, RxC."
        ),
        click.option("--sparsity", "sparsities", multiple=True, type=float, default=sparsities),
        click.option("--rounds", type=int, default=21),
        click.option(
            "--seconds", type=float, default=20.0, help="Most seconds per shape and number of rows."
        ),
        click.option("--threads", type=click.IntRange(min=1), default=1),
        click.option("--isa", default=None, help="Force an instruction set (see `sparsecc doctor`)."),
        click.option("--peers/--no-peers", default=True, help="Time the other engines that are installed."),
        click.option(
            "--openvino-isa",
            default=None,
            help="Time OpenVINO again, in a process of its own, with ONEDNN_MAX_CPU_ISA set to this "
            "[default: AVX512_CORE_VNNI where the machine has AMX].",
        ),
        click.option("--json", "path", type=click.Path(path_type=Path), help="Also write results here."),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def sizes_of(shapes: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (inputs, outputs, rows) of every layer asked for."""
    for shape in shapes:
        inputs, outputs = (int(part) for part in shape.split("x"))
        for m in rows:
            yield inputs, outputs, m


def console() -> Console:
    """Return where results go: wide enough for the tables when it is no terminal."""
    return Console() if os.isatty(1) else Console(width=160)
