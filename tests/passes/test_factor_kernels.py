"""Mathematics of convolutions as several smaller ones: exact at full size, errors that only fall."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparsecc.passes.factor.kernels import (
    Refined,
    canonical,
    hooi,
    separable,
    spatial_svd,
    tucker,
    tucker_numbers,
    tucker_ranks,
)
from sparsecc.passes.factor.multilinear import Multilinear, refine
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import quadratic_error

SHAPES = [(5, 4, (3, 3)), (7, 3, (2, 5)), (3, 5, (3,)), (4, 2, (2, 2, 2)), (1, 4, (3, 3)), (17, 2, (3, 2))]


def layer(outputs: int, channels: int, kernel: tuple[int, ...], rows: int = 300):
    """A weight and the damped second moments of correlated, badly scaled inputs, one dead and one there twice."""
    rng = np.random.default_rng([outputs, channels, *kernel])
    size = channels * math.prod(kernel)
    scale = np.exp(rng.standard_normal(size))
    x = rng.standard_normal((rows, size)) @ rng.standard_normal((size, size)) * scale
    x[:, size // 2] = 0
    x[:, -1] = x[:, 0]
    gram = x.T @ x / rows
    return rng.standard_normal((outputs, size)), gram + 0.01 * np.trace(gram) / size * np.eye(size)


def product(name: str, factors) -> np.ndarray:
    """The weight ``[N, K]`` of the factors of a form."""
    if name == "cp":
        axes = "ijk"[: len(factors) - 2]
        text = f"or,rc,{','.join('r' + axis for axis in axes)}->oc{axes}"
    else:
        text = {
            "spatial": "or...,rci->oci...",
            "tucker": "ob,ba...,ac->oc...",
            "separable": "oct,ct...->oc...",
        }[name]
    return np.einsum(text, *factors).reshape(len(factors[0]), -1)


def fits(name: str, weight, gram, channels: int, kernel: tuple[int, ...]) -> list[Refined]:
    """The form from small to full size."""
    outputs, places = len(weight), math.prod(kernel)
    if name == "spatial":
        full = min(channels * kernel[0], outputs * math.prod(kernel[1:]))
        return [spatial_svd(weight, gram, kernel, rank) for rank in sorted({1, full // 2 or 1, full})]
    if name == "tucker":
        pairs = [(max(1, channels // 2), 1), (channels, 1)]
        pairs += [(channels, min(outputs, channels * places) // 2 or 1), (channels, outputs)]
        return [tucker(weight, gram, kernel, pair) for pair in pairs]
    if name == "cp":
        rng = np.random.default_rng(0)
        sizes = [(kernel, 1), (kernel, 3), ((places,), weight.shape[1])]
        return [canonical(weight, gram, sides, rank, rng) for sides, rank in sizes]
    full = min(outputs, places)
    return [separable(weight, gram, kernel, rank) for rank in sorted({1, full})]


@pytest.mark.parametrize(("outputs", "channels", "kernel"), SHAPES)
@pytest.mark.parametrize("name", ["spatial", "tucker", "cp", "separable"])
def test_errors_never_rise_and_full_size_is_exact(name, outputs, channels, kernel):
    if name == "spatial" and len(kernel) == 1:
        kernel = (kernel[0], 2)
    weight, gram = layer(outputs, channels, kernel)
    energy = quadratic_error(weight, gram)
    found = fits(name, weight, gram, channels, kernel)
    for item in found:
        dense = product(name, item.factors)
        rounds = item.objectives
        assert all(
            after <= before * (1 + 1e-8) + 1e-9 * energy for before, after in itertools.pairwise(rounds)
        )
        error = quadratic_error(weight - dense, gram)
        assert error <= rounds[-1] * (1 + 1e-6) + 1e-9 * energy
        assert name == "cp" or error == pytest.approx(rounds[-1], rel=1e-6, abs=1e-9 * energy)
    np.testing.assert_allclose(product(name, found[-1].factors), weight, atol=1e-5)


@pytest.mark.parametrize(("outputs", "channels", "kernel"), [(5, 4, (3, 3)), (9, 3, (2, 5))])
@pytest.mark.parametrize("name", ["spatial", "tucker", "cp", "separable"])
def test_what_counts_inputs_beats_what_does_not(name, outputs, channels, kernel):
    weight, gram = layer(outputs, channels, kernel)
    plain = fits(name, weight, np.eye(len(gram)), channels, kernel)[0]
    fitted = fits(name, weight, gram, channels, kernel)[0]
    errors = [quadratic_error(weight - product(name, item.factors), gram) for item in (fitted, plain)]
    assert errors[0] < errors[1]


FORMS = [
    (("orj", "rci"), "cij"),
    (("oap", "ca"), "cp"),
    (("or", "rc", "ri", "rj"), "cij"),
    (("oct", "ctp"), "cp"),
]


@pytest.mark.parametrize(("operands", "kernel"), FORMS)
def test_no_single_factor_could_be_better(operands, kernel):
    sizes = {"o": 5, "c": 4, "i": 2, "j": 3, "p": 6, "r": 3, "a": 2, "t": 2}
    weight, gram = layer(5, 4, (2, 3))
    form = Multilinear(operands, kernel, sizes)
    rng = np.random.default_rng(1)
    start = [rng.standard_normal(form.shape(letters)) for letters in operands[1:]]
    found = list(refine(form, start, weight, gram, 300).factors)
    error = quadratic_error(weight - form.product(found), gram)
    root = np.linalg.cholesky(gram)
    for at, factor in enumerate(found):
        columns = []
        for place in range(factor.size):
            unit = np.zeros(factor.size)
            unit[place] = 1
            changed = [*found[:at], unit.reshape(factor.shape), *found[at + 1 :]]
            columns.append((form.product(changed) @ root).ravel())
        matrix = np.stack(columns, axis=1)
        best = np.linalg.lstsq(matrix, (weight @ root).ravel(), rcond=None)[0]
        least = np.square(matrix @ best - (weight @ root).ravel()).sum()
        assert least <= error * (1 + 1e-9)
        assert error <= least * (1.0001 if at == 0 else 1.02)


def test_a_rank_of_the_first_factor_is_reduced_rank_regression():
    for outputs, channels in ((5, 4), (25, 2)):
        weight, gram = layer(outputs, channels, (3, 3))
        for rank in (1, 3, 5):
            found = tucker(weight, gram, (3, 3), (channels, rank))
            best = best_factors(weight, gram, rank).product()
            np.testing.assert_allclose(product("tucker", found.factors), best, atol=1e-6)
    weight, gram = layer(5, 4, (3, 3))
    narrow = tucker(weight, gram, (3, 3), (2, 3))
    error = quadratic_error(weight - product("tucker", narrow.factors), gram)
    assert error >= quadratic_error(weight - best_factors(weight, gram, 3).product(), gram)


def test_orthogonal_iteration_only_loses_less():
    rng = np.random.default_rng(2)
    for shape in ((6, 5, 7), (60, 2, 7), (6, 2, 40)):
        tensor = rng.standard_normal(shape)
        bases, losses = hooi(tensor, {0: 2, 2: 3})
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
        for axis, rank in ((0, 2), (2, 3)):
            assert bases[axis].shape == (tensor.shape[axis], rank)
            np.testing.assert_allclose(bases[axis].T @ bases[axis], np.eye(rank), atol=1e-10)
    tensor = rng.standard_normal((6, 5, 7))
    bases, losses = hooi(tensor, {0: 2, 2: 3})
    projected = np.einsum("abc,ax,cz,Ax,Cz->AbC", tensor, bases[0], bases[2], bases[0], bases[2])
    assert np.square(tensor - projected).sum() == pytest.approx(losses[-1])
    matrix = rng.standard_normal((6, 9))
    tail = np.square(np.linalg.svd(matrix, compute_uv=False))[2:].sum()
    assert hooi(matrix, {0: 2})[1][-1] == pytest.approx(tail)
    assert hooi(tensor, {0: 6, 1: 5, 2: 7})[1][-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_tucker_ranks_are_the_best_affordable_ones(multiple, share):
    weight, _ = layer(9, 6, (3, 3))
    weight[:, :18] *= 3  # channels differ
    numbers = int(share * weight.size)
    found = tucker_ranks(weight, (3, 3), numbers, multiple)
    tensor = weight.reshape(9, 6, 9)
    tails = []
    for axis, side in ((1, 6), (0, 9)):
        values = np.linalg.svd(np.moveaxis(tensor, axis, 0).reshape(side, -1), compute_uv=False) ** 2
        tails.append([values[rank:].sum() for rank in range(side + 1)])
    allowed = {
        (inner, outer): tails[0][inner] + tails[1][outer]
        for inner in [*range(multiple, 6, multiple), 6]
        for outer in [*range(multiple, 9, multiple), 9]
        if tucker_numbers((inner, outer), weight.shape, 9) <= numbers
    }
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert allowed[found] == pytest.approx(min(allowed.values()))
    left, core, right = tucker(weight, np.eye(54), (3, 3), found).factors
    stored = core.size + (left.size if found[1] < 9 else 0) + (right.size if found[0] < 6 else 0)
    assert stored == tucker_numbers(found, weight.shape, 9)


def test_tucker_ranks_never_exceed_what_the_other_side_gives():
    for shape, kernel in (((1, 24), (3,)), ((12, 2), (2,)), ((9, 3), (3,))):
        weight = np.random.default_rng(0).standard_normal(shape)
        for numbers in range(1, weight.size + 1):
            ranks = tucker_ranks(weight, kernel, numbers, 1)
            if ranks is not None:
                factors = tucker(weight, np.eye(weight.shape[1]), kernel, ranks).factors
                assert product("tucker", factors).shape == weight.shape


def test_a_sum_of_products_is_found_again():
    rng = np.random.default_rng(4)
    parts = [rng.standard_normal((6, 2)), *(rng.standard_normal((2, size)) for size in (5, 3, 4))]
    weight = product("cp", parts)
    mix = rng.standard_normal((60, 60))
    gram = np.eye(60) + mix @ mix.T / 60
    found = canonical(weight, gram, (3, 4), 2, rng)
    error = quadratic_error(weight - product("cp", found.factors), gram)
    assert error < 1e-4 * quadratic_error(weight, gram)


def test_components_do_not_grow_against_each_other():
    # of rank 3, but as close as one likes to rank 2, with components that grow without end
    e = np.eye(2)
    weight = sum(np.einsum("o,c,i->oci", *(e[int(bit)] for bit in bits)) for bits in ("001", "010", "100"))
    weight = np.asarray(weight).reshape(2, 4)
    found = canonical(weight, np.eye(4), (2,), 2, np.random.default_rng(0))
    left, *rest = found.factors
    norms = np.linalg.norm(left, axis=0) * np.prod([np.linalg.norm(part, axis=1) for part in rest], axis=0)
    assert norms.max() <= 2 * np.linalg.norm(weight)
    assert quadratic_error(weight - product("cp", found.factors), np.eye(4)) < 0.2 * np.square(weight).sum()
