"""The registry: laziness, plug-ins, clashes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest

from sparsecc.errors import PassError, SpecError, UsageError
from sparsecc.pm import Pass, PassReport, Pipeline, get_pass, list_passes, pass_names


@dataclass(frozen=True)
class Guest(Pass):
    """Comes from another package.

    More text.
    """

    name: ClassVar[str] = "guest-pass"

    def run(self, model, ctx):
        return PassReport(self.name)


@pytest.fixture
def install(monkeypatch):
    """Pretend that a package ``guests`` registers entry points."""
    module = types.ModuleType("guests")
    module.Guest = Guest
    module.not_a_pass = 3
    monkeypatch.setitem(sys.modules, "guests", module)
    monkeypatch.delenv("SPARSECC_NO_PLUGINS", raising=False)

    def register(**points: str) -> None:
        group = "sparsecc.passes"
        found = [
            importlib.metadata.EntryPoint(name.replace("_", "-"), value, group)
            for name, value in points.items()
        ]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: found)

    return register


def test_built_in_passes():
    assert {"tidy", "prune-magnitude", "prune-wanda", "choose-layout", "lower-sparse"} <= set(pass_names())
    assert get_pass("tidy").name == "tidy"
    infos = {info.name: info for info in list_passes()}
    assert infos["prune-magnitude"].summary.startswith("Set the weights of smallest magnitude to zero")
    assert infos["prune-magnitude"].origin == "sparsecc"


def test_a_plug_in_joins(install):
    install(guest_pass="guests:Guest")
    assert get_pass("guest-pass") is Guest
    assert str(Pipeline.parse("tidy,guest-pass")) == "tidy,guest-pass"
    info = next(info for info in list_passes() if info.name == "guest-pass")
    assert info == ("guest-pass", "Comes from another package", "guests:Guest")


def test_plug_ins_can_be_switched_off(install, monkeypatch):
    install(guest_pass="guests:Guest")
    monkeypatch.setenv("SPARSECC_NO_PLUGINS", "1")
    assert "guest-pass" not in pass_names()
    with pytest.raises(SpecError, match="unknown pass 'guest-pass'"):
        get_pass("guest-pass")
    monkeypatch.setenv("SPARSECC_NO_PLUGINS", "0")
    assert "guest-pass" in pass_names()


def test_a_name_clash_is_an_error(install):
    install(tidy="guests:Guest")
    with pytest.raises(UsageError, match="pass 'tidy' is registered by both 'sparsecc' and 'guests:Guest'"):
        get_pass("prune-magnitude")


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("guests:not_a_pass", "is no Pass of that name"),
        ("guests:Guest", "is no Pass of that name"),
        ("guests:Absent", "cannot be imported"),
        ("absent_module:Guest", "cannot be imported"),
    ],
)
def test_a_broken_plug_in_is_named_but_hides_no_other(install, target, part):
    install(broken=target)
    with pytest.raises(PassError, match=part):
        get_pass("broken")
    infos = {info.name: info.summary for info in list_passes()}
    assert part in infos["broken"]
    assert infos["tidy"].startswith("Fold constants")


def test_naming_passes_imports_none_of_them():
    code = """
        import sys
        from sparsecc.pm import pass_names
        assert "tidy" in pass_names()
        heavy = {"onnx", "onnx_ir", "onnxruntime", "networkx", "sparsecc.passes.tidy.tidy"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
