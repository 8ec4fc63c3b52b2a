"""Kernels against dense onnxruntime, one linear layer at a time.

Every engine runs in this process on the same arrays, in turn, for many short rounds; a ratio is the median
over the rounds of (dense time / sparse time), so that drift of the machine hits both sides alike. The dense
side is onnxruntime's fp32 MatMul with bound buffers; the sparse side is the library's C interface through
ctypes on one thread, and its operator inside an onnxruntime session (whose threads it uses) on several.

    python bench/kernels.py --json bench/results/kernels.json
    python bench/kernels.py --shape 768x768 --rows 1 --rows 128 --pattern 16x1 --sparsity 0.9
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from sparsecc.runtime import NativeMatMul, isas, library_version, register
from sparsecc.sparse import Pattern, SparseTensor, keep_mask

SHAPES = ("384x1536", "768x768", "768x3072", "3072x768", "1024x4096", "4096x4096")  # K x N, as in peers.md
ROWS = (1, 16, 128, 512)
PATTERNS = ("unstructured", "2:4", "1:4", "16x1", "32x1", "64x1")
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SLICE_SECONDS = 0.004  # one engine's turn in one round


@dataclass(frozen=True)
class Result:
    """One engine on one layer. ``ratio`` is dense time over its time; times in microseconds."""

    inputs: int
    outputs: int
    rows: int
    pattern: str
    sparsity: float
    kernel: str
    microseconds: float
    dense_microseconds: float
    ratio: float


@dataclass(frozen=True)
class Engine:
    """Something that computes one layer; ``call`` runs it once."""

    pattern: str
    sparsity: float
    kernel: str
    call: Callable[[], object]
    holds: object  # what must live as long as the call


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 zeros on a cache line, where onnxruntime's own allocator puts tensors."""
    size = int(np.prod(shape))
    whole = np.zeros(size + 16, np.float32)
    skip = -whole.ctypes.data % 64 // 4
    return whole[skip : skip + size].reshape(shape)


def bound_session(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], x: np.ndarray, outputs: int, threads: int
) -> tuple[Callable[[], object], np.ndarray]:
    """Return a call of a model of one node x -> y on bound buffers, and y."""
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [x.shape[0], outputs])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.sparsecc", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    y = aligned((x.shape[0], outputs))
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return partial(session.run_with_iobinding, binding), y


def dense_engine(weight: np.ndarray, x: np.ndarray, threads: int) -> tuple[Callable[[], object], np.ndarray]:
    """Return a call of onnxruntime's MatMul with weight [N, K], and its y."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return bound_session(node, {"w": np.ascontiguousarray(weight.T)}, x, weight.shape[0], threads)


def operator_engine(
    tensor: SparseTensor, x: np.ndarray, threads: int
) -> tuple[Callable[[], object], np.ndarray]:
    """Return a call of the library's operator in a session, and its y."""
    block = "Block" if tensor.pattern.kind == "block" else ""
    constants = {
        "values": tensor.values,
        "indices": tensor.indices,
        "shape": np.array(tensor.shape, np.int64),
        "bias": np.zeros(tensor.shape[0], np.float32),
    }
    node = helper.make_node(f"{block}SparseMatMul", ["x", *constants], ["y"], domain="ai.sparsecc",
                            layout=str(tensor.pattern), layout_version=1)  # fmt: skip
    return bound_session(node, constants, x, tensor.shape[0], threads)


def direct_engine(op: NativeMatMul, x: np.ndarray) -> tuple[Callable[[], object], np.ndarray]:
    """Return a call of the C interface with its arguments converted once, and its y."""
    y = aligned((x.shape[0], op.shape[0]))
    error = ctypes.create_string_buffer(256)
    run = op._library.sparsecc_matmul_run
    return partial(run, op._handle, x.ctypes.data, x.shape[0], y.ctypes.data, None, error, 256), y


def sparse_engine(
    rng: np.random.Generator,
    x: np.ndarray,
    outputs: int,
    cell: tuple[str, float],
    threads: int,
    isa: str | None,
) -> Engine:
    """Return the library's kernel on random weights with a random mask, checked once against NumPy."""
    text, sparsity = cell
    pattern = Pattern.parse(text)
    weight = rng.standard_normal((outputs, x.shape[1])).astype(np.float32)
    weight *= keep_mask(rng.random(weight.shape), pattern, None if pattern.kind == "nm" else sparsity)
    tensor = SparseTensor.encode(weight, pattern)
    op = NativeMatMul(str(pattern), tensor.shape, tensor.values, tensor.indices, isa=isa)
    call, y = direct_engine(op, x) if threads == 1 else operator_engine(tensor, x, threads)
    call()
    np.testing.assert_allclose(y, x @ weight.T, rtol=0, atol=np.finfo(np.float32).eps * x.shape[1] * 25)
    return Engine(text, sparsity, op.kernel(x.shape[0]), call, (op, x, y))


