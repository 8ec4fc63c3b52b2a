"""The library shows the world only what it means to."""

from __future__ import annotations

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
