"""What the dense model computes on the calibration inputs: the targets of healing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparsecc.calib import Arrays
from sparsecc.errors import UsageError
from sparsecc.heal.graph import TorchGraph
from sparsecc.heal.operators import Tensor
from sparsecc.heal.states import block_states
from sparsecc.ir import Model

__all__ = ["Targets"]


class Targets:
    """Internal states and outputs of the dense model, by batch.

    They are computed once and kept while all those kept fit ``byte_budget``; the others are computed anew.

    Attributes:
        states: names of the internal states, which both models have in the same shape.
        outputs: names of the floating-point outputs.
    """

    def __init__(
        self,
        model: Model,
        reference: Model,
        graph: TorchGraph,
        batches: Sequence[Arrays],
        *,
        byte_budget: int,
        narrow: bool,
    ) -> None:
        """Find what to match, on the first batch.

        Args:
            model: the one to heal.
            reference: the dense model, with the same inputs and outputs.
            graph: ``model``, to be run.
            batches: inputs of both.
            byte_budget: bytes of targets to keep.
            narrow: whether targets that are trained on are computed and kept in bfloat16.

        Raises:
            UnsupportedModelError: PyTorch cannot run an operator of the dense model; all such are named.
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
        self._graph = TorchGraph(reference, graph.device)
        with torch.no_grad():
            wanted, found = (side.run(batches[0], names) for side in (self._graph, graph))
        fits = {
            name
            for name in names
            if wanted[name].is_floating_point() and wanted[name].shape == found[name].shape
        }
        self.states = [name for name in states if name in fits]
        self.outputs = [name for name in outputs if name in fits]
        if not self.outputs:
            raise UsageError("no output of the model is a floating-point tensor: there is nothing to match")
        self._narrow = narrow
        self._left = byte_budget
        self._kept: dict[tuple[int, bool], Mapping[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All that is matched, once each."""
        return list(dict.fromkeys([*self.states, *self.outputs]))

    def of(self, number: int, *, exact: bool = False) -> Mapping[str, Tensor]:
        """The targets of one batch by name.

        Args:
            number: of the batch.
            exact: float32 whatever is trained on.
        """
        narrow = self._narrow and not exact
        kept = self._kept.get((number, narrow))
        if kept is not None:
            return kept
        with torch.no_grad(), torch.autocast(self._graph.device, torch.bfloat16, enabled=narrow):
            found = self._graph.run(self._batches[number], self.names)
        if narrow:
            found = {name: tensor.bfloat16() for name, tensor in found.items()}
        nbytes = sum(tensor.nbytes for tensor in found.values())
        if nbytes <= self._left:
            self._left -= nbytes
            self._kept[number, narrow] = found
        return found
