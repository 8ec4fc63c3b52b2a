"""Statistics from the already changed front of a model, layer by layer, beside those of the model it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.collect import Reading, Readings, UnavailableError
from sparsecc.calib.source import Batches
from sparsecc.calib.stepwise import Stepwise, ancestors
from sparsecc.calib.views import RowBlock
from sparsecc.ir import Model, Site
from sparsecc.ir.mapped import Scratch, release
from sparsecc.pm import Progress

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Moments", "Schedule", "walk"]

#: Rows of a matrix that one product gives.
_ROWS = 1024

#: Width of inputs up to which second moments of the reference alone are summed too: 32 MB each.
_WIDE = 2048


@dataclass(frozen=True)
class Moments:
    """Second moments of what a site reads: ``Xh`` in the model as it is, ``X`` in the reference, row for row.

    The weight that comes closest to the reference's outputs is ``W cross gram^-1``: whatever is chosen instead
    costs a constant more than its distance to that one, measured by ``gram``.

    Attributes:
        gram: mean of ``Xh^T Xh``, ``[K, K]``, or ``[groups, K, K]`` for a grouped Conv.
        mean: mean of ``Xh``, ``[K]`` or ``[groups, K]``.
        cross: mean of ``X^T Xh``, of the shape of ``gram`` but for rows of another number where the reference has
            more channels there; ``gram`` itself without a reference.
        reference_mean: mean of ``X``.
        reference_gram: mean of ``X^T X``; ``gram`` itself without a reference; None for wide inputs, where it is not
            worth its memory.
        rows: number of rows.
    """

    gram: NDArray[np.float64]
    mean: NDArray[np.float64]
    cross: NDArray[np.float64]
    reference_mean: NDArray[np.float64]
    reference_gram: NDArray[np.float64] | None
    rows: int


def walk(
    model: Model,
    reference: Model | None,
    sites: Sequence[Site],
    batches: Batches,
    *,
    count: int,
    seed: int,
    byte_budget: int,
    moment_budget: int,
    threads: int,
    progress: Progress,
    unavailable: dict[str, str],
) -> Iterator[dict[str, Moments]]:
    """Yield the moments of ``sites`` in steps, front to back; see ``Calibration.walk``."""
    schedule = Schedule(model, sites, unavailable)

    def opened(side: Model) -> Stepwise:
        return Stepwise(lambda: schedule.tapped(side), batches, byte_budget=byte_budget, threads=threads)

    ours, theirs = opened(model), None if reference is None else opened(reference)
    done, total = 0, schedule.count * count
    for step in schedule.steps(moment_budget):
        progress("measuring activations", done * count, total)
        sums = _step_sums(schedule, step, ours, theirs, seed, moment_budget)
        yield dict(schedule.moments(step, sums, unavailable))
        sums.clear()
        done += len(step)
    progress("measuring activations", total, total)


def _step_sums(
    schedule: Schedule, step: Sequence[str], ours: Stepwise, theirs: Stepwise | None, seed: int, budget: int
) -> dict[Reading, _Sums]:
    """Run one step in both models and return the sums of each reading, in files if they exceed ``budget`` bytes."""
    readings = list(dict.fromkeys(reading for name in step for reading in schedule.readings[name]))
    names = list(dict.fromkeys(name for name, _ in readings))
    later = schedule.later()
    beside = None if theirs is None else theirs.run(names, later, ())
    sums: dict[Reading, _Sums] = {}
    for number, here in enumerate(ours.run(names, later, schedule.changing(step))):
        sides = [here] if beside is None else [here, next(beside)]
        for name, view in readings:
            if here[name].size:  # nothing in a branch not taken, in a loop of no round
                # The generator depends on the batch alone, so that both sides draw the same positions.
                rows = (view.rows(side[name], np.random.default_rng([seed, number])) for side in sides)
                sums.setdefault((name, view), _Sums(budget)).add(*rows)
    if beside is not None:
        next(beside, None)  # lets it keep what later steps read
    return sums


class Schedule:
    """Which sites can be measured together: none of them changes what another one of a step reads.

    Attributes:
        readings: what has to be summed, by site name, in graph order.
    """

    def __init__(self, model: Model, sites: Sequence[Site], unavailable: dict[str, str]) -> None:
        """Find the readings of ``sites``; those that cannot be measured go into ``unavailable`` with the reason."""
        self._sites = list(sites)
        self.readings: dict[str, tuple[Reading, ...]] = {}
        self._inputs: dict[str, int] = {}
        copy = self.tapped(model, unavailable)
        nodes = list(copy.onnx.graph)
        values = {value.name: value for node in nodes for value in node.outputs}
        known = {*values, *(value.name for value in copy.onnx.graph.inputs)}
        for site in sites:
            if any(name not in known for name, _ in self.readings.get(site.name, ())):
                del self.readings[site.name]
                unavailable[site.name] = "its input is a constant or is never computed"
        place = _places(model)
        self._holders = {
            s.name: {place[id(node)] for node in s.nodes} for s in sites if s.name in self.readings
        }
        self._before = {
            name: ancestors(nodes, [values[tap] for tap, _ in found if tap in values]) - self._holders[name]
            for name, found in self.readings.items()
        }
        self._size = {site.name: 8 * 2 * site.groups * site.shape[1] ** 2 for site in sites}
        self._waiting: list[str] = []

    @property
    def count(self) -> int:
        """Number of sites."""
        return len(self.readings)

    def tapped(self, model: Model, unavailable: dict[str, str] | None = None) -> Model:
        """Return a copy of ``model`` in whose main graph all readings are tensors, under the same names each time."""
        copy = model.copy()
        readings = Readings(model, copy)
        twins = {site.name: site for site in model.sites()}
        for site in self._sites:
            try:
                found = readings.of(twins[site.name])
            except UnavailableError as reason:
                if unavailable is not None:
                    unavailable[site.name] = str(reason)
            else:
                self.readings.setdefault(site.name, found)
        return copy

    def steps(self, budget: int) -> Iterator[list[str]]:
        """Yield the names of sites front to back; a step's moments take at most ``budget`` bytes, or one input."""
        self._waiting = list(self.readings)
        while self._waiting:
            ready = [name for name in self._waiting if self._is_ready(name)] or self._waiting[:1]
            step, free = [ready[0]], budget - self._size[ready[0]]
            for name in ready[1:]:
                shared = self.readings[name] in [self.readings[other] for other in step]
                if shared or self._size[name] <= free:
                    free -= 0 if shared else self._size[name]
                    step.append(name)
            self._waiting = [name for name in self._waiting if name not in step]
            yield step

    def _is_ready(self, name: str) -> bool:
        before, own = self._before[name], self._holders[name]
        return not any((self._holders[other] - own) & before for other in self._waiting if other != name)

    def later(self) -> list[str]:
        """Tensors that are asked for after the step taken last."""
        return [name for site in self._waiting for name, _ in self.readings[site]]

    def changing(self, step: Sequence[str]) -> set[int]:
        """Positions of the nodes whose weights may change from ``step`` on."""
        return {at for name in (*step, *self._waiting) for at in self._holders[name]}

    def moments(
        self, step: Sequence[str], sums: Mapping[Reading, _Sums], unavailable: dict[str, str]
    ) -> Iterator[tuple[str, Moments]]:
        """Yield name and moments of each site of ``step``; a weight of several nodes has those of all of them.

        Sites with the same readings share them.
        """
        known: dict[tuple[Reading, ...], Moments] = {}
        for name in step:
            found = [sums[reading] for reading in self.readings[name] if reading in sums]
            if not found or not sum(item.rows for item in found):
                unavailable[name] = "its input is never computed"
                continue
            if self.readings[name] not in known:
                known[self.readings[name]] = _Sums.of(found).moments()
            yield name, known[self.readings[name]]


