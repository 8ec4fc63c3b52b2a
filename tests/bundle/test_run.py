"""`sparsecc-run`: models without Python."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from sparsecc import runtime

CASTS = """<ir_version: 8, opset_import: ["" : 17]>
casts (float[n, 2] f, int64[n] i, bool[] b, float16[3] h, int8[2, 2] q, int32[n] w) =>
  (float[n, 2] of, int64[n] oi, bool[] ob, float16[3] oh, int8[2, 2] oq, int32[n] ow, double[n] d) {
    of = Neg(f)
    oi = Neg(i)
    ob = Not(b)
    oh = Neg(h)
    oq = Neg(q)
    ow = Neg(w)
    d = Cast<to = 11>(i)
}"""


def test_outputs_and_times(
    runner: Callable[..., object],
    lowered: Path,
    images: Path,
    expected: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    y = tmp_path / "y.npy"
    done = runner(lowered, "--input", images, "--output", y, "--repeat", 3, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0 < told["min_ms"] <= told["median_ms"]
    assert (told["iterations"], told["threads"]) == (3, 1)
    assert told["library"] == runtime.get_library_path()
    np.testing.assert_array_equal(np.load(y), expected(lowered, images))


def test_without_the_library_the_functions_in_the_file_run(
    runner: Callable[..., object],
    lowered: Path,
    images: Path,
    expected: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    y = tmp_path / "y.npy"
    done = runner(lowered, f"--input=image={images}", "--no-library")
    assert done.returncode == 2  # values go after options, not into them
    done = runner(lowered, "--input", f"image={images}", "--output", f"logits={y}", "--no-library")
    assert done.returncode == 0, done.stderr
    assert "operator library none" in done.stdout
    np.testing.assert_allclose(np.load(y), expected(lowered, images), rtol=1e-4, atol=1e-5)


def test_every_type_of_element(runner: Callable[..., object], tmp_path: Path) -> None:
    model = tmp_path / "casts.onnx"
    onnx.save(onnx.parser.parse_model(CASTS), model)
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(3, 2),
        "i": np.array([1, -2, 3]),
        "b": np.array(True),
        "h": np.array([0.5, 1, 2], np.float16),
        "q": np.array([[1, 2], [3, -128]], np.int8),
        "w": np.array([7, 8, 9], np.int32),
    }
    arguments: list[object] = []
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        arguments += ["--input", f"{name}={tmp_path / name}.npy"]
        arguments += ["--output", f"o{name}={tmp_path}/o{name}.npy"]
    done = runner(model, *arguments, "--output", f"d={tmp_path}/d.npy", "--repeat", 1)
    assert done.returncode == 0, done.stderr
    for name, array in arrays.items():
        y = np.load(tmp_path / f"o{name}.npy")
        assert y.dtype == array.dtype
        np.testing.assert_array_equal(y, ~array if name == "b" else -array)
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), np.array([1.0, -2.0, 3.0]))
    assert not list(tmp_path.glob("*.tmp"))


def _damaged(images: Path, folder: Path) -> dict[str, bytes]:
    whole = images.read_bytes()
    np.save(folder / "fortran.npy", np.asfortranarray(np.ones((3, 1, 8, 8), np.float32)))
    return {
        "text.npy": b"not an array",
        "empty.npy": b"",
        "cut.npy": whole[:-4],
        "longer.npy": whole + b"\0" * 4,
        "huge.npy": whole.replace(b"(3, 1, 8, 8), }   ", b"(9999999999999999)"),
        "bigendian.npy": whole.replace(b"<f4", b">f4"),
        "header.npy": whole[:8] + b"\xff\xff" + whole[10:],
        "version.npy": whole[:6] + b"\x09" + whole[7:],
        "fortran.npy": (folder / "fortran.npy").read_bytes(),
    }


def test_arrays_that_do_not_fit_are_named(
    runner: Callable[..., object], digits: Path, images: Path, tmp_path: Path
) -> None:
    for name, content in _damaged(images, tmp_path).items():
        (tmp_path / name).write_bytes(content)
        done = runner(digits, "--input", tmp_path / name)
        assert done.returncode == 2, name
        assert name in done.stderr
        assert done.stderr.count("\n") == 1
    np.save(tmp_path / "rank.npy", np.ones((3, 8, 8), np.float32))
    np.save(tmp_path / "type.npy", np.ones((3, 1, 8, 8)))
    for name, text in (("rank", "float32 3x8x8"), ("type", "float64 3x1x8x8")):
        done = runner(digits, "--input", tmp_path / f"{name}.npy")
        assert done.returncode == 2
        assert f"{text} does not fit input 'image' (float32 ?x1x8x8)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no model given"),
        (("M",), 2, "input 'image' (float32 ?x1x8x8) is missing"),
        (("M", "--input", "q=X"), 2, "no such thing: 'q'"),
        (("M", "--input", "X", "--input", "X"), 2, "given twice"),
        (("M", "--input"), 2, "needs a value"),
        (("M", "--input", "X", "--repeat", "0"), 2, "expected a number from 1"),
        (("M", "--input", "X", "--threads", "two"), 2, "expected a number from 0"),
        (("M", "--fast"), 2, "no option --fast"),
        (("M", "M"), 2, "more than one model"),
        (("M", "--input", "X", "--output", "/no/folder/y.npy"), 2, "cannot write /no/folder/y.npy"),
        (("gone.onnx",), 3, "gone.onnx: no such file"),
        (("X",), 3, "onnxruntime: "),
        (("M", "--library", "gone.so"), 6, "--library does not exist: gone.so"),
        (("M", "--library", "X"), 6, "operator library cannot be loaded"),
        (("M", "--onnxruntime", "OPS"), 6, "has no OrtGetApiBase"),
    ],
)
def test_one_line_and_an_exit_code(
    runner: Callable[..., object],
    digits: Path,
    images: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    names = {"M": digits, "X": images, "q=X": f"q={images}", "OPS": runtime.get_library_path()}
    done = runner(*(names.get(word, word) for word in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("sparsecc-run: error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_help_and_version(runner: Callable[..., object]) -> None:
    from sparsecc import __version__

    assert "--repeat N" in runner("--help").stdout
    assert runner("--version").stdout == f"sparsecc-run, version {__version__}\n"


def test_without_onnxruntime_it_says_where_to_get_it(
    runner: Callable[..., object], digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSECC_ONNXRUNTIME", str(tmp_path / "gone.so"))
    done = runner(digits)
    assert done.returncode == 6
    assert "SPARSECC_ONNXRUNTIME does not exist" in done.stderr
    monkeypatch.delenv("SPARSECC_ONNXRUNTIME")
    if any(Path(folder, "libonnxruntime.so").exists() for folder in ("/usr/lib", "/usr/local/lib")):
        pytest.skip("this system has an onnxruntime of its own")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.devnull)
    done = runner(digits)
    assert done.returncode == 6
    assert "onnxruntime is not found" in done.stderr
