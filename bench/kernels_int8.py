"""Block-sparse int8 kernels against dense onnxruntime, one linear layer at a time, on one thread.

Baselines are onnxruntime's ``DynamicQuantizeMatMul`` (int8 weights, one scale per output) and its fp32 MatMul.
All engines read float32 and write float32, so quantising x and scaling back is counted for every int8 one.
They run in this process on the same arrays in turn; a ratio is the median over the rounds of (baseline time /
our time), in CPU time of the one thread, so that neither drift of the machine nor other programs favour a side.
Each is a session of one node with bound buffers; ours is the library's operator.

    python bench/kernels_int8.py --json bench/results/kernels_int8.json
    python bench/kernels_int8.py --shape 768x768 --rows 1 --rows 128 --pattern 16x4 --sparsity 0.9
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from kernels import ROWS, SHAPES, machine, pinned
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from sparsecc.runtime import NativeInt8MatMul, int8_isas, register
from sparsecc.sparse import Pattern, QuantizedTensor, keep_mask
from sparsecc.verify.timing import time_interleaved

PATTERNS = ("16x4",)
SPARSITIES = (0.5, 0.8, 0.9)
DOMAINS = {"": 17, "com.microsoft": 1, "ai.sparsecc": 1}

Call = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One kernel on one layer. Ratios are baseline time over its time; times in microseconds."""

    inputs: int
    outputs: int
    rows: int
    pattern: str
    sparsity: float
    kernel: str
    microseconds: float
    int8_microseconds: float
    fp32_microseconds: float
    ratio_to_int8: float
    ratio_to_fp32: float


def bound_session(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> Call:
    """Return a call of a model of one node x -> y that reads ``x`` and writes ``y``."""
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, y.shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid(name, version) for name, version in DOMAINS.items()]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return partial(session.run_with_iobinding, binding)


def dense_engines(weight: np.ndarray, x: np.ndarray) -> tuple[list[Call], list[np.ndarray]]:
    """Return onnxruntime's int8 and fp32 products with weight [N, K], and their results."""
    tensor = QuantizedTensor.encode(weight, Pattern.parse("16x4"))
    y = [np.zeros((x.shape[0], weight.shape[0]), np.float32) for _ in range(2)]
    constants = {"w": np.ascontiguousarray(tensor.decode_codes().T), "scale": tensor.scales}
    int8 = helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")
    fp32 = helper.make_node("MatMul", ["x", "w"], ["y"])
    calls = [
        bound_session(int8, constants, x, y[0]),
        bound_session(fp32, {"w": np.ascontiguousarray(weight.T)}, x, y[1]),
    ]
    for call in calls:
        call()
    error = np.linalg.norm(y[0] - y[1]) / np.linalg.norm(y[1])
    if error > 0.05:
        raise SystemExit(f"the int8 baseline is not the same product: relative distance {error:.3f}")
    return calls, y


def sparse_engine(weight: np.ndarray, x: np.ndarray, text: str) -> tuple[str, Call, np.ndarray]:
    """Return the name of our kernel, a call of our operator, checked once against NumPy, and its result."""
    tensor = QuantizedTensor.encode(weight, Pattern.parse(text))
    with NativeInt8MatMul(text, tensor.shape, tensor.values, tensor.indices, tensor.scales) as op:
        kernel = op.kernel
    constants = {
        "values": tensor.values,
        "indices": tensor.indices,
        "shape": np.array(tensor.shape, np.int64),
        "scales": tensor.scales,
        "bias": np.zeros(tensor.shape[0], np.float32),
    }
    node = helper.make_node("BlockSparseMatMulInt8", ["x", *constants], ["y"], domain="ai.sparsecc",
                            layout=text, layout_version=1)  # fmt: skip
    y = np.zeros((x.shape[0], tensor.shape[0]), np.float32)
    call = bound_session(node, constants, x, y)
    call()
    expected = x @ weight.T
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    if error > 0.05:
        raise SystemExit(f"{kernel} is wrong by {error:.3f}")
    return kernel, call, y


