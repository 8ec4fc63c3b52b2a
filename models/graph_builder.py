"""A small writer of plain ONNX graphs, shared by the zoo and by the training scripts.

Graphs are written directly rather than traced: every node then has a meaningful name, constants are folded,
and nothing depends on the version of an exporter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["GraphBuilder", "Prune"]

Prune = Callable[[NDArray[np.float32]], NDArray[np.bool_]]
"""Maps a weight seen as ``[outputs, inputs]`` to the mask of the entries to keep."""

IR_VERSION_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}


class GraphBuilder:
    """Collects nodes and constants; every method adds nodes and returns the name of the last output.

    Node names are paths such as ``/layers.0/mlp/fc1/MatMul`` (the *scope* argument plus the operator); the
    weight of that node is ``layers.0.mlp.fc1.weight``, the way exporters of PyTorch models name them.

    Args:
        opset: Version of the default operator set, 13 or later.
        seed: Seed of the weights that nobody supplies.
        prune: Chooses which entries of each prunable weight survive; nothing is pruned without it.
    """

    def __init__(self, *, opset: int = 17, seed: int = 0, prune: Prune | None = None) -> None:
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.prune = prune
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, op_type: str, scope: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add one node and return its first output, ``<scope>/<op_type>_output_0``."""
        name = f"{scope}/{op_type}"
        results = [f"{name}_output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), results, name=name, **attributes))
        return results[0]

    def split(self, scope: str, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Split ``x`` along ``axis`` and return the names of the parts."""
        self.op("Split", scope, x, self.ints(sizes), outputs=len(sizes), axis=axis)
        return list(self.nodes[-1].output)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add an initializer (once per name) and return its name."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def scalar(self, value: float) -> str:
        """Return a float32 scalar constant."""
        return self.constant(f"scalar_{value:g}", np.array(value, np.float32))

    def ints(self, values: Sequence[int]) -> str:
        """Return an int64 vector constant (shapes, axes, bounds)."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def weight(self, shape: Sequence[int], *, prunable: bool, gain: float = 1.0) -> NDArray[np.float32]:
        """Draw a weight ``[outputs, inputs...]`` and prune it when it is prunable.

        The scale keeps the variance of the activations: ``gain / sqrt(entries kept per output)``. Deep random
        networks would otherwise run into infinities or denormals, which change the timing.
        """
        matrix = self.rng.standard_normal((shape[0], math.prod(shape[1:])), dtype=np.float32)
        kept = matrix.shape[1]
        if prunable and self.prune is not None:
            mask = self.prune(matrix)
            matrix *= mask
            kept = max(1, round(mask.sum() / shape[0]))
        matrix *= np.float32(gain / math.sqrt(kept))
        return matrix.reshape(shape)

    def linear(
        self,
        scope: str,
        x: str,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        weight: NDArray[np.float32] | None = None,
        bias_value: NDArray[np.float32] | None = None,
        prunable: bool = True,
    ) -> str:
        """``x @ weight.T + bias`` as MatMul and Add; ``weight`` is ``[outputs, inputs]`` as in PyTorch."""
        stem = scope.lstrip("/").replace("/", ".")
        if weight is None:
            weight = self.weight((outputs, inputs), prunable=prunable)
        y = self.op("MatMul", scope, x, self.constant(f"{stem}.weight", weight.T))
        if not bias:
            return y
        if bias_value is None:
            bias_value = self.rng.standard_normal(outputs, dtype=np.float32) * np.float32(0.02)
        return self.op("Add", scope, y, self.constant(f"{stem}.bias", bias_value))

    def layer_norm(
        self, scope: str, x: str, width: int, *, parameters: Sequence[NDArray[np.float32]] | None = None
    ) -> str:
        """LayerNormalization over the last axis, or its primitive form below opset 17."""
        stem = scope.lstrip("/").replace("/", ".")
        gain, shift = parameters or (np.ones(width, np.float32), np.zeros(width, np.float32))
        scale = self.constant(f"{stem}.weight", gain)
        offset = self.constant(f"{stem}.bias", shift)
        if self.opset >= 17:
            return self.op("LayerNormalization", scope, x, scale, offset, axis=-1, epsilon=1e-5)
        centred = self.op("Sub", f"{scope}/centre", x, self.op("ReduceMean", f"{scope}/mean", x, axes=[-1]))
        square = self.op("Pow", scope, centred, self.scalar(2.0))
        variance = self.op("ReduceMean", f"{scope}/variance", square, axes=[-1])
        deviation = self.op("Sqrt", scope, self.op("Add", f"{scope}/epsilon", variance, self.scalar(1e-5)))
        return self.op(
            "Add", scope, self.op("Mul", scope, self.op("Div", scope, centred, deviation), scale), offset
        )

    def rms_norm(self, scope: str, x: str, width: int) -> str:
        """Root-mean-square normalisation in the primitive form that runtimes recognise and fuse."""
        square = self.op("Pow", scope, x, self.scalar(2.0))
        if self.opset >= 18:
            mean = self.op("ReduceMean", scope, square, self.ints([-1]))
        else:
            mean = self.op("ReduceMean", scope, square, axes=[-1])
        root = self.op("Sqrt", scope, self.op("Add", scope, mean, self.scalar(1e-5)))
        gain = self.constant(f"{scope.lstrip('/').replace('/', '.')}.weight", np.ones(width, np.float32))
        return self.op("Mul", scope, self.op("Div", scope, x, root), gain)

    def gelu(self, scope: str, x: str) -> str:
        """The exact GELU: the operator from opset 20, the Erf form that runtimes fuse before."""
        if self.opset >= 20:
            return self.op("Gelu", scope, x)
        erf = self.op("Erf", scope, self.op("Div", scope, x, self.scalar(math.sqrt(2))))
        gated = self.op("Mul", scope, x, self.op("Add", scope, erf, self.scalar(1.0)))
        return self.op("Mul", f"{scope}/half", gated, self.scalar(0.5))

    def conv(
        self,
        scope: str,
        x: str,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        prunable: bool = True,
        weight: NDArray[np.float32] | None = None,
        bias_value: NDArray[np.float32] | None = None,
        batch_norm: bool = False,
        gain: float = math.sqrt(2),
    ) -> str:
        """A 2-D convolution, padded by ``kernel // 2``, with its bias or with a BatchNormalization after it.

        The default ``gain`` of a random weight makes up for a rectifier before it.
        """
        stem = scope.lstrip("/").replace("/", ".")
        if weight is None:
            weight = self.weight((outputs, inputs // groups, kernel, kernel), prunable=prunable, gain=gain)
        operands = [x, self.constant(f"{stem}.weight", weight)]
        if not batch_norm:
            if bias_value is None:
                bias_value = self.rng.standard_normal(outputs, dtype=np.float32) * np.float32(0.02)
            operands.append(self.constant(f"{stem}.bias", bias_value))
        y = self.op(
            "Conv",
            scope,
            *operands,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            dilations=[1, 1],
            group=groups,
        )
        return self.batch_norm(f"{scope}/bn", y, outputs) if batch_norm else y

    def batch_norm(self, scope: str, x: str, width: int) -> str:
        """BatchNormalization with statistics near those of unit-variance activations."""
        stem = scope.lstrip("/").replace("/", ".")
        statistics = {
            "weight": self.rng.uniform(0.9, 1.1, width),
            "bias": self.rng.normal(0, 0.02, width),
            "running_mean": self.rng.normal(0, 0.02, width),
            "running_var": self.rng.uniform(0.9, 1.1, width),
        }
        names = [self.constant(f"{stem}.{key}", v.astype(np.float32)) for key, v in statistics.items()]
        return self.op("BatchNormalization", scope, x, *names, epsilon=1e-5)

    def finish(
        self,
        name: str,
        inputs: Sequence[tuple[str, int, Sequence[int | str]]],
        outputs: Sequence[tuple[str, str, Sequence[int | str]]],
    ) -> onnx.ModelProto:
        """Name the results, check the model and return it.

        Args:
            name: Name of the graph.
            inputs: Per input its name, element type and shape (a string is a symbolic dimension).
            outputs: Per output the name to give it, the value that it names, and its shape; all are float32.

        Raises:
            onnx.checker.ValidationError: The graph is not valid.
        """
        renamed = {value: output for output, value, _ in outputs}
        for node in self.nodes:
            for field in (node.input, node.output):
                for i, value in enumerate(field):
                    field[i] = renamed.get(value, value)
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(*spec) for spec in inputs],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape) for output, _, shape in outputs],
            list(self.constants.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSION_OF_OPSET.get(self.opset, 10),
            producer_name="sparsecc-models",
        )
        self.check(model)
        return model

    def check(self, model: onnx.ModelProto) -> None:
        """Check what ``finish`` is about to return.

        Raises:
            onnx.checker.ValidationError: The graph is not valid.
        """
        if model.ByteSize() < 2**31:
            onnx.checker.check_model(model, full_check=True)
