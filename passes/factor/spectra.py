"""Which rank each layer gets of one budget of parameters, by the spectra of all. Arrays in, arrays out; float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix

__all__ = ["parameters", "spread", "tail_errors", "threshold_ranks", "whitened_spectrum"]

Vector = NDArray[np.float64]


def whitened_spectrum(weight: Matrix, gram: Matrix) -> Vector:
    """Return the singular values of ``weight`` times a root of ``gram``, falling, ``[min(N, K)]``.

    The sum of the squares behind the first ``r`` is the smallest error on the outputs of any weight of rank ``r``.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, positive semi-definite; definite where ``N > K``.

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not definite where it must be.
    """
    rows, columns = weight.shape
    if rows <= columns:
        outputs = weight @ gram @ weight.T
    else:
        root = weight @ np.linalg.cholesky(gram)
        outputs = root.T @ root
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh((outputs + outputs.T) / 2)[::-1], 0.0)))


def tail_errors(spectrum: Vector) -> Vector:
    """Return the share of the energy that is lost at each rank from 0 to all, ``[len + 1]``, from 1 down to 0."""
    left = np.append(np.cumsum((spectrum**2)[::-1])[::-1], 0.0)
    return left / left[0] if left[0] > 0 else left


def spread(spectrum: Vector) -> Vector:
    """Return the singular values moved and scaled to [0, 1], WeLore's normalisation; zeros where all are equal."""
    low, high = float(spectrum.min()), float(spectrum.max())
    return (spectrum - low) / (high - low) if high > low else np.zeros_like(spectrum)


def threshold_ranks(
    levels: Sequence[Vector],
    shapes: Sequence[tuple[int, int]],
    budget: float,
    multiple: int = 1,
    limits: Sequence[int] | None = None,
) -> list[int | None]:
    """Return the ranks that the values above one threshold give, which is as low as ``budget`` allows.

    As WeLore (Jaiswal et al., 2024) does with ``spread`` of singular values; but a layer whose factors of that rank
    would not be smaller than its weight stays dense, which the authors' code does not see to.

    Args:
        levels: per layer the values of its spectrum, falling, comparable between layers.
        shapes: (N, K) per layer.
        budget: parameters of all layers together, those of dense ones counted.
        multiple: ranks are rounded down to multiples of it; it is the least rank too.
        limits: per layer a rank beyond which it stays dense, below the one that makes it no smaller; None for that one.

    Returns:
        Per layer the rank, or None where it stays dense. Where even the least ranks exceed the budget, these.
    """
    smaller = [(rows * columns - 1) // (rows + columns) for rows, columns in shapes]
    beyond = smaller if limits is None else [min(pair) for pair in zip(smaller, limits, strict=True)]
    candidates = np.unique(np.concatenate([[np.inf], *levels]))

    def at(threshold: float) -> list[int | None]:
        return [
            _rank(int(np.count_nonzero(own >= threshold)), most, multiple)
            for own, most in zip(levels, beyond, strict=True)
        ]

    low, high = 0, len(candidates) - 1  # what is kept falls with the threshold
    while low < high:
        middle = (low + high) // 2
        fits = parameters(at(candidates[middle]), shapes) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return at(candidates[high])


def parameters(ranks: Sequence[int | None], shapes: Sequence[tuple[int, int]]) -> int:
    """Return the parameters of layers of these ranks; None is dense."""
    return sum(
        rows * columns if rank is None else rank * (rows + columns)
        for rank, (rows, columns) in zip(ranks, shapes, strict=True)
    )


def _rank(kept: int, most: int, multiple: int) -> int | None:
    rank = max(kept // multiple, 1) * multiple
    return rank if rank <= most else None
