"""A compiler that turns sparse and compressible ONNX models into smaller models that are actually faster.

The public names are loaded when they are first used: importing the package itself imports neither onnx nor
onnxruntime.
"""

from __future__ import annotations

import importlib
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecc.api import OptimizeResult, optimize
    from sparsecc.ir import Model
    from sparsecc.pm import Pipeline
    from sparsecc.runtime import get_library_path, register
    from sparsecc.sparse import Pattern

    load = Model.load
    save = Model.save

__all__ = [
    "Model",
    "OptimizeResult",
    "Pattern",
    "Pipeline",
    "__version__",
    "get_library_path",
    "load",
    "optimize",
    "register",
    "save",
]

__version__ = "0.1.0"

# Module and attribute of each public name.
_HOMES = {
    "Model": ("sparsecc.ir", "Model"),
    "OptimizeResult": ("sparsecc.api", "OptimizeResult"),
    "Pattern": ("sparsecc.sparse", "Pattern"),
    "Pipeline": ("sparsecc.pm", "Pipeline"),
    "get_library_path": ("sparsecc.runtime", "get_library_path"),
    "load": ("sparsecc.ir", "Model.load"),
    "optimize": ("sparsecc.api", "optimize"),
    "register": ("sparsecc.runtime", "register"),
    "save": ("sparsecc.ir", "Model.save"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = operator.attrgetter(attribute)(importlib.import_module(module))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
