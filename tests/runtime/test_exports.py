"""The library shows the world only what it means to."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from sparsecc import runtime


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_only_the_wanted_symbols_are_exported() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", runtime.get_library_path()], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    wanted = re.compile(r"sparsecc_\w+|RegisterCustomOps|SparseccRegisterCustomOps")
    extra = {name for name in names if not wanted.fullmatch(name)}
    assert {
        "RegisterCustomOps",
        "SparseccRegisterCustomOps",
        "sparsecc_matmul_run",
        "sparsecc_conv_run",
    } <= names
    assert not extra


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_loading_the_library_runs_none_of_its_code() -> None:
    """Programs on small devices load it at start: the compiler's own entry is all that may run then."""
    listing = subprocess.run(
        ["readelf", "--section-headers", "--wide", runtime.get_library_path()],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    sizes = dict(re.findall(r"\] (\.init_array|\.ctors)\s+\S+\s+\S+\s+\S+\s+(\S+)", listing))
    assert sizes.pop(".init_array") == "000008"
    assert not sizes


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has tile registers")
def test_products_of_tiles_are_instructions() -> None:
    """Tests run the same kernels on emulated tile registers; this is what is left to ask of the real ones."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", runtime.get_library_path()],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = set(re.findall(r"^\s*[0-9a-f]+:\s+(\w*tile\w*|tdp\w+)\s", listing, re.MULTILINE))
    assert found == {
        "ldtilecfg",
        "tilerelease",
        "tilezero",
        "tileloadd",
        "tilestored",
        "tdpbsud",
        "tdpbf16ps",
    }
