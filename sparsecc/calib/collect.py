"""Streaming statistics of tensors through onnxruntime with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from sparsecc.calib.engine import open_session
from sparsecc.calib.lift import Lifter, LiftError, twins
from sparsecc.calib.source import Batch, Batches
from sparsecc.calib.stepwise import Stepwise
from sparsecc.calib.tap import tap, tensor_shapes
from sparsecc.calib.views import InBody, Patches, Rows, States, Statistic, Sums, View
from sparsecc.errors import UsageError
from sparsecc.ir import Model, Site, conv_geometry
from sparsecc.ir.quantized import data_input
from sparsecc.pm import Progress

__all__ = ["Reading", "Readings", "Tapped", "UnavailableError", "collect", "tensor_groups"]

#: A tensor of the main graph and how it is looked at. Sites with the same reading share its sums.
Reading: TypeAlias = tuple[str, View]

#: Bytes of one element, for the budget: sites read float32 or float16 as a rule.
_ELEMENT = 4


class UnavailableError(Exception):
    """A site cannot be measured; the text is the reason."""


class Readings:
    """What has to be summed to know the reduction vectors of sites.

    Args:
        model: where the sites are.
        copy: a copy of it, which is changed: what is read inside bodies of If, Loop and Scan becomes a tensor of
            its main graph, and an output of LSTM or GRU gets a name where the model does not produce it.
    """

    def __init__(self, model: Model, copy: Model) -> None:
        self._main = model.onnx.graph
        self._twins = twins(model.onnx.graph, copy.onnx.graph)
        self._lifter = Lifter.of(copy.onnx)

    def of(self, site: Site) -> tuple[Reading, ...]:
        """Return the readings of ``site``; a weight that several nodes use has those of all of them.

        Raises:
            UnavailableError: onnxruntime cannot return what the site reads.
        """
        if site.scope == "function":
            raise UnavailableError("inside a function body, whose tensors onnxruntime does not return")
        found: list[Reading] = []
        for node in site.nodes:
            states = site.op in ("LSTM", "GRU") and site.input is None
            parts = _state_values(node) if states else [(data_input(node), _view(site, node))]
            found += [self._reading(node, value, view, site.dtype) for value, view in parts]
        return tuple(found)

    def _reading(
        self, node: onnx_ir.Node, value: onnx_ir.Value | None, view: View, dtype: np.dtype[Any]
    ) -> Reading:
        twin = None if value is None else self._twins.get(value)
        if twin is None:
            raise UnavailableError("its input has no floating-point form, or no name")
        if not twin.name:
            twin.name = f"sparsecc_states_of_{node.name}_{node.outputs[-1].name}"
        if node.graph is self._main:
            return twin.name, view
        try:
            lifted = self._lifter.copy_of(twin, dtype, self._twins[node.outputs[-1]].producer())
        except LiftError as error:
            raise UnavailableError(str(error)) from None
        return str(lifted.value.name), InBody(view, lifted.stacked)


def _view(site: Site, node: onnx_ir.Node) -> View:
    if site.conv is None:
        return Rows()
    geometry = conv_geometry(node, site.weight_shape)
    return Patches(
        geometry.kernel_shape,
        geometry.strides,
        geometry.dilations,
        geometry.pads,
        geometry.group,
        odd_first=node.attributes.get_string("auto_pad", "NOTSET") == "SAME_LOWER",
    )


def _state_values(node: onnx_ir.Node) -> Iterator[tuple[onnx_ir.Value | None, View]]:
    """What the recurrent weight of an LSTM or GRU meets: its states, and the state it starts from."""
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise UnavailableError("its states end at sequence_lens, which the statistics do not follow")
    direction = node.attributes.get_string("direction", "forward") or "forward"
    directions = ("forward", "reverse") if direction == "bidirectional" else (direction,)
    has_start = len(node.inputs) > 5 and node.inputs[5] is not None
    yield node.outputs[0], States(directions, from_zero=not has_start)
    if has_start:
        yield node.inputs[5], Rows()


def collect(
    model: Model,
    wanted: Sequence[Reading],
    statistic: Statistic,
    batches: Batches,
    *,
    count: int,
    seed: int,
    byte_budget: int,
    threads: int,
    progress: Progress,
) -> dict[Reading, Sums]:
    """Run ``model`` over all batches and return the sums of each reading.

    Tensors are returned by onnxruntime in groups of at most ``byte_budget`` bytes (a larger one alone), told
    by the first batch. Each part of the model runs once over the ``count`` batches, with its own weights only.

    Raises:
        UsageError: there are no batches, or one does not fit the model.
        ModelError: onnxruntime refuses the model.
    """
    first = next(batches(), None)
    if first is None:
        raise UsageError("the calibration data hold no samples; give at least one")
    groups = tensor_groups(model, [name for name, _ in wanted], first, byte_budget)
    steps = Stepwise(model.copy, batches, byte_budget=byte_budget, threads=threads)
    sums: dict[Reading, Sums] = {}
    done = 0
    for at, names in enumerate(groups):
        later = [name for group in groups[at + 1 :] for name in group]
        here = [reading for reading in wanted if reading[0] in names]
        for number, arrays in enumerate(steps.run(names, later, ())):
            for name, view in here:
                rng = np.random.default_rng(
                    [seed, number]
                )  # of the batch alone: the grouping must not matter
                if isinstance(view, InBody) and not arrays[name].size:
                    continue  # a branch not taken, a loop of no round
                part = view.sums(arrays[name], statistic, rng)
                sums[name, view] = sums[name, view] + part if (name, view) in sums else part
            done += 1
            progress("measuring activations", done, max(done, count * len(groups)))
    return sums


class Tapped:
    """Returns named tensors of a model, inputs of the graph among them."""

    def __init__(self, model: Model, names: Sequence[str], threads: int) -> None:
        inputs = {spec.name for spec in model.input_specs()}
        self._direct = [name for name in names if name in inputs]
        computed = [name for name in names if name not in inputs]
        # Without the native operators: their function bodies compute the same and need no library.
        self._session = open_session(tap(model, computed), threads=threads) if computed else None

    def run(self, batch: Batch) -> Batch:
        """Return the tensors by name."""
        computed = self._session.run(batch) if self._session else {}
        return {**computed, **{name: batch[name] for name in self._direct}}


def tensor_groups(model: Model, names: Sequence[str], first: Batch, byte_budget: int) -> list[list[str]]:
    """Return ``names`` in groups of at most ``byte_budget`` bytes (a larger one alone), told by ``first``."""
    shapes = tensor_shapes(model, names, first)
    groups: list[list[str]] = []
    filled = byte_budget + 1
    for name, shape in shapes.items():
        nbytes = prod(shape) * _ELEMENT
        if filled + nbytes > byte_budget:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups
