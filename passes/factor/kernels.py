"""Kernels of convolutions as smaller ones in a row, fitted to the inputs. Arrays in, arrays out; float64, no ONNX.

Weights are ``[N, K]`` with K in the order ``(channel, *kernel)``. Each function starts from a decomposition that
weighs the inputs roughly and hands over to ``refine``, which counts all their correlations and only lowers the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.multilinear import Multilinear, Refined, refine
from sparsecc.passes.hybrid.lowrank import Factors, best_factors
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = [
    "canonical",
    "hooi",
    "separable",
    "spatial_svd",
    "tucker",
    "tucker_numbers",
    "tucker_ranks",
]

#: Rounds of alternating least squares at most.
_ROUNDS = 20

#: Sweeps of higher-order orthogonal iteration, the gain that ends them.
_SWEEPS, _LEAST_GAIN = 10, 1e-4

#: Starts of CP at random beside the others, the rounds that tell which is worth going on with.
_STARTS, _TRIAL = 1, 3

#: CP: the ridge at first as a share of the energy, and the longest component as a multiple of the whole weight.
_RIDGE, _LONGEST = 1e-3, 2.0

#: Share of the energy below which nothing is left to fit.
_EXACT = 1e-12

_AXES = "ijkl"


def spatial_svd(target: Matrix, gram: Matrix, kernel: Sequence[int], rank: int) -> Refined:
    """Return ``[N, r, *rest]`` behind ``[r, C, first]``: a convolution along the first axis, then one along the rest.

    The start is the SVD of ``[C * first, N * rest]`` (Jaderberg et al. 2014) that is best for inputs whose entries
    along the rest are alike.

    Args:
        target: ``[N, C * kernel]``.
        gram: ``[K, K]``, positive definite.
        kernel: two entries or more.
        rank: ``r``, at most ``min(C * first, N * rest)``.
    """
    first, rest = kernel[0], math.prod(kernel[1:])
    channels = target.shape[1] // (first * rest)
    tensor = target.reshape(len(target), channels, first, rest)
    places = gram.reshape(channels, first, rest, channels, first, rest)
    alike = np.einsum("cijdkj->cidk", places).reshape(channels * first, -1) / rest
    matrix = tensor.transpose(0, 3, 1, 2).reshape(-1, channels * first)
    start = best_factors(matrix, alike, rank).right.reshape(rank, channels, first)
    sizes = {"o": len(target), "r": rank, "c": channels, "i": first, "j": rest}
    found = refine(Multilinear(("orj", "rci"), "cij", sizes), [start], target, gram, _ROUNDS)
    outer, inner = found.factors
    even = Factors(outer.transpose(0, 2, 1).reshape(-1, rank), inner.reshape(rank, -1)).balanced()
    left = even.left.reshape(len(target), *kernel[1:], rank)
    return Refined((np.moveaxis(left, -1, 1), even.right.reshape(rank, channels, first)), found.objectives)


def hooi(
    tensor: Matrix, ranks: dict[int, int], sweeps: int = _SWEEPS
) -> tuple[dict[int, Matrix], list[float]]:
    """Return orthonormal bases of some axes that keep most of a tensor, and the squared norm lost after each sweep.

    Higher-order orthogonal iteration (De Lathauwer et al. 2000) from the truncated higher-order SVD, which is the
    first entry of the losses. They never rise.

    Args:
        tensor: any.
        ranks: columns of the basis of each axis that is to be cut.
        sweeps: at most.
    """
    bases = {axis: _largest(_unfolded(tensor, axis), rank) for axis, rank in ranks.items()}
    whole = float(np.square(tensor).sum())
    losses = [_lost(tensor, bases, whole)]
    for _ in range(sweeps):
        for axis, rank in ranks.items():
            others = {other: basis for other, basis in bases.items() if other != axis}
            bases[axis] = _largest(_unfolded(_projected(tensor, others), axis), rank)
        losses.append(_lost(tensor, bases, whole))
        if losses[-2] - losses[-1] <= _LEAST_GAIN * losses[-2]:
            break
    return bases, losses


def tucker_ranks(
    weight: Matrix, kernel: Sequence[int], numbers: int, multiple: int
) -> tuple[int, int] | None:
    """Return the ranks of channels in and out that lose least of ``weight`` with at most ``numbers`` stored.

    Judged by the sum of what each cut loses by itself, which is at least what both lose together. A rank is a
    multiple of ``multiple``, or all channels: then that side needs no convolution of its own. None where nothing is
    affordable.

    Args:
        weight: ``[N, C * kernel]``.
        kernel: entries per axis.
        numbers: most that may be stored, as ``tucker_numbers`` counts.
        multiple: of ranks.
    """
    tensor = weight.reshape(len(weight), -1, math.prod(kernel))
    outputs, channels, places = tensor.shape
    lost_out, lost_in = (_tails(_unfolded(tensor, axis)) for axis in (0, 1))
    best: tuple[float, int, int] | None = None
    for inner in _steps(channels, multiple):
        for outer in _steps(outputs, multiple):
            if (inner < channels and inner > outer * places) or (outer < outputs and outer > inner * places):
                continue  # more than the other side can give
            if tucker_numbers((inner, outer), weight.shape, places) > numbers:
                continue
            found = (float(lost_in[inner] + lost_out[outer]), inner, outer)
            best = found if best is None else min(best, found)
    return None if best is None else best[1:]


def tucker_numbers(ranks: tuple[int, int], shape: tuple[int, ...], places: int) -> int:
    """Return the numbers in core and bases of a weight ``[N, C * places]``; a rank of all channels has no basis."""
    (inner, outer), (outputs, columns) = ranks, shape
    channels = columns // places
    bases = [side * rank for side, rank in ((channels, inner), (outputs, outer)) if rank < side]
    return inner * outer * places + sum(bases)


def tucker(target: Matrix, gram: Matrix, kernel: Sequence[int], ranks: tuple[int, int]) -> Refined:
    """Return ``[N, r_out]``, ``[r_out, r_in, *kernel]`` and ``[r_in, C]``: fewer channels around the kernel.

    Tucker-2 (Kim et al. 2016) with inputs counted: the start is orthogonal iteration on the weight whitened by the
    inputs' second moments, averaged over the kernel's places; the core and the outputs' basis are always solved
    together, exactly. The basis of a side that keeps all its channels is the identity.

    Args:
        target: ``[N, C * kernel]``.
        gram: ``[K, K]``, positive definite.
        kernel: entries per axis.
        ranks: ``r_in`` and ``r_out``, at most ``r_in * prod(kernel)``.
    """
    places, (inner, outer) = math.prod(kernel), ranks
    outputs, channels = len(target), target.shape[1] // places
    start: Matrix = np.eye(channels)
    rounds = 0
    if inner < channels:
        alike = np.einsum("cpdp->cd", gram.reshape(channels, places, channels, places)) / places
        root = np.linalg.cholesky(alike)
        whitened = np.einsum("ocp,cd->odp", target.reshape(-1, channels, places), root)
        start = np.asarray(np.linalg.solve(root.T, hooi(whitened, {0: outer, 1: inner})[0][1]), np.float64)
        rounds = _ROUNDS
    sizes = {"o": outputs, "a": inner, "c": channels, "p": places}
    form = Multilinear(("oap", "ca"), "cp", sizes, outer_rank=outer)
    found = refine(form, [start], target, gram, rounds)
    core, basis = found.factors
    if inner < channels:
        columns, scale = np.linalg.qr(basis)
        basis = np.asarray(columns, np.float64)
        core = np.asarray(np.einsum("oap,ba->obp", core, scale))
    flat = core.reshape(outputs, -1)
    left = _largest(flat, outer) if outer < outputs else np.eye(outputs)
    core = (left.T @ flat).reshape(outer, inner, *kernel)
    return Refined((left, core, np.ascontiguousarray(basis.T)), found.objectives)


def canonical(
    target: Matrix,
    gram: Matrix,
    kernel: Sequence[int],
    rank: int,
    rng: np.random.Generator,
    rounds: int = _ROUNDS,
) -> Refined:
    """Return ``[N, r]``, ``[r, C]`` and ``[r, side]`` for each axis: a sum of products of vectors (CP).

    A best one need not exist: components may grow without end and cancel one another. So a ridge on the factors,
    raised until no component is longer than twice the weight, and several starts of which the best goes on.

    Args:
        target: ``[N, C * kernel]``.
        gram: ``[K, K]``, positive definite.
        kernel: entries per axis, up to four axes.
        rank: ``r``.
        rng: for the starts.
        rounds: at most, for each ridge.
    """
    axes = _AXES[: len(kernel)]
    channels = target.shape[1] // math.prod(kernel)
    sizes = {"o": len(target), "r": rank, "c": channels, **dict(zip(axes, kernel, strict=True))}
    form = Multilinear(("or", "rc", *(f"r{axis}" for axis in axes)), "c" + axes, sizes)
    energy, longest = quadratic_error(target, gram), _LONGEST * float(np.linalg.norm(target))
    tried = [refine(form, start, target, gram, _TRIAL) for start in _starts(target, gram, form, rng)]
    first = min(tried, key=lambda found: found.objectives[-1])
    factors = _balanced(first.factors)
    if first.objectives[-1] <= _EXACT * energy and _longest(factors) <= longest:
        return Refined(tuple(factors), first.objectives)
    ridge = _RIDGE * energy / max(sum(float(np.square(part).sum()) for part in factors), 1e-300)
    while True:
        found = refine(form, factors[1:], target, gram, rounds, ridge=ridge, balance=_balanced)
        factors = _balanced(found.factors)
        if _longest(factors) <= longest or ridge > energy:
            return _polished(form, found, target, gram, longest)
        ridge *= 10


def separable(target: Matrix, gram: Matrix, kernel: Sequence[int], rank: int) -> Refined:
    """Return ``[N, C, r]`` and ``[C, r, *kernel]``: ``r`` depthwise kernels per channel, then a pointwise convolution.

    The start is the best matrix of rank ``r`` for the kernels ``[N, kernel]`` of each channel on its own inputs
    (Guo et al. 2018 take plain ones).

    Args:
        target: ``[N, C * kernel]``.
        gram: ``[K, K]``, positive definite.
        kernel: entries per axis.
        rank: ``r``, at most ``min(N, prod(kernel))``.
    """
    places = math.prod(kernel)
    tensor = target.reshape(len(target), -1, places)
    channels = tensor.shape[1]
    own = np.einsum("cpcq->cpq", gram.reshape(channels, places, channels, places))
    start = np.stack([best_factors(tensor[:, c], own[c], rank).right for c in range(channels)])
    sizes = {"o": len(target), "c": channels, "t": rank, "p": places}
    found = refine(Multilinear(("oct", "ctp"), "cp", sizes), [start], target, gram, _ROUNDS)
    outer, inner = found.factors
    even = Factors(outer.reshape(len(target), -1), inner.reshape(channels * rank, places)).balanced()
    shapes = outer.shape, (channels, rank, *kernel)
    return Refined((even.left.reshape(shapes[0]), even.right.reshape(shapes[1])), found.objectives)


def _steps(size: int, multiple: int) -> list[int]:
    """Multiples up to ``size``, and ``size`` itself."""
    return [*range(multiple, size, multiple), size]


def _unfolded(tensor: Matrix, axis: int) -> Matrix:
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def _largest(matrix: Matrix, rank: int) -> Matrix:
    """Return the left singular vectors of the ``rank`` largest values, as columns."""
    if matrix.shape[0] > matrix.shape[1]:
        return np.asarray(np.linalg.svd(matrix, full_matrices=False)[0][:, :rank], np.float64)
    return best_factors(matrix, np.eye(matrix.shape[1]), rank).left


def _tails(matrix: Matrix) -> NDArray[np.float64]:
    """Return what is lost of the squared norm by a cut to every rank, from 0 on."""
    values = np.square(np.linalg.svd(matrix, compute_uv=False))
    return np.append(np.cumsum(values[::-1])[::-1], np.zeros(1 + len(matrix) - len(values)))


def _projected(tensor: Matrix, bases: dict[int, Matrix]) -> Matrix:
    """Return the tensor in the coordinates of these bases."""
    for axis, basis in bases.items():
        tensor = np.moveaxis(np.tensordot(basis, tensor, axes=(0, axis)), 0, axis)
    return tensor


def _lost(tensor: Matrix, bases: dict[int, Matrix], whole: float) -> float:
    return max(0.0, whole - float(np.square(_projected(tensor, bases)).sum()))


def _starts(
    target: Matrix, gram: Matrix, form: Multilinear, rng: np.random.Generator
) -> Iterator[list[Matrix]]:
    """Yield inner factors of CP: by directions of the inputs, by single channels, and at random.

    The second is the best separable convolution, which is exact where it may have all its kernels.
    """
    rank, channels = form.sizes["r"], form.sizes["c"]
    sides = form.shape(form.kernel)[1:]
    rows = best_factors(target, gram, min(rank, *target.shape)).right
    directions = [_vectors(row.reshape(channels, *sides)) for row in rows[::-1]]  # the largest comes first
    yield _filled(directions, form, rng)
    places = math.prod(sides)
    kernels: list[tuple[float, int, Matrix]] = []
    for channel in range(channels):
        some = slice(channel * places, (channel + 1) * places)
        found = best_factors(target[:, some], gram[some, some], min(len(target), places))
        sizes = np.square(found.left).sum(0) * np.einsum(
            "tp,pq,tq->t", found.right, gram[some, some], found.right
        )
        kernels += [(-size, channel, row) for size, row in zip(sizes.tolist(), found.right, strict=True)]
    kernels.sort(key=lambda item: item[:2])
    unit = np.eye(channels)
    singles = [[unit[channel], *_vectors(row.reshape(sides))] for _, channel, row in kernels[:rank]]
    yield _filled(singles, form, rng)
    for _ in range(_STARTS):
        yield _filled([], form, rng)


def _vectors(tensor: Matrix) -> list[Matrix]:
    """Return one vector per axis whose product is the closest to ``tensor``, but for its size."""
    if tensor.ndim == 1:
        return [tensor]
    bases, _ = hooi(tensor, dict.fromkeys(range(tensor.ndim), 1))
    return [bases[axis][:, 0] for axis in range(tensor.ndim)]


def _filled(components: list[list[Matrix]], form: Multilinear, rng: np.random.Generator) -> list[Matrix]:
    """Return inner factors of these components, and of random ones as far as they are too few."""
    factors = [rng.standard_normal(form.shape(letters)) for letters in form.operands[1:]]
    for place, vectors in enumerate(components):
        for factor, vector in zip(factors, vectors, strict=True):
            factor[place] = vector
    return factors


def _balanced(factors: Sequence[Matrix]) -> list[Matrix]:
    """Return the same components with vectors of equal length; the first factor is ``[N, r]``, others ``[r, ...]``."""
    rows = [factors[0].T, *factors[1:]]
    lengths = np.stack([np.linalg.norm(part, axis=1) for part in rows])
    usable = (lengths > 0).all(axis=0)
    wanted = np.where(usable, np.exp(np.log(np.where(usable, lengths, 1.0)).mean(axis=0)), 0.0)
    scaled = [
        part * np.divide(wanted, length, out=np.zeros_like(length), where=length > 0)[:, None]
        for part, length in zip(rows, lengths, strict=True)
    ]
    return [scaled[0].T, *scaled[1:]]


def _polished(form: Multilinear, found: Refined, target: Matrix, gram: Matrix, longest: float) -> Refined:
    """Return the factors with the first one solved without the ridge, if components stay as short."""
    free = refine(form, found.factors[1:], target, gram, 0)
    factors = tuple(_balanced(free.factors))
    return Refined(factors, (*found.objectives, *free.objectives)) if _longest(factors) <= longest else found


def _longest(factors: Sequence[Matrix]) -> float:
    """Return the norm of the largest component."""
    rows = [factors[0].T, *factors[1:]]
    return float(np.prod([np.linalg.norm(part, axis=1) for part in rows], axis=0).max(initial=0.0))
