"""Every form of calibration data, and every way it can be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import UnsupportedModelError, UsageError
from sparsecc.ir import Model


def model_of(inputs: str, body: str = "y = Relu(x)") -> Model:
    names = [part.split()[-1] for part in inputs.replace("]", "] ").split(",") if "]" in part]
    outputs = "float[P, Q] y"
    assert names
    return Model.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
        )
    )


FREE = model_of("float[B, 3] x")
FIXED = model_of("float[4, 3] x")
TWO = model_of("float[B, 3] x, int64[B, 2] ids", "i = Cast<to = 1>(ids) y = Concat<axis = 1>(x, i)")


def ramp(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def shapes(source: Calibration, name: str = "x") -> list[tuple[int, ...]]:
    return [batch[name].shape for batch in source]


def joined(source: Calibration, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in source])


def test_npz_is_cut_into_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=ramp(70, 3))
    source = Calibration.from_path(str(path), FREE)
    assert shapes(source) == [(32, 3), (32, 3), (6, 3)]
    assert source.batches == 3
    np.testing.assert_array_equal(joined(source), ramp(70, 3))
    fixed = Calibration.from_path(str(path), FIXED)
    assert shapes(fixed) == [(4, 3)] * 17


def test_npz_with_one_entry_per_batch(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=ramp(5, 4, 3))
    for model in (FREE, FIXED):
        assert shapes(Calibration.from_path(str(path), model)) == [(4, 3)] * 5


def test_unnamed_array_of_a_single_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", ramp(2, 3))
    np.save(tmp_path / "data.npy", ramp(2, 3))
    for name in ("data.npz", "data.npy"):
        assert shapes(Calibration.from_path(str(tmp_path / name), FREE)) == [(2, 3)]


def test_inputs_are_cut_together_and_constant_ones_repeated(tmp_path: Path) -> None:
    model = model_of("float[B, 3] x, float[2, 3] state, float[T, 3] steps", "y = Relu(x)")
    np.savez(tmp_path / "d.npz", x=ramp(40, 3), state=ramp(2, 3), steps=ramp(50, 3))
    source = Calibration.from_path(str(tmp_path / "d.npz"), model)
    assert shapes(source) == [(32, 3), (8, 3)]
    assert shapes(source, "state") == [(2, 3)] * 2
    assert shapes(source, "steps") == [(50, 3)] * 2


def test_seeded_choice_of_samples(tmp_path: Path) -> None:
    path = str(tmp_path / "d.npz")
    np.savez(path, x=ramp(100, 3))
    one, same, other = (
        joined(Calibration.from_path(path, FREE, num_samples=10, seed=seed)) for seed in (1, 1, 2)
    )
    assert len(one) == 10
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert (np.diff(one[:, 0]) > 0).all()


def test_folder_of_samples(tmp_path: Path) -> None:
    for number in range(5):
        np.savez(tmp_path / f"inp-{number:04}.npz", x=ramp(3) + number, ids=ramp(2, dtype=np.int64))
    source = Calibration.from_path(str(tmp_path), TWO)
    assert shapes(source) == [(5, 3)]
    np.testing.assert_array_equal(joined(source)[:, 0], range(5))
    assert Calibration.from_path(str(tmp_path), TWO, num_samples=2).batches == 1


def test_folder_of_samples_of_several_lengths_and_fixed_batches(tmp_path: Path) -> None:
    model = model_of("float[B, T] x")
    for number, length in enumerate((3, 3, 4, 3)):
        np.savez(tmp_path / f"{number}.npz", x=ramp(1, length))
    assert shapes(Calibration.from_path(str(tmp_path), model)) == [(2, 3), (1, 4), (1, 3)]
    for number in range(4, 9):
        np.savez(tmp_path / f"{number}.npz", x=ramp(3))
    (tmp_path / "2.npz").unlink()
    assert shapes(Calibration.from_path(str(tmp_path), FIXED)) == [(4, 3)] * 2


def test_folder_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ramp(33, 3))
    np.save(tmp_path / "ids.npy", ramp(33, 2, dtype=np.int64))
    source = Calibration.from_path(str(tmp_path), TWO)
    assert shapes(source) == [(32, 3), (1, 3)]
    assert shapes(source, "ids") == [(32, 2), (1, 2)]


SCRIPT = """
import numpy as np
def load_data():
    for number in range(6):
        yield {"x": np.full((2, 3), number)%s}
