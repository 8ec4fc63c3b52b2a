"""Whether PyTorch is there."""

from __future__ import annotations

import importlib.util

from sparsecc.errors import MissingExtraError

__all__ = ["require_torch"]


def require_torch() -> None:
    """Refuse where PyTorch is not installed.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(
            "healing trains with PyTorch, which is not installed: pip install 'sparsecc[heal]'"
        )