def _places(model: Model) -> dict[int, int]:
    """Position in the main graph of each node by identity: for one in a body, of the node around it."""
    found: dict[int, int] = {}

    def visit(node: onnx_ir.Node, at: int) -> None:
        found[id(node)] = at
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH" and not attribute.is_ref():
                for inner in attribute.as_graph():
                    visit(inner, at)

    for at, node in enumerate(model.onnx.graph):
        visit(node, at)
    return found


def _paired(
    ours: Iterator[RowBlock], theirs: Iterator[RowBlock] | None
) -> Iterator[tuple[RowBlock, RowBlock | None]]:
    """Blocks of the first with as many rows of the second: narrower rows come in longer blocks."""
    waiting: RowBlock | None = None
    for here in ours:
        if theirs is None:
            yield here, None
            continue
        count = here.shape[1]
        while waiting is None or waiting.shape[1] < count:
            more = next(theirs)
            waiting = more if waiting is None else np.concatenate([waiting, more], 1)
        yield here, waiting[:, :count]
        waiting = waiting[:, count:] if waiting.shape[1] > count else None


class _Sums:
    """Running sums over pairs of rows.

    Args:
        budget: bytes of matrices to hold in memory; larger ones are in a file.
    """

    def __init__(self, budget: int) -> None:
        self.rows = 0
        self._budget = budget
        self._parts: list[NDArray[np.float64]] = []
        self._reference: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, items: Sequence[_Sums]) -> _Sums:
        """Return the sum of several; of one it is that one."""
        items = [item for item in items if item.rows] or items[:1]
        if len(items) == 1:
            return items[0]
        total = cls(items[0]._budget)
        for item in items:
            total._parts = total._parts or [total._zeros(part.shape) for part in item._parts]
            for sums, part in zip(total._parts, item._parts, strict=True):
                sums += part
            if item._reference is not None:
                total._reference = item._reference + (0 if total._reference is None else total._reference)
            total.rows += item.rows
        return total

    def add(self, ours: Iterator[RowBlock], theirs: Iterator[RowBlock] | None = None) -> None:
        """Count rows; two iterators give the same number of rows in all."""
        for here, there in _paired(ours, theirs):
            sides = [here] if there is None else [here, there]
            if not self._parts:
                groups, _, width = here.shape
                shapes = [((groups, side.shape[2], width), (groups, side.shape[2])) for side in sides]
                self._parts = [self._zeros(shape) for pair in shapes for shape in pair]
            for (products, sums), left in zip(self._pairs(), sides, strict=True):
                _add_products(products, left, here)  # the first are of the rows with themselves
                sums += left.sum(1)
            if there is not None and there.shape[2] <= _WIDE:
                if self._reference is None:
                    self._reference = np.zeros((len(there), there.shape[2], there.shape[2]))
                _add_products(self._reference, there, there)
            self.rows += here.shape[1]

    def moments(self) -> Moments:
        """Turn the sums into means; one group loses its axis. Without second rows they are those of the first."""
        _mirror(self._parts[0])
        for products, sums in self._pairs():
            products /= self.rows
            sums /= self.rows
            release(products)
        gram, mean, *crossed = (part[0] if len(part) == 1 else part for part in self._parts)
        cross, reference_mean = crossed or (gram, mean)
        return Moments(gram, mean, cross, reference_mean, self._reference_gram(gram, cross), self.rows)

    def _reference_gram(
        self, gram: NDArray[np.float64], cross: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        if self._reference is None:
            return gram if cross is gram else None
        _mirror(self._reference)
        self._reference /= self.rows
        return self._reference[0] if len(self._reference) == 1 else self._reference

    def _pairs(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        return zip(self._parts[::2], self._parts[1::2], strict=True)

    def _zeros(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        if 8 * math.prod(shape) * 2 > self._budget:  # with the matrix of the second rows
            return Scratch().zeros(shape, np.float64)
        return np.zeros(shape)


def _add_products(total: NDArray[np.float64], left: RowBlock, right: RowBlock) -> None:
    """Add ``left^T right`` of each group to ``total [groups, L, K]``, some rows of it at a time.

    Where both sides are the same, what ``_mirror`` can fill in is left out. The sum has the same bits wherever it is.
    """
    for matrix, a, b in zip(total, left, right, strict=True):
        for start in range(0, len(matrix), _ROWS):
            some, rest = slice(start, start + _ROWS), slice(start if left is right else 0, None)
            matrix[some, rest] += a[:, some].T @ b[:, rest]


def _mirror(total: NDArray[np.float64]) -> None:
    """Make the matrices ``total [groups, K, K]`` symmetric from what is right of their diagonal blocks."""
    for matrix in total:
        for stop in range(_ROWS, len(matrix), _ROWS):
            matrix[stop:, stop - _ROWS : stop] = matrix[stop - _ROWS : stop, stop:].T
