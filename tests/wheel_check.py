"""Build the wheel, install it into a fresh environment and use it away from the checkout.

Twice: as usual, and built without a compiler (``-Cwheel.cmake=false``), which must still compress. Run by
``make wheel-test``; not a pytest file because it needs its own environments.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "digits_cnn" / "digits_cnn.onnx"

#: Runs inside the fresh environment: compress, run without the library, and with it where it was built.
CHECK = """
import sys, numpy, onnxruntime, sparsecc
from pathlib import Path
model, has_library = sys.argv[1], sys.argv[2] == "native"
assert "site-packages" in sparsecc.__file__, sparsecc.__file__
import sparsecc.passes, sparsecc.runtime
assert Path(sparsecc.__file__).parent.joinpath("report", "templates", "page.html.j2").exists()
result = sparsecc.optimize(model, "out.onnx", pattern="2:4", keep_slower=has_library,
                           standard_ops_only=not has_library, threads=1)
session = onnxruntime.InferenceSession("out.onnx")
name = session.get_inputs()[0].name
x = numpy.random.default_rng(0).random((2, 1, 8, 8), dtype=numpy.float32)
plain = session.run(None, {name: x})[0]
if has_library:
    fast = sparsecc.runtime.load("out.onnx").run(None, {name: x})[0]
    numpy.testing.assert_allclose(fast, plain, rtol=1e-3, atol=1e-4)
    assert any(site.layout != "dense" for site in result.sites)
else:
    try:
        sparsecc.get_library_path()
    except sparsecc.errors.RuntimeMissingError:
        pass
    else:
        raise AssertionError("a wheel without the library found one")
print("wheel ok:", sys.argv[2], result.output.stat().st_size, "bytes")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command, loudly, and fail with it."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def check(kind: str, *build_options: str) -> None:
    """Build one wheel, install it and run ``CHECK`` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            *build_options,
            "-w",
            work,
            ROOT,
            cwd=work,
        )
        (wheel,) = work.glob("*.whl")
        assert "-py3-none-" in wheel.name, wheel.name
        run(sys.executable, "-m", "venv", work / "env", cwd=work)
        python = work / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=work)
        run(python, "-c", CHECK, MODEL, kind, cwd=work)
        command = work / "env" / "bin" / "sparsecc"
        run(command, "inspect", "out.onnx", cwd=work)
        if kind == "native":
            run(
                command,
                "bundle",
                "out.onnx",
                "--target",
                f"{platform.machine()}-linux",
                "-o",
                "device",
                cwd=work,
            )
            run(python, "device/examples/run_model.py", cwd=work)
            run(work / "device" / "bin" / "sparsecc-run", "--version", cwd=work)
            run(command, "ops", "path", "--cmake", cwd=work)


if __name__ == "__main__":
    check("native")
    check("pure", "-Cwheel.cmake=false")
