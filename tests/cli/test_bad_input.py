"""Bad input: one line on stderr, the documented exit code, nothing written, the input untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

Run = Callable[..., "object"]


def check_refused(result: object, code: int, *words: str) -> None:
    assert result.code == code, result.err
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("sparsecc: error: ")
    assert "internal error" not in lines[0]
    for word in words:
        assert word.lower() in lines[0].lower()


def truncated(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def missing_external(good: Path, path: Path) -> None:
    onnx.save(onnx.load(good), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").unlink()


def escaping_external(good: Path, path: Path) -> None:
    outside = path.parent.parent / "outside.bin"
    outside.write_bytes(b"\0" * (1 << 20))
    proto = onnx.load(good)
    for tensor in proto.graph.initializer:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "../outside.bin"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def future_opset(good: Path, path: Path) -> None:
    proto = onnx.load(good)
    proto.opset_import[0].version = 9999
    path.write_bytes(proto.SerializeToString())


def unknown_operator(good: Path, path: Path) -> None:
    proto = onnx.load(good)
    proto.graph.node[0].op_type = "Frobnicate"
    path.write_bytes(proto.SerializeToString())


BROKEN = {
    "empty": (lambda good, path: path.write_bytes(b""), "empty"),
    "text": (lambda good, path: path.write_text("hello, I am not a model\n" * 20), ""),
    "truncated": (truncated, ""),
    "missing-external": (missing_external, "weights.bin"),
    "escaping-external": (escaping_external, "outside.bin"),
    "future-opset": (future_opset, "9999"),
    "unknown-operator": (unknown_operator, "Frobnicate"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_model(sparsecc: Run, mlp: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "bad.onnx"
    make, word = BROKEN[kind]
    make(mlp, path)
    before = path.read_bytes()
    mlp.unlink()
    check_refused(sparsecc("optimize", path, "-o", tmp_path / "out.onnx"), 3, word)
    assert not list(tmp_path.glob("*.onnx*"))
    assert path.read_bytes() == before


def test_no_such_model(sparsecc: Run, tmp_path: Path) -> None:
    check_refused(sparsecc("optimize", tmp_path / "no.onnx"), 3, "no.onnx")
    check_refused(sparsecc("inspect", tmp_path), 3, "folder")


def test_output_is_the_input(sparsecc: Run, mlp: Path) -> None:
    before = mlp.read_bytes()
    check_refused(sparsecc("optimize", mlp, "-o", mlp), 2, "is the input")
    link = mlp.parent / "link.onnx"
    link.symlink_to(mlp)
    check_refused(sparsecc("optimize", mlp, "-o", link), 2, "is the input")
    assert mlp.read_bytes() == before


def test_output_would_replace_a_file_that_is_read(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(onnx.load(mlp), source, save_as_external_data=True, location="ext.data", size_threshold=0)
    weights = (tmp_path / "ext.data").read_bytes()
    check_refused(sparsecc("optimize", source, "-o", tmp_path / "ext.data"), 2, "is the input ext.data")
    check_refused(sparsecc("optimize", source, "-o", tmp_path / "ext"), 2, "is the input ext.data")
    assert (tmp_path / "ext.data").read_bytes() == weights
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('pipeline = ["tidy"]')
    check_refused(sparsecc("optimize", mlp, "-o", recipe, "--recipe", recipe), 2, "recipe.toml")
    assert recipe.read_text() == 'pipeline = ["tidy"]'
    data = tmp_path / "data.npz"
    np.savez(data, x=np.zeros((4, 64), np.float32))
    check_refused(sparsecc("optimize", mlp, "-o", data, "--calibration-data", data), 2, "data.npz")


def test_output_that_is_no_regular_file(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_refused(sparsecc("optimize", mlp, "-o", tmp_path / "pipe"), 2, "no regular file")
    check_refused(sparsecc("optimize", mlp, "-o", "/dev/null"), 2, "no regular file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--threads", "100000"), ("threads",)),
        (("--pattern", "4:2"), ("4:2",)),
        (("--pattern", "banana"), ("banana",)),
        (("--pattern", "2:4", "--sparsity", "0.9"), ("2:4",)),
        (("--sparsity", "1.5"), ("1.5",)),
        (("--method", "nonsense", "--sparsity", "0.5"), ("nonsense", "magnitude")),
        (("--method", "wanda", "--sparsity", "0.5"), ("--calibration-data",)),
        (("--match", "no-such-layer", "--sparsity", "0.5"), ("no-such-layer", "fc1")),
        (("--match", "re:(", "--sparsity", "0.5"), ("re:(",)),
        (("--pipeline", "tidy,frobnicate"), ("frobnicate", "tidy")),
        (("--pipeline", "tidy{colour=red}"), ("colour",)),
        (("--recipe", "no-such.toml"), ("no-such.toml",)),
        (("--target", "toaster"), ("toaster", "cpu")),
        (("--input-shapes", "x=1"), ("NAME:D,D",)),
        (("--input-shapes", "z:1,2"), ("z",)),
        (("--input-shapes", "x:1,65"), ("65",)),
        (("--no-such-option",), ("no-such-option",)),
    ],
)
def test_wrong_usage(
    sparsecc: Run, mlp: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    check_refused(sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", *arguments), 2, *words)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("target", ["cuda", "arm64"])
def test_target_without_library(sparsecc: Run, mlp: Path, tmp_path: Path, target: str) -> None:
    check_refused(sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--target", target), 6, target)


def test_library_that_is_not_there(
    sparsecc: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSECC_OPS_LIBRARY", str(tmp_path / "no.so"))
    check_refused(sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx"), 6, "no.so")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"wrong": np.zeros((4, 64), np.float32)}, ("wrong", "x")),
        ({"x": np.zeros((4, 2, 2, 64), np.float32)}, ("x",)),
        ({"x": np.zeros((4, 63), np.float32)}, ("63", "64")),
        ({"x": np.full((4, 64), "a")}, ("x",)),
        ({"x": np.zeros((4, 64), np.complex64)}, ("complex64",)),
        ({"x": np.full((4, 64), np.nan, np.float32)}, ("nan",)),
        ({"x": np.zeros((0, 64), np.float32)}, ("x",)),
    ],
)
def test_wrong_calibration_arrays(
    sparsecc: Run, mlp: Path, tmp_path: Path, arrays: dict, words: tuple[str, ...]
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    result = sparsecc(
        "optimize", mlp, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--calibration-data", path
    )
    check_refused(result, 2, *words)
    assert not list(tmp_path.glob("out*"))


def test_calibration_file_that_is_no_npz(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_text("hello")
    check_refused(
        sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--calibration-data", path), 2, "data.npz"
    )
    check_refused(
        sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--calibration-data", "no.npz"), 2, "no.npz"
    )


def test_nan_weights_stay_dense_with_a_reason(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    proto = onnx.load(mlp)
    array = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[3, 5] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))
    onnx.save(proto, mlp)
    result = sparsecc(
        "optimize", mlp, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--standard-ops-only"
    )
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("fc1")]
    assert "nan" in line.lower()


DYNAMIC = """<ir_version: 8, opset_import: ["" : 17]>
g (float[a, b, 16] x, float[a, b, 16] z) => (float[a, b, 8] y) <float[16, 8] w> { s = Add(x, z) y = MatMul(s, w) }"""
EMPTY = """<ir_version: 8, opset_import: ["" : 17]>
g (float[0, 16] x) => (float[0, 8] y) <float[16, 8] w> { y = MatMul(x, w) }"""


@pytest.mark.parametrize("text", [DYNAMIC, EMPTY], ids=["dynamic-everywhere", "zero-size"])
def test_odd_shapes_work(sparsecc: Run, tmp_path: Path, text: str) -> None:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.eye(16, 8, dtype=np.float32), "w"))
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    result = sparsecc("optimize", path, "-o", tmp_path / "out.onnx", "--keep-slower")
    assert result.code == 0, result.err
    assert onnx.load(tmp_path / "out.onnx").graph.node[-1].op_type == "SparseMatMul"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(sparsecc: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    check_refused(sparsecc("optimize", mlp, "-o", out), 2, "No space left")
    monkeypatch.setattr(os, "fsync", real_fsync)
    assert not list(out.parent.iterdir())
    assert real_write is os.write


def test_killed_process_leaves_no_model(mlp: Path, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    command = [sys.executable, "-m", "sparsecc", "optimize", str(mlp), "-o", str(out), "--sparsity", "0.5"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():  # it was quick enough to finish: then it must be whole
        onnx.checker.check_model(onnx.load(out))
    before = mlp.read_bytes()
    assert before


def test_interrupt_gives_130(mlp: Path, tmp_path: Path, root: Path) -> None:
    code = (
        "import signal, sparsecc.api, sparsecc.cli.main as m\n"
        "def stop(*a, **k): raise KeyboardInterrupt\n"
        "sparsecc.api.optimize = stop\n"
        f"raise SystemExit(m.run(['optimize', {str(mlp)!r}, '-o', {str(tmp_path / 'out.onnx')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_internal_errors_are_one_line_too(sparsecc: Run, mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("sparsecc.api.optimize", broken)
    result = sparsecc("optimize", mlp)
    assert result.code == 1
    assert "two lines" in result.err
    assert "SPARSECC_TRACEBACK" in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("-q",)])
def test_no_or_unknown_verb(sparsecc: Run, arguments: tuple[str, ...]) -> None:
    result = sparsecc(*arguments)
    check_refused(result, 2, "command")
    assert len(result.err) < 160


def test_unknown_instruction_set(sparsecc: Run, mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_ISA", "mmx")
    check_refused(sparsecc("doctor"), 2, "SPARSECC_ISA", "mmx", "generic")
    check_refused(sparsecc("optimize", mlp, "--pattern", "2:4"), 2, "SPARSECC_ISA", "mmx", "generic")


SIGNALLED = """
import os, signal, sys
import sparsecc.cli.main as command
import sparsecc.ir.write as write
real, number = write._finish, int(sys.argv.pop())
signal.signal(number, signal.SIG_DFL)  # the tests themselves may run in the background, where some are ignored
def finish(file):
    real(file)
    os.kill(os.getpid(), number)
write._finish = finish
command.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(mlp: Path, tmp_path: Path, root: Path, number: int) -> None:
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    arguments = ["optimize", str(mlp), "-o", str(out), "--sparsity", "0.5", "--standard-ops-only"]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments, str(int(number))],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == ["sparsecc: error: interrupted; no unfinished file was left behind"]
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("memory", ["0", "nan", "inf"])
def test_memory_is_a_positive_number_of_gigabytes(
    sparsecc: Run, mlp: Path, tmp_path: Path, memory: str
) -> None:
    arguments = ("--calibration-data", "synthetic", "--memory", memory)
    check_refused(sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", *arguments), 2, "memory")
