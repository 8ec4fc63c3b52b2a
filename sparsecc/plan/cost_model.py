"""Times of linear sites in any form: measured where a profile has them, else interpolated, with an honest spread.

An estimate between measured products is a sum of what the work takes (``t = a + b * multiplications + c * weights read
+ d * inputs + e * outputs``, no coefficient negative, fitted by least squares of relative errors to all products of the
same kind in the same form), times what neighbours took more or less than their own sums. Its spread comes from leaving
each product out in turn.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model
from sparsecc.plan.costs import CostTable, machine_facts
from sparsecc.plan.items import Estimate
from sparsecc.plan.workload import ProfileKey, Workload, call_key, model_key

__all__ = ["CostModel", "isotonic", "nonnegative_fit"]

Floats = npt.NDArray[np.float64]

#: Two densities that differ by less, as a share of the larger, are the same.
_SAME_DENSITY = 0.02

#: Two measurements of one thing agree to about this share in nine of ten cases.
_NOISE = 0.03

#: How many doublings of a size away a neighbour counts for one third of one at the same place.
_REACH = 1.0

#: By what share the spread grows with each doubling of a size beyond what was measured.
_BEYOND = 0.25

#: N and M in the name of a form.
_GROUPS = re.compile(r"\b(\d+):(\d+)$")

#: Names that rows of a series have besides the dense form.
_NEEDED = {"pair": ("pair",)}

#: At least this share of a measured time is the product's, whatever the call of a session takes.
_LEAST_SHARE = 0.1

#: Spread where a single product was measured, so that nothing can be left out.
_UNKNOWN = 0.5


def nonnegative_fit(columns: Floats, target: Floats) -> Floats:
    """Return the x >= 0 that minimises ``|columns x - target|``, exactly, for at most a handful of columns.

    Args:
        columns: ``[m, p]``.
        target: ``[m]``.
    """
    best, least = np.zeros(columns.shape[1]), float(target @ target)
    scale = np.linalg.norm(columns, axis=0)
    _, small = np.linalg.qr(np.column_stack([columns, target]))  # the same problem in few rows
    columns, target = small[:, :-1], small[:, -1]
    usable = np.flatnonzero(scale > 0)
    for size in range(1, min(len(usable), columns.shape[0]) + 1):
        for chosen in itertools.combinations(usable.tolist(), size):
            part = columns[:, chosen] / scale[list(chosen)]
            found = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.sum((part @ found - target) ** 2))
            if found.min() >= 0 and error < least * (1 - 1e-12):
                least = error
                best = np.zeros(columns.shape[1])
                best[list(chosen)] = found / scale[list(chosen)]
    return best


def isotonic(values: Sequence[float]) -> list[float]:
    """Return the rising sequence nearest to ``values`` in the mean square: neighbours that fall are averaged."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


@dataclass(frozen=True)
class _Curve:
    """Times of one product in one form: densities rising, times in ms not falling."""

    densities: tuple[float, ...]
    times: tuple[float, ...]

    def measured(self, density: float) -> float | None:
        """The time at ``density`` if it was measured there."""
        at = int(np.argmin([abs(known - density) for known in self.densities]))
        near = abs(self.densities[at] - density) <= _SAME_DENSITY * max(density, self.densities[at])
        return self.times[at] if near else None

    def holds(self, density: float) -> bool:
        """Whether ``density`` lies between measured ones."""
        return self.densities[0] <= density <= self.densities[-1]

    def interpolated(self, density: float) -> float:
        """The time between the two measured around ``density``."""
        return float(np.interp(density, self.densities, self.times))


