"""One shared library of what TVM compiled, our kernels and the weights they read."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc.errors import RuntimeMissingError, UsageError
from sparsecc.runtime.native import get_static_library

__all__ = ["INLINE_LIMIT", "Toolchain", "linker", "toolchain"]

#: Bytes of packed weights above which they go to a file beside the module: code reaches 2 GB of constants.
INLINE_LIMIT = 1_000_000_000

#: Any GPU since Ampere: nothing is measured here, so nothing finer is chosen.
_CUDA = {
    "kind": "cuda",
    "arch": "sm_80",
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}

#: The module's own part: the record, and our functions under the names by which TVM finds them.
_PART = """\
#include <stdint.h>
extern "C" {{
__asm__(
    ".section .rodata\\n.balign 64\\n.globl sparsecc_tvm_record\\n.hidden sparsecc_tvm_record\\n"
    "sparsecc_tvm_record:\\n{include}.byte 0\\n.previous\\n");
extern const uint64_t sparsecc_tvm_record_size;
const uint64_t sparsecc_tvm_record_size = {size};
extern const char sparsecc_tvm_record_file[];
const char sparsecc_tvm_record_file[] = "{file}";
#define FUNCTION(name)                                                                        \\
  int sparsecc_tvm_##name(void*, const void*, int32_t, void*);                                \\
  __attribute__((visibility("default"))) int __tvm_ffi_sparsecc_##name(                       \\
      void* self, const void* args, int32_t count, void* result) {{                            \\
    return sparsecc_tvm_##name(self, args, count, result);                                    \\
  }}
FUNCTION(run)
FUNCTION(prepare)
FUNCTION(signature)
}}
"""


@dataclass(frozen=True)
class Toolchain:
    """What a target needs.

    Attributes:
        compiler: a C++ compiler that links for it.
        kernels: the static library of our kernels.
        target: what TVM is told.
    """

    compiler: str
    kernels: str
    target: dict[str, Any]


def toolchain(target: str, processor: dict[str, Any]) -> Toolchain:
    """Return the tools for a target, ``cpu``, ``arm64`` or ``cuda``.

    Args:
        target: which.
        processor: what TVM is told of this machine's own.

    Raises:
        UsageError: another target.
        RuntimeMissingError: the compiler or the static library is not there.
    """
    if target == "cpu":
        compiler, wanted = os.environ.get("CXX", "c++"), processor
    elif target == "arm64":
        compiler = "aarch64-linux-gnu-g++"
        wanted = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
    elif target == "cuda":
        compiler, wanted = os.environ.get("CXX", "c++"), {**_CUDA, "host": processor}
        if shutil.which("nvcc") is None:
            raise RuntimeMissingError(
                "--emit tvm --target cuda compiles with nvcc, which is not installed: install CUDA"
            )
    else:
        raise UsageError(f"--emit tvm has no target '{target}': known are cpu, arm64, cuda")
    found = shutil.which(compiler)
    if found is None:
        raise RuntimeMissingError(
            f"--emit tvm links with {compiler}, which is not installed: apt-get install "
            + ("g++-aarch64-linux-gnu" if target == "arm64" else "g++")
        )
    return Toolchain(found, get_static_library("arm64" if target == "arm64" else "cpu"), wanted)


def linker(tools: Toolchain, record: Path, beside: str) -> Callable[..., None]:
    """Return what TVM calls with the objects it has made.

    Args:
        tools: of the target.
        record: what ``write_record`` wrote.
        beside: name of the file beside the module that will hold the record; empty: it goes into the module.
    """

    def link(output: str, objects: Sequence[str], **_: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.cc"
            include = "" if beside else f'.incbin \\"{record}\\"\\n'
            size = 0 if beside else record.stat().st_size
            part.write_text(_PART.format(include=include, size=size, file=beside))
            command = [
                tools.compiler, "-shared", "-fPIC", "-O1", "-s", "-o", output, *objects, str(part), tools.kernels,
                # Several modules, and the library for onnxruntime, may be in one process.
                "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-pthread", "-ldl",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            text = " ".join((done.stderr or "no message").split())[:300]
            raise RuntimeMissingError(f"{tools.compiler} cannot link the module: {text}")

    link.output_format = "so"  # type: ignore[attr-defined]  # TVM asks for it
    return link
