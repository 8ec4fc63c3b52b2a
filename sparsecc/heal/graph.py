"""An ONNX graph as a function of PyTorch tensors, differentiable in inputs and constants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray

from sparsecc.calib.stepwise import ancestors
from sparsecc.errors import ModelError, UnsupportedModelError, UsageError
from sparsecc.heal.operators import OPERATORS, Call, Operator, Tensor
from sparsecc.heal.operators_nn import OPERATORS_NN
from sparsecc.heal.operators_recurrent import OPERATORS_RECURRENT, recurrent_refusal
from sparsecc.heal.operators_shape import OPERATORS_SHAPE
from sparsecc.ir import Model
from sparsecc.ir.slots import all_graphs

__all__ = ["SUPPORTED", "TorchGraph"]

_TABLE: dict[str, Operator] = {**OPERATORS, **OPERATORS_SHAPE, **OPERATORS_NN, **OPERATORS_RECURRENT}

#: Operators that a graph may have, by name.
SUPPORTED = frozenset({*_TABLE, "Constant", "If"})

_Env = dict[onnx_ir.Value, Tensor]


class TorchGraph:
    """The main graph of a model, to be run on tensors.

    float16 and bfloat16 are computed in float32. Values are float32 to rounding what onnxruntime computes.

    Attributes:
        constants: by value, what the graph reads and does not compute; to be replaced by tensors with gradients.
        device: where the tensors are.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        """Take the constants of ``model`` to ``device``.

        Raises:
            UnsupportedModelError: the graph has operators that have no differentiable form here; all are named.
        """
        lacking = _lacking(model)
        if lacking:
            raise UnsupportedModelError(
                f"healing cannot run {', '.join(lacking)}: heal before such operators are made, or leave heal out"
            )
        self._graph = model.onnx.graph
        self._opset = model.opset
        self.device = device
        self.constants: _Env = {}
        for graph in (self._graph, *self._graph.subgraphs()):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    self.constants[value] = self.tensor(value.const_value.numpy())
            for node in graph:
                if node.op_type == "Constant" and node.domain == "":
                    self.constants[node.outputs[0]] = self._constant(node)
        self._inputs = {str(value.name): value for value in self._graph.inputs}
        self._plans: dict[tuple[str, ...], tuple[list[onnx_ir.Value], list[onnx_ir.Node]]] = {}

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """``array`` as a tensor on the device, half precision as float32; never shares memory."""
        if array.dtype.name in ("float16", "bfloat16"):
            array = array.astype(np.float32)
        return torch.from_numpy(np.array(array, order="C")).to(self.device)

    def run(self, inputs: Mapping[str, NDArray[Any]], wanted: Collection[str]) -> dict[str, Tensor]:
        """Return the named tensors of the main graph for arrays by input name.

        Args:
            inputs: arrays by input name.
            wanted: names of tensors; nodes that none of them needs are not run.

        Raises:
            UsageError: an input is missing, or a name is no tensor of the main graph.
            ModelError: a node fails on these inputs.
        """
        env = dict(self.constants)
        for name, value in self._inputs.items():
            if name in inputs:
                env[value] = self.tensor(inputs[name])
            elif value not in env:
                raise UsageError(f"no array for input {name}; the model reads {', '.join(self._inputs)}")
        targets, nodes = self._plan(tuple(wanted))
        self._run_nodes(nodes, env)
        return {name: env[value] for name, value in zip(wanted, targets, strict=True)}

    def _plan(self, wanted: tuple[str, ...]) -> tuple[list[onnx_ir.Value], list[onnx_ir.Node]]:
        """The values of these names, and the nodes that they need, in order."""
        if wanted not in self._plans:
            values = {
                str(value.name): value
                for value in (*self._inputs.values(), *_produced(self._graph))
                if value.name
            }
            unknown = [name for name in wanted if name not in values]
            if unknown:
                raise UsageError(f"no tensor {', '.join(unknown)} in the main graph")
            targets = [values[name] for name in wanted]
            nodes = list(self._graph)
            self._plans[wanted] = targets, [nodes[at] for at in sorted(ancestors(nodes, targets))]
        return self._plans[wanted]

    def _run_nodes(self, nodes: Iterable[onnx_ir.Node], env: _Env) -> None:
        for node in nodes:
            if node.op_type == "Constant":
                continue
            results = self._if(node, env) if node.op_type == "If" else self._call(node, env)
            for value, result in zip(node.outputs, results, strict=False):
                env[value] = result

    def _call(self, node: onnx_ir.Node, env: _Env) -> tuple[Tensor, ...]:
        inputs = [None if value is None else env[value] for value in node.inputs]
        try:
            found = _TABLE[node.op_type](Call(node, self._opset), *inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{node.op_type} {node.name!r} fails on these inputs in PyTorch: {reason}"
            ) from error
        return found if isinstance(found, tuple) else (found,)

    def _if(self, node: onnx_ir.Node, env: _Env) -> tuple[Tensor, ...]:
        condition = node.inputs[0]
        assert condition is not None  # onnx.checker
        body = node.attributes["then_branch" if bool(env[condition]) else "else_branch"].as_graph()
        self._run_nodes(body, env)
        return tuple(env[value] for value in body.outputs)

    def _constant(self, node: onnx_ir.Node) -> Tensor:
        kinds: dict[str, Callable[[Any], Any]] = {
            "value": lambda attr: attr.as_tensor().numpy(),
            "value_float": lambda attr: np.float32(attr.as_float()),
            "value_int": lambda attr: np.int64(attr.as_int()),
            "value_floats": lambda attr: np.array(attr.as_floats(), np.float32),
            "value_ints": lambda attr: np.array(attr.as_ints(), np.int64),
        }
        for name, read in kinds.items():
            if name in node.attributes:
                return self.tensor(np.asarray(read(node.attributes[name])))
        raise UnsupportedModelError(f"Constant {node.name!r} is no tensor of numbers")


def _produced(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [value for node in graph for value in node.outputs]


def _lacking(model: Model) -> list[str]:
    """Operators of the model that cannot be run, each once, in words."""
    found: dict[str, None] = {}
    for graph in all_graphs(model.onnx):
        for node in graph:
            if node.domain not in ("", "ai.onnx"):
                found[f"{node.domain}:{node.op_type}"] = None
            elif node.op_type not in SUPPORTED:
                found[node.op_type] = None
            elif node.op_type in OPERATORS_RECURRENT and (why := recurrent_refusal(Call(node, model.opset))):
                found[why] = None
    return list(found)
