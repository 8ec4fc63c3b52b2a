"""``--emit tvm``: what onnxruntime computes with and without the library, a module of TVM computes too."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import onnx.parser
import pytest

from sparsecc import optimize, verify
from sparsecc.cli.main import run
from sparsecc.errors import (
    MissingExtraError,
    ModelError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from sparsecc.ir import Model
from sparsecc.runtime.tvm_module import TvmModule, is_tvm_module
from sparsecc.tvm import compile_model
from sparsecc.tvm.prepare import NODE, prepare

_REASON = "modules of TVM need it: pip install 'sparsecc[tvm]'"


def _model(text: str, seed: int = 0, **weights: tuple[int, ...]) -> Model:
    """A graph in ONNX's text form with random weights, half of which are zero in blocks of 16 outputs."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            array[..., ::2] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


@pytest.fixture(scope="module")
def perceptron() -> Model:
    text = """
    m (float[n, 48] x) => (float[n, 10] y) {
        h = MatMul (x, w1)  a = Add (h, b1)  r = Relu (a)  z = MatMul (r, w2)  y = Softmax <axis = -1> (z)
    }"""
    return _model(text, w1=(48, 64), b1=(64,), w2=(64, 10))


@pytest.fixture(scope="module")
def compiled(perceptron, tmp_path_factory):
    pytest.importorskip("tvm", reason=_REASON)
    path = tmp_path_factory.mktemp("tvm") / "mlp.so"
    return compile_model(perceptron, path, input_shapes={"x": (3, 48)})


def test_heavy_operators_become_kernels_and_the_rest_stays(perceptron):
    prepared = prepare(perceptron, {"x": (3, 48)})
    assert [item.record.op for item in prepared.kernels] == ["BlockSparseMatMulRelu", "BlockSparseMatMul"]
    assert [node.op_type for node in prepared.model.onnx.graph] == [NODE, NODE, "Softmax"]
    assert not prepared.model.onnx.functions
    assert len(perceptron.onnx.graph) == 5  # as it was


def test_outputs_agree(compiled, perceptron):
    inputs = verify.make_inputs(perceptron, None, 7, {"x": (3, 48)})
    wanted = verify.session(perceptron).run(inputs)["y"]
    module = TvmModule(compiled.path)
    assert (module.input_names, module.output_names) == (["x"], ["y"])
    np.testing.assert_allclose(module.run(inputs)["y"], wanted, rtol=1e-5, atol=1e-6)
    assert (compiled.kernels, compiled.shapes, compiled.weights) == (2, {"x": (3, 48)}, None)


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(compiled, tmp_path):
    path = tmp_path / "m.so"
    shutil.copy(compiled.path, path)
    TvmModule(path)
    path.unlink()
    path.write_bytes(compiled.path.read_bytes() + b"more")
    with pytest.raises(UsageError, match="has changed since this process loaded it"):
        TvmModule(path)


def test_loops_are_ordered_for_vectors():
    """Rows of a product beside columns in a vector, and what follows a convolution row by row."""
    pytest.importorskip("tvm", reason=_REASON)
    from sparsecc.tvm import schedule
    from sparsecc.tvm.importer import import_model

    text = """m (float[1, 2, 8, 16] a, float[1, 2, 16, 8] b) => (float[1, 2, 8, 8] y) {
        p = MatMul (a, b)  r = Relu (p)  y = Conv <pads = [1, 1, 1, 1], group = 2> (r, w)
    }"""
    module = import_model(prepare(_model(text, w=(2, 1, 3, 3))))
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline

    target = tvm.target.Target("llvm")
    with target:
        module = tvm.transform.Sequential(pipeline.legalize_passes(target))(module)
    ordered = {
        name.name_hint: schedule._ordered(function).script()
        for name, function in module.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    assert all("T.vectorized(T.int64(8))" in script for script in ordered.values()), ordered
    assert any("conv" in name for name in ordered)
    assert any("matmul" in name for name in ordered)


def test_another_shape_is_refused(compiled):
    with pytest.raises(UsageError, match=r"compiled for float32 \[3, 48\]"):
        TvmModule(compiled.path).run({"x": np.zeros((4, 48), np.float32)})


def test_weights_beside_the_module(perceptron, tmp_path, monkeypatch):
    pytest.importorskip("tvm", reason=_REASON)
    made = compile_model(perceptron, tmp_path / "m.so", inline_limit=0)
    assert made.weights == tmp_path / "m.so.weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.so", "m.so.weights"]
    monkeypatch.chdir(tmp_path.parent)  # found by where the module lies
    inputs = verify.make_inputs(perceptron, None, 1, made.shapes)
    TvmModule(made.path).run(inputs)
    (other := tmp_path / "other").mkdir()
    shutil.copy(made.path, other)
    with pytest.raises(ModelError, match="weights that belong beside"):
        TvmModule(other / "m.so")
    (other / "m.so.weights").write_bytes(made.weights.read_bytes()[:200])
    (third := tmp_path / "third").mkdir()
    for name in ("m.so", "m.so.weights"):
        shutil.copy(other / name, third)
    with pytest.raises(ModelError, match="cut off or of another release"):
        TvmModule(third / "m.so")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (
            """m (float[1, 8, 9, 9] x) => (float[1, 5] y) {
                c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (c)
                d = Conv <pads = [1, 1, 1, 1], group = 16> (r, w2)  k = HardSwish (d)
                t = Transpose <perm = [0, 1, 3, 2]> (r)  m = MatMul (k, t)  n = Erf (m)
                s = Add (n, r)  p = GlobalAveragePool (s)  f = Flatten (p)  y = MatMul (f, w3)
            }""",
            {"w1": (16, 8, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (16, 5)},
        ),
        (
            """m (float[4, 1, 12] x) => (float[4, 1, 1, 16] y, float[1, 1, 16] h) {
                y, h = GRU <hidden_size = 16, linear_before_reset = 1> (x, w, r)
            }""",
            {"w": (1, 48, 12), "r": (1, 48, 16)},
        ),
    ],
    ids=["convolutions", "recurrent"],
)
def test_kinds_of_models_agree(text, weights, tmp_path):
    pytest.importorskip("tvm", reason=_REASON)
    made = compile_model(_model(text, **weights), tmp_path / "m.so")  # compares the outputs itself
    assert made.kernels >= 1
    assert made.rel_l2 < 1e-5


