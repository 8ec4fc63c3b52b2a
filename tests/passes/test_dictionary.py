"""Sparse dictionaries: what is proven of the mathematics, and the graphs that come of it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc import emit
from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.dictionary import (
    Coding,
    Support,
    compot,
    error_of,
    fit_atoms,
    fit_codes,
    principal_samples,
    refit,
    rocket,
)
from sparsecc.passes.factor.pursuit import cospadi, pursue, sweep
from sparsecc.passes.factor.sparse_dictionary import SparseDictionary
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault
from sparsecc.sparse import Pattern, SparseTensor, matches

RNG = np.random.default_rng(11)
SHAPES = [(12, 16), (17, 11), (1, 9), (9, 1), (7, 7)]
PATTERNS = ["unstructured", "4x1", "2:4", "16x1"]


def layer(n: int, k: int, rows: int = 80):
    """A weight and the damped Gram matrix of correlated, badly scaled inputs, one dead and two equal."""
    rng = np.random.default_rng([n, k])
    x = rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    if k > 4:
        x[:, 1], x[:, 2] = 0, x[:, 3]
    return rng.standard_normal((n, k)), damped(x.T @ x / rows, 0.01)[0]


def support(pattern: str, kept: int) -> Support:
    return Support(Pattern.parse(pattern), kept)


def methods(samples, weight, atoms: int, kept: Support) -> dict[str, Coding]:
    return {
        "compot": compot(samples, atoms, kept, 12),
        "cospadi": cospadi(samples, atoms, kept, 6, 4),
        "rocket": rocket(samples, weight, atoms, kept),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_the_distances_of_outputs_and_principal_axes(shape):
    weight, gram = layer(*shape)
    samples = principal_samples(weight, gram)
    assert samples.shape == (shape[0], min(shape))
    scale = np.trace(samples @ samples.T)
    np.testing.assert_allclose(samples @ samples.T, weight @ gram @ weight.T, atol=1e-10 * scale)
    inner = samples.T @ samples
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-9 * scale)
    assert (np.diff(np.diag(inner)) <= 1e-9 * scale).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_all_codes_kept_is_whitened_svd(shape):
    weight, gram = layer(*shape)
    samples = principal_samples(weight, gram)
    for atoms in {1, min(shape) // 2, min(shape)} - {0}:
        best = quadratic_error(weight - best_factors(weight, gram, atoms).product(), gram)
        for name, found in methods(samples, weight, atoms, support("unstructured", atoms)).items():
            total = np.square(samples).sum()
            assert found.errors[-1] == pytest.approx(best, rel=1e-7, abs=1e-9 * total), name
            whole = refit(samples, found, 3)
            product = whole.codes @ fit_atoms(whole.codes, weight)
            assert quadratic_error(weight - product, gram) == pytest.approx(
                best, rel=1e-7, abs=1e-9 * total
            ), name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(18, 13), (13, 24)])
def test_no_step_raises_the_error_and_it_is_that_of_the_outputs(shape, pattern):
    weight, gram = layer(*shape)
    samples = principal_samples(weight, gram)
    kept = support(pattern, 4)
    for name, found in methods(samples, weight, 8, kept).items():
        whole = refit(samples, found, 5)
        errors = np.array(whole.errors)
        assert (np.diff(errors) <= 1e-9 * errors[0]).all(), name
        assert len(errors) >= len(found.errors) + 2, name
        assert whole.errors[-1] == pytest.approx(error_of(samples, whole.codes, whole.atoms)), name
        assert not whole.codes[~whole.mask].any(), name
        assert set(whole.mask.sum(1)) == {4}, name
        assert matches(whole.codes.astype(np.float32), kept.pattern), name
        # atoms in the space of the weights are the same combinations
        product = whole.codes @ fit_atoms(whole.codes, weight)
        assert quadratic_error(weight - product, gram) == pytest.approx(errors[-1], rel=1e-7), name
        gram_of_codes = whole.codes.T @ (samples - whole.codes @ whole.atoms)
        np.testing.assert_allclose(gram_of_codes, 0, atol=1e-8 * np.abs(whole.codes).max() ** 2, err_msg=name)


def test_largest_codes_are_the_best_ones_of_orthonormal_atoms():
    weight, gram = layer(5, 6)
    samples = principal_samples(weight, gram)
    found = compot(samples, 4, support("unstructured", 2), 3)
    np.testing.assert_allclose(found.atoms @ found.atoms.T, np.eye(4), atol=1e-12)
    for row, codes in zip(samples, found.codes, strict=True):
        left = np.square(row - codes @ found.atoms).sum()
        others = [
            np.square(row - row @ found.atoms[list(some)].T @ found.atoms[list(some)]).sum()
            for some in itertools.combinations(range(4), 2)
        ]
        assert left == pytest.approx(min(others))
    # Procrustes: no rotation of the atoms by a small angle suits the same codes better
    before = compot(samples, 4, support("unstructured", 2), 2)
    best = np.square(samples - before.codes @ found.atoms).sum()
    for _ in range(20):
        turned = np.linalg.qr((found.atoms + 0.05 * RNG.standard_normal(found.atoms.shape)).T)[0].T
        turned *= np.sign(np.einsum("ij,ij->i", turned, found.atoms))[:, None]
        assert best <= np.square(samples - before.codes @ turned).sum() + 1e-12


def test_refits_are_least_squares_also_of_dependent_and_unused_atoms():
    samples = RNG.standard_normal((20, 6))
    codes = RNG.standard_normal((20, 5))
    codes[:, 2], codes[:, 3] = 0, codes[:, 4]
    atoms = fit_atoms(codes, samples)
    expected = codes @ np.linalg.lstsq(codes, samples)[0]
    np.testing.assert_allclose(codes @ atoms, expected, atol=1e-10)
    assert not atoms[2].any()
    assert not fit_atoms(np.zeros((3, 2)), samples[:3]).any()

    mask = RNG.random((20, 5)) < 0.5
    start = np.where(mask, RNG.standard_normal(mask.shape), 0)
    atoms = RNG.standard_normal((5, 6))
    atoms[1] = 0
    found = fit_codes(samples, atoms, mask, start, steps=20)
    assert not found[~mask].any()
    for row, wanted, kept in zip(found, samples, mask, strict=True):
        best = np.linalg.lstsq(atoms[kept].T, wanted)[0] @ atoms[kept]
        np.testing.assert_allclose(row @ atoms, best, atol=1e-5)
    one = fit_codes(samples, atoms, mask, start, steps=1)
    assert error_of(samples, one, atoms) < error_of(samples, start, atoms)


def test_a_pursuit_of_as_many_stages_as_codes_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install 'sparsecc[dev]'")
    samples, atoms = RNG.standard_normal((30, 12)), RNG.standard_normal((20, 12))
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    errors = []
    for kept in range(1, 8):
        codes, mask = pursue(samples, unit, support("unstructured", kept), kept, steps=40)
        expected = linear_model.orthogonal_mp(unit.T, samples.T, n_nonzero_coefs=kept).T
        errors.append(error_of(samples, codes, unit))
        np.testing.assert_array_equal(mask, expected != 0)
        np.testing.assert_allclose(codes, expected, atol=1e-5)
        scaled, same = pursue(samples, atoms, support("unstructured", kept), kept, steps=40)
        np.testing.assert_array_equal(same, mask)
        assert error_of(samples, scaled, atoms) == pytest.approx(errors[-1], rel=1e-6)
    assert (np.diff(errors) < 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pursuits_only_add_atoms(pattern):
    samples, atoms = RNG.standard_normal((18, 12)), RNG.standard_normal((12, 12))
    kept = support(pattern, 6)
    for count in (1, 3, 20):
        sizes = kept.stages(count)
        assert sizes[-1] == kept
        masks = [pursue(samples, atoms, size, count)[1] for size in sizes]
        assert len(masks) <= count
        assert set(masks[-1].sum(1)) == {6}
    assert not pursue(samples, np.zeros((12, 12)), kept, 3)[0].any()


def naive_sweep(samples, codes, mask, atoms):
    """K-SVD with one power iteration, one atom and its users at a time."""
    codes, atoms = codes.copy(), atoms.copy()
    for at in range(len(atoms)):
        users = np.flatnonzero(mask[:, at])
        rest = samples - codes @ atoms + np.outer(codes[:, at], atoms[at])
        axis = rest[users].T @ codes[users, at]
        atoms[at] = axis / np.linalg.norm(axis)
        codes[users, at] = rest[users] @ atoms[at]
    return codes, atoms


def test_a_sweep_is_ksvd_atom_by_atom():
    samples, atoms = (
        RNG.standard_normal((90, 50)),
        RNG.standard_normal((45, 50)),
    )  # more than one block of atoms
    codes, mask = pursue(samples, atoms, support("unstructured", 7), 3)
    found = sweep(samples, Coding(codes, mask, atoms, (error_of(samples, codes, atoms),)))
    expected = naive_sweep(samples, codes, mask, atoms)
    np.testing.assert_allclose(found.codes, expected[0], atol=1e-9)
    np.testing.assert_allclose(found.atoms, expected[1], atol=1e-9)
    assert found.errors[1] == pytest.approx(error_of(samples, found.codes, found.atoms))
    assert found.errors[1] < found.errors[0]


def test_atoms_without_users_become_what_is_met_worst():
    samples = RNG.standard_normal((9, 5))
    codes, atoms = np.zeros((9, 4)), np.eye(4, 5)
    codes[:, 0] = samples[:, 0]
    mask = np.repeat([[True, False, False, False]], 9, axis=0)
    found = sweep(samples, Coding(codes, mask, atoms, (error_of(samples, codes, atoms),)))
    rest = samples - found.codes @ found.atoms
    worst = np.argsort(-np.square(rest).sum(1))
    for atom, row in zip(found.atoms[1:], worst, strict=False):
        np.testing.assert_allclose(atom, rest[row] / np.linalg.norm(rest[row]), atol=1e-12)
    assert found.errors[-1] == pytest.approx(np.square(rest).sum())
    none = sweep(np.zeros((3, 2)), Coding(np.zeros((3, 1)), np.ones((3, 1), bool), np.eye(1, 2), (0.0,)))
    assert none.errors[-1] == 0


def test_dictionaries_beat_low_rank_where_outputs_are_mixtures():
    """Outputs that use few of many directions: low rank of as many numbers is far off."""
    atoms = np.linalg.qr(RNG.standard_normal((24, 24)))[0]
    codes = RNG.standard_normal((96, 24))
    codes[~support("unstructured", 4).mask(np.square(codes))] = 0
    weight, gram = codes @ atoms, np.eye(24)
    samples = principal_samples(weight, gram)
    rank = (24 * 24 + 96 * 4) // (24 + 96)
    low = quadratic_error(weight - best_factors(weight, gram, rank).product(), gram)
    for name, found in methods(samples, weight, 24, support("unstructured", 4)).items():
        assert refit(samples, found, 3).errors[-1] < 0.7 * low, name


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def context(model: Model, x: np.ndarray) -> PassContext:
    return PassContext(calibration=Calibration.from_batches([{"x": x}], model, threads=1), threads=1)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


GRAPHS = [
    ("(float[N,T,24] x) => (float[N,T,40] y) { [s] h = MatMul(x, w) y = Add(h, b) }", (24, 40), (100, 3, 24)),
    (
        "(float[N,24] x) => (float[N,40] y) { [s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }",
        (40, 24),
        (300, 24),
    ),
    (
        "(float[N,6,9,8] x) => (float[N,C,H,W] y) { [s] y = Conv <strides = [2, 1], pads = [0, 1, 1, 0]> (x, w, b) }",
        (40, 6, 3, 3),
        (20, 6, 9, 8),
    ),
]


@pytest.mark.parametrize("name", ["factor-compot", "factor-cospadi", "factor-rocket"])
@pytest.mark.parametrize(("text", "shape", "given"), GRAPHS)
def test_the_chain_computes_what_was_reported_sparse_operators_too(name, text, shape, given):
    weight = normal(*shape)
    model = build(f"g {text}", w=weight, b=normal(40))
    x = normal(*given) @ normal(given[-1], given[-1])
    whole = model.copy()
    spec = f"{name}{{param-ratio=0.6 multiple=4 min-elements=1 bias=false}}"
    (report,) = Pipeline.parse(spec).run(model, context(model, x))
    (change,) = report.changed
    assert graph_fault(model) is None
    atoms, codes = model.sites()
    assert [atoms.name, codes.name] == ["s.atoms", "s.codes"]
    assert len(atoms.numpy()) % 4 == 0
    assert len(set(np.count_nonzero(codes.numpy(), axis=1))) == 1
    assert matches(codes.numpy(), Pattern.parse("4x1"))
    stored = atoms.numpy().size + np.count_nonzero(codes.numpy())
    assert change.numbers["parameters"] == stored / weight.size <= 0.6
    (site,) = whole.sites()
    site.replace((codes.numpy().astype(np.float64) @ atoms.numpy()).astype(np.float32))
    expected = outputs(whole, x[:7])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs(model, x[:7]), expected, atol=1e-5 * scale)
    Pipeline.parse("choose-layout{match=s.codes layout=4x1},lower-sparse").run(model, PassContext())
    emit.finalize(model)
    assert [node.domain for node in model.onnx.graph].count("ai.sparsecc") == 1
    np.testing.assert_allclose(outputs(model, x[:7]), expected, atol=1e-5 * scale)


@pytest.mark.parametrize("pattern", [*PATTERNS, "1:4"])
def test_budgets_hold_in_every_pattern_and_fits_beat_low_rank(pattern):
    model = build("g (float[N,48] x) => (float[N,96] y) { [s] y = MatMul(x, w) }", w=normal(48, 96))
    x = normal(200, 48)
    for ratio in (0.35, 0.6, 0.8):
        own = model.copy()
        spec = f"factor-rocket{{param-ratio={ratio} multiple=1 min-elements=1 pattern={pattern}}}"
        (report,) = Pipeline.parse(spec).run(own, context(own, x))
        (change,) = report.changed
        numbers = change.numbers["parameters"]
        assert 0.85 * ratio < numbers <= ratio
        assert matches(own.sites()[1].numpy(), Pattern.parse(pattern))
        assert str(Pattern.parse(pattern)) in change.detail


def test_bytes_count_places_and_zeros_where_they_are_stored():
    codes = normal(16, 12)
    support_ = support("4x1", 3)
    codes[~support_.mask(np.square(codes))] = 0
    form = SparseDictionary(codes, normal(12, 30), support_)
    packed = SparseTensor.encode(codes, support_.pattern)
    assert packed.nbytes > 4 * np.count_nonzero(codes)
    assert form.bytes(4, custom_ops=True) == 4 * 12 * 30 + packed.nbytes
    assert form.bytes(4, custom_ops=False) == 4 * (12 * 30 + 16 * 12)
    assert form.numbers == form.macs == 12 * 30 + 16 * 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("param-ratio=0.05", "do not hold a dictionary of 8 atoms for 48 x 24 weights"),
        ("custom-ops=false param-ratio=0.9", "bytes, dense"),
        ("multiple=1 ratio=1.001", "that is low rank, use factor-rrr"),
    ],
)
def test_what_cannot_pay_stays_dense_and_says_why(options, reason):
    model = build("g (float[N,24] x) => (float[N,48] y) { [s] y = MatMul(x, w) }", w=normal(24, 48))
    before = model.fingerprint()
    (report,) = Pipeline.parse(f"factor-compot{{min-elements=1 {options}}}").run(
        model, context(model, normal(60, 24))
    )
    assert reason in report.skipped[0].reason
    assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("pattern=dense", "without zeros it is low rank"),
        ("pattern=4x4", "unstructured, N:M or Rx1"),
        ("ratio=1", "ratio must be above 1"),
        ("rounds=-1", "rounds must be 0 or more"),
        ("iterations=-1", "iterations must be 0 or more"),
        ("stages=0", "stages must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(SpecError, match=reason):
        Pipeline.parse(f"factor-cospadi{{{options}}}")
    with pytest.raises(SpecError, match="iterations must be"):
        Pipeline.parse("factor-compot{iterations=-1}")


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (13, 97), (97, 13)])
def test_thin_and_prime_shapes_are_rewritten_or_refused(shape):
    model = build(
        f"g (float[N,{shape[0]}] x) => (float[N,{shape[1]}] y) {{ [s] y = MatMul(x, w) }}", w=normal(*shape)
    )
    x = normal(5, shape[0])  # fewer rows than inputs
    whole = outputs(model, x)
    for name in ("compot", "cospadi", "rocket"):
        own = model.copy()
        spec = f"factor-{name}{{multiple=1 min-elements=1 param-ratio=0.7 damping=1e-4}}"
        (report,) = Pipeline.parse(spec).run(own, context(own, x))
        if report.skipped:
            assert shape != (13, 97)
            reason = "do not hold a dictionary" if 1 in shape else "low rank"
            assert reason in report.skipped[0].reason
        else:
            assert report.changed[0].numbers["output_error"] < 0.2
            assert np.linalg.norm(outputs(own, x) - whole) < 0.3 * np.linalg.norm(whole)


@pytest.mark.parametrize("weight", [np.zeros((12, 9)), np.outer(np.arange(12), np.ones(9)), np.ones((12, 9))])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_of_rank_one_and_none_are_exact(weight, pattern):
    gram = np.eye(9) + np.ones((9, 9))
    samples = principal_samples(weight, gram)
    for name, found in methods(samples, weight, 6, support(pattern, 3)).items():
        whole = refit(samples, found, 2)
        assert np.isfinite(whole.atoms).all(), name
        product = whole.codes @ fit_atoms(whole.codes, weight)
        np.testing.assert_allclose(product, weight, atol=1e-6 * (1 + np.abs(weight).max()), err_msg=name)
