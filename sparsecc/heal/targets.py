"""What the dense model computes on the calibration inputs: the targets of healing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsecc.calib import Arrays, open_session, tap
from sparsecc.errors import UsageError
from sparsecc.heal.states import block_states
from sparsecc.ir import Model

__all__ = ["Targets"]


class Targets:
    """Internal states and outputs of the dense model, by batch.

    They are computed by onnxruntime, and kept while all those kept fit ``byte_budget``.

    Attributes:
        states: names of the internal states, which both models have in the same shape.
        outputs: names of the floating-point outputs.
    """

    def __init__(
        self, model: Model, reference: Model, batches: Sequence[Arrays], *, threads: int, byte_budget: int
    ) -> None:
        """Find what to match, on the first batch.

        Args:
            model: the one to heal.
            reference: the dense model, with the same inputs and outputs.
            batches: inputs of both.
            threads: of onnxruntime; 0 for all cores.
            byte_budget: bytes of targets to keep.

        Raises:
            UsageError: the reference has other outputs, or no output is floating point.
        """
        theirs = {str(value.name) for node in reference.onnx.graph for value in node.outputs}
        states = [name for name in block_states(model) if name in theirs]
        outputs = [spec.name for spec in model.output_specs()]
        if [spec.name for spec in reference.output_specs()] != outputs:
            raise UsageError(
                "the reference model has other outputs: give the dense model this one was made from"
            )
        # An output that is a constant or an input is the same in both.
        names = list(dict.fromkeys([*states, *(name for name in outputs if name in theirs)]))
        self._batches = batches
        self._session = open_session(tap(reference, names), threads=threads)
        first = self._session.run(batches[0])
        own = open_session(tap(model, names), threads=threads).run(batches[0])
        fits = {
            name for name in names if first[name].dtype.kind == "f" and first[name].shape == own[name].shape
        }
        self.states = [name for name in states if name in fits]
        self.outputs = [name for name in outputs if name in fits]
        if not self.outputs:
            raise UsageError("no output of the model is a floating-point tensor: there is nothing to match")
        self._left = byte_budget
        self._kept: dict[int, Arrays] = {}

    @property
    def names(self) -> list[str]:
        """All that is matched, once each."""
        return list(dict.fromkeys([*self.states, *self.outputs]))

    def of(self, number: int) -> Arrays:
        """The targets of one batch by name, float32."""
        if number in self._kept:
            return self._kept[number]
        found = {
            name: array.astype(np.float32, copy=False)
            for name, array in self._session.run(self._batches[number], self.names).items()
        }
        nbytes = sum(array.nbytes for array in found.values())
        if nbytes <= self._left:
            self._left -= nbytes
            self._kept[number] = found
        return found
