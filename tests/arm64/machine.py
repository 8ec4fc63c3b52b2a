"""A 64-bit ARM machine in a folder: Debian's arm64 Python under qemu, with wheels for that machine.

Nothing is installed on this system except, where it is Debian and we are root, the cross compiler and qemu. All
that is downloaded stays under ``build/arm64``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "MissingError",
    "build_library",
    "build_static_program",
    "more_wheels",
    "prepare",
    "program",
    "python",
    "tools",
]

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "arm64"

#: Commands and the Debian packages that bring them.
TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64-static": "qemu-user-static"}
PACKAGES = ("python3", "libstdc++6")
#: What the tests import there. Newer versions of onnxruntime crash under qemu 7.
WHEELS = ("numpy", "onnx", "onnx-ir", "onnxruntime>=1.18,<=1.24.4", "pytest", "click", "rich", "networkx")
PLATFORMS = (
    "manylinux2014_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_28_aarch64",
)


class MissingError(Exception):
    """Something that is needed is not here and cannot be had; the text says what."""


def _run(*command: str | Path) -> str:
    """Run a command and return what it prints; raises ``MissingError`` with the end of that if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise MissingError(f"`{Path(command[0]).name}` failed: {lines[-1]}")
    return done.stdout


def tools() -> None:
    """See that cross compiler and emulator are there; as root on Debian install them.

    Raises:
        MissingError: they are not; the text says what to install.
    """
    missing = [package for command, package in TOOLS.items() if shutil.which(command) is None]
    if not missing:
        return
    hint = f"install {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingError(hint)
    try:
        _run("apt-get", "update")
        _run("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    except MissingError as error:
        raise MissingError(f"{hint} ({error})") from error


def _cmake() -> str:
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else "cmake"


def build_library() -> Path:
    """Cross-compile the operator library and the runner; return the library's file.

    Stripped they lie in ``runtime/aarch64-linux``, where ``sparsecc`` finds them.
    """
    command = _cmake()
    folder = WORK / "library"
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "SPARSECC_WERROR": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([command, "-S", str(ROOT / "runtime"), "-B", str(folder), *definitions], check=True)
    subprocess.run([command, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)
    installed = ROOT / "runtime" / "aarch64-linux"
    subprocess.run([command, "--install", str(folder), "--prefix", str(installed), "--strip"], check=True)
    return installed / "lib" / "libsparsecc_ops.so"


def build_static_program(folder: Path) -> Path:
    """Compile ``static_link.cc`` with the library's archive into a program without shared libraries; return it."""
    work, program = WORK / "library", folder / "static_link"
    subprocess.run([_cmake(), "--build", str(work), "--target", "sparsecc_ops_static"], check=True)
    source = Path(__file__).with_name("static_link.cc")
    include = ROOT / "runtime" / "csrc" / "include"
    words = ["aarch64-linux-gnu-g++", "-std=c++20", "-Wall", "-static", "-I", include, source]
    subprocess.run([*map(str, words), str(work / "libsparsecc_ops.a"), "-o", str(program)], check=True)
    return program


def _unpack_debian(folder: Path) -> None:
    """Put Debian's arm64 Python and what it depends on into ``folder``, with a private state of apt."""
    state = WORK / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").write_text("")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Debug::NoLocking": "1",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run("apt-get", *options, "update")
    _run(
        "apt-get", *options, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES
    )  # fmt: skip
    archives = sorted((state / "archives").glob("*.deb"))
    if not archives:
        raise MissingError("apt-get found no packages for arm64")
    for archive in archives:
        _run("dpkg-deb", "--extract", archive, folder)


def _unpack_wheels(version: str, folder: Path, names: Sequence[str] = WHEELS) -> None:
    """Put the wheels for that version of Python into ``folder``."""
    cache = WORK / "wheels" / folder.name
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--dest", cache, "--only-binary=:all:",
        "--python-version", version, *platforms, *names,
    )  # fmt: skip
    for wheel in sorted(cache.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def prepare() -> None:
    """Make the machine, once for each list of packages.

    Raises:
        MissingError: it cannot be made, for instance without a network.
    """
    wanted = hashlib.sha256(repr((PACKAGES, WHEELS, PLATFORMS)).encode()).hexdigest()
    stamp = WORK / "prepared"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    for name in ("root", "site", "apt", "wheels"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    _unpack_debian(WORK / "root")
    _unpack_wheels(_version(), WORK / "site")
    stamp.write_text(wanted)


def _version() -> str:
    """The version of Python on the machine, such as 3.11."""
    found = re.fullmatch(r"python(\d+\.\d+)", (WORK / "root/usr/bin/python3").readlink().name)
    if found is None:
        raise MissingError("Debian's python3 is not a link to a version of it")
    return found[1]


def more_wheels(name: str, version: str) -> Path:
    """A folder with the wheels of one more package, of just that version, and what it needs.

    Raises:
        MissingError: they cannot be had.
    """
    folder = WORK / f"{name}-{version}"
    if not folder.exists():
        _unpack_wheels(_version(), folder, [f"{name}=={version}"])
    return folder


def python(
    arguments: Sequence[str | Path], *, cpu: str, library: Path, **variables: str
) -> subprocess.Popen[str]:
    """Start Python on the machine, with the checkout and the library to use, on a kind of processor."""
    path = os.pathsep.join(str(part) for part in (ROOT, WORK / "site"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPARSECC_"))},
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "SPARSECC_OPS_LIBRARY": str(library),
        **variables,
    }
    return _start([WORK / "root" / "usr" / "bin" / "python3", *arguments], cpu, environment)


def program(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
    """Start a program that was built for the machine, with the onnxruntime of its Python, on the best processor."""
    (onnxruntime,) = (WORK / "site" / "onnxruntime" / "capi").glob("libonnxruntime.so.*")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPARSECC_")}
    return _start(arguments, "max", {**environment, "SPARSECC_ONNXRUNTIME": str(onnxruntime)})


def _start(arguments: Sequence[str | Path], cpu: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = ["qemu-aarch64-static", "-cpu", cpu, "-L", WORK / "root", *arguments]
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
