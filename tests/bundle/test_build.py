"""Models as build products: the example project by CMake, Make and Ninja."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from sparsecc import runtime
from sparsecc.cli.depfile import write_depfile
from sparsecc.cli.main import run as run_cli

TOOLS = ("cmake", "ninja", "make", "c++")
Build = Callable[..., subprocess.CompletedProcess[str]]

needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"one of {', '.join(TOOLS)} is not installed"
)


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example project and of the model beside it."""
    base = tmp_path_factory.mktemp("project")
    shutil.copytree(root / "examples" / "edge", base / "examples" / "edge")
    shutil.copytree(root / "models" / "digits_cnn", base / "models" / "digits_cnn")
    return base / "examples" / "edge"


@pytest.fixture(scope="module")
def build(root: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Run a build tool in the project, with this checkout's command line on PATH."""
    binaries = tmp_path_factory.mktemp("bin")
    program = binaries / "sparsecc"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" -m sparsecc "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words], cwd=project, env=environment, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def configured(build: Build, project: Path) -> Path:
    """The build folder, everything built."""
    folder = project / "build"
    definition = f"-Dsparsecc_DIR={Path(runtime.__file__).parent / 'cmake'}"
    for words in (("-S", ".", "-B", folder, "-G", "Ninja", definition), ("--build", folder)):
        done = build("cmake", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@contextmanager
def newer(path: Path) -> Iterator[None]:
    """Let a file look changed."""
    old = path.stat()
    os.utime(path)
    yield
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@needs_tools
def test_the_product_works(configured: Path, onnxruntime_library: Path) -> None:
    device = configured / "device"
    words = [configured / "classify", device / "model/digits.onnx", device / "lib/libsparsecc_ops.so"]
    done = subprocess.run([*words, onnxruntime_library], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "digit 6\n"), done.stderr


@needs_tools
def test_it_is_made_again_when_something_changed_and_only_then(
    configured: Path, build: Build, project: Path
) -> None:
    def planned() -> str:
        return build("ninja", "-C", configured, "-n").stdout

    assert "no work to do" in planned()
    data = project.parents[1] / "models" / "digits_cnn"
    for changed in (
        project / "recipe.toml",
        data / "digits_cnn_sparse16x1.onnx",
        data / "calibration.npz",
    ):
        with newer(changed):
            assert {"sparsecc optimize", "sparsecc bundle"} <= {
                line.split("] ")[-1].rsplit(" ", 1)[0] for line in planned().splitlines()
            }, changed
    for other in (project / "classify.cc", data / "test.npz"):
        with newer(other):
            assert "sparsecc" not in planned(), other
    for depfile in ("digits.onnx.d", "device.d"):
        text = (configured / depfile).read_text()
        assert runtime.get_library_path() in text
        assert "sparsecc/__init__.py" in text


@needs_tools
def test_make_gives_the_same_bytes(configured: Path, build: Build, project: Path) -> None:
    done = build("make")
    assert done.returncode == 0, done.stderr
    assert (project / "out/digits.onnx").read_bytes() == (configured / "digits.onnx").read_bytes()
    manifests = [folder / "device/manifest.json" for folder in (project / "out", configured)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    assert build("make", "-q").returncode == 0
    with newer(project / "recipe.toml"):
        assert build("make", "-q").returncode == 1
    recipe = project / "recipe.toml"
    good, before = recipe.read_text(), (project / "out/digits.onnx").read_bytes()
    recipe.write_text('pipeline = ["tidy", "prune-nothing"]')
    try:
        done = build("make")
    finally:
        recipe.write_text(good)
    assert done.returncode == 2
    assert "sparsecc: error: " in done.stderr
    assert (project / "out/digits.onnx").read_bytes() == before


@needs_tools
def test_ninja_alone_knows_what_to_do(build: Build) -> None:
    done = build("ninja", "-n", "-v")
    assert done.returncode == 0, done.stderr
    assert (
        "sparsecc optimize ../../models/digits_cnn/digits_cnn_sparse16x1.onnx -o out/digits.onnx"
        in done.stdout
    )


@needs_tools
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("find_package(sparsecc 9)", "9"),
        ("find_package(sparsecc REQUIRED)\nsparsecc_optimize(m OUTPUT o.onnx)", "MODEL is missing"),
        ("find_package(sparsecc REQUIRED)\nsparsecc_optimize(m MODEL a OUTPUT b --fast)", "go after ARGS"),
        ("find_package(sparsecc REQUIRED)\nsparsecc_bundle(m MODEL a OUTPUT b)", "MACHINE is missing"),
    ],
)
def test_mistakes_are_told_when_configuring(build: Build, tmp_path: Path, lines: str, message: str) -> None:
    text = f"cmake_minimum_required(VERSION 3.21)\nproject(p LANGUAGES NONE)\n{lines}\n"
    if "9" in lines:
        text += 'if(NOT sparsecc_FOUND)\nmessage(FATAL_ERROR "no version 9")\nendif()\n'
    (tmp_path / "CMakeLists.txt").write_text(text)
    definition = f"-Dsparsecc_DIR={Path(runtime.__file__).parent / 'cmake'}"
    done = build("cmake", "-S", tmp_path, "-B", tmp_path / "b", "-G", "Ninja", definition)
    assert done.returncode != 0
    assert message in done.stderr


def test_depfile_names_all_that_was_read(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = onnx.load(digits)
    convert_model_to_external_data(proto, location="w.data", size_threshold=0)
    onnx.save(proto, "m.onnx")
    assert run_cli(
        ["optimize", "m.onnx", "-o", "out.onnx", "--keep-slower", "--threads", "1", "--depfile", "out.d"]
    ) == 0  # fmt: skip
    rule = Path("out.d").read_text().split("\n\n")[0]
    assert rule.startswith("out.onnx: \\\n")
    assert f"{tmp_path}/m.onnx" in rule
    assert f"{tmp_path}/w.data" in rule
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "x$.npz").touch()
    Path("m.py").touch()
    write_depfile("d", "o", [folder, "m.py:evaluate", "synthetic", None])
    rule = Path("d").read_text().split("\n\n")[0]
    for name in ("with\\ space \\", "with\\ space/x$$.npz \\", "m.py \\"):
        assert f"{tmp_path}/{name}\n" in rule
    assert "synthetic" not in rule
    assert run_cli(
        ["bundle", "m.onnx", "--target", runtime.triple_of("cpu"), "-o", "b", "--depfile", "/no/folder/d"]
    ) == 2  # fmt: skip
