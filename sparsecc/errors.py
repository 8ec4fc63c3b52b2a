"""Exceptions of sparsecc and the exit codes the command line gives them.

Every message names what is wrong, what was observed, and what to do about it, in one line.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BudgetError",
    "MeasurementError",
    "MissingExtraError",
    "ModelError",
    "PassError",
    "RuntimeMissingError",
    "ScoreError",
    "SparseccError",
    "SpecError",
    "UnsafeModelError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
]


class SparseccError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class PassError(SparseccError):
    """A pass broke its own promise (for instance it produced an invalid graph)."""


class UsageError(SparseccError):
    """An argument, option or input file other than the model is wrong."""

    exit_code = 2


class ScoreError(UsageError):
    """The metric of a model is no finite number."""


class SpecError(UsageError):
    """A pipeline, pattern or recipe text does not parse."""


class ModelError(SparseccError):
    """The model file cannot be read, or is not a valid ONNX model."""

    exit_code = 3


class UnsafeModelError(ModelError):
    """The model refers to files outside its own folder, or lies about sizes."""


class UnsupportedModelError(ModelError):
    """The model is valid but uses something sparsecc cannot handle."""


class VerificationError(SparseccError):
    """Outputs differ by more than the tolerance, or the accuracy guard failed."""

    exit_code = 4


class BudgetError(SparseccError):
    """The requested budget cannot be reached."""

    exit_code = 5


class MeasurementError(SparseccError):
    """An operator or a model cannot be timed here; the message says why."""


class RuntimeMissingError(SparseccError):
    """The native operator library is missing or cannot be loaded."""

    exit_code = 6


class MissingExtraError(SparseccError):
    """An optional dependency is not installed; the message gives the pip command."""

    exit_code = 6
