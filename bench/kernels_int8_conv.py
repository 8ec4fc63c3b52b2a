"""Sparse convolutions of bytes against dense onnxruntime, one layer of ResNet-50 at a time, on one thread.

The baseline is onnxruntime's ``QLinearConv`` with int8 weights, one scale per output, on uint8 activations: the faster
of its NCHW form and its NHWC form (``com.microsoft``), whichever that is for the layer. Ours is the operator
``BlockSparseConvQuads``. Both read and write bytes, each in its own layout, with bound buffers, in this process in
turns; a ratio is the median over the rounds of (baseline time / our time), in CPU time of the one thread.

    python bench/kernels_int8_conv.py --json bench/results/kernels_int8_conv.json
    python bench/kernels_int8_conv.py --layer 64x64x56x3x1 --sparsity 0.8 --pattern 16x4 --pattern 4x4
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir
import onnxruntime
from layers import machine, pinned
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from sparsecc import emit
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.ops_planes import ByteScale, QuadsBuilder
from sparsecc.runtime import register
from sparsecc.sparse import Pattern, QuantizedTensor, keep_mask
from sparsecc.verify.timing import time_interleaved

LAYERS = (  # channels in x out x side of the input x kernel x stride
    "64x64x56x1x1", "64x64x56x3x1", "64x256x56x1x1", "256x128x56x1x1", "128x128x56x3x2", "128x128x28x3x1",
    "512x128x28x1x1", "256x512x56x1x2", "256x256x14x3x1", "256x1024x14x1x1", "512x512x7x3x1", "2048x512x7x1x1",
)  # fmt: skip
X, Y = ByteScale(0.02, 120), ByteScale(0.1, 128)

Call = Callable[[], object]
Bytes = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Result:
    """One layer at one sparsity; times in microseconds, ``ratio`` is the baseline's time over ours."""

    layer: str
    pattern: str
    sparsity: float
    baseline: str
    baseline_us: float
    ours_us: float
    ratio: float


