"""A compiler that turns sparse and compressible ONNX models into smaller models that are actually faster.

The public names are loaded when they are first used: importing the package itself imports neither onnx nor
onnxruntime.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecc.api import OptimizeResult, ResizeResult, load, optimize, resize, save
    from sparsecc.ir import Model
    from sparsecc.pm import Pipeline
    from sparsecc.runtime import get_library_path, register
    from sparsecc.sparse import Pattern

__all__ = [
    "Model",
    "OptimizeResult",
    "Pattern",
    "Pipeline",
    "ResizeResult",
    "__version__",
    "get_library_path",
    "load",
    "optimize",
    "register",
    "resize",
    "save",
]

__version__ = "0.1.0"

# onnxruntime's own telemetry (from 1.31 on, on Linux too) writes an identifier into the home folder and sends events
# as soon as it is imported; its switch in Python comes too late. Whoever sets the variable has decided.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Model": "sparsecc.ir",
    "OptimizeResult": "sparsecc.api",
    "Pattern": "sparsecc.sparse",
    "Pipeline": "sparsecc.pm",
    "ResizeResult": "sparsecc.api",
    "get_library_path": "sparsecc.runtime",
    "load": "sparsecc.api",
    "optimize": "sparsecc.api",
    "register": "sparsecc.runtime",
    "resize": "sparsecc.api",
    "save": "sparsecc.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