class _Form:
    """What was measured of one form of one kind of product, and what follows from it for others."""

    def __init__(self, curves: Mapping[Workload, _Curve]) -> None:
        self.curves = dict(curves)
        self._coefficients = _fitted(self.curves)
        self._factors = _factors(self.curves, self._coefficients)

    def sum(self, work: Workload, density: float, coefficients: Floats | None = None) -> float:
        """What the work takes by the fitted coefficients, in ms."""
        chosen = self._coefficients if coefficients is None else coefficients
        return float(_basis(work, density) @ chosen)

    def estimate(self, work: Workload, density: float) -> Estimate:
        curve = self.curves.get(work)
        if curve is not None:
            return self._of_measured(curve, work, density)
        ms = self.sum(work, density) * _correction(work, self._factors)
        spread = _quantile(self.left_out) if self.left_out else _UNKNOWN
        beyond = min(_distance(work, other) for other in self.curves)
        return Estimate(ms, "interpolated", spread * (1 + _BEYOND * max(0.0, beyond - _REACH)))

    def _of_measured(self, curve: _Curve, work: Workload, density: float) -> Estimate:
        """Of a product that was measured, perhaps at other densities."""
        known = curve.measured(density)
        if known is not None:
            return Estimate(known, "measured", _NOISE)
        spread = max(_NOISE, _quantile(self.between)) if self.between else _UNKNOWN
        if curve.holds(density):
            return Estimate(curve.interpolated(density), "interpolated", spread)
        end = curve.densities[0] if density < curve.densities[0] else curve.densities[-1]
        ratio = self.sum(work, density) / self.sum(work, end)
        beyond = abs(math.log2(density / end))
        return Estimate(curve.interpolated(end) * ratio, "interpolated", spread * (1 + beyond))

    @cached_property
    def left_out(self) -> list[float]:
        """Relative errors of the products' estimates from all others."""
        found: list[float] = []
        for work, curve in self.curves.items():
            rest = {other: known for other, known in self.curves.items() if other != work}
            if not rest:
                break
            coefficients = _fitted(rest)
            factor = _correction(work, _factors(rest, coefficients))
            found += [
                abs(self.sum(work, density, coefficients) * factor / ms - 1)
                for density, ms in zip(curve.densities, curve.times, strict=True)
            ]
        return found

    @cached_property
    def between(self) -> list[float]:
        """Relative errors at densities whose neighbours on both sides were measured, from these."""
        found: list[float] = []
        for curve in self.curves.values():
            for at in range(1, len(curve.densities) - 1):
                rest = _Curve(
                    curve.densities[:at] + curve.densities[at + 1 :], curve.times[:at] + curve.times[at + 1 :]
                )
                found.append(abs(rest.interpolated(curve.densities[at]) / curve.times[at] - 1))
        return found


def _basis(work: Workload, density: float) -> Floats:
    """What is summed up: a call, multiplications, numbers of the weight, of the inputs and of the outputs."""
    return np.array(
        [1.0, work.multiplications * density, work.n * work.k * density, work.inputs, work.outputs]
    )  # fmt: skip


def _fitted(curves: Mapping[Workload, _Curve]) -> Floats:
    """Coefficients of the basis, never negative, with the least squares of relative errors."""
    rows = [
        (_basis(work, density), ms)
        for work, curve in curves.items()
        for density, ms in zip(curve.densities, curve.times, strict=True)
    ]
    times = np.array([ms for _, ms in rows])
    columns = np.array([basis for basis, _ in rows]) / times[:, None]
    return nonnegative_fit(columns, np.ones(len(rows)))


def _factors(curves: Mapping[Workload, _Curve], coefficients: Floats) -> dict[Workload, float]:
    """By product the mean logarithm of what it took over its sum."""
    found = {}
    for work, curve in curves.items():
        sums = [float(_basis(work, density) @ coefficients) for density in curve.densities]
        found[work] = float(np.mean(np.log(np.array(curve.times) / sums)))
    return found


def _place(work: Workload) -> Floats:
    """Where a product lies: doublings of its sizes."""
    strides = math.prod(work.strides) if work.strides else 1
    return np.log2([work.rows, work.n, work.k, strides])


def _distance(one: Workload, other: Workload) -> float:
    """How far two products lie apart, in doublings of sizes; another activation counts as one."""
    apart = float(np.linalg.norm(_place(one) - _place(other)))
    return apart + (one.activation != other.activation)


