"""Compiled loops against NumPy's: every kind of loop and result, small and odd inputs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsecc.algebra import Compressed, Dense, Tensor, einsum, evaluate, plan, tvm_codegen
from sparsecc.algebra.tvm_codegen import TvmBackend, _compiled, cuda_code, signature
from sparsecc.algebra.tvm_source import kernel_source
from sparsecc.errors import MissingExtraError, SpecError

RNG = np.random.default_rng(11)
SIZES = {"i": 13, "j": 11, "k": 7, "l": 5, "n": 3, "m": 4}


HARNESS = Path(__file__).with_name("tvm_call.cc")


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("tvm", reason="compiled loops need TVM: pip install 'sparsecc[tvm]'")
    return TvmBackend(strict=True)


def array(indices, density=0.4, dtype=np.float64):
    shape = [SIZES[index] for index in indices]
    return np.where(RNG.random(shape) < density, RNG.integers(-4, 5, shape), 0).astype(dtype)


def packed(values, form):
    found = np.argwhere(values)
    return Tensor.from_coordinates(found, values[tuple(found.T)], values.shape, form)


# Expression, formats of the sparse operands, format of the result.
CASES = [
    ("y(i) = A(i,j) * x(j)", {"A": "csr"}, None),
    ("y(i) = A(i,j) * x(j)", {"A": "dcsr", "x": "compressed"}, "compressed"),
    ("y(j) = A(i,j) * x(i)", {"A": "csr"}, None),
    ("Y(i,n) = A(i,j) * N(j,n)", {"A": "dcsr"}, None),
    ("Y(n,i) = A(i,j) * N(j,n)", {"A": "csr"}, "coo"),
    ("Y(i,n,m) = A(i,j) * N(j,n) * M(j,m)", {"A": "csr"}, None),
    ("y(n) = A(i,j) * N(j,n)", {"A": "csr"}, "compressed"),
    ("S(i,j) = A(i,j) * U(i,n) * V(n,j)", {"A": "csr"}, "csr"),
    ("S(i,j) = A(i,j) + B(i,j) - 2 * C(i,j)", {"A": "csr", "B": "csr", "C": "dcsr"}, "csr"),
    ("S(i,j) = A(i,j) * B(i,j) * C(i,j)", {"A": "dcsr", "B": "csr", "C": "coo"}, "dcsr"),
    ("S(i,j) = (A(i,j) + B(i,j)) * C(i,j)", {"A": "csr", "B": "dcsr", "C": "dcsr"}, "csr"),
    ("S(i,j) = A(i,j) + B(i,j)", {"A": "dcsr"}, None),
    ("y(i) = b(i) + A(i,j) * x(j)", {"A": "csr"}, None),
    ("y(i) = b(i) + A(i,j) * x(j)", {"A": "dcsr", "b": "compressed"}, "compressed"),
    ("y(i) = two() * A(i,j)", {"A": "csr"}, None),
    ("Y(i,k) = A(i,j) * D(j,k)", {"A": "csr", "D": "csr"}, "csr"),
    ("Y(i,k) = A(i,j) * D(j,k)", {"A": "csr", "D": "csr"}, None),
    ("Y(i,k) = E(i,k) * A(i,j) * D(j,k)", {"A": "csr", "D": "csr", "E": "csr"}, "csr"),
    ("y(i) = A(i,j) * D(j,k) * c(k)", {"A": "dcsr", "D": "dcsr"}, None),
    ("M(i,n) = T(i,j,k) * N(j,n) * K(k,n)", {"T": "csf"}, None),
    ("S(i,j) = T(i,j,k) * c(k)", {"T": "csf"}, "dcsr"),
    ("S(i,j) = T(i,j,k) * c(k)", {"T": "dense,compressed,dense", "c": "compressed"}, "dcsr"),
    ("S(i,j,n) = T(i,j,k) * K(k,n)", {"T": "csf"}, "csf"),
    ("a = T(i,j,k) * R(i,j,k)", {"T": "csf", "R": "coo"}, None),
    ("Y(i,j) = x(j) * b(i)", {}, None),
]

ARM = [CASES[at] for at in (0, 7, 8, 10, 15, 18, 19, 23)]


def operands(text, formats, zero=()):
    made = {
        "A": "ij", "B": "ij", "C": "ij", "D": "jk", "E": "ik", "T": "ijk", "R": "ijk", "U": "in", "V": "nj",
        "N": "jn", "M": "jm", "K": "kn", "x": "j" if "x(j)" in text else "i", "b": "i", "c": "k",
    }  # fmt: skip
    found = {"two": np.asarray(2.0)}
    for name, indices in made.items():
        values = array(indices) * (name not in zero)
        found[name] = packed(values, formats[name]) if name in formats else values
    return found


@pytest.mark.parametrize(("text", "formats", "form"), CASES)
def test_all_kinds_of_loops_and_results(backend, text, formats, form):
    for zero in [(), tuple(formats)[:1]]:
        given = operands(text, formats, zero)
        expected = evaluate(text, given)
        for parts in (1, 6):
            found = einsum(text, given, format=form, parts=parts, backend=backend)
            assert isinstance(found, Tensor) == (form is not None)
            np.testing.assert_array_equal(found if form is None else found.validated().to_dense(), expected)


def rows(lengths, columns=40):
    pos = np.concatenate([[0], np.cumsum(lengths)])
    crd = np.concatenate([np.sort(RNG.choice(columns, n, replace=False)) for n in lengths])
    levels = (Dense(len(lengths)), Compressed(columns, pos.astype(np.int32), crd.astype(np.int32)))
    return Tensor(
        (len(lengths), columns), (0, 1), levels, RNG.integers(1, 5, len(crd)).astype(np.float32)
    ).validated()


@pytest.mark.parametrize(
    ("first", "second"),
    [([1] * 20 + [40] + [0] * 19, [0] * 38 + [40, 1]), ([0] * 40, [40] + [0] * 39), ([0] * 40, [0] * 40)],
)
def test_giant_and_empty_rows_in_parts(backend, first, second):
    given = {"A": rows(first), "B": rows(second), "x": np.arange(40, dtype=np.float32)}
    for text, form in [
        ("y(i) = A(i,j) * x(j)", None),
        ("S(i,j) = A(i,j) + B(i,j)", "csr"),
        ("S(i,j) = A(i,j) * B(i,j)", "csr"),
    ]:
        found = einsum(text, given, format=form, parts=9, backend=backend)
        values = found if form is None else found.to_dense()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, evaluate(text, given))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_no_rows_or_columns(backend, shape):
    values = np.ones(shape)
    for form in ("csr", "dcsr"):
        given = {"A": packed(values, form), "x": np.ones(shape[1])}
        np.testing.assert_array_equal(einsum("y(i) = A(i,j) * x(j)", given, backend=backend), values.sum(1))
        found = einsum("S(i,j) = A(i,j) + A(i,j)", given, backend=backend, format="csr")
        np.testing.assert_array_equal(found.to_dense(), 2 * values)


@pytest.mark.parametrize("text", ["y(i) = A(i,j) * x(j)", "y(j) = A(i,j) * x(i)", "Y(i,k) = A(i,j) * B(k,j)"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_do_not_depend_on_threads(backend, text, dtype):
    values = np.where(RNG.random((90, 90)) < 0.3, RNG.random((90, 90)), 0).astype(dtype)
    given = {"A": packed(values, "csr"), "B": packed(values, "csc"), "x": RNG.random(90).astype(dtype)}
    once, again = (einsum(text, given, parts=23, threads=count, backend=backend) for count in (1, 3))
    assert once.dtype == dtype
    assert once.tobytes() == again.tobytes()
    np.testing.assert_allclose(once, einsum(text, given), rtol=1e-5)


def test_types(backend):
    values = array("ij")
    for dtype in (np.int32, np.int64):
        given = {"A": packed(values.astype(dtype), "csr"), "x": np.arange(11, dtype=np.int32)}
        found = einsum("y(i) = A(i,j) * x(j)", given, backend=backend)
        np.testing.assert_array_equal(found, einsum("y(i) = A(i,j) * x(j)", given), strict=True)
    fixed = np.arange(11.0)
    fixed.flags.writeable = False
    found = einsum(
        "y(i) = A(i,j) * x(j)", A=values[:, ::2], x=packed(fixed[::2], "compressed"), backend=backend
    )
    np.testing.assert_array_equal(found, values[:, ::2] @ fixed[::2])


def test_what_there_is_no_kernel_for(backend):
    given = {"A": packed(array("ij"), "csr").astype(np.complex128), "x": np.ones(11)}
    with pytest.raises(SpecError, match=r"no kernel by TVM: values of type complex128 \(only float32"):
        einsum("y(i) = A(i,j) * x(j)", given, backend=backend)
    found = einsum("y(i) = A(i,j) * x(j)", given, backend=TvmBackend())
    np.testing.assert_array_equal(found, given["A"].to_dense() @ given["x"])
    with pytest.raises(SpecError, match="a number that is not finite"):
        einsum("y(i) = 1e999 * A(i,j)", A=packed(array("ij"), "csr"), backend=backend)
    with pytest.raises(SpecError, match="unknown target 'vulkan'; known: llvm, cuda"):
        TvmBackend("vulkan")


def test_kernels_are_kept_for_other_sizes(backend):
    known = []
    for size in (5, 50):
        einsum("kept(i) = A(i,j) * x(j)", A=packed(np.eye(size), "csr"), x=np.ones(size), backend=backend)
        known.append(_compiled.cache_info().misses)
    assert known[0] == known[1]


def test_text_has_no_names_of_the_expression():
    text = "y(größe) = Matrix(größe,spalte) * x(spalte)"
    cut = plan(text, {"Matrix": packed(array("ij"), "csr"), "x": np.ones(11)}, 2)
    source = kernel_source(signature(cut, cut.nests[0], cut.phases[0][0], "dense"))
    assert source.text.isascii()
    assert "Matrix" not in source.text
    compile(source.text, "kernel", "exec")


def test_without_tvm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[tvm\]'"):
        TvmBackend()


def signatures(text, formats, form, target):
    """Of every kernel of an expression."""
    cut = plan(text, operands(text, formats), 5, output=form)
    return [
        signature(cut, nest, phase, mode, target)
        for nest, phases in zip(cut.nests, cut.phases, strict=True)
        for phase in phases
        if any(len(term.indices) - 1 in phase.loops for term in nest.terms)
        for mode in (("dense",) if form is None else ("count", "fill"))
    ]


@pytest.fixture(scope="module")
def cuda_text():
    """All kernels in one file."""
    pytest.importorskip("tvm", reason="compiled loops need TVM: pip install 'sparsecc[tvm]'")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the code is not compiled")
    every = [sign for case in CASES for sign in signatures(*case, "cuda")]
    head, kernels = "", []
    for number, sign in enumerate(every):
        head, word, code = cuda_code(sign).partition('extern "C"')
        assert "blockIdx.x" in code
        assert "64_0_ptr[64];" in code  # variables are the thread's own
        kernels.append(word + code.replace("kernel_kernel", f"kernel_{number}"))
    return head + "\n".join(kernels), len(every)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_cuda_code_of_every_kind_of_expression_compiles(cuda_text, tmp_path, arch):
    text, count = cuda_text
    (tmp_path / "kernels.cu").write_text(text)
    command = ["nvcc", "-cubin", f"-arch={arch}", "kernels.cu", "-o", "kernels.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"kernel_{count - 1}".encode() in (tmp_path / "kernels.cubin").read_bytes()


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory):
    """Compiles a kernel for 64-bit ARM; the function runs it on an emulated machine."""
    tvm = pytest.importorskip("tvm", reason="compiled loops need TVM: pip install 'sparsecc[tvm]'")
    missing = [
        name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64-static") if shutil.which(name) is None
    ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} are not installed: nothing was linked for ARM")
    folder = tmp_path_factory.mktemp("arm")
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    known = {}

    def compiled(sign):
        if sign not in known:
            source = kernel_source(sign)
            program = folder / f"kernel{len(known)}"
            tvm_codegen._built(source, target).mod.write_to_file(f"{program}.o", "o")
            command = [
                "aarch64-linux-gnu-g++",
                "-static",
                "-O1",
                str(HARNESS),
                f"{program}.o",
                "-o",
                str(program),
            ]
            subprocess.run(command, check=True)
            known[sign] = (lambda *arguments: run(program, arguments)), source.parameters
        return known[sign]

    def run(program, arguments):
        described = b""
        for item in arguments:
            data = item.tobytes() if isinstance(item, np.ndarray) else b""
            number = len(item) if data else int(item)
            kind = {"f": 2, "i": 0}[item.dtype.kind] if data else -1
            bits = 8 * item.itemsize if data else 0
            described += np.array([kind, bits, number], np.int64).tobytes() + data
        (folder / "in").write_bytes(described)
        command = ["qemu-aarch64-static", str(program), str(folder / "in"), str(folder / "out")]
        subprocess.run(command, check=True, timeout=60)
        computed = (folder / "out").read_bytes()
        for item in arguments:
            if isinstance(item, np.ndarray):
                item[:] = np.frombuffer(computed[: item.nbytes], item.dtype)
                computed = computed[item.nbytes :]

    return compiled


@pytest.mark.parametrize(("text", "formats", "form"), ARM)
def test_code_for_arm_computes_the_same(on_arm, monkeypatch, text, formats, form):
    monkeypatch.setattr(tvm_codegen, "_compiled", on_arm)
    given = operands(text, formats)
    found = einsum(text, given, format=form, parts=4, backend=TvmBackend(strict=True))
    values = found.validated().to_dense() if isinstance(found, Tensor) else found
    np.testing.assert_array_equal(values, evaluate(text, given))


@pytest.mark.parametrize(("text", "formats", "form"), CASES)
def test_cuda_computes_the_same(text, formats, form):
    tvm = pytest.importorskip("tvm", reason="compiled loops need TVM: pip install 'sparsecc[tvm]'")
    if not tvm.cuda(0).exist:
        pytest.skip("no CUDA device")
    given = operands(text, formats)
    found = einsum(text, given, format=form, parts=200, backend=TvmBackend("cuda", strict=True))
    np.testing.assert_array_equal(found if form is None else found.to_dense(), evaluate(text, given))