class Layer:
    """A convolution with random weights and a random mask, as both engines compute it."""

    def __init__(self, text: str, pattern: str, sparsity: float) -> None:
        self.inputs, self.outputs, self.size, self.kernel, self.stride = (
            int(part) for part in text.split("x")
        )
        rng = np.random.default_rng(0)
        shape = (self.outputs, self.kernel, self.kernel, self.inputs)
        matrix = rng.integers(-127, 128, (self.outputs, int(np.prod(shape[1:]))))
        if sparsity:
            matrix = matrix * keep_mask(rng.random(matrix.shape), Pattern.parse(pattern), sparsity)
        self.codes = matrix.astype(np.int8).reshape(shape)
        self.scales = np.full(self.outputs, 0.01 / np.sqrt(shape[3] * self.kernel**2), np.float32)
        self.pattern = Pattern.parse(pattern)
        pad = self.kernel // 2
        self.geometry = ConvGeometry((self.kernel,) * 2, (self.stride,) * 2, (pad,) * 4, (1, 1), 1)
        self.side = (self.size + 2 * pad - self.kernel) // self.stride + 1
        self.x = rng.integers(0, 256, (1, self.inputs, self.size, self.size)).astype(np.uint8)

    def ours(self) -> tuple[Call, Bytes]:
        """A call of our operator, and one that gives what it wrote as NCHW."""
        quads = np.ascontiguousarray(np.moveaxis(self.x.reshape(1, -1, 4, self.size, self.size), 2, -1))
        x = onnx_ir.Value(
            name="x", shape=onnx_ir.Shape(quads.shape), type=onnx_ir.TensorType(onnx_ir.DataType.UINT8)
        )
        graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 17}, name="layer")
        matrix = self.codes.reshape(self.outputs, -1)
        node = QuadsBuilder(graph).conv(
            x, QuantizedTensor.from_codes(matrix, self.scales, self.pattern), name="op",
            weight_shape=self.codes.shape, conv=self.geometry, x_scale=X, y_scale=Y,
        )  # fmt: skip
        node.outputs[0].name = "y"
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        model = Model(onnx_ir.Model(graph, ir_version=8))
        emit.finalize(model)
        call, y = bound(model.to_proto(), quads, (1, self.outputs // 4, self.side, self.side, 4))
        return call, lambda: np.moveaxis(y, -1, 2).reshape(1, self.outputs, self.side, self.side)

    def dense(self, channels_last: bool) -> tuple[Call, Bytes]:
        """A call of onnxruntime's operator, and one that gives what it wrote as NCHW."""
        constants = {
            "x_scale": np.float32(X.scale), "x_zero": np.uint8(X.zero_point),
            "w": np.ascontiguousarray(np.moveaxis(self.codes, -1, 1)), "w_scale": self.scales,
            "w_zero": np.zeros(self.outputs, np.int8),
            "y_scale": np.float32(Y.scale), "y_zero": np.uint8(Y.zero_point),
        }  # fmt: skip
        attributes = {
            "strides": self.geometry.strides,
            "pads": self.geometry.pads,
            "kernel_shape": [self.kernel] * 2,
        }
        domain = {"domain": "com.microsoft", "channels_last": 1} if channels_last else {}
        node = helper.make_node("QLinearConv", ["x", *constants], ["y"], **attributes, **domain)
        x = np.ascontiguousarray(np.moveaxis(self.x, 1, -1)) if channels_last else self.x
        shape = (
            (1, self.side, self.side, self.outputs)
            if channels_last
            else (1, self.outputs, self.side, self.side)
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        call, y = bound(helper.make_model(graph, opset_imports=opsets, ir_version=8), x, shape)
        return call, lambda: np.moveaxis(y, -1, 1) if channels_last else y


def bound(model: onnx.ModelProto, x: np.ndarray, shape: tuple[int, ...]) -> tuple[Call, np.ndarray]:
    """Return a call of a model of one node on ``x``, and the array it writes."""
    y = np.zeros(shape, np.uint8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.uint8, shape, y.ctypes.data)
    return partial(session.run_with_iobinding, binding), y


def measure(text: str, pattern: str, sparsity: float, rounds: int) -> Result:
    """Check both engines against each other and time them."""
    layer = Layer(text, pattern, sparsity)
    engines = {"ours": layer.ours(), "NCHW": layer.dense(False), "NHWC": layer.dense(True)}
    for call, _ in engines.values():
        call()
    for name, (_, result) in engines.items():
        if np.abs(result().astype(int) - engines["NCHW"][1]()).max() > 1:
            raise SystemExit(f"{text}: {name} is not the same convolution")
    times, _ = time_interleaved([call for call, _ in engines.values()], clock="cpu", rounds=rounds)
    taken = dict(zip(engines, times, strict=True))
    best = min(("NCHW", "NHWC"), key=lambda name: statistics.median(taken[name]))
    ratio = statistics.median(a / b for a, b in zip(taken[best], taken["ours"], strict=True))
    dense_us, our_us = (round(statistics.median(taken[name]) * 1e6, 2) for name in (best, "ours"))
    return Result(text, pattern, sparsity, best, dense_us, our_us, round(ratio, 3))


@click.command(context_settings={"show_default": True})
@click.option("--layer", "layers", multiple=True, default=LAYERS, help="In x out x side x kernel x stride.")
@click.option("--pattern", "patterns", multiple=True, default=("8x4",), help="RxC, columns (kh, kw, cin).")
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=(0.0, 0.5, 0.8, 0.9))
@click.option("--rounds", type=int, default=15)
@click.option(
    "--json", "path", type=click.Path(path_type=Path), default=None, help="Also write results here."
)
def main(
    layers: tuple[str, ...],
    patterns: tuple[str, ...],
    sparsities: tuple[float, ...],
    rounds: int,
    path: Path | None,
) -> None:
    """Time sparse int8 convolutions against dense onnxruntime."""
    console = Console()
    cells = [(pattern, sparsity) for pattern in patterns for sparsity in sparsities]
    results: list[Result] = []
    table = Table(title="times faster than onnxruntime's int8 convolution, one thread (microseconds)")
    for name in ("layer", "dense", *(f"{pattern} {sparsity:.0%}" for pattern, sparsity in cells)):
        table.add_column(name, justify="right")
    with pinned(1):
        for text in layers:
            found = [measure(text, pattern, sparsity, rounds) for pattern, sparsity in cells]
            results += found
            own = [f"{r.ratio:.2f} ({r.ours_us:.0f})" for r in found]
            table.add_row(text, f"{found[0].baseline} {found[0].baseline_us:.0f}", *own)
    means = (
        statistics.geometric_mean(r.ratio for r in results if (r.pattern, r.sparsity) == cell)
        for cell in cells
    )
    table.add_row("geometric mean", "", *(f"{mean:.2f}" for mean in means))
    console.print(table)
    if path is not None:
        document = {"machine": machine(1), "rounds": rounds, "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
