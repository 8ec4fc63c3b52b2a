"""Kernels that are products of small tensors, fitted to the inputs by solving for one factor at a time.

Arrays in, arrays out; float64, no ONNX. A form is written as the operands of an Einstein sum whose result is the
kernel: ``("orj", "rci")`` over ``"cij"`` is a vertical convolution before a horizontal one. The objective is
``Q(E) = tr(E gram E^T)`` with ``E`` what the kernel ``[N, K]`` lacks and K in the order of the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import Matrix, quadratic_error

__all__ = ["Multilinear", "Refined", "refine"]

Pair = tuple[int, int]

#: A round that lowers the objective by less than this share of it is the last one.
_LEAST_GAIN = 1e-3

#: Steps of conjugate gradients for a factor, and the share of the first gradient at which they end.
_STEPS, _PRECISION = 4, 1e-3

#: Ridge of systems that are solved, as a share of the mean of their diagonals: factors may have dependent parts.
_RIDGE = 1e-10


@dataclass(frozen=True)
class Multilinear:
    """How factors make a kernel.

    Attributes:
        operands: the letters of each factor. The first begins with ``o``, the outputs, which no other one has.
        kernel: the letters of the kernel behind ``o``, in the order of K.
        sizes: of every letter.
        outer_rank: of the first factor as a matrix ``[o, rest]``; none for any.
    """

    operands: tuple[str, ...]
    kernel: str
    sizes: dict[str, int]
    outer_rank: int | None = None

    def shape(self, letters: str) -> tuple[int, ...]:
        """Return the sizes of ``letters``."""
        return tuple(self.sizes[letter] for letter in letters)

    def contract(
        self, operands: Sequence[str], factors: Sequence[Matrix], result: str, order: Sequence[Pair] = ()
    ) -> Matrix:
        """Return the Einstein sum of ``factors`` with these letters, in pairs, by default whichever are cheapest."""
        path: Any = ["einsum_path", *order] if order else "greedy"
        return np.asarray(np.einsum(f"{','.join(operands)}->{result}", *factors, optimize=path))

    def product(self, factors: Sequence[Matrix]) -> Matrix:
        """Return the kernel ``[N, K]``."""
        letters, inner = self.joined(self.operands[1:], factors[1:])
        result = self.contract([self.operands[0], letters], [factors[0], inner], "o" + self.kernel)
        return result.reshape(len(result), -1)

    def joined(self, operands: Sequence[str], factors: Sequence[Matrix]) -> tuple[str, Matrix]:
        """Return one factor, and its letters, in the place of several: nothing is summed over."""
        letters = "".join(dict.fromkeys("".join(operands)))
        return letters, self.contract(operands, factors, letters)

    def basis(self, inner: Sequence[Matrix]) -> Matrix:
        """Return ``[m, K]``, what the columns of the first factor, ``[N, m]``, are multiplied with."""
        letters = self.operands[0][1:]
        size = int(np.prod(self.shape(letters)))
        unit = replace(self, sizes={**self.sizes, "o": size})
        return unit.product([np.eye(size).reshape(size, *self.shape(letters)), *inner])


@dataclass(frozen=True)
class Refined:
    """Factors with what they were found by.

    Attributes:
        factors: as their operands say.
        objectives: ``Q`` and the ridge's part, after each round; the first belongs to the start.
    """

    factors: tuple[Matrix, ...]
    objectives: tuple[float, ...]


def refine(
    form: Multilinear,
    inner: Sequence[Matrix],
    target: Matrix,
    gram: Matrix,
    rounds: int,
    *,
    ridge: float = 0.0,
    balance: Callable[[Sequence[Matrix]], Sequence[Matrix]] | None = None,
) -> Refined:
    """Return factors that suit ``target`` better with every round.

    The first factor is solved exactly for the others (with ``outer_rank`` by reduced-rank regression), then each of
    the others approximately for the rest, by conjugate gradients from where it is. No step raises
    ``Q + ridge * (squared norm of all factors)``.

    Args:
        form: of the factors.
        inner: where the factors behind the first one start.
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite.
        rounds: at most.
        ridge: keeps factors small; 0 for none.
        balance: makes the norm of the factors smaller without a change of their product.
    """
    found = [_outer(form, inner, target, gram, ridge), *inner]
    objectives = [_objective(form, found, target, gram, ridge)]
    for _ in range(rounds):
        for at in range(1, len(found)):
            found[at] = _inner(form, found, at, target, gram, ridge)
        if balance is not None:
            found = list(balance(found))
        found[0] = _outer(form, found[1:], target, gram, ridge)
        objectives.append(_objective(form, found, target, gram, ridge))
        if objectives[-1] > objectives[-2] * (1 - _LEAST_GAIN):
            break
    return Refined(tuple(found), tuple(objectives))


def _objective(
    form: Multilinear, factors: Sequence[Matrix], target: Matrix, gram: Matrix, ridge: float
) -> float:
    size = sum(float(np.square(factor).sum()) for factor in factors) if ridge else 0.0
    return quadratic_error(target - form.product(factors), gram) + ridge * size


def _outer(form: Multilinear, inner: Sequence[Matrix], target: Matrix, gram: Matrix, ridge: float) -> Matrix:
    """Return the best first factor, ``[o, ...]``."""
    basis = form.basis(inner)
    weighted = basis @ gram
    normal = weighted @ basis.T
    normal.flat[:: len(normal) + 1] += ridge + _RIDGE * np.trace(normal) / len(normal)
    solved = np.asarray(np.linalg.solve(normal, weighted @ target.T).T, np.float64)
    if form.outer_rank is not None and form.outer_rank < min(solved.shape):
        solved = best_factors(solved, normal, form.outer_rank).product()
    return solved.reshape(len(target), *form.shape(form.operands[0][1:]))


def _inner(
    form: Multilinear, factors: Sequence[Matrix], at: int, target: Matrix, gram: Matrix, ridge: float
) -> Matrix:
    """Return a better factor ``at``, the others as they are.

    Directions of the outputs that the first factor does not reach are left out: nothing changes there.
    """
    others = [factor for place, factor in enumerate(factors) if place != at]
    first = others[0].reshape(len(target), -1)
    left = target - form.product(factors)
    if first.shape[0] > first.shape[1]:
        span, first = np.linalg.qr(first)
        left = span.T @ left
    others[0] = first.reshape(len(first), *others[0].shape[1:])
    step = _Step(form, at, others, gram)
    start = factors[at]
    change = _conjugate_gradients(
        lambda way: step.back(step.ahead(way) @ gram) + ridge * way,
        step.back(left @ gram) - ridge * start,
        step.precondition,
    )
    return np.asarray(start + change)


class _Step:
    """The linear map from one factor to the kernel, the other way, and a rough inverse of both in turn."""

    def __init__(self, form: Multilinear, at: int, others: Sequence[Matrix], gram: Matrix) -> None:
        self._form, self._own = form, form.operands[at]
        letters = [operand for place, operand in enumerate(form.operands) if place != at]
        elsewhere = set("".join(letters))
        #: Letters that tie the factor to the others, those it is summed over, and those only it has.
        self._shared = "".join(a for a in self._own if a in form.kernel and a in elsewhere)
        self._ranks = "".join(a for a in self._own if a not in form.kernel)
        self._places = "".join(a for a in self._own if a in form.kernel and a not in elsewhere)
        self._letters, self._others = letters[:1], list(others[:1])
        self._joint = len(letters) > 1
        if self._joint:  # they are small, the product with the first one need not be: kept apart from it
            joint, factor = form.joined(letters[1:], others[1:])
            self._letters.append(joint)
            self._others.append(factor)
        self._inverses = self._inverse_of_ranks(), self._inverse_of_places(gram)

    def ahead(self, factor: Matrix) -> Matrix:
        """Return the kernel ``[N, K]`` of this factor."""
        operands, order = [*self._letters, self._own], [(1, 2), (0, 1)] if self._joint else []
        result = self._form.contract(operands, [*self._others, factor], "o" + self._form.kernel, order)
        return result.reshape(len(result), -1)

    def back(self, kernel: Matrix) -> Matrix:
        """Return the transpose of ``ahead`` applied to ``kernel [N, K]``."""
        tensor = kernel.reshape(len(kernel), *self._form.shape(self._form.kernel))
        operands = [*self._letters, "o" + self._form.kernel]
        order = [(0, 2), (0, 1)] if self._joint else []
        return self._form.contract(operands, [*self._others, tensor], self._own, order)

    def precondition(self, factor: Matrix) -> Matrix:
        """Return what would solve the step if places and ranks were apart and all other entries of K alike."""
        ranks, places = self._ranks, self._places
        operands = [
            self._shared + ranks.upper() + ranks,
            self._own,
            self._shared + places + places.upper(),
        ]
        left, right = self._inverses
        return self._form.contract(operands, [left, factor, right], _upper(self._own, ranks + places))

    def _inverse_of_ranks(self) -> Matrix:
        ranks = self._ranks
        operands = [*(_upper(operand, ranks) for operand in self._letters), *self._letters]
        result = self._shared + ranks.upper() + ranks
        order = [(0, 2), (0, 1), (0, 1)] if self._joint else []
        return _inverse(self._form.contract(operands, self._others * 2, result, order), len(ranks))

    def _inverse_of_places(self, gram: Matrix) -> Matrix:
        kernel, places = self._form.kernel, self._places
        tensor = gram.reshape(self._form.shape(kernel) * 2)
        result = self._shared + places + places.upper()
        return _inverse(np.einsum(f"{kernel}{_upper(kernel, places)}->{result}", tensor), len(places))


def _upper(letters: str, some: str) -> str:
    """Return ``letters`` with ``some`` of them as capitals."""
    return letters.translate(str.maketrans(some, some.upper()))


def _inverse(tensor: Matrix, axes: int) -> Matrix:
    """Return the inverses of the matrices whose rows and columns are the last two times ``axes`` axes."""
    shared = tensor.shape[: tensor.ndim - 2 * axes]
    size = int(np.prod(tensor.shape[tensor.ndim - axes :]))
    matrices = tensor.reshape(*shared, size, size)
    mean = np.trace(matrices, axis1=-2, axis2=-1)[..., None, None] / size
    ridge = np.where(mean > 0, 1e-6 * mean, 1.0) * np.eye(size)
    return np.asarray(np.linalg.inv(matrices + ridge)).reshape(tensor.shape)


def _conjugate_gradients(
    normal: Callable[[Matrix], Matrix], gradient: Matrix, precondition: Callable[[Matrix], Matrix]
) -> Matrix:
    """Return an approximate solution of ``normal(x) = gradient`` whose quadratic is at most that of 0."""
    solution = np.zeros_like(gradient)
    rest, way, size = gradient, np.zeros_like(gradient), 1.0
    first = 0.0
    for step in range(_STEPS):
        wanted = precondition(rest)
        new = float((rest * wanted).sum())
        first = first or new
        if not new > first * _PRECISION**2:
            break
        way = wanted + (new / size if step else 0.0) * way
        size = new
        image = normal(way)
        curvature = float((way * image).sum())
        if not curvature > 0:
            break
        solution = solution + new / curvature * way
        rest = rest - new / curvature * image
    return solution