def bad():
    yield 3
def broken():
    yield {"x": np.zeros((1, 3), np.float32)}
    raise ValueError("no\\nmore")
"""


def test_function(tmp_path: Path) -> None:
    script = tmp_path / "data.py"
    script.write_text(SCRIPT % ".astype('float32')")
    for spec in (str(script), f"{script}:load_data"):
        assert shapes(Calibration.from_path(spec, FREE)) == [(2, 3)] * 6
    assert Calibration.from_path(str(script), FREE, num_samples=5).batches == 3
    for name, words in (
        ("nothing", "no such function"),
        ("bad", "item 0: got int"),
        ("broken", "ValueError: no more"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            Calibration.from_path(f"{script}:{name}", FREE)
        assert "\n" not in str(caught.value)
    script.write_text("import no_such_module")
    with pytest.raises(UsageError, match=r"data.py cannot be imported: ModuleNotFoundError"):
        Calibration.from_path(str(script), FREE)


def test_synthetic_says_so() -> None:
    source = Calibration.from_path("synthetic", FREE, seed=3, input_shapes={"x": (2, 3)})
    assert source.synthetic
    assert source.notes
    assert shapes(source) == [(2, 3)] * 8
    first, second = list(source)[:2]
    assert not np.array_equal(first["x"], second["x"])
    again = Calibration.from_path("synthetic", FREE, seed=3, input_shapes={"x": (2, 3)})
    assert again.fingerprint() == source.fingerprint()
    assert Calibration.from_path("synthetic", FREE, seed=4).fingerprint() != source.fingerprint()
    assert source.to_json()["synthetic"] is True


def test_widening_casts_are_silent() -> None:
    batch = {"x": ramp(2, 3, dtype=np.float64), "ids": ramp(2, 2, dtype=np.int32)}
    (fitted,) = Calibration.from_batches([batch], TWO)
    assert fitted["x"].dtype == np.float32
    assert fitted["ids"].dtype == np.int64


OK = {"x": ramp(4, 3), "ids": ramp(4, 2, dtype=np.int64)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": ramp(4, 3)}, "no array for input ids; the model reads x, ids"),
        ({"x": OK["x"], "idz": OK["ids"]}, "'idz' is no input .* x, ids; rename it to 'ids'"),
        ({**OK, "extra": ramp(4)}, "'extra' is no input"),
        ({**OK, "x": ramp(3)}, "shape .* 1 axes, but the input has 2"),
        ({**OK, "x": ramp(1, 4, 1, 3)}, "4 axes, but the input has 2"),
        ({**OK, "x": ramp(4, 5)}, r"shape \[4, 5\] but the input has \[\?, 3\]"),
        ({**OK, "ids": ramp(4, 2)}, "type float32 but the input has int64"),
        ({**OK, "x": ramp(4, 3, dtype=np.int64)}, "int64 .* astype"),
        ({**OK, "x": np.full((4, 3), "a")}, "<U1"),
        ({**OK, "x": ramp(4, 3).astype(np.complex64)}, "complex64"),
        ({**OK, "x": np.where(ramp(4, 3) > 9, np.nan, 1).astype(np.float32)}, "holds 2 NaN"),
        ({**OK, "x": np.zeros((0, 3), np.float32)}, "is empty"),
        ({**OK, "x": ramp(5, 3)}, "different numbers of samples"),
        ({**OK, "x": ramp(4, 2, 3)}, "batches of different sizes"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=words) as caught:
        Calibration.from_path(str(path), TWO)
    assert "\n" not in str(caught.value)
    assert "d.npz" in str(caught.value)


def test_symbols_must_agree_within_a_batch() -> None:
    with pytest.raises(UsageError, match="'B' is 2 in 'x' but 3 in 'ids'"):
        Calibration.from_batches([{"x": ramp(2, 3), "ids": ramp(3, 2, dtype=np.int64)}], TWO)


def test_too_few_samples_for_a_fixed_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=ramp(3, 3))
    with pytest.raises(UsageError, match="batch size 4"):
        Calibration.from_path(str(tmp_path / "d.npz"), FIXED)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    np.save(mixed / "x.npy", ramp(2, 3))
    np.savez(mixed / "x.npz", x=ramp(2, 3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.save(tmp_path / "pickled.npy", np.array([{}], object))
    for name, words in {
        "nothing.npz": "does not exist",
        "text.npz": "cannot be read",
        "pickled.npz": "cannot be read",
        "pickled.npy": "cannot be read",
        "x.txt": "no known form",
        "empty": "holds no .npz",
        "mixed": "holds .npz and .npy",
    }.items():
        with pytest.raises(UsageError, match=words) as caught:
            Calibration.from_path(str(tmp_path / name), FREE)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="1 or more"):
        Calibration.from_path("synthetic", FREE, num_samples=0)
    with pytest.raises(UsageError, match="no samples"):
        Calibration.from_batches([], FREE)


def test_truncated_archive(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=ramp(400, 3))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"d\.npz: cannot be read"):
        Calibration.from_path(str(path), FREE)


def test_pipes_are_refused_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "d.npz", tmp_path / "d.npy", tmp_path / "d.py", folder / "x.npy"):
        os.mkfifo(path)
    for name in ("d.npz", "d.npy", "d.py", "folder"):
        with pytest.raises(UsageError, match="pipe"):
            Calibration.from_path(str(tmp_path / name), FREE)


@pytest.mark.parametrize("place", ["import", "generator"])
def test_a_script_that_exits_is_an_error(tmp_path: Path, place: str) -> None:
    script = tmp_path / "data.py"
    body = "import sys\n" + ("sys.exit(0)\n" if place == "import" else "")
    script.write_text(body + "def load_data():\n    yield from ()\n    sys.exit(0)\n")
    with pytest.raises(UsageError, match="SystemExit: 0; run it by itself"):
        Calibration.from_path(str(script), FREE)


def test_batches_of_another_size_than_the_fixed_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=ramp(5, 2, 3))
    with pytest.raises(UsageError, match=r"shape \[2, 3\] but the input has \[4, 3\]"):
        Calibration.from_path(str(tmp_path / "d.npz"), FIXED)


def test_casts_that_lose_are_refused() -> None:
    with pytest.raises(UsageError, match="type bool but the input has float32"):
        Calibration.from_batches([{"x": np.ones((2, 3), bool)}], FREE)
    with pytest.raises(UsageError, match="1 values that are too large for float32"):
        Calibration.from_batches([{"x": np.array([[1e300, 1, np.inf]])}], FREE)


def test_one_array_of_batches_and_one_of_samples(tmp_path: Path) -> None:
    model = model_of("float[B, 3] x, float[A, 2] z", "y = Relu(x)")
    np.savez(tmp_path / "d.npz", x=ramp(5, 4, 3), z=ramp(5, 2))
    with pytest.raises(UsageError, match="give every array one axis more"):
        Calibration.from_path(str(tmp_path / "d.npz"), model)


def test_sequences_are_no_inputs_to_measure_on() -> None:
    model = Model.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]>
            g (seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence<axis = 0>(x) }"""
        )
    )
    for source in (lambda: Calibration.from_path("synthetic", model),
                   lambda: Calibration.from_batches([{"x": ramp(3)}], model)):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="'x' is of type sequence and cannot be fed"):
            source()
