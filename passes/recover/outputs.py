"""Statistics of tensors in the model and in the dense one, front to back, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.stepwise import Stepwise
from sparsecc.ir import Model
from sparsecc.pm import CalibrationSource

__all__ = ["Batch", "Channels", "Step", "Tap", "walk_pairs", "walk_tensors"]

#: Bytes of activations kept in memory between steps, for each of the two models; more go to files.
_BYTE_BUDGET = 256 << 20

Vector = NDArray[np.float64]


Batch = dict[str, NDArray[Any]]


class Step(NamedTuple):
    """Tensors of the main graph to read together, and the nodes that may be changed once they are read."""

    names: Sequence[str]
    nodes: Sequence[onnx_ir.Node]


@dataclass(frozen=True)
class Tap:
    """A tensor to measure.

    Attributes:
        name: in both models.
        axis: of its channels.
        nodes: what may be changed once it is measured, besides what comes later.
        kept: channels of the dense model that it has; None: all.
    """

    name: str
    axis: int
    nodes: tuple[onnx_ir.Node, ...]
    kept: NDArray[np.int64] | None = None

    def of_dense(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return those channels of ``array``, the tensor in the dense model."""
        return array if self.kept is None else np.take(array, self.kept, self.axis)


@dataclass(frozen=True)
class Channels:
    """Statistics over everything but the channels, each ``[C]``: of the model, of the dense one, of both.

    Attributes:
        mean: mean in the model.
        variance: variance in the model.
        dense_mean: mean in the dense model.
        dense_variance: variance in the dense model.
        covariance: of the two, element by element.
    """

    mean: Vector
    variance: Vector
    dense_mean: Vector
    dense_variance: Vector
    covariance: Vector

    @property
    def error(self) -> float:
        """``||y - y_dense||**2 / ||y_dense||**2``."""
        apart = self.variance + self.dense_variance - 2 * self.covariance
        apart = apart + np.square(self.mean - self.dense_mean)
        energy = float((self.dense_variance + np.square(self.dense_mean)).sum())
        return max(0.0, float(apart.sum())) / energy if energy else 0.0


def walk_tensors(
    model: Model, reference: Model, taps: Sequence[Tap], calibration: CalibrationSource, threads: int
) -> Iterator[tuple[Tap, Channels | str]]:
    """Yield the statistics of each tap in order; the caller may change its nodes' constants before the next.

    Args:
        model: as it is when a tap is reached; its nodes and names must stay.
        reference: the same nodes and names.
        taps: tensors of the main graph in topological order.
        calibration: the inputs.
        threads: of the sessions.

    Yields:
        The tap, and its statistics or the reason why there are none.
    """
    steps = [Step((tap.name,), tap.nodes) for tap in taps]
    for tap, pairs in zip(taps, walk_pairs(model, reference, steps, calibration, threads), strict=True):
        sums, fits = _Sums(tap.axis), True
        for found, wanted in pairs:
            target = tap.of_dense(wanted[tap.name])
            fits = fits and found[tap.name].shape == target.shape
            if fits:
                sums.add(found[tap.name], target)
        yield tap, sums.result() if fits else "its output has another shape in the dense model"


def walk_pairs(
    model: Model, reference: Model, steps: Sequence[Step], calibration: CalibrationSource, threads: int
) -> Iterator[Iterator[tuple[Batch, Batch]]]:
    """Yield for each step its tensors in the model and in the dense one, batch by batch; all must be taken.

    Arguments as for ``walk_tensors``; between two steps the nodes of the first may be changed. Each part of the two
    models runs once.
    """
    position = {node: at for at, node in enumerate(model.onnx.graph)}

    def batches() -> Iterator[Batch]:
        return (dict(batch) for batch in calibration)

    sides = [
        Stepwise(side.copy, batches, byte_budget=_BYTE_BUDGET, threads=threads) for side in (model, reference)
    ]
    for number, step in enumerate(steps):
        later = [name for item in steps[number + 1 :] for name in item.names]
        changing = {position[node] for item in steps[number:] for node in item.nodes}
        ours = sides[0].run(step.names, later, changing)
        theirs = sides[1].run(step.names, later, ())  # its nodes may be others, and none changes
        yield zip(ours, theirs, strict=True)


class _Sums:
    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._parts: list[Vector] = []

    def add(self, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        a, b = (
            np.moveaxis(item, self._axis, -1).reshape(-1, item.shape[self._axis]).astype(np.float64)
            for item in (found, wanted)
        )
        parts = [a.sum(0), b.sum(0), np.square(a).sum(0), np.square(b).sum(0), (a * b).sum(0)]
        self._parts = (
            [old + new for old, new in zip(self._parts, parts, strict=True)] if self._parts else parts
        )
        self._count += len(a)

    def result(self) -> Channels | str:
        if not self._count:
            return "it is never computed"
        mean, dense_mean, square, dense_square, product = (part / self._count for part in self._parts)
        if not all(np.isfinite(part).all() for part in (square, dense_square)):
            return "its output is NaN or infinite on the calibration data"
        return Channels(
            mean,
            np.maximum(square - mean**2, 0),
            dense_mean,
            np.maximum(dense_square - dense_mean**2, 0),
            product - mean * dense_mean,
        )