def _correction(work: Workload, corrections: Mapping[Workload, float]) -> float:
    """The factor by which ``work`` is expected to differ from its sum: that of its neighbours, near ones most."""
    total, weights = 0.0, 0.0
    for other, value in corrections.items():
        weight = math.exp(-_distance(work, other) / _REACH)
        total, weights = total + weight * value, weights + weight
    return math.exp(total / weights) if weights else 1.0


def _quantile(errors: Sequence[float]) -> float:
    """What nine of ten errors do not exceed."""
    return float(np.quantile(errors, 0.9))


class CostModel:
    """Times of linear sites in forms that were profiled on one machine with one number of threads.

    Attributes:
        facts: of that machine.
        threads: of the sessions.
        differing: names of the facts in which this machine differs.
    """

    def __init__(self, table: CostTable, threads: int | None = None) -> None:
        """Fit the model to the rows of profiles in ``table``.

        Raises:
            UsageError: there are none, none with ``threads``, or some with several numbers of threads and it is not
                said which; or a time is not a positive number.
        """
        rows = [(key, times) for text, times in table if (key := ProfileKey.parse(text)) is not None]
        known = sorted({key.threads for key, _ in rows})
        said = f"{table.path or 'the cost table'}"
        if not rows:
            raise UsageError(f"{said} holds no profile; 'sparsecc targets profile -o FILE' measures one")
        if threads is None and len(known) > 1:
            raise UsageError(f"{said} was profiled with {known} threads; give one of them with --threads")
        self.threads = known[0] if threads is None else threads
        if self.threads not in known:
            raise UsageError(
                f"{said} was profiled with {known} threads, not {threads}; profile with --threads {threads}"
            )
        self._table = table
        self.facts = dict(table.facts)
        self.differing = table.differing(machine_facts())
        call = (table.get(call_key(self.threads), ("empty",)) or {"empty": 0.0})["empty"]
        if not 0 <= call < math.inf:
            raise UsageError(f"{said}: no time under '{call_key(self.threads)}'; measure again")
        chosen = [(key, times) for key, times in rows if key.threads == self.threads]
        _check(chosen, said)
        self._forms = _forms(chosen, call, _borders(chosen, call))

    @classmethod
    def load(cls, source: str | Path | CostTable, threads: int | None = None) -> CostModel:
        """The model of a table, or of a file with one, which may come from another machine."""
        return cls(source if isinstance(source, CostTable) else CostTable.read(Path(source)), threads)

    def model_ms(self, model: Model, inputs: Mapping[str, npt.NDArray[np.generic]]) -> float | None:
        """The time of the whole model as it is on inputs of these shapes in ms, if it was profiled."""
        found = self._table.get(model_key(model, inputs, self.threads), ("dense",))
        return None if found is None else found["dense"]

    @property
    def provenance(self) -> str:
        """One line for reports: where the times come from."""
        where = f"{self.facts.get('cpu', 'an unknown processor')}, {self.threads} thread(s)"
        if not self.differing:
            return f"times profiled on this machine: {where}"
        return f"times profiled on another machine, not measured here: {where}; differs in {', '.join(self.differing)}"

    @property
    def forms(self) -> Mapping[str, Sequence[str]]:
        """By kind of product (``Workload.kind``) the forms it was measured in."""
        found: dict[str, list[str]] = defaultdict(list)
        for kind, form in sorted(self._forms):
            found[kind].append(form)
        return found

    def left_out_errors(self) -> dict[tuple[str, str], float]:
        """By kind and form the mean relative error of estimates of products from all others, where there are any."""
        return {
            name: float(np.mean(form.left_out)) for name, form in self._forms.items() if form.left_out
        }  # fmt: skip

    def estimate(self, work: Workload, form: str = "dense", density: float = 1.0) -> Estimate:
        """The time of ``work`` in ``form``.

        Args:
            work: the product (``workload_of_site``).
            form: ``dense``; ``int8 dense`` and ``static int8 dense``: quantised, with ranges of activations found at
                run time and fixed before; ``low-rank``; or the text of a ``Layout``, such as ``16x1``.
            density: share of the numbers of the weight that are left; of ``low-rank``, what both factors hold; of N:M
                it does not matter, as all N of every M are stored.

        Raises:
            MeasurementError: nothing like it was measured.
        """
        if not 0 < density <= 1:
            raise MeasurementError(f"no time of density {density:g}: it lies in (0, 1]")
        groups = _GROUPS.search(form)
        if groups is not None:
            density = int(groups[1]) / int(groups[2])
        found = self._forms.get((work.kind, form))
        if found is None:
            known = ", ".join(self.forms.get(work.kind, ())) or "nothing"
            raise MeasurementError(
                f"no profile of {form} for {work.kind} products (there is {known}); profile this machine again"
            )
        return found.estimate(_alike(work), density)


