"""Names of values: new ones must differ from all others, since a body sees those of the graphs around it."""

from __future__ import annotations

import onnx_ir

from sparsecc.ir.slots import all_graphs

__all__ = ["free_name", "graph_names", "value_names"]


def value_names(model: onnx_ir.Model) -> set[str]:
    """Return every name of a value in the model: inputs, initializers and results of all graphs."""
    names: set[str] = set()
    for graph in all_graphs(model):
        names |= _own_names(graph)
    return names


def graph_names(graph: onnx_ir.Graph) -> set[str]:
    """Return the names of ``graph`` and of the bodies inside it, and what they read from the graphs around it."""
    names: set[str] = set()
    for part in (graph, *graph.subgraphs()):
        names |= _own_names(part)
        names |= {value.name for node in part for value in node.inputs if value is not None and value.name}
    return names


def free_name(name: str, taken: set[str]) -> str:
    """Return ``name``, with a number behind it where it is taken already, and add it to ``taken``."""
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}.{number}", number + 1
    taken.add(unique)
    return unique


def _own_names(graph: onnx_ir.Graph) -> set[str]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return {value.name for value in values if value.name}
