"""Orthogonal matching pursuit and K-SVD on all samples at once. Arrays in, arrays out; float64, no ONNX."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.factor.dictionary import Coding, Support, error_of
from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.least_squares import fit_rows
from sparsecc.passes.prune.selection import Mask

__all__ = ["cospadi", "pursue", "sweep"]

#: Atoms that one sweep of K-SVD takes between two updates of what all of them leave.
_BLOCK = 32

#: Steps of conjugate gradients while a pursuit goes on, and at least at its end.
_ROUGH, _EXACT = 2, 6

#: Iterations stop where the error falls by less than this share.
_LEAST_GAIN = 1e-3


def pursue(
    samples: Matrix, atoms: Matrix, support: Support, stages: int, steps: int = _ROUGH
) -> tuple[Matrix, Mask]:
    """Return sparse codes ``[N, k]`` for given atoms and their mask, by orthogonal matching pursuit in few stages.

    Every stage adds the atoms that explain most of what is left, then solves for all codes. As many stages as atoms
    are kept is the plain pursuit (Pati et al. 1993), one atom at a time; fewer are cheaper and can be worse.

    Args:
        samples: ``[N, d]``.
        atoms: ``[k, d]``.
        support: how many stay, in which pattern.
        stages: most of them.
        steps: of conjugate gradients for the codes of a stage before the last.
    """
    gram, products = atoms @ atoms.T, samples @ atoms.T
    gram.flat[:: len(gram) + 1] += np.diag(gram) == 0  # atoms of zeros
    codes = np.zeros_like(products)
    mask = np.zeros(codes.shape, bool)
    rest = products
    sizes = support.stages(stages)
    for at, stage in enumerate(sizes):
        mask = stage.mask(np.where(mask, np.inf, np.square(rest) / np.diag(gram)))
        codes = fit_rows(rest, mask, gram, codes, max(steps, _EXACT) if at == len(sizes) - 1 else steps)
        rest = products - codes @ gram
    return codes, mask


def sweep(samples: Matrix, found: Coding) -> Coding:
    """Return the coding after one pass of K-SVD: each atom and its codes in turn, the others as they are.

    One power iteration for each (Rubinstein et al. 2008), which lowers the error or leaves it. An atom without users
    becomes the direction of the sample that is met worst.

    Args:
        samples: ``[N, d]``.
        found: where to start; atoms of any length.
    """
    codes, atoms = found.codes.copy(), found.atoms.copy()
    rest = samples - codes @ atoms
    for start in range(0, len(atoms), _BLOCK):
        some = slice(start, start + _BLOCK)
        before, directions = codes[:, some].copy(), atoms[some].copy()
        ours, axes = codes[:, some], atoms[some]  # rest is before these changed
        for at in range(len(axes)):
            code, old = ours[:, at].copy(), axes[at].copy()
            axis = code @ rest + (code @ before) @ directions - (code @ ours) @ axes + (code @ code) * old
            length = float(np.linalg.norm(axis))
            if length == 0:
                continue
            axis /= length
            code = rest @ axis + before @ (directions @ axis) - ours @ (axes @ axis) + code * (old @ axis)
            ours[:, at], axes[at] = np.where(found.mask[:, some][:, at], code, 0.0), axis
        rest += before @ directions - ours @ axes
    unused = np.flatnonzero(~codes.any(0))
    left = np.square(rest).sum(1)
    for atom, worst in zip(unused, np.argsort(-left, kind="stable"), strict=False):
        if left[worst] > 0:
            atoms[atom] = rest[worst] / np.sqrt(left[worst])
    return Coding(codes, found.mask, atoms, (*found.errors, float(left.sum())))


def cospadi(samples: Matrix, atoms: int, support: Support, iterations: int, stages: int) -> Coding:
    """Return codes of a dictionary of any atoms by pursuit and K-SVD in turns (CoSpaDi, Shopkhoev et al. 2025).

    Starts from the first principal axes. Samples whose new codes are worse than their old ones keep those, so that
    the error never rises.

    Args:
        samples: ``[N, d]`` by ``principal_samples``.
        atoms: how many, at most d.
        support: how many codes stay, in which pattern.
        iterations: most of them.
        stages: of a pursuit.
    """
    basis = support.start(atoms, samples.shape[1])
    codes, mask = pursue(samples, basis, support, stages)
    found = Coding(codes, mask, basis, (error_of(samples, codes, basis),))
    for _ in range(iterations):
        start = found.errors[-1]
        found = sweep(samples, found)
        found = _better(samples, found, *pursue(samples, found.atoms, support, stages), support)
        if found.errors[-1] >= start * (1 - _LEAST_GAIN):
            break
    return found


def _better(samples: Matrix, found: Coding, codes: Matrix, mask: Mask, support: Support) -> Coding:
    """Let samples, as many together as share a support, have new codes where these are better."""

    def errors(some: Matrix) -> NDArray[np.float64]:
        return np.asarray(np.square(samples - some @ found.atoms).sum(1))

    groups = np.arange(0, len(samples), support.rows)
    lower = np.add.reduceat(errors(codes), groups) < np.add.reduceat(errors(found.codes), groups)
    rows = np.repeat(lower, support.rows)[: len(samples), None]
    codes, mask = np.where(rows, codes, found.codes), np.where(rows, mask, found.mask)
    return Coding(codes, mask, found.atoms, (*found.errors, error_of(samples, codes, found.atoms)))
