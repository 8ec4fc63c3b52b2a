"""Samples as sparse combinations of dictionary atoms, ``Z ~ C A``. Arrays in, arrays out; float64, no ONNX.

A row of ``Z [N, d]`` is what one output of a layer is to its inputs: for ``V [N, K]`` beside the weight ``W``, and
inputs with the Gram matrix ``G = L L^T``, ``Q(W - V) = ||(W - V) L||_F^2``; a rotation of the columns of ``Z = W L``
changes no distance. ``C [N, k]`` is sparse, the same number of entries in each row; ``A [k, d]`` is dense. Atoms that
are combinations of samples are the same combinations of the rows of ``W`` in the space of the weights: ``L`` is never
inverted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.least_squares import fit_rows
from sparsecc.passes.prune.selection import Mask
from sparsecc.sparse import Pattern, keep_mask, keep_units

__all__ = [
    "Coding",
    "Support",
    "compot",
    "error_of",
    "fit_atoms",
    "fit_codes",
    "principal_samples",
    "refit",
    "rocket",
]

#: Directions of the codes whose energy is a smaller share of the largest count as none.
_DEPENDENT = 1e-12

#: Steps of conjugate gradients in a turn: atoms are close to orthonormal, and the next turn goes on.
_STEPS = 4

#: Iterations stop where the error falls by less than this share.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class Support:
    """How many codes of a row stay, and in which pattern.

    Attributes:
        pattern: unstructured, N:M or blocks ``Rx1`` of rows.
        kept: codes of each row that stay; what N:M implies.
    """

    pattern: Pattern
    kept: int

    @property
    def rows(self) -> int:
        """Rows that share one support."""
        return max(1, self.pattern.rows)

    def mask(self, squares: Matrix) -> Mask:
        """Return the mask ``[N, k]`` that keeps the largest sum of ``squares``, what dropping each code costs."""
        if self.pattern.kind == "nm":
            return keep_mask(squares, self.pattern)
        return keep_units(squares, self.pattern, self.kept, "row")

    def start(self, atoms: int, axes: int) -> Matrix:
        """Return orthonormal atoms ``[k, d]`` to begin with: the first axes, dealt over the groups of N:M by turns."""
        order = np.arange(atoms)
        if self.pattern.kind == "nm":
            groups = -(-atoms // self.pattern.m)
            order = np.argsort(order % groups, kind="stable")
        return np.eye(atoms, axes)[order]

    def stages(self, count: int) -> list[Support]:
        """Return supports of growing size, at most ``count`` of them, the last this one."""
        most = self.pattern.n if self.pattern.kind == "nm" else self.kept
        sizes = sorted({-(-most * (at + 1) // count) for at in range(count)} - {0})
        if self.pattern.kind == "nm":
            return [replace(self, pattern=replace(self.pattern, n=size)) for size in sizes]
        return [replace(self, kept=size) for size in sizes]


@dataclass(frozen=True)
class Coding:
    """Samples as sparse codes times atoms.

    Attributes:
        codes: ``[N, k]``, exactly zero outside the mask.
        mask: ``[N, k]``.
        atoms: ``[k, d]``.
        errors: squared distance from the samples after each step; the last is that of codes and atoms.
    """

    codes: Matrix
    mask: Mask
    atoms: Matrix
    errors: tuple[float, ...]


def principal_samples(weight: Matrix, gram: Matrix) -> Matrix:
    """Return samples ``Z [N, min(N, K)]`` with ``Z Z^T = W G W^T``, coordinate axes by falling energy.

    So the first r unit vectors are the best dictionary of r atoms without sparsity, the right singular vectors.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, positive semi-definite; definite where ``N > K``.

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not definite where it must be.
    """
    if len(weight) <= len(gram):
        outputs = weight @ gram @ weight.T
        values, vectors = np.linalg.eigh((outputs + outputs.T) / 2)
        return np.ascontiguousarray((vectors * np.sqrt(np.maximum(values, 0.0)))[:, ::-1])
    whitened = weight @ np.linalg.cholesky(gram)
    return np.asarray(whitened @ np.linalg.eigh(whitened.T @ whitened)[1][:, ::-1])


def fit_atoms(codes: Matrix, samples: Matrix) -> Matrix:
    """Return the atoms ``[k, d]`` with the smallest ``||samples - codes atoms||_F``, zero where no code uses one.

    Args:
        codes: ``[N, k]``.
        samples: ``[N, d]``.
    """
    lengths = np.linalg.norm(codes, axis=0)
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    scaled = (
        codes * scale
    )  # of equal length: the normal equations are well conditioned but for dependent atoms
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    usable = values > _DEPENDENT * max(values[-1], 0.0)
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=usable)
    return np.asarray(scale[:, None] * ((vectors * inverse) @ (vectors.T @ (scaled.T @ samples))))


def fit_codes(samples: Matrix, atoms: Matrix, mask: Mask, start: Matrix, steps: int) -> Matrix:
    """Return the codes on ``mask`` that are closest to the samples, never farther than ``start``.

    Args:
        samples: ``[N, d]``.
        atoms: ``[k, d]``.
        mask: ``[N, k]``.
        start: ``[N, k]``, zero outside the mask.
        steps: most steps of conjugate gradients.
    """
    gram = atoms @ atoms.T
    gram.flat[:: len(gram) + 1] += np.diag(gram) == 0  # an atom of zeros: nothing is left for it to explain
    return fit_rows((samples - start @ atoms) @ atoms.T, mask, gram, start, steps)


def compot(samples: Matrix, atoms: int, support: Support, iterations: int) -> Coding:
    """Return codes of an orthonormal dictionary (COMPOT, after its summaries).

    Starts from the first principal axes. In turns: the codes that cost most to drop stay, which is the best sparse
    code for orthonormal atoms; then the orthonormal atoms that suit the codes best (Procrustes). The error never rises.

    Args:
        samples: ``[N, d]`` by ``principal_samples``.
        atoms: how many, at most d.
        support: how many codes stay, in which pattern.
        iterations: most of them.
    """
    total = float(np.square(samples).sum())
    basis = support.start(atoms, samples.shape[1])
    errors: list[float] = []
    while True:
        codes = samples @ basis.T
        mask = support.mask(np.square(codes))
        codes = np.where(mask, codes, 0.0)
        errors.append(max(0.0, total - float(np.square(codes).sum())))
        if len(errors) > iterations or (len(errors) > 1 and errors[-1] >= errors[-2] * (1 - _LEAST_GAIN)):
            return Coding(codes, mask, basis, tuple(errors))
        left, _, right = np.linalg.svd(codes.T @ samples, full_matrices=False)
        basis = left @ right


def rocket(samples: Matrix, weight: Matrix, atoms: int, support: Support) -> Coding:
    """Return codes of the first principal axes, those that matter in both spaces (ROCKET, without its training).

    The importance of a code is the geometric mean of its size among the samples and of what its atom adds to the
    weight. No codes are admitted again afterwards: every row keeps the same number.

    Args:
        samples: ``[N, d]`` by ``principal_samples``.
        weight: ``[N, K]``, what the samples are made from.
        atoms: how many, at most d.
        support: how many codes stay, in which pattern.
    """
    basis = support.start(atoms, samples.shape[1])
    codes = samples @ basis.T
    lengths = np.linalg.norm(fit_atoms(codes, weight), axis=1)
    mask = support.mask(np.square(codes) * lengths)
    kept = np.where(mask, codes, 0.0)
    return Coding(kept, mask, basis, (error_of(samples, kept, basis),))


def refit(samples: Matrix, found: Coding, rounds: int) -> Coding:
    """Return the same mask with codes and atoms by least squares in turns, atoms first; the error never rises.

    Args:
        samples: ``[N, d]``.
        found: where to start.
        rounds: most of them; the last ends with atoms.
    """
    codes, atoms, errors = found.codes, found.atoms, list(found.errors)
    for turn in range(rounds + 1):
        if turn:
            codes = fit_codes(samples, atoms, found.mask, codes, _STEPS)
        atoms = fit_atoms(codes, samples)
        errors.append(error_of(samples, codes, atoms))
        if turn and errors[-1] >= errors[-2] * (1 - _LEAST_GAIN):
            break
    return Coding(codes, found.mask, atoms, tuple(errors))


def error_of(samples: Matrix, codes: Matrix, atoms: Matrix) -> float:
    """Return ``||samples - codes atoms||_F^2``."""
    return float(np.square(samples - codes @ atoms).sum())
