"""By how much the outputs of a part change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Session, open_session
from sparsecc.ir import Model
from sparsecc.plan.part_data import PartData, batches_of
from sparsecc.plan.thinning import BLOCK

__all__ = ["Comparison", "error_of", "estimate"]

#: Operators after which outputs are no affine function of the inputs, or not to rounding.
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger")
#: Standard deviations that hold nine of ten cases on either side.
_NINE_OF_TEN = 1.645

Array = NDArray[np.float64]


class Comparison:
    """Changes of forms against the dense part: exact on the moments where all is affine, else on the sample.

    Args:
        dense: the part by itself.
        data: what it reads.
        affine: its outputs are an affine function of what it reads.
    """

    def __init__(self, dense: Model, data: PartData, affine: bool) -> None:
        self._affine = affine
        self._batches = batches_of(data.sample, dense)
        self._outputs = self._run(open_session(dense))
        self._energies = [float(_columns(output).sum()) for output in self._outputs]
        if affine:
            moments = next(iter(data.moments.values()))
            last = np.append(moments.mean, 1.0)
            whole = np.concatenate([moments.gram, moments.mean[None]])
            self._gram = np.concatenate([whole, last[:, None]], axis=1)
            self._maps = self._map(dense)
            self._affine_energies = [float(self._squares(item).sum()) for item in self._maps]

    def changes(self, form: Model) -> list[Array]:
        """Return of each output the squares of what changed in each column, as shares of all that there was.

        Of outputs that were zeros all counts as much as there was.
        """
        operators = {node.op_type for node in form.onnx.graph}
        if self._affine and operators.isdisjoint(_ROUNDING):
            maps = zip(self._maps, self._map(form), strict=True)
            changed = [self._squares(new - old) for old, new in maps]
            return [_share(item, energy) for item, energy in zip(changed, self._affine_energies, strict=True)]
        pairs = zip(self._outputs, self._run(open_session(form)), strict=True)
        changed = [_columns(new - old.astype(np.float64)) for old, new in pairs]
        return [_share(item, energy) for item, energy in zip(changed, self._energies, strict=True)]

    def _run(self, session: Session) -> list[NDArray[Any]]:
        """Outputs for the sample."""
        return [
            np.stack(found)
            for found in zip(*(session.run(item).values() for item in self._batches), strict=True)
        ]

    def _squares(self, weights: Array) -> Array:
        """Mean square of each output of an affine map ``[K + 1, N]`` over all rows."""
        found: Array = np.maximum(np.einsum("in,in->n", weights, self._gram @ weights), 0.0)
        return found

    def _map(self, model: Model) -> list[NDArray[np.float64]]:
        """Weights and bias of each output, ``[K + 1, N]``: what the rows of the identity give, and one of zeros."""
        names, first = list(self._batches[0]), next(iter(self._batches[0].values()))
        width, length = first.shape[-1], first.shape[-2]  # sessions are made for as many rows
        probes = np.zeros((-(-(width + 1) // length) * length, width), first.dtype)
        probes[np.arange(width), np.arange(width)] = 1
        session = open_session(model)
        pieces = [
            list(session.run(dict.fromkeys(names, probes[at : at + length].reshape(first.shape))).values())
            for at in range(0, len(probes), length)
        ]
        whole = [
            np.concatenate([piece[number].reshape(length, -1) for piece in pieces]).astype(np.float64)[
                : width + 1
            ]
            for number in range(len(pieces[0]))
        ]
        return [np.concatenate([item[:width] - item[width], item[width:]]) for item in whole]


def _columns(array: NDArray[Any]) -> Array:
    """Sums of squares along all axes but the last."""
    wide = array.astype(np.float64).reshape(-1, array.shape[-1])
    found: Array = np.einsum("in,in->n", wide, wide)
    return found


def _share(changed: Array, energy: float) -> Array:
    """``changed`` as a share of ``energy``, or of itself."""
    whole = energy or float(changed.sum())
    return changed / whole if whole else changed


def error_of(changes: Sequence[Array]) -> float:
    """Return the norm of what changed over the norm of the outputs, root of the mean of squares over outputs."""
    return float(np.sqrt(np.mean([item.sum() for item in changes]))) if changes else 0.0


def estimate(
    whole: Sequence[Array], some: Sequence[Array], other: Sequence[Array], share: float
) -> tuple[float, float] | None:
    """Return the error of a form of which only some outputs were fitted, and its spread.

    Outputs differ much in how far they change, in transformers a few hold most of the energy, but forms of one kind
    change the same ones: another form of that kind, of which all is known, says what the others hold.

    Args:
        whole: changes of that form, all of them.
        some: the same, as far as outputs were looked at; whole blocks.
        other: of the form that is asked for.
        share: of the outputs that were looked at.

    Returns:
        Error, and half the width of an interval that holds it in nine of ten cases as a share of it; None where the
        known form changes nothing of some output.
    """
    squares, variance = [], 0.0
    for known, here, there in zip(whole, some, other, strict=True):
        total = float(here.sum())
        if not total > 0:
            return None
        ratio = float(there.sum()) / total
        squares.append(ratio * float(known.sum()))
        apart = (there - ratio * here).reshape(-1, BLOCK).sum(1)
        count = len(apart)
        scale = float(known.sum()) / total
        variance += (1 - share) * count / (count - 1) * float(np.square(apart).sum()) * scale**2
    if not sum(squares) > 0:
        return 0.0, 0.0
    return float(np.sqrt(np.mean(squares))), _NINE_OF_TEN * float(np.sqrt(variance)) / sum(squares) / 2
