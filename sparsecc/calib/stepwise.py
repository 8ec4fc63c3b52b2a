"""Running a model front to back in steps: each part once, with what later parts read kept in between.

What is returned after one step comes from the weights the model has then, so that layers can be changed between
steps without running everything before them again. A step whose nodes hold many weights runs in parts, so that
no more than a few layers are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.engine import Register, open_session
from sparsecc.calib.source import Batch, Batches
from sparsecc.ir import Model
from sparsecc.ir.mapped import Scratch, array_of, is_mapped, release
from sparsecc.ir.trace import captured_inputs

__all__ = ["Stepwise", "ancestors"]

#: Bytes of the weights of one part, about; a single node may have more. onnxruntime holds them up to four times.
_WEIGHT_BUDGET = 256 << 20

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
        register: adds operator libraries to the options of the sessions, as for ``open_session``.
    """

    def __init__(
        self,
        current: Callable[[], Model],
        batches: Batches,
        *,
        byte_budget: int,
        threads: int | None,
        register: Register | None = None,
    ) -> None:
        self._current = current
        self._batches = batches
        self._threads = threads
        self._register = register
        self._store = _Store(byte_budget)
        self._done: set[int] = set()
        self._kinds: dict[str, Kind] = {}

    def run(self, names: Sequence[str], later: Collection[str], changing: Collection[int]) -> Iterator[Batch]:
        """Yield per batch the named tensors of the main graph; all batches must be taken.

        Args:
            names: what to return.
            later: the tensors that will be asked for in later steps.
            changing: nodes, by position in the main graph, that change before the next step: they and what
                depends on them are run again.
        """
        nodes = list(self._current().onnx.graph)
        values = {value.name: value for node in nodes for value in node.outputs if value.name}
        needed = ancestors(nodes, [values[name] for name in names if name in values]) - self._done
        settled = self._done | (needed - _descendants(nodes, changing))
        ahead = ancestors(nodes, [values[name] for name in later if name in values]) - settled
        ready, parts = set(self._done), _parts(nodes, needed, _WEIGHT_BUDGET)
        for part in parts[:-1]:
            ready |= part
            for _ in self._part(part, (), _border(nodes, (needed - ready) | ahead, ready, (*names, *later))):
                pass
        border = _border(nodes, ahead, settled, later)
        yield from self._part(parts[-1], names, border)
        self._done = settled
        self._store.drop(set(self._kinds) - set(border))
        self._kinds = {name: self._kinds[name] for name in border}

    def _part(self, needed: set[int], names: Sequence[str], border: Sequence[str]) -> Iterator[Batch]:
        """Run the nodes ``needed`` on all batches, yield the named tensors, and keep those of the border."""
        model = self._current()
        graph = model.onnx.graph
        nodes = list(graph)
        values = {value.name for node in nodes for value in node.outputs if value.name}
        wanted = [name for name in names if name in values]
        keep = [name for name in border if name not in self._store]
        computed = list(dict.fromkeys([*wanted, *(name for name in keep if name not in wanted)]))
        produced = {value.name for node in (nodes[at] for at in needed) for value in node.outputs}
        fresh = [name for name in computed if name in produced]
        weights = graph.initializers
        constants = {name: weights[name].const_value for name in names if name in weights}
        given = _cut(graph, nodes, needed, fresh, self._kinds)
        stored = [*given, *(name for name in wanted if name not in produced and name not in given)]
        session = open_session(model, threads=self._threads, register=self._register) if fresh else None
        for number, batch in enumerate(self._batches()):
            found = {**batch, **self._store.read(number, stored)}
            found.update((name, held.numpy()) for name, held in constants.items() if held is not None)
            if session is not None:
                found.update(session.run(found))
            yield {name: found[name] for name in names}
            for name in keep:
                self._kinds[name] = found[name].dtype, found[name].ndim
                self._store.add(number, name, found[name])
        del session  # it reads the weights
        for value in graph.initializers.values():
            held = None if value.const_value is None else array_of(value.const_value)
            if held is not None:
                release(held)


def _parts(nodes: Sequence[onnx_ir.Node], needed: set[int], budget: int) -> list[set[int]]:
    """Cut the nodes ``needed``, in topological order, where the weights they read exceed ``budget`` bytes."""
    parts: list[set[int]] = [set()]
    seen: set[onnx_ir.Value] = set()
    filled = 0
    for at in sorted(needed):
        read = {value for value in captured_inputs(nodes[at]) if value.is_initializer()} - seen
        nbytes = sum(value.const_value.nbytes for value in read if value.const_value is not None)
        if filled and filled + nbytes > budget:
            parts.append(set())
            seen, filled = set(), 0
        parts[-1].add(at)
        seen |= read
        filled += nbytes
    return parts


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
        self._arrays: dict[str, dict[int, NDArray[Any]]] = {}
        self._scratch = Scratch()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def add(self, batch: int, name: str, array: NDArray[Any]) -> None:
        if array.nbytes > self._free:
            array = self._scratch.keep(array)
        else:
            self._free -= array.nbytes
        self._arrays.setdefault(name, {})[batch] = array

    def read(self, batch: int, names: Iterable[str]) -> Batch:
        kept = {name: self._arrays[name][batch] for name in names}
        return {name: _loaded(item) for name, item in kept.items()}

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for kept in self._arrays.pop(name, {}).values():
                if not is_mapped(kept):
                    self._free += kept.nbytes


def _loaded(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array of a file in memory, where its pages do not stay, and any other as it is."""
    if not is_mapped(array):
        return array
    copy = array.copy()
    release(array)
    return copy
