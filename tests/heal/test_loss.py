"""The loss of healing against numpy: what counts, and that padding does not."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")

from sparsecc.heal.loss import attended, kl_divergence, relative_error  # noqa: E402

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_padding_is_told_by_the_one_mask_of_zeros_and_ones():
    ids = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(attended({"ids": ids, "attention_mask": MASK}), MASK.astype(bool))
    np.testing.assert_array_equal(attended({"mask": MASK.astype(np.float32)}), MASK.astype(bool))
    for unclear in (
        {"ids": MASK},
        {"attention_mask": np.ones((3, 4))},
        {"attention_mask": 2 * MASK},
        {"attention_mask": MASK[None]},
        {"attention_mask": np.zeros((3, 4))},
        {"a_mask": MASK, "b_mask": MASK},
    ):
        assert attended(unclear) is None


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 2, 5)])
def test_errors_are_those_of_the_positions_that_count(shape):
    found, wanted = normal(*shape), normal(*shape, seed=1)
    counted = MASK.astype(bool)
    expected = np.square((found - wanted)[counted]).sum() / np.square(wanted[counted]).sum()
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (found, wanted)]
    assert float(relative_error(*tensors, torch.from_numpy(counted))) == pytest.approx(expected, rel=1e-5)
    whole = np.square(found - wanted).sum() / np.square(wanted).sum()
    assert float(relative_error(*tensors)) == pytest.approx(whole, rel=1e-5)


def test_a_tensor_without_positions_counts_whole():
    found, wanted = (torch.from_numpy(normal(3, 7, seed=seed)) for seed in (0, 1))
    counted = torch.from_numpy(MASK.astype(bool))
    assert float(relative_error(found, wanted, counted)) == float(relative_error(found, wanted))


def test_a_dense_state_of_zeros_gives_a_finite_error():
    assert np.isfinite(float(relative_error(torch.zeros(2, 3), torch.zeros(2, 3))))


def test_the_divergence_is_zero_for_the_same_logits_and_known_for_others():
    a, b = normal(6, 5), normal(6, 5, seed=1)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (b, a))
    found = kl_divergence(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-5)
    assert float(kl_divergence(torch.from_numpy(a), torch.from_numpy(a))) == pytest.approx(0, abs=1e-7)
