"""Small models on disk, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc.cli.main import run

MLP = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[batch, 64] x) => (float[batch, 32] y) <float[64, 128] w1, float[128] b1, float[128, 32] w2> {
    [fc1] h = MatMul(x, w1)
    [bias1] hb = Add(h, b1)
    [relu] a = Relu(hb)
    [fc2] y = MatMul(a, w2)
}"""


class Result(NamedTuple):
    """What one run of the command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def sparsecc(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def mlp_proto(sparsity: float = 0.0, block: int = 1) -> onnx.ModelProto:
    """Two linear layers with zeros in blocks of ``block`` outputs."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP)
    for name, shape in (("w1", (64, 128)), ("b1", (128,)), ("w2", (128, 32))):
        array = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            mask = rng.random((shape[0], shape[1] // block)) >= sparsity
            array *= np.repeat(mask, block, axis=1)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """A dense model file."""
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp_proto(), path)
    return path


@pytest.fixture
def sparse_mlp(tmp_path: Path) -> Path:
    """A model file whose weights are 80 % zeros in 16x1 blocks."""
    path = tmp_path / "sparse_mlp.onnx"
    onnx.save(mlp_proto(0.8, 16), path)
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model large enough for smaller forms to pay: weights of falling spectra."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP.replace("64", "512").replace("128", "768").replace("32]", "256]"))
    for name, shape in (("w1", (512, 768)), ("b1", (768,)), ("w2", (768, 256))):
        array = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))
        if len(shape) == 2:
            left, values, right = np.linalg.svd(array, full_matrices=False)
            array = ((left * values * 0.97 ** np.arange(len(values))) @ right).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    path = tmp_path / "wide.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32))
    return path
