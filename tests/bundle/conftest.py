"""Models with inputs in files, the runner, and the onnxruntime that it loads."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from sparsecc import runtime
from sparsecc.cli.main import run as run_cli
from sparsecc.errors import RuntimeMissingError

Process = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def digits(root: Path) -> Path:
    """A small CNN with weights in 16x1 blocks, as custom operators."""
    return root / "models" / "digits_cnn" / "digits_cnn_sparse16x1.onnx"


@pytest.fixture(scope="session")
def lowered(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with operators of the library."""
    path = tmp_path_factory.mktemp("lowered") / "digits.onnx"
    source = root / "models" / "digits_cnn" / "digits_cnn_sparse16x1.onnx"
    arguments = ["optimize", str(source), "-o", str(path), "--keep-slower", "--threads", "1"]
    assert run_cli(arguments) == 0
    return path


@pytest.fixture(scope="session")
def images(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the CNN."""
    path = tmp_path_factory.mktemp("images") / "x.npy"
    with np.load(root / "models" / "digits_cnn" / "test.npz") as arrays:
        np.save(path, (arrays["images"][:3, None] / np.float32(16)).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def expected() -> Callable[[Path, Path], NDArray[np.float32]]:
    """What onnxruntime gives in Python, with the operator library."""

    def compute(model: Path, images: Path) -> NDArray[np.float32]:
        session = runtime.load(model, threads=1)
        y: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: np.load(images)})[0]
        return y

    return compute


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The shared library inside onnxruntime's Python package."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip(f"the Python package of onnxruntime {onnxruntime.__version__} has no libonnxruntime.so")
    return found[0]


@pytest.fixture(scope="session")
def runner_path() -> Path:
    """The program; the test is skipped where the package was built without native code."""
    try:
        return Path(runtime.get_runner_path())
    except RuntimeMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def runner(
    runner_path: Path, onnxruntime_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Process]:
    """Run the program with this onnxruntime."""
    monkeypatch.setenv("SPARSECC_ONNXRUNTIME", str(onnxruntime_library))

    def call(*arguments: object) -> Process:
        command = [str(runner_path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return call