def test_a_transformer_agrees_with_and_without_the_library(root, tmp_path, monkeypatch):
    pytest.importorskip("tvm", reason=_REASON)
    monkeypatch.syspath_prepend(str(root / "models"))
    import zoo

    sizes = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "vocabulary": 50, "positions": 16}
    model = Model.from_proto(zoo.build("bert_base", seq=8, pattern="16x1", sparsity=0.5, **sizes))
    made = compile_model(model, tmp_path / "m.so")
    assert made.kernels >= 6
    inputs = verify.make_inputs(model, None, 3)
    found = TvmModule(made.path).run(inputs)
    for library in (True, False):
        for name, wanted in verify.session(model, library=library).run(inputs).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_indices_outside_a_table_read_inside_it(tmp_path):
    pytest.importorskip("tvm", reason=_REASON)
    model = _model("m (int64[3] i) => (float[3, 4] y) { y = Gather (t, i) }", t=(5, 4))
    made = compile_model(model, tmp_path / "m.so")
    table = model.onnx.graph.initializers["t"].const_value.numpy()
    found = TvmModule(made.path).run({"i": np.array([-1, 1 << 40, 2])})["y"]
    np.testing.assert_array_equal(found, table[[4, 4, 2]])


def test_operators_that_the_importer_lacks_are_named(tmp_path):
    pytest.importorskip("tvm", reason=_REASON)
    model = _model("m (float[8] x) => (float[8] y) { h = Celu (x)  y = Abs (h) }")
    with pytest.raises(UnsupportedModelError, match="importer has no Celu: leave out --emit tvm"):
        compile_model(model, tmp_path / "m.so")
    assert not list(tmp_path.iterdir())


def test_cuda_takes_standard_operators(perceptron, tmp_path):
    """Compiled by nvcc; nothing here could run it. Its twin for this machine is compared."""
    tvm = pytest.importorskip("tvm", reason=_REASON)
    if shutil.which("nvcc") is None:
        pytest.skip("code for CUDA is compiled by nvcc, which is not installed")
    small = tmp_path / "small.onnx"
    optimize(_saved(perceptron, tmp_path), small, keep_slower=True, threads=1)
    assert any(node.domain == "ai.sparsecc" for node in Model.load(small).onnx.graph)
    made = compile_model(Model.load(small), tmp_path / "m.so", target="cuda", input_shapes={"x": (3, 48)})
    assert made.kernels == 0
    assert made.rel_l2 < 1e-5
    if not tvm.cuda(0).exist:
        with pytest.raises((RuntimeMissingError, ModelError)):
            TvmModule(made.path)


def _saved(model: Model, folder) -> str:
    model.save(folder / "in.onnx")
    return str(folder / "in.onnx")


def test_a_library_that_is_no_module(root):
    pytest.importorskip("tvm", reason=_REASON)
    library = root / "runtime" / "lib" / "libsparsecc_ops.so"
    assert is_tvm_module(library)
    assert not is_tvm_module(root / "README.md")
    with pytest.raises(ModelError, match="TVM cannot load it"):
        TvmModule(library)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [(("-o", "m.onnx"), 2, "ends in .so"), (("-o", "m.so", "--target", "riscv"), 2, "riscv")],
)
def test_bad_arguments_are_found_before_the_slow_part(
    arguments, code, text, perceptron, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tvm", reason=_REASON)
    monkeypatch.chdir(tmp_path)
    perceptron.save("in.onnx")
    assert run(["optimize", "in.onnx", "--emit", "tvm", *arguments]) == code
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_command_line(tmp_path, perceptron, capsys):
    pytest.importorskip("tvm", reason=_REASON)
    source, module = str(tmp_path / "in.onnx"), str(tmp_path / "m.so")
    perceptron.save(source)
    assert run(["optimize", source, "-o", module, "--emit", "tvm", "--threads", "1", "-O0"]) == 0
    assert "2 nodes on our kernels" in capsys.readouterr().out
    assert run(["verify", source, module]) == 0
    assert run(["benchmark", source, module, "--seconds", "0.1", "--threads", "1"]) == 0
    assert "m.so" in capsys.readouterr().out


def test_without_tvm_the_extra_is_named(monkeypatch, tmp_path, perceptron):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[tvm\]'"):
        compile_model(perceptron, tmp_path / "m.so")
    module = tmp_path / "n.so"
    module.write_bytes(b"\x7fELF")
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[tvm\]'"):
        verify.runner(module)
