"""Models written as ONNX text, with weights given by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.ir import Model

HEADER = '<ir_version: 10, opset_import: ["": 17]>\n'


def parse_proto(text, header=HEADER, **weights):
    proto = onnx.parser.parse_model(header + text)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, array in weights.items():
        if name not in held:
            held[name] = proto.graph.initializer.add()
        held[name].CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


@pytest.fixture
def proto():
    return parse_proto


@pytest.fixture
def model():
    return lambda text, header=HEADER, **weights: Model.from_proto(parse_proto(text, header, **weights))


@pytest.fixture
def run():
    """Outputs of a model (path or Model) in onnxruntime, on one thread and without its optimizer."""
    ort = pytest.importorskip("onnxruntime")

    def run(model, feed):
        source = model.to_proto().SerializeToString() if isinstance(model, Model) else os.fspath(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feed)

    return run


@pytest.fixture(scope="session")
def data_folder():
    here = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("SPARSECC_TEST_DATA", here.parent / "shared" / "data"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models: set SPARSECC_TEST_DATA (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def real_models(data_folder, tmp_path_factory):
    """Paths of the real models, MiniLM expanded to fp32 with an external weight file."""
    paths = sorted((data_folder / "models").glob("*.onnx"))
    spec = importlib.util.spec_from_file_location("eval_dense", data_folder / "eval_dense.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("minilm")
    minilm = module.expand_minilm(str(data_folder / "models" / "minilm_l6_v2"), str(folder))
    return [*paths, Path(minilm)]
