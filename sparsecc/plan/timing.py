"""Measured times of sites and of whole models, for the passes that decide (``PassContext.costs``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from sparsecc import emit, verify
from sparsecc.errors import MeasurementError, SparseccError
from sparsecc.ir import Model, Site
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY, mark
from sparsecc.passes.lower.linear_form import LinearForm, Refusal, borders, linear_form
from sparsecc.passes.lower.recurrent import (
    LayoutPair,
    leads,
    pair_text,
    recurrent_form,
    weight_pair,
)
from sparsecc.plan.alone import (
    begin_with_bytes,
    constant_bytes,
    part_model,
    random_inputs,
    recurrent_model,
    site_model,
)
from sparsecc.plan.copies import rows_of, weight_bytes
from sparsecc.plan.costs import CostTable
from sparsecc.plan.part_costs import (
    Inputs,
    SiteCosts,
    has_sparse_ops,
    input_shapes_of_sites,
    lowered_copy,
    rewritten_part,
    runs_of_sites,
)
from sparsecc.pm import Requantizer, RewriteCost
from sparsecc.sparse import INT8_DENSE, Layout

__all__ = ["Inputs", "MeasuredCosts", "input_shapes_of_sites", "lowered_copy", "runs_of_sites"]

#: Most seconds spent on timing one site, and on timing one whole model against dense.
_SITE_SECONDS = 0.4
_MODEL_SECONDS = 6.0


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class MeasuredCosts(SiteCosts):
    """Times from interleaved runs on this machine, kept in a cost table.

    Args:
        table: where known times come from and new ones go.
        inputs: inputs of the whole model; their shapes decide the shapes sites are timed at.
        threads: threads of every timed session.
        seed: of the random activations that single sites are fed.
        copies: how many copies of what is timed alone take turns (see ``verify.benchmark``), for bytes of weights and
            rows of the input (``copies_of``); one by default.
    """

    def __init__(
        self,
        table: CostTable,
        inputs: Inputs,
        threads: int,
        seed: int = 0,
        copies: Callable[[int, int], int] = lambda own, rows: 1,
    ) -> None:
        super().__init__(inputs)
        self.table = table
        self._threads = threads
        self._seed = seed
        self._copies = copies

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> dict[str, float]:
        """Median ms of the site alone: ``"dense"`` (onnxruntime) and each of ``layouts`` by its text.

        With ``base``, the model before it was quantised, ``"dense"`` and all that is not int8 are of its site.

        Raises:
            MeasurementError: the shape of the site's input is not known, or it cannot run alone.
        """
        shape = self.input_shape(model, site)
        try:
            form = linear_form(model, site, site.nodes[0])
        except Refusal:
            if base is None or list(layouts) != [INT8_DENSE]:
                raise
            return self._byte_times_ms(model, site, shape, base)
        plain = None if base is None else _form_before(base, site.name)
        names = [str(layout) for layout in layouts]
        copies = self._copies_of([site], shape)
        key = f"{self._site_key(site, form, shape, plain)}{_told(copies)}"

        def measure() -> dict[str, float]:
            own = site_model(form, shape, model)
            before = own if plain is None or base is None else site_model(plain, shape, base)
            variants = [
                own if layout == INT8_DENSE else _lowered_to(own if layout.int8 else before, str(layout))
                for layout in layouts
            ]
            inputs = {**random_inputs(before, self._seed), **random_inputs(own, self._seed)}
            return self._time_variants([before, *variants], names, inputs, copies)

        return self.table.get_or_measure(key, ["dense", *names], measure)

    def _byte_times_ms(
        self, model: Model, site: Site, shape: tuple[int, ...], base: Model
    ) -> dict[str, float]:
        """Times of a site in float32 and on bytes, from the bytes of its input to those of its output."""
        own = borders(site.node)
        before = next((borders(other.node) for other in base.sites() if other.name == site.name), None)
        if own is None or before is None:
            raise MeasurementError("not timed: there is no float32 form of it to compare with")
        copies = self._copies_of([site], shape)
        key = (
            f"{site.op} int8-static/float32 x{list(shape)} w{list(site.weight_shape)} {site.conv} "
            f"to={own.output_type.name} threads={self._threads}{_told(copies)}"
        )

        def measure() -> dict[str, float]:
            variants = [part_model([before], shape, base), part_model([own], shape, model)]
            inputs = {name: x for part in variants for name, x in random_inputs(part, self._seed).items()}
            return self._time_variants(variants, [str(INT8_DENSE)], inputs, copies)

        return self.table.get_or_measure(key, ["dense", str(INT8_DENSE)], measure)

    def recurrent_times_ms(self, model: Model, site: Site, layouts: Sequence[LayoutPair]) -> dict[str, float]:
        """As ``site_times_ms`` for an LSTM or GRU whose W is ``site``: layouts of (W, R), ``W+R`` if they differ."""
        form = recurrent_form(model, weight_pair(model, site), site.nodes[0])
        shape = self.input_shape(model, site)
        names = [pair_text(pair) for pair in layouts]
        copies = self._copies_of(weight_pair(model, site), shape)
        zeros = _digest(*(np.packbits(w != 0).tobytes() for w in (form.input_weight, form.state_weight)))
        key = (
            f"{form.cell} x{list(shape)} h{form.hidden} {form.direction} lbr={form.before_reset:d} "
            f"lengths={form.lengths is not None:d} state={bool(form.initial):d} threads={self._threads} "
            f"zeros={zeros}{_told(copies)}"
        )

        def measure() -> dict[str, float]:
            dense = recurrent_model(form, shape, model.opset)
            variants = [dense, *(_lowered_to(dense, name) for name in names)]
            return self._time_variants(variants, names, copies=copies)

        return self.table.get_or_measure(key, ["dense", *names], measure)

    def _together(
        self,
        own: Model,
        parts: Sequence[tuple[Site, LinearForm]],
        shape: tuple[int, ...],
        rewrite: Callable[[Model, Sequence[Site]], None],
        key: str,
        custom_ops: bool,
    ) -> RewriteCost:
        copies = self._copies_of([site for site, _ in parts], shape)
        sites = " + ".join(self._site_key(site, form, shape, None) for site, form in parts)
        row = self.table.get_or_measure(
            f"{sites} -> {key} custom-ops={custom_ops:d}{_told(copies)}",
            ("dense", "ms", "bytes"),
            lambda: self._rewritten(own, rewrite, custom_ops, copies),
        )
        return RewriteCost(row["dense"], row["ms"], constant_bytes(own), int(row["bytes"]))

    def part_rewritten(
        self,
        part: Model,
        rewrite: Callable[[Model], None],
        key: str,
        *,
        custom_ops: bool,
        layout: Layout | None = None,
    ) -> tuple[RewriteCost, bool]:
        """What a part of a model costs by itself, dense and rewritten, and whether the latter has sparse operators.

        Args:
            part: its inputs have static shapes; not changed.
            rewrite: changes the copy that it is given. Where that ends between bytes, these are what is timed.
            key: says all that the times depend on.
            custom_ops: whether sparse operators may stand for products with many zeros.
            layout: of these, pattern and type of float values; None: each is the fastest of those that its zeros allow.

        Raises:
            MeasurementError: it cannot be timed; the message says why.
        """
        (first, *_) = part.onnx.graph.inputs
        copies = self._copies_of(part.sites(), [size for size in first.shape or () if isinstance(size, int)])
        row = self.table.get_or_measure(
            f"part {key} layout={layout} threads={self._threads} custom-ops={custom_ops:d}{_told(copies)}",
            ("dense", "ms", "bytes", "sparse-ops"),
            lambda: self._rewritten(part, lambda own, _: rewrite(own), custom_ops, copies, layout),
        )
        cost = RewriteCost(row["dense"], row["ms"], constant_bytes(part), int(row["bytes"]))
        return cost, bool(row["sparse-ops"])

    def _rewritten(
        self,
        own: Model,
        rewrite: Callable[[Model, Sequence[Site]], None],
        custom_ops: bool,
        copies: int,
        layout: Layout | None = None,
    ) -> dict[str, float]:
        inputs = random_inputs(own, self._seed)
        inner = MeasuredCosts(self.table, inputs, self._threads, self._seed, lambda size, rows: copies)
        _, candidate = rewritten_part(own, rewrite, inner if custom_ops else None, layout)
        begin_with_bytes(candidate)
        times = self._time_variants(
            [own, candidate], ["ms"], {**inputs, **random_inputs(candidate, self._seed)}, copies
        )
        return {
            **times,
            "bytes": constant_bytes(candidate),
            "sparse-ops": float(has_sparse_ops(candidate)),
        }

    def _copies_of(self, sites: Sequence[Site], shape: Sequence[int]) -> int:
        """How many copies of a part with these sites, which reads an input of ``shape``, take turns."""
        return self._copies(weight_bytes(sites), rows_of(sites[0].op, shape))

    def _site_key(
        self, site: Site, form: LinearForm, shape: tuple[int, ...], plain: LinearForm | None
    ) -> str:
        zeros = _digest(np.packbits(form.weight != 0).tobytes())
        geometry = "" if form.conv is None else f" {form.conv}"
        dtype = "float32" if form.int8 is None else "int8" if form.dequantize is None else "int8-static"
        dtype += "" if plain is None else "/float32"
        if plain is not None:
            zeros += _digest(np.packbits(plain.weight != 0).tobytes())
        return (
            f"{site.op} {dtype} x{list(shape)} w{list(site.weight_shape)}{geometry} "
            f"act={form.activation.suffix or 'none'} threads={self._threads} zeros={zeros}"
        )

    def _time_variants(
        self, variants: Sequence[Model], names: Sequence[str], inputs: Inputs | None = None, copies: int = 1
    ) -> dict[str, float]:
        """Time models of one site, the first as ``dense``, on ``inputs`` or on random ones for the first."""
        try:
            result = verify.benchmark(
                variants,
                random_inputs(variants[0], self._seed) if inputs is None else inputs,
                threads=self._threads,
                library=[has_sparse_ops(model) for model in variants],  # it takes 25 ms for each session
                copies=copies,
                max_seconds=_SITE_SECONDS * len(variants),
            )
        except SparseccError as error:
            raise MeasurementError(f"not timed: {error}") from error
        times = [timing.median_ms for timing in result.models]
        return dict(zip(["dense", *names], times, strict=True))

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        """Time of the whole model with ``sites`` lowered / time of the same model with none lowered.

        With ``quantization``, which made ``model``, none lowered means none quantised either.
        """
        if not sites:
            return 1.0
        marks = {site.name: site.nodes[0].metadata_props.get(LAYOUT_KEY, "") for site in model.sites()}
        chosen = json.dumps(sorted((name, marks[name]) for name in sites))
        digest = _digest(model.fingerprint().encode(), chosen.encode(), self._input_shapes())
        return self._relative_time(
            f"model {digest} sites={len(sites)}",
            lambda: [lowered_copy(model, (), quantization), lowered_copy(model, sites, quantization)],
        )

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        """Time of ``candidate`` / time of ``model``, both with the operators in them as they are."""
        ready = [other.copy() for other in (model, candidate)]
        for other in ready:
            emit.finalize(other)
        digest = _digest(*(other.fingerprint().encode() for other in ready), self._input_shapes())
        return self._relative_time(f"models {digest}", lambda: ready)

    def _input_shapes(self) -> bytes:
        shapes = {name: list(array.shape) for name, array in sorted(self.inputs.items())}
        return json.dumps(shapes).encode()

    def _relative_time(self, key: str, variants: Callable[[], Sequence[Model]]) -> float:
        """Time of the second of two whole models / time of the first, from the table or measured."""

        def measure() -> dict[str, float]:
            result = verify.benchmark(
                variants(), self.inputs, threads=self._threads, max_seconds=_MODEL_SECONDS
            )
            return {"relative": 1 / result.ratio_to_first[1]}

        key += f" threads={self._threads}"
        return self.table.get_or_measure(key, ["relative"], measure)["relative"]


def _told(copies: int) -> str:
    """The end of a key: rows of single copies have none."""
    return f" copies={copies}" if copies > 1 else ""


def _form_before(base: Model, name: str) -> LinearForm | None:
    """The form of the site in the model before it was quantised; None where that did not quantise it."""
    site = next((site for site in base.sites() if site.name == name), None)
    return None if site is None or site.quantization is not None else linear_form(base, site, site.nodes[0])


def _lowered_to(model: Model, layout: str) -> Model:
    """The model of one site, lowered to ``layout``."""
    marked = model.copy()
    site = next(site for site in marked.sites() if leads(site))
    mark(site, layout, 1.0)
    return lowered_copy(marked, [site.name])
