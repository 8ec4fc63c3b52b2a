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
    checks = [*_packages(), _library(), _operator_runs()]
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


def _library() -> dict[str, Any]:
    from sparsecc import runtime
    from sparsecc.errors import RuntimeMissingError

    try:
        path = runtime.get_library_path()
        return _check(
            "operator library",
            True,
            f"{path}, version {runtime.library_version()}, {' '.join(runtime.isas())}",
        )
    except RuntimeMissingError as error:
        return _check("operator library", False, str(error))


def _operator_runs() -> dict[str, Any]:
    """Run one sparse operator in onnxruntime: the only proof that library and onnxruntime fit together."""
    import numpy as np
    import onnx.parser

    from sparsecc import emit, verify
    from sparsecc.errors import SparseccError
    from sparsecc.ir import Model
    from sparsecc.pm import PassContext, Pipeline

    name = "sparse operator in onnxruntime"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 16), dtype=np.float32)
    x = rng.standard_normal((3, 32), dtype=np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> check (float[3, 32] x) => (float[3, 16] y) '
        "<float[32, 16] w> { y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    try:
        model = Model.from_proto(proto)
        passes = "prune-magnitude{pattern=2:4 min-elements=0},choose-layout{layout=2:4},lower-sparse"
        Pipeline.parse(passes).run(model, PassContext())
        emit.finalize(model)
        got = verify.session(model, library=True).run({"x": x})["y"]
        plain = verify.session(model, library=False).run({"x": x})["y"]
    except SparseccError as problem:
        return _check(name, False, str(problem))
    error = verify.compare_arrays("y", plain, got).rel_l2
    return _check(name, error <= 1e-5, f"relative L2 {error:.1e} against its function body")
