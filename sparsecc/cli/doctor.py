"""``sparsecc doctor``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

import sparsecc
from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]

_REQUIRED = ("onnx", "onnxruntime", "onnx-ir", "onnx-graphsurgeon", "numpy", "networkx", "click", "rich")
_OPTIONAL = {"apache-tvm": "tvm", "jinja2": "report"}


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check this installation: packages, operator library, instruction sets. Exit code 6 if something is missing.

    Example: sparsecc doctor
    """
    checks = [*_packages(), _processor(), _library(), _operator_runs()]
    healthy = all(check["ok"] or check["optional"] for check in checks)
    if as_json:
        print_json(
            {
                "sparsecc": sparsecc.__version__,
                "python": platform.python_version(),
                "ok": healthy,
                "checks": checks,
            }
        )
    else:
        rows = [(_mark(check), check["name"], check["detail"]) for check in checks]
        print_table(("", "what", "found"), rows)
    return 0 if healthy else 6


def _mark(check: dict[str, Any]) -> str:
    return "ok" if check["ok"] else "-" if check["optional"] else "MISSING"


def _check(name: str, ok: bool, detail: str, *, optional: bool = False) -> dict[str, Any]:
    return {"name": name, "ok": ok, "optional": optional, "detail": detail}


def _packages() -> list[dict[str, Any]]:
    checks = []
    for name in (*_REQUIRED, *_OPTIONAL):
        optional = name in _OPTIONAL
        try:
            checks.append(_check(name, True, importlib.metadata.version(name), optional=optional))
        except importlib.metadata.PackageNotFoundError:
            extra = f'pip install "sparsecc[{_OPTIONAL[name]}]"' if optional else f"pip install {name}"
            checks.append(_check(name, False, f"not installed: {extra}", optional=optional))
    return checks


def _processor() -> dict[str, Any]:
    from sparsecc.target import Target, host_features

    return _check("processor", True, " ".join((str(Target.host().isa), *host_features())))


def _library() -> dict[str, Any]:
    from sparsecc import runtime
    from sparsecc.errors import RuntimeMissingError

    try:
        path = runtime.get_library_path()
        return _check(
            "operator library",
            True,
            f"{path}, version {runtime.library_version()}, {' '.join(runtime.isas())}; "
            f"int8: {' '.join(runtime.int8_isas())}",
        )
    except RuntimeMissingError as error:
        return _check("operator library", False, str(error))


def _operator_runs() -> dict[str, Any]:
    """Run one sparse operator in onnxruntime: the only proof that library and onnxruntime fit together."""
    from sparsecc import emit
    from sparsecc.errors import SparseccError

    name = "sparse operator in onnxruntime"
    try:
        error = emit.self_test()
    except SparseccError as problem:
        return _check(name, False, str(problem))
    return _check(name, error <= 1e-5, f"relative L2 {error:.1e} against NumPy")
