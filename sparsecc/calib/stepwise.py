"""Running a model front to back in steps: each part once, with what later parts read kept in between.

What is returned after one step comes from the weights the model has then, so that layers can be changed between
steps without running everything before them again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.engine import open_session
from sparsecc.calib.source import Batch, Batches
from sparsecc.ir import Model
from sparsecc.ir.trace import captured_inputs

__all__ = ["Stepwise", "ancestors"]

#: Type and rank of an array.
Kind: TypeAlias = tuple[np.dtype[Any], int]


class Stepwise:
    """Returns named tensors of a model step by step, for all batches.

    Args:
        current: gives a copy of the model as it is now, free to be changed; nodes and names are the same in every
            step, weights need not be.
        batches: the inputs, the same in every step.
        byte_budget: bytes of activations kept in memory between steps; more go to temporary files.
        threads: of the sessions; 0 for all physical cores.

    A context manager: temporary files are gone when it is left.
    """

    def __init__(
        self, current: Callable[[], Model], batches: Batches, *, byte_budget: int, threads: int
    ) -> None:
        self._current = current
        self._batches = batches
        self._threads = threads
        self._store = _Store(byte_budget)
        self._done: set[int] = set()
        self._kinds: dict[str, Kind] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def run(self, names: Sequence[str], later: Collection[str], changing: Collection[int]) -> Iterator[Batch]:
        """Yield per batch the named tensors of the main graph; all batches must be taken.

        Args:
            names: what to return.
            later: the tensors that will be asked for in later steps.
            changing: nodes, by position in the main graph, that change before the next step: they and what
                depends on them are run again.
        """
        model = self._current()
        graph = model.onnx.graph
        nodes = list(graph)
        values = {value.name: value for node in nodes for value in node.outputs if value.name}
        wanted = [name for name in names if name in values]
        needed = ancestors(nodes, [values[name] for name in wanted]) - self._done
        stale = _descendants(nodes, changing)
        settled = self._done | (needed - stale)
        ahead = ancestors(nodes, [values[name] for name in later if name in values]) - settled
        border = _border(nodes, ahead, settled, later)
        keep = [name for name in border if name not in self._store]
        computed = list(dict.fromkeys([*wanted, *(name for name in keep if name not in wanted)]))
        produced = {value.name for node in (nodes[at] for at in needed) for value in node.outputs}
        fresh = [name for name in computed if name in produced]
        given = _cut(graph, nodes, needed, fresh, self._kinds)
        stored = [*given, *(name for name in wanted if name not in produced and name not in given)]
        session = open_session(model, threads=self._threads) if fresh else None
        for number, batch in enumerate(self._batches()):
            found = {**batch, **self._store.read(number, stored)}
            if session is not None:
                found.update(session.run(found))
            yield {name: found[name] for name in names}
            for name in keep:
                self._kinds[name] = found[name].dtype, found[name].ndim
                self._store.add(number, name, found[name])
        self._done = settled
        self._store.drop(set(self._kinds) - set(border))
        self._kinds = {name: self._kinds[name] for name in border}


def ancestors(nodes: Sequence[onnx_ir.Node], values: Sequence[onnx_ir.Value]) -> set[int]:
    """Return the positions in ``nodes`` of all that ``values`` are computed from."""
    position = {node: at for at, node in enumerate(nodes)}
    found: set[int] = set()
    stack = [value.producer() for value in values]
    while stack:
        node = stack.pop()
        at = None if node is None else position.get(node)
        if at is None or at in found:
            continue
        found.add(at)
        stack += [value.producer() for value in captured_inputs(nodes[at])]
    return found


def _descendants(nodes: Sequence[onnx_ir.Node], start: Collection[int]) -> set[int]:
    """Return ``start`` and the positions of all nodes, in topological order, that depend on it."""
    found, tainted = set(start), {value for at in start for value in nodes[at].outputs}
    for at, node in enumerate(nodes):
        if at not in found and any(value in tainted for value in captured_inputs(node)):
            found.add(at)
            tainted.update(node.outputs)
    return found


def _border(
    nodes: Sequence[onnx_ir.Node], ahead: set[int], settled: set[int], later: Collection[str]
) -> list[str]:
    """Names of what is taken from nodes that are ``settled``: by the nodes ``ahead``, or as a result."""
    made = {str(value.name): value for at in settled for value in nodes[at].outputs}
    read = {value for at in ahead for value in captured_inputs(nodes[at])}
    return [name for name, value in made.items() if name in later or value in read]


def _cut(
    graph: onnx_ir.Graph,
    nodes: Sequence[onnx_ir.Node],
    needed: set[int],
    outputs: Sequence[str],
    known: Mapping[str, Kind],
) -> list[str]:
    """Reduce ``graph`` to the nodes ``needed`` for ``outputs``; return the ``known`` tensors that became inputs."""
    values = {value.name: value for node in nodes for value in node.outputs if value.name}
    graph.outputs[:] = [values[name] for name in outputs]
    read = {value for at in needed for value in captured_inputs(nodes[at])}
    given = [name for name in known if values[name] in read]
    for name, (dtype, rank) in known.items():
        value = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(dtype)),
            shape=onnx_ir.Shape([None] * rank),
        )
        onnx_ir.convenience.replace_all_uses_with(values[name], value)
        if name in given:
            graph.inputs.append(value)
    unneeded = [node for at, node in enumerate(nodes) if at not in needed]
    for node in unneeded:
        _empty_bodies(node)
    graph.remove(unneeded, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]
    return given


def _empty_bodies(node: onnx_ir.Node) -> None:
    """Take the bodies of a node that is to go off what they read from around them."""
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH and not attribute.is_ref():
            body = attribute.as_graph()
            body.outputs.clear()
            for inner in body:
                _empty_bodies(inner)
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)


class _Store:
    """Arrays by batch and name; those beyond a number of bytes lie in temporary files."""

    def __init__(self, byte_budget: int) -> None:
        self._free = byte_budget
        self._arrays: dict[str, dict[int, NDArray[Any] | Path]] = {}
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def add(self, batch: int, name: str, array: NDArray[Any]) -> None:
        kept: NDArray[Any] | Path = array
        if array.nbytes > self._free:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="sparsecc-activations-")
            self._files += 1
            kept = Path(self._folder.name) / f"{self._files}.npy"
            np.save(kept, array)
        else:
            self._free -= array.nbytes
        self._arrays.setdefault(name, {})[batch] = kept

    def read(self, batch: int, names: Iterable[str]) -> Batch:
        kept = {name: self._arrays[name][batch] for name in names}
        return {name: np.load(item) if isinstance(item, Path) else item for name, item in kept.items()}

    def close(self) -> None:
        self._arrays.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for kept in self._arrays.pop(name, {}).values():
                if isinstance(kept, Path):
                    kept.unlink()
                else:
                    self._free += kept.nbytes
