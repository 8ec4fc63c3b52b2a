"""Passes by name. Nothing is imported before it is asked for, so that ``--help`` stays quick.

Built-in passes stand in the table ``LOADERS`` of ``sparsecc.passes``. Other packages add theirs through the
entry point group ``sparsecc.passes`` (name = pass name, value = ``module:Class``); ``SPARSECC_NO_PLUGINS=1``
ignores them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sparsecc.errors import PassError, SparseccError, SpecError, UsageError
from sparsecc.pm.base import Pass, summary_of
from sparsecc.target.spec import suggestion

__all__ = ["ENTRY_POINT_GROUP", "PassInfo", "get_pass", "list_passes", "pass_names"]


ENTRY_POINT_GROUP = "sparsecc.passes"
_BUILT_IN = "sparsecc"


class PassInfo(NamedTuple):
    """One line of the list of passes; ``origin`` is the distribution that provides the pass."""

    name: str
    summary: str
    origin: str


@dataclass(frozen=True)
class _Loader:
    origin: str
    load: Callable[[], object]


def pass_names() -> list[str]:
    """Return the registered names, sorted, importing none of the passes."""
    return sorted(_loaders())


def get_pass(name: str) -> type[Pass]:
    """Return the pass class registered under ``name``.

    Raises:
        SpecError: no such pass; the message lists the known ones.
        UsageError: two distributions register the same name.
        PassError: the registered object cannot be imported or is not a pass of that name.
    """
    loaders = _loaders()
    if name not in loaders:
        known = ", ".join(sorted(loaders))
        raise SpecError(f"unknown pass '{name}'{suggestion(name, loaders)}; known: {known}")
    return _load(name, loaders[name])


def list_passes() -> list[PassInfo]:
    """Return all passes by name; one that cannot be imported shows the reason in place of its summary."""
    infos = []
    for name, loader in sorted(_loaders().items()):
        try:
            summary = summary_of(_load(name, loader))
        except SparseccError as error:
            summary = f"cannot be loaded: {error}"
        infos.append(PassInfo(name, summary, loader.origin))
    return infos


def _load(name: str, loader: _Loader) -> type[Pass]:
    try:
        loaded = loader.load()
    except Exception as error:  # a plugin may raise anything while it is imported
        raise PassError(
            f"pass '{name}' of '{loader.origin}' cannot be imported ({type(error).__name__}: {error}); "
            f"repair or uninstall '{loader.origin}'"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and loaded.name == name):
        raise PassError(
            f"'{loader.origin}' registers as pass '{name}' {loaded!r}, which is no Pass of that name; "
            f"set SPARSECC_NO_PLUGINS=1 or repair '{loader.origin}'"
        )
    return loaded


def _loaders() -> dict[str, _Loader]:
    table: dict[str, str] = importlib.import_module("sparsecc.passes").LOADERS
    loaders = {name: _Loader(_BUILT_IN, _importer(path)) for name, path in table.items()}
    if os.environ.get("SPARSECC_NO_PLUGINS", "0") not in ("", "0"):
        return loaders
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        origin = point.dist.name if point.dist is not None else point.value
        if point.name in loaders:
            raise UsageError(
                f"pass '{point.name}' is registered by both '{loaders[point.name].origin}' and '{origin}'; "
                "uninstall one, or set SPARSECC_NO_PLUGINS=1"
            )
        loaders[point.name] = _Loader(origin, point.load)
    return loaders


def _importer(path: str) -> Callable[[], object]:
    module, _, attribute = path.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)
