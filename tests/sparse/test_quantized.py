from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor, keep_mask, quantize_rows, unpack_gaps

METHODS = ("absmax", "mse")
patterns = st.one_of(
    st.builds(Pattern, st.just("block"), rows=st.integers(1, 17), cols=st.integers(1, 5)),
    st.builds(Pattern, st.just("nm"), n=st.integers(1, 3), m=st.integers(4, 9)),
    st.just(Pattern("unstructured")),
)
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
    elements=st.floats(-4, 4, width=32),
)


def pruned(weight, pattern, sparsity):
    kept = keep_mask(np.abs(weight), pattern, sparsity if pattern.needs_sparsity else None)
    return np.where(kept, weight, np.float32(0))


@given(matrices, patterns, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from(METHODS))
def test_what_comes_back(weight, pattern, sparsity, method):
    weight = pruned(weight, pattern, sparsity)
    packed = QuantizedTensor.encode(weight, pattern, method)
    back = packed.decode()
    assert back.shape == weight.shape
    assert (back[weight == 0] == 0).all()
    assert packed.values.min(initial=0) >= -127
    assert packed.nnz == np.count_nonzero(packed.decode_codes())
    assert packed.nbytes == packed.values.nbytes + packed.indices.nbytes + packed.scales.nbytes
    if pattern.kind != "nm":
        assert packed.values.any(tuple(range(1, packed.values.ndim))).all()
    if method == "absmax":
        half = packed.scales[:, None].astype(np.float64) / 2
        assert (np.abs(back - weight) <= half * (1 + 1e-5)).all()


@given(matrices, patterns)
def test_least_squares_is_never_worse(weight, pattern):
    weight = pruned(weight, pattern, 0.3)
    errors = [
        ((QuantizedTensor.encode(weight, pattern, method).decode() - weight).astype(np.float64) ** 2).sum(1)
        for method in ("mse", "absmax")
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-30).all()


def test_least_squares_clips_an_outlier():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 1 << 16)).astype(np.float32)
    weight[:, 0] = 9
    pattern = Pattern.parse("1x4")
    error = {
        method: np.linalg.norm(QuantizedTensor.encode(weight, pattern, method).decode() - weight)
        for method in METHODS
    }
    assert error["mse"] < 0.9 * error["absmax"]


@given(matrices, patterns)
def test_the_stream_is_that_of_float_weights(weight, pattern):
    """Where nothing is rounded away."""
    weight = pruned(np.where(np.abs(weight) < 0.5, 0, weight), pattern, 0.0)
    bytes_, floats = QuantizedTensor.encode(weight, pattern), SparseTensor.encode(weight, pattern)
    assert bytes_.indices.tobytes() == floats.indices.tobytes()
    assert bytes_.values.shape == floats.values.shape


def test_by_hand():
    weight = np.array([[0, 0, 12.7], [0, 0, -0.1], [2, 0, 0]], np.float16)
    packed = QuantizedTensor.encode(weight, Pattern.parse("2x2"))
    assert unpack_gaps(packed.indices).tolist() == [1, 2]
    assert packed.values.tolist() == [[[127, 0], [-127, 0]], [[127, 0], [0, 0]]]
    np.testing.assert_allclose(packed.scales, [0.1, 0.1 / 127, 2 / 127], rtol=1e-3)


def test_outputs_without_a_weight_and_with_tiny_ones():
    weight = np.zeros((3, 4), np.float32)
    weight[1] = 1e-44
    packed = QuantizedTensor.encode(weight, Pattern.parse("1x1"))
    assert packed.scales[0] == 1
    assert (packed.scales > 0).all()
    packed.validate()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad):
    with pytest.raises(ModelError, match="no int8 form"):
        QuantizedTensor.encode(np.array([[1, bad]]), Pattern.parse("1x1"))


def test_what_cannot_be_packed():
    with pytest.raises(SpecError, match="dense"):
        QuantizedTensor.encode(np.zeros((2, 2)), Pattern("dense"))
    with pytest.raises(ModelError, match="3 non-zeros"):
        QuantizedTensor.encode(np.ones((1, 3)), Pattern.parse("2:4"))
    with pytest.raises(SpecError, match="matrix"):
        QuantizedTensor.encode(np.zeros(2), Pattern.parse("1x1"))
    with pytest.raises(SpecError, match="absmax, mse"):
        quantize_rows(np.ones((1, 1), np.float32), np.zeros(1, np.int64), 1, "best")  # type: ignore[arg-type]


GOOD = QuantizedTensor.encode(np.eye(4, 8, dtype=np.float32), Pattern.parse("2x2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2, 2)}, "outside"),
        ({"values": GOOD.values[:-1]}, "2 positions for 1 values"),
        ({"values": GOOD.values.astype(np.float32)}, "int8"),
        ({"values": GOOD.values.reshape(-1)}, r"\[blocks, 2, 2\]"),
        ({"indices": GOOD.indices[:-1]}, "positions for 2"),
        ({"pattern": Pattern("unstructured")}, "1-D"),
        ({"pattern": Pattern("dense")}, "no packed form"),
        ({"scales": GOOD.scales[:-1]}, r"scales must be float32 \[4\]"),
        ({"scales": GOOD.scales.astype(np.float64)}, "scales must be float32"),
        ({"scales": GOOD.scales * 0}, "finite positive"),
        ({"scales": GOOD.scales * np.float32(np.inf)}, "finite positive"),
    ],
)
def test_malformed_tensors_are_refused(change, message):
    bad = dataclasses.replace(GOOD, **change)
    with pytest.raises(ModelError, match=message):
        bad.validate()
    with pytest.raises(ModelError, match=message):
        bad.decode()


@given(st.binary(max_size=40), st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), patterns)
def test_random_bytes_never_escape(data, rows, cols, count, pattern):
    unit = (pattern.rows, pattern.cols) if pattern.kind == "block" else ()
    values = np.ones((count, *unit), np.int8)
    tensor = QuantizedTensor(
        pattern, (rows, cols), values, np.frombuffer(data, np.uint8), np.ones(rows, np.float32)
    )
    with contextlib.suppress(ModelError):
        assert tensor.decode().shape == (rows, cols)
