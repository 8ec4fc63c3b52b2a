"""What parts of a model are, and become, before anything is known about their times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc import emit, verify
from sparsecc.calib import value_rounds
from sparsecc.errors import MeasurementError
from sparsecc.ir import Model, Site
from sparsecc.ir.quantized import data_input
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.passes.lower.choose_layout import ChooseLayout, unmark
from sparsecc.passes.lower.linear_form import LinearForm, Refusal, linear_form
from sparsecc.passes.lower.lower_sparse import LowerSparse
from sparsecc.passes.lower.recurrent import leads
from sparsecc.passes.lower.restore_dense import marks_of, quantized_where_marked
from sparsecc.plan.alone import form_ends, part_model
from sparsecc.pm import CostSource, PassContext, Requantizer, RewriteCost
from sparsecc.sparse import Layout

__all__ = [
    "Inputs",
    "SiteCosts",
    "has_sparse_ops",
    "input_shapes_of_sites",
    "lowered_copy",
    "rewritten_part",
    "runs_of_sites",
]

Inputs = Mapping[str, npt.NDArray[np.generic]]


def lowered_copy(model: Model, sites: Iterable[str], quantization: Requantizer | None = None) -> Model:
    """A copy of ``model`` in which only the marked sites named in ``sites`` are lowered and ready to run.

    With ``quantization``, which made ``model``, only those of them that are marked as int8 are quantised.
    """
    wanted = set(sites)
    if quantization is None:
        copy = model.copy()
        for site in copy.sites():
            if leads(site) and site.name not in wanted:
                unmark(site)
    else:
        marks = {name: found for name, found in marks_of(model).items() if name in wanted}
        copy = quantized_where_marked(quantization, marks)
    LowerSparse().run(copy, PassContext())
    emit.finalize(copy)
    return copy


def input_shapes_of_sites(model: Model, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The concrete shape that each site reads when the model is fed ``inputs``, in bodies of If, Loop and Scan too.

    The model is run once with the shapes of the sites' inputs as extra outputs. Of several nodes with one weight
    the first that runs counts; left out are sites of which none does, and those in functions.
    """
    model = model.copy()
    # An earlier pass may have made sparse operators, which onnxruntime runs by their functions.
    emit.finalize(model)
    readers = _readers(model)
    shapes = verify.value_shapes(model, [value for values in readers.values() for value in values], inputs)
    found = {name: [shapes[value] for value in values if value in shapes] for name, values in readers.items()}
    return {name: known[0] for name, known in found.items() if known}


def runs_of_sites(model: Model, inputs: Inputs) -> dict[str, int]:
    """How often each site in a body of If, Loop or Scan computes when the model is fed ``inputs``.

    Of several nodes with one weight the first that runs counts. Sites of the main graph, which compute once, are left
    out, as are those that do not run.
    """
    inner = {site.name for site in model.sites() if site.scope == "subgraph"}
    readers = {name: values for name, values in _readers(model).items() if name in inner}
    if not readers:
        return {}
    rounds = value_rounds(model, [value for values in readers.values() for value in values], inputs)
    counts = {
        name: [len(rounds[value]) for value in values if value in rounds] for name, values in readers.items()
    }
    return {name: next(filter(None, found)) for name, found in counts.items() if any(found)}


def _readers(model: Model) -> dict[str, list[onnx_ir.Value]]:
    """What the nodes of each site read."""
    return {
        site.name: [value for node in site.nodes if (value := data_input(node)) is not None]
        for site in model.sites()
        if site.scope != "function" and site.input is not None
    }


def rewritten_part(
    own: Model,
    rewrite: Callable[[Model, Sequence[Site]], None],
    costs: CostSource | None,
    layout: Layout | None = None,
) -> tuple[Model, Model]:
    """Return a rewritten copy of a part, its sites marked with the layouts that ``costs`` find fastest; and lowered.

    Args:
        own: not changed.
        rewrite: changes the copy and the sites that it is given.
        costs: decide about layouts; None: no sparse operators.
        layout: of all sites, pattern and type of float values; None: each gets the fastest.
    """
    candidate = own.copy()
    rewrite(candidate, candidate.sites())
    if costs is None:
        return candidate, candidate
    chosen = ChooseLayout() if layout is None else _forced(layout)
    chosen.run(candidate, PassContext(costs=costs))
    return candidate, lowered_copy(candidate, [found.name for found in candidate.sites()])


def _forced(layout: Layout) -> ChooseLayout:
    return ChooseLayout(layout=layout.pattern, values="fp32" if layout.values == "int8" else layout.values)


def has_sparse_ops(model: Model) -> bool:
    """Whether the model has operators of the library."""
    return any(node.domain == DOMAIN for graph in model.graphs() for node in graph)


class SiteCosts(ABC):
    """What all that knows times of sites has in common: shapes, and sites as models of their own.

    Args:
        inputs: of the whole model; their shapes decide the shapes of sites.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._shapes: dict[str, tuple[tuple[int, int], tuple[int, ...] | None]] = {}

    def input_shape(self, model: Model, site: Site) -> tuple[int, ...]:
        """What a site of ``model`` reads.

        Raises:
            MeasurementError: the inputs do not reach it.
        """
        if (
            self._shapes.get(site.name, (None, None))[0] != site.shape
        ):  # passes make sites, and others of the same name
            found = input_shapes_of_sites(model, self.inputs)
            self._shapes = {item.name: (item.shape, found.get(item.name)) for item in model.sites()}
        shape = self._shapes[site.name][1]
        if shape is None:
            raise MeasurementError("not timed: the inputs given do not reach it (a branch not taken)")
        return shape

    def rewritten(
        self, model: Model, site: Site, rewrite: Callable[[Model, Site], None], key: str, *, custom_ops: bool
    ) -> RewriteCost:
        """See ``CostSource.rewritten``."""
        return self.rewritten_together(
            model, [site], lambda part, own: rewrite(part, own[0]), key, custom_ops=custom_ops
        )

    def rewritten_together(
        self,
        model: Model,
        sites: Sequence[Site],
        rewrite: Callable[[Model, Sequence[Site]], None],
        key: str,
        *,
        custom_ops: bool,
    ) -> RewriteCost:
        """See ``CostSource.rewritten_together``."""
        shape = self.input_shape(model, sites[0])
        try:
            forms = [linear_form(model, site, site.node) for site in sites]
        except Refusal as refusal:
            raise MeasurementError(f"not timed: {refusal}") from refusal
        own = part_model([form_ends(form) for form in forms], shape, model)
        return self._together(own, list(zip(sites, forms, strict=True)), shape, rewrite, key, custom_ops)

    @abstractmethod
    def _together(
        self,
        own: Model,
        parts: Sequence[tuple[Site, LinearForm]],
        shape: tuple[int, ...],
        rewrite: Callable[[Model, Sequence[Site]], None],
        key: str,
        custom_ops: bool,
    ) -> RewriteCost:
        """The same for a part whose sites all read a value of ``shape``."""
