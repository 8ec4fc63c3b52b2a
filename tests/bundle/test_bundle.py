"""`sparsecc bundle`: a folder that a device needs nothing else than onnxruntime for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from sparsecc import bundle, runtime
from sparsecc.bundle import make
from sparsecc.cli.main import run as run_cli
from sparsecc.errors import ModelError, RuntimeMissingError, UsageError
from sparsecc.runtime.elf import read_native

HERE = runtime.triple_of("cpu")
OTHER = next(triple for triple in bundle.TRIPLES if triple != HERE)


@pytest.fixture(scope="module")
def made(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for this machine."""
    folder = tmp_path_factory.mktemp("bundles") / "device"
    bundle.make_bundle(lowered, folder, triple=HERE)
    return folder


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_bytes()) for path in files}


def test_manifest_lists_every_file(made: Path, lowered: Path, root: Path) -> None:
    document = json.loads((made / "manifest.json").read_text())
    content = _content(made)
    content.pop("manifest.json")
    assert [item["path"] for item in document["files"]] == sorted(content)
    for item in document["files"]:
        _, data = content[item["path"]]
        assert item["sha256"] == hashlib.sha256(data).hexdigest()
        assert item["nbytes"] == len(data)
    assert content[document["model"]["path"]][1] == lowered.read_bytes()
    assert document["target"] == HERE
    assert document["requires"]["onnxruntime"] == "1.17"
    assert "GLIBC" in document["requires"]
    assert document["model"]["custom_operators"]
    assert document["model"]["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert content["licenses/sparsecc-LICENSE"][1] == (root / "LICENSE").read_bytes()


def test_equal_inputs_give_equal_bytes(
    made: Path, lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = os.umask(0o077)
    try:
        bundle.make_bundle(lowered, "again", triple=HERE)
    finally:
        os.umask(old)
    assert _content(tmp_path / "again") == _content(made)


def test_python_example_runs_without_sparsecc(
    made: Path, lowered: Path, images: Path, expected: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    y = tmp_path / "y.npy"
    code = (
        f"import runpy, sys; sys.modules['sparsecc'] = None; sys.argv = ['run', '--input', 'image={images}', "
        f"'--output', 'logits={y}', '--threads', '1']; runpy.run_path({str(made / 'examples/run_model.py')!r}, "
        "run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "logits: float32 (3, 10)\n"
    np.testing.assert_array_equal(np.load(y), expected(lowered, images))
    alone = subprocess.run(
        [sys.executable, made / "examples" / "run_model.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert alone.stdout == "logits: float32 (1, 10)\n", alone.stderr


def test_runner_finds_the_library_of_its_bundle(
    made: Path,
    runner_path: Path,
    onnxruntime_library: Path,
    lowered: Path,
    images: Path,
    expected: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    (moved / "lib" / "libonnxruntime.so").symlink_to(onnxruntime_library)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPARSECC_")}
    done = subprocess.run(
        [moved / "bin" / "sparsecc-run", "model/digits.onnx", "--input", images, "--output", "y.npy",
         "--threads", "1", "--json"],
        capture_output=True, text=True, cwd=moved, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["library"] == str(moved / "lib" / "libsparsecc_ops.so")
    np.testing.assert_array_equal(np.load(moved / "y.npy"), expected(lowered, images))


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_cpp_example_compiles_and_runs(
    made: Path,
    onnxruntime_library: Path,
    lowered: Path,
    images: Path,
    expected: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    program, y = tmp_path / "example", tmp_path / "y.npy"
    sources = sorted((made / "examples" / "cpp").glob("*.cc"))
    subprocess.run(["c++", "-std=c++20", "-Wall", *sources, "-o", program, "-ldl"], check=True)
    library = made / "lib" / "libsparsecc_ops.so"
    model = made / "model" / lowered.name
    subprocess.run([program, model, library, onnxruntime_library, images, y], check=True)
    np.testing.assert_allclose(np.load(y), expected(lowered, images), rtol=1e-5, atol=1e-5)


def test_external_data_report_and_licences_go_along(digits: Path, tmp_path: Path) -> None:
    proto = onnx.load(digits)
    convert_model_to_external_data(proto, location="w.data", size_threshold=0)
    onnx.save(proto, tmp_path / "m.onnx")
    (tmp_path / "r.html").write_text("report")
    (tmp_path / "DATA").write_text("licence")
    result = bundle.make_bundle(
        tmp_path / "m.onnx",
        tmp_path / "out",
        triple=HERE,
        report=tmp_path / "r.html",
        licenses=[tmp_path / "DATA"],
    )
    paths = {item["path"] for item in result.manifest["files"]}
    assert {"model/m.onnx", "model/w.data", "report.html", "licenses/DATA"} <= paths
    weights = [
        {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
        for path in (tmp_path / "out/model/m.onnx", digits)
    ]
    for name, array in weights[1].items():
        np.testing.assert_array_equal(weights[0][name], array)


def test_nothing_is_replaced_unasked(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    bundle.make_bundle(digits, out, triple=HERE)  # an empty folder is no obstacle
    with pytest.raises(UsageError, match=r"out exists: .* --force"):
        bundle.make_bundle(digits, out, triple=HERE)
    (out / "left over").touch()
    bundle.make_bundle(digits, out, triple=HERE, force=True)
    assert not (out / "left over").exists()
    (out / "manifest.json").write_text('{"format": "of others"}')
    with pytest.raises(UsageError, match="is no bundle, so --force does not replace it"):
        bundle.make_bundle(digits, out, triple=HERE, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failures_leave_nothing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError):
        bundle.make_bundle(tmp_path / "text.onnx", tmp_path / "out", triple=HERE)
    with pytest.raises(UsageError, match=r"gone\.html does not exist"):
        bundle.make_bundle(digits, tmp_path / "out", triple=HERE, report=tmp_path / "gone.html")
    with monkeypatch.context() as patch:
        patch.setattr(make, "manifest", fail)
        with pytest.raises(UsageError, match="No space left on device"):
            bundle.make_bundle(digits, tmp_path / "out", triple=HERE)
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]
    bundle.make_bundle(digits, tmp_path / "out", triple=HERE)
    before = _content(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(make.os, "replace", _fail_the_second(make.os.replace))
        with pytest.raises(UsageError):
            bundle.make_bundle(digits, tmp_path / "out", triple=HERE, force=True)
    assert _content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.onnx"]


def _fail_the_second(replace: Callable[..., None]) -> Callable[..., None]:
    calls = []

    def wrapped(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(*arguments)

    return wrapped


def test_library_must_be_for_the_machine(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="unknown target 'riscv64-linux': known are aarch64-linux"):
        bundle.make_bundle(digits, tmp_path / "out", triple="riscv64-linux")
    with pytest.raises(RuntimeMissingError, match=f"is for {HERE}, not {OTHER}"):
        bundle.make_bundle(digits, tmp_path / "out", triple=OTHER, library=runtime.get_library_path())
    with pytest.raises(RuntimeMissingError, match="no 64-bit library or program"):
        bundle.make_bundle(digits, tmp_path / "out", triple=HERE, library=digits)
    monkeypatch.setattr(runtime.native, "_package_folders", lambda: iter([tmp_path / "lib"]))
    assert run_cli(["bundle", str(digits), "--target", OTHER, "-o", str(tmp_path / "out")]) == 6
    with pytest.raises(RuntimeMissingError, match=r"run `make (arm64|build)`"):
        bundle.make_bundle(digits, tmp_path / "out", triple=OTHER)
    assert not (tmp_path / "out").exists()


def test_command_line(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli(["bundle", str(digits), "--target", HERE, "-o", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["manifest"] == json.loads((tmp_path / "out" / "manifest.json").read_text())
    monkeypatch.setattr("sparsecc.bundle.make.find_runner", lambda triple: None)
    assert run_cli(["bundle", str(digits), "--target", HERE, "-o", str(tmp_path / "out"), "--force"]) == 0
    assert "without sparsecc-run" in capfd.readouterr().out
    assert not (tmp_path / "out" / "bin").exists()


@pytest.mark.skipif(shutil.which("strip") is None, reason="strip (binutils) is not installed")
def test_stripped_size_is_that_of_strip(tmp_path: Path) -> None:
    path = runtime.get_library_path()
    subprocess.run(["strip", "-o", tmp_path / "stripped.so", path], check=True)
    nbytes = (tmp_path / "stripped.so").stat().st_size
    told = read_native(path)
    assert told.triple == HERE
    assert told.nbytes == Path(path).stat().st_size
    assert abs(told.stripped_nbytes - nbytes) < 0.01 * nbytes