def interleave(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds per call of each engine in each round, engines taking turns."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(SLICE_SECONDS / (time.perf_counter() - start + 1e-9))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, taken in zip(calls, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken.append((time.perf_counter() - start) / count)
    return times


def measure(
    inputs: int,
    outputs: int,
    rows: int,
    cells: list[tuple[str, float]],
    rounds: int,
    threads: int,
    isa: str | None,
) -> Iterator[Result]:
    """Measure all cells (pattern, sparsity) of one layer and number of rows."""
    rng = np.random.default_rng(0)
    x = aligned((rows, inputs))
    x[:] = rng.standard_normal((rows, inputs))
    dense, _y = dense_engine(rng.standard_normal((outputs, inputs)).astype(np.float32), x, threads)
    engines = [sparse_engine(rng, x, outputs, cell, threads, isa) for cell in cells]
    first, *others = interleave([dense, *(engine.call for engine in engines)], rounds)
    for engine, taken in zip(engines, others, strict=True):
        ratio = statistics.median(a / b for a, b in zip(first, taken, strict=True))
        microseconds, dense_microseconds = (round(statistics.median(t) * 1e6, 2) for t in (taken, first))
        yield Result(inputs, outputs, rows, engine.pattern, engine.sparsity, engine.kernel, microseconds,
                     dense_microseconds, round(ratio, 3))  # fmt: skip


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
        "isas": list(isas()),
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


def table_of(results: list[Result]) -> Table:
    """Times faster than dense: geometric mean over the shapes, smallest and largest in brackets."""
    table = Table(title="times faster than dense onnxruntime fp32: geometric mean over shapes (min-max)")
    rows = sorted({r.rows for r in results})
    for name in ("pattern", "sparsity", *(f"M={m}" for m in rows)):
        table.add_column(name, justify="right")
    for pattern, sparsity in dict.fromkeys((r.pattern, r.sparsity) for r in results):
        cells = []
        for m in rows:
            ratios = [r.ratio for r in results if (r.pattern, r.sparsity, r.rows) == (pattern, sparsity, m)]
            mean = statistics.geometric_mean(ratios)
            spread = f" ({min(ratios):.1f}-{max(ratios):.1f})" if len(ratios) > 1 else ""
            cells.append(f"{mean:.2f}{spread}")
        table.add_row(pattern, f"{sparsity:.0%}", *cells)
    return table


def cells_of(patterns: tuple[str, ...], sparsities: tuple[float, ...]) -> list[tuple[str, float]]:
    """Pair patterns with sparsities; N:M has only its own."""
    cells: list[tuple[str, float]] = []
    for text in patterns:
        pattern = Pattern.parse(text)
        cells += (
            [(text, 1 - pattern.n / pattern.m)] if pattern.kind == "nm" else [(text, s) for s in sparsities]
        )
    return cells


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="Inputs x outputs, e.g. 768x3072.")
@click.option("--rows", "-m", multiple=True, type=int, default=ROWS, help="Rows of x.")
@click.option("--pattern", "patterns", multiple=True, default=PATTERNS, help="unstructured, N:M or RxC.")
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=SPARSITIES)
@click.option("--rounds", type=int, default=21)
@click.option("--threads", type=click.IntRange(min=1), default=1)
@click.option("--isa", default=None, help="Force an instruction set (see `sparsecc doctor`).")
@click.option(
    "--json", "path", type=click.Path(path_type=Path), default=None, help="Also write results here."
)
def main(
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    patterns: tuple[str, ...],
    sparsities: tuple[float, ...],
    rounds: int,
    threads: int,
    isa: str | None,
    path: Path | None,
) -> None:
    """Time the sparse kernels against dense onnxruntime."""
    console = Console()
    cells = cells_of(patterns, sparsities)
    results: list[Result] = []
    with pinned(threads):
        for shape in shapes:
            inputs, outputs = (int(part) for part in shape.split("x"))
            for m in rows:
                results += measure(inputs, outputs, m, cells, rounds, threads, isa)
                best = max(results[-len(cells) :], key=lambda r: r.ratio)
                console.print(f"{shape} M={m}: dense {best.dense_microseconds:.0f} us", style="dim")
    console.print(table_of(results))
    if path is not None:
        document = {"machine": machine(threads), "rounds": rounds, "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