def _alike(work: Workload) -> Workload:
    """The same product as a MatMul where it is a Gemm: both are one kernel."""
    return (
        Workload("MatMul", work.rows, work.n, work.k, activation=work.activation)
        if work.op == "Gemm"
        else work
    )


def _check(rows: Iterable[tuple[ProfileKey, Mapping[str, float]]], said: str) -> None:
    for key, times in rows:
        if any(not 0 < ms < math.inf for ms in times.values()) or not {
            "dense",
            *_NEEDED.get(key.series, ()),
        } <= {*times}:
            raise UsageError(
                f"{said}: no positive times, or none of the dense form, under '{key}'; measure again"
            )


def _borders(rows: Iterable[tuple[ProfileKey, Mapping[str, float]]], call: float) -> dict[str, float]:
    """By kind of product the share of its time that a dense convolution alone takes to reorder input and output.

    onnxruntime stores channels in blocks between convolutions; one alone has to go there and back. Pairs in a row tell.
    """
    shares: dict[str, list[float]] = defaultdict(list)
    for key, times in rows:
        if key.series == "pair":
            alone = times["dense"] - call
            shares[key.work.kind].append(
                (2 * times["dense"] - times["pair"] - call) / alone if alone > 0 else 0.0
            )
    return {kind: min(max(0.0, median(found)), 1 - _LEAST_SHARE) for kind, found in shares.items()}


def _forms(
    rows: Iterable[tuple[ProfileKey, Mapping[str, float]]], call: float, borders: Mapping[str, float]
) -> dict[tuple[str, str], _Form]:
    """All measured forms by kind of product and name.

    The times of one product come from several runs. What was slower or faster in all of a run was the machine: times
    are scaled so that the dense form takes what it takes in the median run. What the ``call`` of a session takes is
    left out, and what dense convolutions pay at their ``borders``: inside a model both are paid once.
    """
    runs: dict[tuple[Workload, int], list[tuple[ProfileKey, Mapping[str, float]]]] = defaultdict(list)
    for key, times in rows:
        if key.series != "pair":
            runs[_alike(key.work), key.copies].append((key, times))
    found: dict[tuple[str, str], dict[Workload, dict[float, list[float]]]] = defaultdict(dict)
    for (work, _), own in runs.items():
        usual = median(times["dense"] for _, times in own)
        for key, times in own:
            for name, ms in times.items():
                density = 1.0 if name.endswith("dense") else key.density
                points = found[work.kind, name].setdefault(work, {})
                scaled = ms * usual / times["dense"]
                net = max(scaled - call, _LEAST_SHARE * scaled)
                if work.op == "Conv" and name in (
                    "dense",
                    "low-rank",
                ):  # onnxruntime blocks the channels of these
                    net *= 1 - borders.get(work.kind, 0.0)
                points.setdefault(density, []).append(net)
    return {
        name: _Form(
            {
                work: _Curve(
                    tuple(sorted(points)), tuple(isotonic([median(points[d]) for d in sorted(points)]))
                )
                for work, points in curves.items()
            }
        )
        for name, curves in found.items()
    }
