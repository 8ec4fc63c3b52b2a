from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from sparsecc import verify
from sparsecc.errors import UnsupportedModelError, UsageError
from sparsecc.ir import Model

EMBEDDING = """
<ir_version: 8, opset_import: ["": 17]>
g (int64[batch, sequence] ids, int64[batch, sequence] attention_mask, float[batch, 3, H, W] picture,
   int32[batch, sequence] kinds, bool[2] flag)
   => (float[batch, sequence, 2] y, float[batch, 3, H, W] p, int64[batch, sequence] m,
       int32[batch, sequence] k, bool[2] f)
<float[5, 2] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}>
{
    i = Cast<to = 6>(ids)
    y = Gather(table, i)
    p = Identity(picture)
    m = Identity(attention_mask)
    k = Identity(kinds)
    f = Identity(flag)
}
"""


@pytest.fixture
def model() -> Model:
    return Model.from_proto(onnx.parser.parse_model(EMBEDDING))


def test_synthetic_inputs_respect_types_tables_and_symbols(model: Model) -> None:
    inputs = verify.make_inputs(model)
    shapes = {name: (array.shape, str(array.dtype)) for name, array in inputs.items()}
    assert shapes == {
        "ids": ((1, 16), "int64"),
        "attention_mask": ((1, 16), "int64"),
        "picture": ((1, 3, 224, 224), "float32"),
        "kinds": ((1, 16), "int32"),
        "flag": ((2,), "bool"),
    }
    assert inputs["ids"].max() < 5
    assert set(inputs["attention_mask"].ravel()) == {1}
    verify.session(model).run(inputs)


def test_ids_reach_every_row_of_the_table(model: Model) -> None:
    ids = verify.make_inputs(model, shapes={"ids": (4, 64)})["ids"]
    assert set(ids.ravel()) == set(range(5))


def test_seeded_and_independent_of_other_inputs(model: Model) -> None:
    a, b, c = (verify.make_inputs(model, seed=seed)["picture"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_given_shapes_bind_the_symbols(model: Model) -> None:
    inputs = verify.make_inputs(model, shapes={"ids": (2, 7)})
    assert inputs["attention_mask"].shape == (2, 7)
    assert inputs["picture"].shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"idz": (1, 2)}, "inputs are ids"),
        ({"ids": (1, 2, 3)}, "2 dimensions"),
        ({"picture": (1, 4, 8, 8)}, "contradicts"),
        ({"ids": (1, 4), "kinds": (1, 5)}, "'sequence' is 4"),
    ],
)
def test_shapes_that_do_not_fit(model: Model, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verify.make_inputs(model, shapes=shapes)


def test_given_inputs(model: Model, tmp_path: Path) -> None:
    batch = {"ids": np.ones((1, 2), np.int64)}
    assert verify.make_inputs(model, batch) == batch
    assert verify.make_inputs(model, [batch, {}]) == batch
    with pytest.raises(UsageError, match="empty"):
        verify.make_inputs(model, [])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(EMBEDDING), path)
    assert verify.make_inputs(path)["ids"].shape == (1, 16)


def test_waveform_and_text() -> None:
    wave = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, sequence] x) => (float[batch, sequence] y) { y = Relu(x) }"""
    )
    assert verify.make_inputs(Model.from_proto(wave))["x"].shape == (1, 512)
    text = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (string[N] x) => (string[N] y) { y = Identity(x) }"""
    )
    with pytest.raises(UnsupportedModelError, match="type string"):
        verify.make_inputs(Model.from_proto(text))
