"""Cross-compile the library for ARM, run all kernel tests and whole models on an emulated machine.

Run by ``make test-arm64``; not a pytest file because it needs another machine. Where the tools or downloads are
not to be had it says so and ends well: a machine without a network can still run everything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import onnxruntime
from modules import run_modules

import sparsecc
from sparsecc import bundle, runtime

ROOT = machine.ROOT
TESTS = ROOT / "tests" / "runtime"
#: Pytest runs, two at a time: kinds of processor that have more and more, and all kernels on the best of them.
RUNS = (
    ("max", "test_int8.py", "test_planes.py", "test_unequal_threads.py"),
    ("max", "test_kernels.py", "test_recurrent.py", "test_transformer.py"),
    ("max", "test_algebra_backend.py"),
    ("cortex-a72", "test_kernels.py", "test_int8.py", "-k", "isas or every_isa"),
    ("neoverse-n1", "test_kernels.py", "test_int8.py", "-k", "isas or every_isa"),
)
ISAS = ("neon_i8mm", "neon_dotprod", "neon", "generic")
#: fp32 sums differ in their order; a byte of x may be rounded the other way after that.
TOLERANCE = {"fp32": "1e-5", "int8": "2e-2"}


def run_tests(library: Path) -> bool:
    """Run the kernel tests; return whether all passed."""
    waiting, passed = list(RUNS), True
    running = []
    while waiting or running:
        while waiting and len(running) < 2:
            cpu, *arguments = waiting.pop(0)
            files = [str(TESTS / name) if name.endswith(".py") else name for name in arguments]
            command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *files]
            running.append((cpu, arguments, machine.python(command, cpu=cpu, library=library)))
        cpu, arguments, process = running.pop(0)
        text, _ = process.communicate()
        passed &= process.returncode == 0
        lines = text.strip().splitlines()
        print(f"{cpu}: {' '.join(arguments)}: {lines[-1] if lines else 'no output'}", flush=True)
        if process.returncode:
            print(text, flush=True)
    return passed


def examples(name: str, model: Path) -> np.ndarray:
    """Inputs for a model."""
    if name == "digits_cnn":
        with np.load(ROOT / "models" / name / "test.npz") as arrays:
            return (arrays["images"][:200, None] / np.float32(16)).astype(np.float32)
    (shape,) = (item.shape for item in onnxruntime.InferenceSession(model).get_inputs())
    return np.random.default_rng(0).random((1, *shape[1:]), dtype=np.float32)


def run_models(library: Path, folder: Path) -> bool:
    """Compress models here, run them here and there, and compare; return whether all agreed."""
    models = {"digits_cnn": ROOT / "models" / "digits_cnn" / "digits_cnn_sparse16x1.onnx"}
    data = Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    resnet = data / "models" / "resnet20_cifar10.onnx"
    if resnet.exists():
        models["resnet20_cifar10"] = resnet
    else:
        print("resnet20_cifar10 skipped: no folder of real models")
    agreed = True
    for name, model in models.items():
        for kind in TOLERANCE:
            quantize = None if kind == "fp32" else "int8"
            small, arrays = folder / f"{name}_{kind}.onnx", folder / f"{name}_{kind}.npz"
            result = sparsecc.optimize(
                model, small, pattern="16x1" if kind == "fp32" else "16x4", sparsity=0.5,
                quantize=quantize, keep_slower=True, threads=1,
            )  # fmt: skip
            layouts = sorted({site.layout for site in result.sites if site.layout != "dense"})
            assert layouts, f"nothing of {name} was lowered"
            x = examples(name, model)
            session = runtime.load(small, threads=1)
            y = session.run(None, {session.get_inputs()[0].name: x})[0]
            np.savez(arrays, input=x, output=y)
            for isa in ISAS if name == "digits_cnn" else ISAS[:1]:
                command = [ROOT / "tests" / "arm64" / "run_model.py", small, arrays, TOLERANCE[kind]]
                process = machine.python(command, cpu="max", library=library, SPARSECC_ISA=isa)
                text, _ = process.communicate()
                agreed &= process.returncode == 0
                if process.returncode:
                    print(text)
                print(
                    f"{name} {kind} {' '.join(layouts)}, SPARSECC_ISA={isa}: {text.strip().splitlines()[-1]}",
                    flush=True,
                )
    return agreed


def run_bundle(folder: Path) -> bool:
    """Bundle a model for that machine, run it there without Python and by the bundle's example; return whether both
    gave what this machine gives.
    """
    source = ROOT / "models" / "digits_cnn" / "digits_cnn_sparse16x1.onnx"
    model, out = folder / "bundled.onnx", folder / "bundle"
    sparsecc.optimize(source, model, keep_slower=True, threads=1)
    bundle.make_bundle(model, out, triple="aarch64-linux")
    x = examples("digits_cnn", model)
    np.save(folder / "x.npy", x)
    session = runtime.load(model, threads=1)
    (name,) = (item.name for item in session.get_inputs())
    expected = session.run(None, {name: x})[0]
    there = Path(f"model/{model.name}")
    runs = {
        "run": machine.program(
            [out / "bin" / "sparsecc-run", out / there, "--input", folder / "x.npy", "--output", folder / "run.npy",
             "--repeat", "2", "--threads", "1"]
        ),
        "example": machine.python(
            [out / "examples" / "run_model.py", "--input", f"{name}={folder / 'x.npy'}",
             "--output", f"{session.get_outputs()[0].name}={folder / 'example.npy'}", "--threads", "1"],
            cpu="max", library=out / "lib" / "libsparsecc_ops.so",
        ),
    }  # fmt: skip
    agreed = True
    for what, process in runs.items():
        text, _ = process.communicate()
        y = np.load(folder / f"{what}.npy") if process.returncode == 0 else np.full_like(expected, np.inf)
        difference = float(np.abs(y - expected).max() / np.abs(expected).max())
        agreed &= difference <= float(TOLERANCE["fp32"])
        print(
            f"bundle, {what}: largest difference {difference:.1e}; {text.strip().splitlines()[-1:]}",
            flush=True,
        )
    return agreed


def run_static(folder: Path) -> bool:
    """Link the library into a program of one file and run it there; return whether it ran."""
    text, _ = machine.program([machine.build_static_program(folder)]).communicate()
    print(f"one file with the archive: {text.strip()}", flush=True)
    return text == f"{sparsecc.__version__}, neon generic, 42\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-only", action="store_true", help="cross-compile the library and stop")
    options = parser.parse_args()
    try:
        machine.tools()
        library = machine.build_library()
        if options.build_only:
            print(library.relative_to(ROOT))
            return 0
        machine.prepare()
    except machine.MissingError as error:
        print(f"SKIPPED: nothing was tested on ARM: {error}", file=sys.stderr)
        return 1 if options.build_only else 0
    begin = time.monotonic()
    passed = run_tests(library)
    with tempfile.TemporaryDirectory() as folder:
        passed &= run_models(library, Path(folder))
        passed &= run_bundle(Path(folder))
        passed &= run_static(Path(folder))
        passed &= run_modules(Path(folder), library)
    print(f"ARM: {'passed' if passed else 'FAILED'} after {time.monotonic() - begin:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
