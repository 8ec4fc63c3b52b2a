from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsecc.errors import ModelError, SpecError
from sparsecc.sparse import Pattern, SparseTensor, keep_mask, pack_gaps, unpack_gaps

positions = st.lists(st.integers(0, 400), unique=True).map(sorted)
patterns = st.one_of(
    st.just(Pattern("unstructured")),
    st.integers(2, 16).flatmap(
        lambda m: st.builds(Pattern, st.just("nm"), st.integers(1, m - 1), st.just(m))
    ),
    st.builds(Pattern, st.just("block"), rows=st.integers(1, 17), cols=st.integers(1, 5)),
)
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
    elements=st.floats(-4, 4, width=32),
)


def plain_pack(places):
    """The stream's definition, step by step."""
    tokens, cursor = [], -1
    for place in places:
        gap = place - cursor
        while gap >= 15:
            tokens.append(15)
            gap -= 15
        tokens.append(gap)
        cursor = place
    tokens += [15] * (len(tokens) % 2)
    return bytes(a | b << 4 for a, b in zip(tokens[::2], tokens[1::2], strict=True))


@given(positions)
def test_stream_is_the_defined_one_and_comes_back(places):
    stream = pack_gaps(np.array(places, np.int64))
    assert stream.tobytes() == plain_pack(places)
    assert unpack_gaps(stream).tolist() == places


@given(st.binary(max_size=12))
def test_a_stream_is_refused_or_canonical(data):
    stream = np.frombuffer(data, np.uint8)
    try:
        places = unpack_gaps(stream)
    except ModelError:
        return
    assert pack_gaps(places).tobytes() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\x00", "nowhere"), (b"\x01", "nowhere"), (b"\xff", "idle"), (b"\xf1\xff", "idle")],
)
def test_bad_streams(data, message):
    with pytest.raises(ModelError, match=message):
        unpack_gaps(np.frombuffer(data, np.uint8))


def test_stream_wants_bytes_and_increasing_positions():
    with pytest.raises(ModelError, match="uint8"):
        unpack_gaps(np.zeros(2, np.int8))  # type: ignore[arg-type]
    for bad in ([-1], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="increase"):
            pack_gaps(np.array(bad))


@given(matrices, patterns, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_decode_inverts_encode_on_the_pattern(weight, pattern, sparsity):
    weight = np.where(keep_mask(np.abs(weight), pattern, sparsity), weight, 0)
    packed = SparseTensor.encode(weight, pattern)
    assert np.array_equal(packed.decode(), weight)
    assert packed.nnz == np.count_nonzero(weight)
    assert packed.nbytes == packed.values.nbytes + packed.indices.nbytes


def test_the_bytes_by_hand():
    weight = np.zeros((2, 20), np.float16)
    weight[0, [0, 15]] = 1, 2  # gaps 1, 15 -> tokens 1, 15, 0
    weight[1, 19] = 3  # gap 24 -> tokens 15, 9; then one 15 completes nothing: five tokens, so one more
    packed = SparseTensor.encode(weight, Pattern("unstructured"))
    assert packed.indices.tobytes() == bytes([0xF1, 0xF0, 0xF9])
    assert packed.values.tolist() == [1, 2, 3]
    assert packed.values.dtype == np.float32


def test_blocks_by_hand():
    weight = np.array([[0, 0, 5], [0, 0, 0], [7, 0, 0]], np.float32)
    packed = SparseTensor.encode(weight, Pattern.parse("2x2"))
    assert packed.values.tolist() == [[[5, 0], [0, 0]], [[7, 0], [0, 0]]]
    assert unpack_gaps(packed.indices).tolist() == [1, 2]


def test_short_groups_are_filled_with_zeros_of_lowest_index():
    packed = SparseTensor.encode(np.array([[0, 0, 0, 8, 0, 0]], np.float32), Pattern.parse("2:4"))
    assert unpack_gaps(packed.indices).tolist() == [0, 3, 4, 5]
    assert packed.values.tolist() == [0, 8, 0, 0]


def test_nan_survives():
    weight = np.array([[0, np.nan]], np.float32)
    assert np.array_equal(
        SparseTensor.encode(weight, Pattern("unstructured")).decode(), weight, equal_nan=True
    )


def test_what_cannot_be_packed():
    with pytest.raises(ModelError, match="group 1 of row 0 has 3"):
        SparseTensor.encode(np.array([[0, 1, 0, 1, 1, 1, 1, 0]]), Pattern.parse("2:4"))
    with pytest.raises(SpecError, match="dense"):
        SparseTensor.encode(np.zeros((2, 2)), Pattern("dense"))
    with pytest.raises(SpecError, match="matrix"):
        SparseTensor.encode(np.zeros(2), Pattern("unstructured"))


GOOD = SparseTensor.encode(np.eye(4, 8, dtype=np.float32), Pattern("unstructured"))
NM = SparseTensor.encode(np.eye(4, 8, dtype=np.float32), Pattern.parse("2:4"))
BLOCK = SparseTensor.encode(np.eye(4, 8, dtype=np.float32), Pattern.parse("2x2"))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (GOOD, {"shape": (4, 6)}, "outside"),
        (GOOD, {"shape": (4, -8)}, "shape"),
        (GOOD, {"shape": (4, 8, 1)}, "shape"),
        (GOOD, {"values": GOOD.values[:-1]}, "4 positions for 3 values"),
        (GOOD, {"values": GOOD.values.astype(np.float64)}, "float32"),
        (GOOD, {"values": GOOD.values[None]}, "1-D"),
        (GOOD, {"indices": GOOD.indices[:-1]}, "positions for 4"),
        (GOOD, {"pattern": Pattern("dense")}, "no packed form"),
        (GOOD, {"pattern": Pattern.parse("2:4")}, "wants 16"),
        (NM, {"shape": (1 << 40, 8)}, "wants"),
        (NM, {"indices": pack_gaps(np.arange(16))}, "group 0 of row 0 keeps 4"),
        (BLOCK, {"values": BLOCK.values.reshape(-1)}, r"\[blocks, 2, 2\]"),
        (BLOCK, {"values": BLOCK.values.reshape(-1, 1, 4)}, r"\[blocks, 2, 2\]"),
        (BLOCK, {"shape": (2, 2)}, "outside"),
    ],
)
def test_malformed_tensors_are_refused(tensor, change, message):
    bad = dataclasses.replace(tensor, **change)
    with pytest.raises(ModelError, match=message):
        bad.validate()
    with pytest.raises(ModelError, match=message):
        bad.decode()


@given(st.binary(max_size=40), st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), patterns)
def test_random_bytes_never_escape(data, rows, cols, count, pattern):
    tail = (pattern.rows, pattern.cols) if pattern.kind == "block" else ()
    tensor = SparseTensor(
        pattern, (rows, cols), np.ones((count, *tail), np.float32), np.frombuffer(data, np.uint8)
    )
    with contextlib.suppress(ModelError):
        assert tensor.decode().shape == (rows, cols)
