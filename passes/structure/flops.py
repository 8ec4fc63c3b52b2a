"""How many multiplications the linear layers of a model need, as a function of the units that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib import Arrays, value_shapes
from sparsecc.ir import Model, Site
from sparsecc.ir.axes import AxisGraph, Part, known_shapes

__all__ = ["Flops", "keep_ratio", "ratio_before"]

#: Key of the metadata under which the share of multiplications left is kept for a later run.
_RATIO = "sparsecc.flops_ratio"

Index = NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    positions: float
    rows: Index | int
    columns: Index | int
    kernel: int


class Flops:
    """Multiplications of MatMul, Gemm and Conv with constant weights.

    On one set of inputs if given, else with 1 for every size that the file does not say.

    Products of two tensors (attention scores), elementwise operators and recurrent layers are not counted.
    """

    def __init__(self, model: Model, axes: AxisGraph, sites: Sequence[Site], inputs: Arrays | None) -> None:
        parts = {(part.value, part.role): _side(part) for part in axes.parts}
        outputs = {
            site.name: [node.outputs[0] for node in site.nodes] for site in sites if site.in_main_graph
        }
        values = [value for found in outputs.values() for value in found]
        shapes = _declared(model, values) if inputs is None else value_shapes(model, values, inputs)
        self._layers = []
        for site in sites:
            sizes = [shapes[value] for value in outputs.get(site.name, []) if value in shapes]
            if site.op not in ("MatMul", "Gemm", "Conv") or not sizes:
                continue
            kernel = site.kernel_size
            rows = parts.get((site.weight, "vector" if site.depthwise else "rows"))
            columns = None if site.depthwise else parts.get((site.weight, "columns"))
            self._layers.append(
                _Layer(
                    sum(float(np.prod(size)) for size in sizes) / site.shape[0],
                    site.shape[0] if rows is None else axes.units(rows, "removal"),
                    site.shape[1] // kernel if columns is None else axes.units(columns, "removal"),
                    kernel,
                )
            )
        self._readers: dict[int, list[int]] = {}
        for number, layer in enumerate(self._layers):
            for side in (layer.rows, layer.columns):
                for unit in [] if isinstance(side, int) else np.unique(side).tolist():
                    self._readers.setdefault(unit, []).append(number)

    def total(self, dead: NDArray[np.bool_]) -> float:
        """Return the multiplications with these units (a flag per unit number) removed."""
        return sum(self._cost(layer, dead) for layer in self._layers)

    def saved(self, dead: NDArray[np.bool_], units: Index) -> float:
        """Return how many fewer there are with ``units`` removed too."""
        numbers = sorted({number for unit in units.tolist() for number in self._readers.get(unit, [])})
        after = dead.copy()
        after[units] = True
        layers = [self._layers[number] for number in numbers]
        return sum(self._cost(layer, dead) - self._cost(layer, after) for layer in layers)

    @staticmethod
    def _cost(layer: _Layer, dead: NDArray[np.bool_]) -> float:
        sides = [
            side if isinstance(side, int) else int(np.count_nonzero(~dead[side]))
            for side in (layer.rows, layer.columns)
        ]
        return layer.positions * sides[0] * sides[1] * layer.kernel


def ratio_before(model: Model) -> float:
    """Return the share of the multiplications that earlier runs left; 1 where there was none."""
    try:
        ratio = float(model.metadata.get(_RATIO, "1"))
    except ValueError:
        return 1.0
    return ratio if 0 < ratio < 1 else 1.0


def keep_ratio(model: Model, ratio: float) -> None:
    """Store the share of the multiplications that is left."""
    model.metadata[_RATIO] = f"{ratio:.6f}"


def _side(part: Part) -> Index:
    """Positions along one side of a weight; the columns of a grouped convolution are those of one group."""
    return part.atoms[0] if part.role == "columns" and part.atoms.ndim > 1 else part.atoms.ravel()


def _declared(model: Model, values: Sequence[onnx_ir.Value]) -> dict[onnx_ir.Value, tuple[int, ...]]:
    with known_shapes(model):
        return {
            value: tuple(size if isinstance(size, int) else 1 for size in value.shape.dims)
            for value in values
            if value.shape is not None
        }