def measure(
    inputs: int, outputs: int, rows: int, cells: list[tuple[str, float]], rounds: int
) -> Iterator[Result]:
    """Measure all cells (pattern, sparsity) of one layer and number of rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    dense, _results = dense_engines(weight, x)
    masks = [keep_mask(rng.random(weight.shape), Pattern.parse(text), sparsity) for text, sparsity in cells]
    ours = [sparse_engine(weight * mask, x, text) for mask, (text, _) in zip(masks, cells, strict=True)]
    times, _ = time_interleaved([*dense, *(call for _, call, _ in ours)], clock="cpu", rounds=rounds)
    int8, fp32 = times[:2]
    for (pattern, sparsity), (kernel, _, _), taken in zip(cells, ours, times[2:], strict=True):
        to_int8, to_fp32 = (
            statistics.median(a / b for a, b in zip(base, taken, strict=True)) for base in (int8, fp32)
        )
        own, int8_us, fp32_us = (round(statistics.median(t) * 1e6, 2) for t in (taken, int8, fp32))
        yield Result(inputs, outputs, rows, pattern, sparsity, kernel, own, int8_us, fp32_us,
                     round(to_int8, 3), round(to_fp32, 3))  # fmt: skip


def table_of(results: list[Result]) -> Table:
    """Times faster than each baseline: geometric mean over the shapes, smallest and largest in brackets."""
    table = Table(title="times faster than onnxruntime: geometric mean over shapes (min-max)")
    rows = sorted({r.rows for r in results})
    for name in ("pattern", "sparsity", "than", *(f"M={m}" for m in rows)):
        table.add_column(name, justify="right")
    for pattern, sparsity in dict.fromkeys((r.pattern, r.sparsity) for r in results):
        for base in ("int8", "fp32"):
            cells = []
            for m in rows:
                ratios = [
                    float(getattr(r, f"ratio_to_{base}"))
                    for r in results
                    if (r.pattern, r.sparsity, r.rows) == (pattern, sparsity, m)
                ]
                cells.append(f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.1f}-{max(ratios):.1f})")
            table.add_row(pattern, f"{sparsity:.0%}", base, *cells)
    return table


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="Inputs x outputs, e.g. 768x3072.")
@click.option("--rows", "-m", multiple=True, type=int, default=ROWS, help="Rows of x.")
@click.option("--pattern", "patterns", multiple=True, default=PATTERNS, help="RxC.")
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=SPARSITIES)
@click.option("--rounds", type=int, default=21)
@click.option("--isa", default=None, help=f"Force an instruction set, here one of {', '.join(int8_isas())}.")
@click.option(
    "--json", "path", type=click.Path(path_type=Path), default=None, help="Also write results here."
)
def main(
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    patterns: tuple[str, ...],
    sparsities: tuple[float, ...],
    rounds: int,
    isa: str | None,
    path: Path | None,
) -> None:
    """Time the sparse int8 kernels against dense onnxruntime, int8 and fp32."""
    if isa is not None:
        os.environ["SPARSECC_ISA"] = isa  # read by the library whenever it makes an operator
    console = Console()
    cells = [(pattern, sparsity) for pattern in patterns for sparsity in sparsities]
    results: list[Result] = []
    with pinned(1):
        for shape in shapes:
            inputs, outputs = (int(part) for part in shape.split("x"))
            for m in rows:
                results += measure(inputs, outputs, m, cells, rounds)
                last = results[-1]
                console.print(
                    f"{shape} M={m}: dense int8 {last.int8_microseconds:.0f} us, "
                    f"fp32 {last.fp32_microseconds:.0f} us",
                    style="dim",
                )
    console.print(table_of(results))
    if path is not None:
        facts = machine(1) | {"int8_isas": list(int8_isas())}
        document = {"machine": facts, "rounds": rounds, "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
