"""One set of inputs to run models on: the caller's, or random ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from sparsecc.calib import Arrays, ModelLike, synthetic_inputs
from sparsecc.errors import UsageError
from sparsecc.ir import Model

__all__ = ["make_inputs"]


def make_inputs(
    model: ModelLike,
    source: Arrays | Iterable[Arrays] | None = None,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return one set of inputs by name.

    Args:
        model: the model or its path.
        source: arrays by name, or something that yields them (a ``Calibration``): the first is taken.
            ``None`` makes synthetic ones.
        seed: of synthetic inputs.
        shapes: of synthetic inputs whose dimensions are symbolic, by input name.

    Raises:
        UsageError: the source is empty, or a shape does not fit.
        UnsupportedModelError: an input is no tensor of numbers.
    """
    if source is None:
        return synthetic_inputs(model if isinstance(model, Model) else Model.load(model), seed, shapes)
    batch = source if isinstance(source, Mapping) else next(iter(source), None)
    if batch is None:
        raise UsageError("the source of inputs is empty; give at least one sample")
    return dict(batch)
