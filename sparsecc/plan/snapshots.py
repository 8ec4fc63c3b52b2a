"""Copies of a model on its way through a pipeline, to compare the result with."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.ir import Model
from sparsecc.pm import Instrument, Pass, PassContext

__all__ = ["Snapshots"]


class Snapshots(Instrument):
    """Keeps what the output must agree with.

    Attributes:
        before_lowering: the dense model just before its sites are lowered.
        promises: (before, after) of every run of lossless passes that ended before a lossy one.
        start: the model at the start of the present run of lossless passes.
    """

    def __init__(self) -> None:
        self.before_lowering: Model | None = None
        self.promises: list[tuple[Model, Model]] = []
        self.start: Model | None = None

    def begin(self, passes: Sequence[Pass], model: Model, ctx: PassContext) -> None:
        """Forget what an earlier run left."""
        self.before_lowering, self.promises, self.start = None, [], None

    def before(self, pass_: Pass, model: Model, ctx: PassContext) -> None:
        """Copy the model where a run of lossless passes starts or ends, and before lowering."""
        if pass_.name == "lower-sparse":
            self.before_lowering = model.copy()
        if pass_.lossless and self.start is None:
            self.start = model.copy()
        elif not pass_.lossless and self.start is not None:
            self.promises.append((self.start, model.copy()))
            self.start = None
