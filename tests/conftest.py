"""Fixtures shared by all tests: where real models lie, a private cost cache, the operator library."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # the emulated ARM machine has no hypothesis
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault
    settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def _private_cost_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs of one test must not decide another."""
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and labelled data; the test is skipped where it is absent."""
    if not (DATA / "models").is_dir():
        pytest.skip(f"no real models in {DATA}; set SPARSECC_TEST_DATA to their folder")
    return DATA


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
