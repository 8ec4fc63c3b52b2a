from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsecc import verify
from sparsecc.errors import UsageError, VerificationError
from sparsecc.ir import Model


def scaled(factor: float, output: str = "y") -> Model:
    return Model.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[B, N] x) => (float[B, N] {output}) <float k = {{{factor}}}> {{ {output} = Mul(x, k) }}"""
        )
    )


PLAIN = (False, False)


def test_equal_models() -> None:
    (diff,) = verify.compare(scaled(2), scaled(2), {"x": np.ones((2, 3), np.float32)}, library=PLAIN)
    assert (diff.max_abs, diff.rel_l2, diff.argmax_agreement) == (0, 0, 1)
    assert diff.cosine == pytest.approx(1)
    assert diff.elements == 6


def test_difference_over_several_batches() -> None:
    batches = [{"x": np.full((1, 4), value, np.float32)} for value in (1, -3)]
    (diff,) = verify.compare(scaled(2), scaled(3), batches, library=PLAIN)
    assert diff.max_abs == 3
    assert diff.rel_l2 == pytest.approx(0.5)
    assert verify.worst_rel_l2([diff]) == diff.rel_l2
    assert verify.worst_rel_l2([]) == 0
    assert diff.to_json()["name"] == "y"


def test_refusals() -> None:
    x = {"x": np.ones((1, 2), np.float32)}
    with pytest.raises(VerificationError, match="has no output y; it has z"):
        verify.compare(scaled(1), scaled(1, "z"), x, library=PLAIN)
    with pytest.raises(UsageError, match="no inputs to compare"):
        verify.compare(scaled(1), scaled(1), [], library=PLAIN)
    with pytest.raises(VerificationError, match=r"shape \[2\] .* \[3\]"):
        verify.compare_arrays("y", np.ones(2), np.ones(3))


def test_not_finite() -> None:
    a = np.array([np.nan, np.inf, 1.0])
    assert verify.compare_arrays("y", a, a).nonfinite_mismatch == 0
    assert verify.compare_arrays("y", a, a).rel_l2 == 0
    for b in ([np.nan, -np.inf, 1.0], [0.0, np.inf, 1.0], [np.nan, np.inf, np.nan]):
        diff = verify.compare_arrays("y", a, np.array(b))
        assert diff.nonfinite_mismatch == 1
        assert diff.rel_l2 == np.inf
        assert diff.max_abs == np.inf


def test_zeros_integers_text_and_empty() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert verify.compare_arrays("y", zero, zero).rel_l2 == 0
    assert verify.compare_arrays("y", zero, zero).cosine == 1
    assert verify.compare_arrays("y", zero, one).rel_l2 == np.inf
    assert verify.compare_arrays("y", one, zero).rel_l2 == 1
    integers = verify.compare_arrays("y", np.array([1, 2]), np.array([1, 4]))
    assert integers.max_abs == 2
    assert integers.argmax_agreement is None
    assert verify.compare_arrays("y", np.array(["a", "b"]), np.array(["a", "c"])).rel_l2 == np.inf
    assert verify.compare_arrays("y", np.zeros((0, 4)), np.zeros((0, 4))).rel_l2 == 0
    assert verify.compare_arrays("y", np.array(2.0), np.array(2.0)).argmax_agreement is None


def test_argmax_agreement() -> None:
    a = np.array([[1.0, 2], [2, 1], [0, 3], [5, 4]])
    b = np.array([[2.0, 1], [2, 1], [0, 3], [5, 4]])
    assert verify.compare_arrays("y", a, b).argmax_agreement == 0.75


floats = hnp.arrays(np.float64, 6, elements=st.floats(-10, 10))


@given(floats, floats)
def test_agrees_with_the_definitions(a: np.ndarray, b: np.ndarray) -> None:
    diff = verify.compare_arrays("y", a, b)
    assert diff.max_abs == np.abs(a - b).max()
    norm = np.linalg.norm(a)
    if norm > 1e-100:
        assert diff.rel_l2 == pytest.approx(np.linalg.norm(a - b) / norm)
    assert -1 <= diff.cosine <= 1


SEQUENCE = """<ir_version: 8, opset_import: ["": 17]>
g (float[5, 3] x) => (seq(float[N, 3]) y) <float k = {{{factor}}}, int64[2] parts = {{2, 3}}>
{{ s = Mul(x, k) y = SplitToSequence<axis = 0>(s, parts) }}"""


def test_sequences_of_tensors_of_several_shapes() -> None:
    x = {"x": np.ones((5, 3), np.float32)}
    one, two = (Model.from_proto(onnx.parser.parse_model(SEQUENCE.format(factor=f))) for f in (1, 2))
    (same,) = verify.compare(one, one, x, library=PLAIN)
    assert (same.elements, same.rel_l2) == (15, 0)
    (diff,) = verify.compare(one, two, x, library=PLAIN)
    assert (diff.elements, diff.max_abs, diff.rel_l2) == (15, 1, 1)


def test_maps_and_missing_values() -> None:
    a, b = {"p": 1.0, "q": 2.0}, {"q": 2.0, "p": 3.0}
    assert verify.compare_arrays("y", [a], [b]).max_abs == 2
    assert verify.compare_arrays("y", None, None).rel_l2 == 0
    for first, second, words in (
        ([a], [a, a], "1 elements .* 2 elements"),
        (a, {"p": 1.0, "r": 2.0}, "keys p, q .* keys p, r"),
        (None, np.ones(2), "no value .* shape \\[2\\]"),
        ([np.ones(2)], [np.ones(3)], r"shape \[2\] .* shape \[3\]"),
    ):
        with pytest.raises(VerificationError, match=words):
            verify.compare_arrays("y", first, second)


def test_large_models_run_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory or in a file, with the same differences as in one piece; only parts of the weights are ever loaded."""
    monkeypatch.setattr("sparsecc.calib.stepwise._WEIGHT_BUDGET", 1)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[B,4] x) => (float[B,4] y, float[B,4] a)'
        "{ a = MatMul(x, v) b = Relu(a) y = MatMul(b, w) }"
    )
    for name in "vw":
        array = np.random.default_rng(ord(name)).standard_normal((4, 4)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    first, second = Model.from_proto(proto), Model.from_proto(proto)
    (site, _) = second.sites()
    site.replace(site.numpy() * 1.5)
    inputs = {"x": np.ones((2, 4), np.float32)}
    whole = verify.compare(first, second, inputs, library=(False, False))
    second.save(tmp_path / "second.onnx")
    room = importlib.import_module("sparsecc.verify.session")
    monkeypatch.setattr(room, "_WHOLE", 1)
    monkeypatch.setattr(room, "session", None)
    for other in (second, tmp_path / "second.onnx"):
        parts = verify.compare(first, other, inputs, library=(False, False))
        assert [item.name for item in parts] == ["y", "a"]
        for item, expected in zip(parts, whole, strict=True):
            assert item.rel_l2 == pytest.approx(expected.rel_l2)
    with pytest.raises(UsageError, match="no array for input x"):
        verify.compare(first, second, {}, library=(False, False))
