"""Rewriting of steps between quantised tensors as operators on quad planes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir

from sparsecc.ir.names import free_name, value_names
from sparsecc.ir.ops_planes import ByteScale, QuadsBuilder
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION
from sparsecc.passes.lower.byte_regions import Step, Stored, is_result, readers_of
from sparsecc.passes.tidy.graph import remove_dead

__all__ = ["rewrite"]


class _Writer:
    def __init__(self, model: onnx_ir.Model) -> None:
        self._graph = model.graph
        self._taken = value_names(model)
        self._build = QuadsBuilder(model.graph, self._taken)
        self._channels: dict[Stored, int] = {}
        self._quads: dict[Stored, onnx_ir.Value] = {}

    def write(self, step: Step) -> None:
        """Put the operator of one step in front of the QuantizeLinear behind it."""
        inputs = [self._bytes(source, step.target.quantizer) for source in step.sources]
        name, to = step.node.name or step.target.real.name or step.node.op_type, step.target.scale
        scales = [source.scale for source in step.sources]
        if step.conv is not None:
            node = self._build.conv(
                inputs[0], step.conv.packed(), name=name, weight_shape=step.conv.codes.shape,
                conv=step.conv.geometry, x_scale=scales[0], y_scale=to, bounds=step.bounds, bias=step.conv.bias,
                residual=(inputs[1], scales[1]) if len(inputs) > 1 else None,
            )  # fmt: skip
            self._channels[step.target] = step.conv.codes.shape[0]
        elif step.node.op_type == "Concat":
            self._channels[step.target] = sum(self._channels[source] for source in step.sources)
            node = self._concat(step, list(zip(inputs, scales, strict=True)), name)
        else:
            self._channels[step.target] = self._channels[step.sources[0]]
            if step.window is not None:
                node = self._build.max_pool(inputs[0], step.window, name=name)
            elif step.node.op_type == "Add":
                pairs = zip(inputs, scales, strict=True)
                node = self._build.add(*pairs, name=name, y_scale=to, bounds=step.bounds)
            else:
                node = self._build.mean(
                    inputs[0], name=name, x_scale=scales[0], y_scale=to, bounds=step.bounds
                )
        self._insert(node, step.target)

    def _concat(self, step: Step, parts: list[tuple[onnx_ir.Value, ByteScale]], name: str) -> onnx_ir.Node:
        """Two at a time, and again what comes of that, so that no byte is copied more often than it must be."""
        count = 0
        while True:
            merged: list[tuple[onnx_ir.Value, ByteScale]] = []
            for first, second in zip(parts[::2], parts[1::2], strict=False):
                count += 1
                node = self._build.concat(
                    first, second, name=f"{name}.{count}", y_scale=step.target.scale, bounds=step.bounds
                )
                if len(parts) == 2:
                    return node
                node.outputs[0].name = free_name(f"{node.name}.quads", self._taken)
                self._graph.insert_before(step.target.quantizer, node)
                merged.append((node.outputs[0], step.target.scale))
            parts = merged + parts[len(merged) * 2 :]

    def leave(self, stored: Stored, converted: Collection[onnx_ir.Node]) -> None:
        """Hand the floats of a stored tensor to what still reads it, through the QuantizeLinear it had."""
        if not is_result(stored) and all(reader in converted for reader in readers_of(stored)):
            return
        node = self._build.dequantize(
            self._quads[stored], stored.scale, self._channels[stored], name=f"{_label(stored)}.leave"
        )
        node.outputs[0].name = free_name(f"{node.name}.out", self._taken)
        node.outputs[0].shape = stored.real.shape
        self._graph.insert_before(stored.quantizer, node)
        stored.quantizer.replace_input_with(0, node.outputs[0])

    def _bytes(self, stored: Stored, before: onnx_ir.Node) -> onnx_ir.Value:
        if stored not in self._quads:
            shape = stored.shape
            if shape is not None and len(shape) > 1 and isinstance(shape[1], int):
                self._channels[stored] = shape[1]
            name = f"{_label(stored)}.enter"
            self._insert(self._build.quantize(stored.real, stored.scale, name=name), stored)
        return self._quads[stored]

    def _insert(self, node: onnx_ir.Node, stored: Stored) -> None:
        node.outputs[0].name = free_name(f"{stored.quantizer.outputs[0].name}.quads", self._taken)
        self._graph.insert_before(stored.quantizer, node)
        self._quads[stored] = node.outputs[0]


def _label(stored: Stored) -> str | None:
    """The name of its bytes: one float tensor may be quantised twice, and nodes need names of their own."""
    return stored.quantizer.outputs[0].name


def rewrite(model: onnx_ir.Model, steps: Sequence[Step]) -> None:
    """Replace the operators of ``steps``, which are in the main graph and in its order, in place."""
    writer = _Writer(model)
    converted = {node for step in steps for node in (step.node, step.absorbed) if node is not None}
    for step in steps:
        writer.write(step)
    for step in steps:
        writer.leave(step.target, converted)
    model.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
    remove_dead(model)
