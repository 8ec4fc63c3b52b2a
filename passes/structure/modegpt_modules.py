"""Modules of a transformer that can become smaller inside: attention, and neurons between linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.ir.axes import AxisGraph, Orbit
from sparsecc.passes.structure.heads import Attention, find_attentions
from sparsecc.pm import PassReport

__all__ = ["Heads", "Module", "Neurons", "find_modules", "keep_before"]

#: Key of the metadata, before the name of a module, under which its first sizes are kept for a later run.
_BEFORE = "sparsecc.modegpt."


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons that several layers make and one layer reads.

    Attributes:
        orbit: the neurons.
        out: the layer that reads them.
        now: how many there are.
        before: how many there were before the first run.
        weights: numbers of all its layers that leave with one neuron.
    """

    orbit: Orbit
    out: Site
    now: tuple[int]
    before: tuple[int]
    weights: tuple[int]

    @property
    def name(self) -> str:
        """Of the first layer."""
        return self.orbit.name

    def steps(self, multiple: int) -> tuple[int]:
        """What the number of neurons must be a multiple of."""
        return (multiple,)


@dataclass(frozen=True, eq=False)
class Heads:
    """An attention.

    Attributes:
        attention: with its layers.
        now: dimensions of a head of q and k, and of one of v.
        before: what they were before the first run.
    """

    attention: Attention
    now: tuple[int, int]
    before: tuple[int, int]

    @property
    def name(self) -> str:
        """Of the Softmax."""
        return self.attention.name

    @property
    def out(self) -> Site:
        """The layer that reads the result."""
        return self.attention.out

    @property
    def weights(self) -> tuple[int, int]:
        """Numbers of its layers that leave with one dimension of q and k, and with one of v, of every head."""
        item, match = self.attention, self.attention.match
        q, k, v = (part.site.shape[1] for part in (item.q, item.k, item.v))
        return match.heads * q + match.kv_heads * k, match.kv_heads * v + match.heads * item.out.shape[0]

    def steps(self, multiple: int) -> tuple[int, int]:
        """What the dimensions must be multiples of: so that rows are of ``multiple``, pairs with rotary positions."""
        match = self.attention.match
        step = multiple // gcd(multiple, match.kv_heads)
        return lcm(step, 2) if match.q.turn is not None else step, step


Module = Neurons | Heads


def find_modules(
    model: Model,
    kinds: Literal["all", "attention", "mlp"],
    wanted: Callable[[Sequence[Site]], bool],
    report: PassReport,
) -> Iterator[Module]:
    """Yield the modules that can be reduced; all other layers get a reason in ``report``.

    Args:
        model: with its shapes inferred.
        kinds: which to look for.
        wanted: whether a module with these layers, or a layer, is asked for.
        report: of the pass.
    """
    told: set[str] = set()
    if kinds != "mlp":
        for name, found in find_attentions(model):
            if isinstance(found, str):
                report.skip(name, found)
            elif wanted(found.sites):
                told |= {site.name for site in found.sites}
                yield Heads(found, found.match.sizes, _pair(model, name) or found.match.sizes)
    weights = {site.weight: site for site in model.sites()}
    for orbit in AxisGraph(model).orbits("removal") if kinds != "attention" else ():
        layers = [weights[part.value] for part in orbit.parts if part.value in weights]
        if not wanted(layers) or told & {site.name for site in layers}:
            continue
        reason = _no_neurons(orbit, layers)
        if reason is None:
            told |= {site.name for site in layers}
            (part,) = orbit.consumers()
            count = len(orbit.units)
            each = sum(site.shape[0] * site.shape[1] for site in layers) // count
            yield Neurons(
                orbit, weights[part.value], (count,), (max(count, _number(model, orbit.name)),), (each,)
            )
        elif orbit.name not in told:
            told.add(orbit.name)
            report.skip(orbit.name, reason)
    for site in weights.values():
        if site.name not in told and wanted([site]):
            report.skip(site.name, "it is no layer of an attention or an MLP that can be reduced")


def keep_before(model: Model, module: Module) -> None:
    """Remember the first sizes of a module that was reduced."""
    model.metadata[_BEFORE + module.name] = ",".join(map(str, module.before))


def _no_neurons(orbit: Orbit, layers: Sequence[Site]) -> str | None:
    """Why these units are not neurons between linear layers, or None."""
    if orbit.reason is not None:
        return orbit.reason
    plain = all(
        site.op in ("MatMul", "Gemm")
        and site.in_main_graph
        and len(site.nodes) == 1
        and site.quantization is None
        for site in layers
    )
    known = {site.weight for site in layers}
    if not plain or not all(part.value in known for part in orbit.parts if part.role != "vector"):
        return "its units are not made and read by plain linear layers alone"
    if len(orbit.consumers()) != 1:
        return f"its units are read by {len(orbit.consumers())} layers"
    if any(part.atoms.size != len(orbit.units) for part in orbit.parts):
        return "its units are heads, or stand beside others in one weight"
    if len(orbit.units) < 2:
        return "there is only one of it"
    if not all(np.isfinite(site.numpy()).all() for site in layers):
        return "a weight of it holds NaN or infinity"
    return None


def _pair(model: Model, name: str) -> tuple[int, int] | None:
    parts = model.metadata.get(_BEFORE + name, "").split(",")
    if len(parts) == 2 and all(part.isdecimal() and len(part) < 7 for part in parts):
        return int(parts[0]), int(parts[1])
    return None


def _number(model: Model, name: str) -> int:
    text = model.metadata.get(_BEFORE + name, "")
    return int(text) if text.isdecimal() and len(text) < 9 else 0
