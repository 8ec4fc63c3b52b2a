"""Measuring a grid of products in all their forms on this machine: what a cost model is fitted to."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx

from sparsecc import verify
from sparsecc.calib import Calibration
from sparsecc.errors import MeasurementError, RuntimeMissingError, SparseccError
from sparsecc.ir import Model, Site
from sparsecc.passes.factor.base import rewrite
from sparsecc.passes.factor.low_rank import FactorSvd
from sparsecc.passes.lower.linear_form import Refusal, borders, linear_form
from sparsecc.passes.quantize.quantize import Quantize
from sparsecc.passes.tidy.tidy import Tidy
from sparsecc.plan.alone import part_model, random_inputs, site_model
from sparsecc.plan.copies import copies_of, weight_bytes
from sparsecc.plan.costs import CostTable
from sparsecc.plan.timing import MeasuredCosts, input_shapes_of_sites
from sparsecc.plan.workload import ProfileKey, Workload, call_key, model_key, workload_of
from sparsecc.pm import PassContext, Progress, no_progress
from sparsecc.runtime import get_library_path
from sparsecc.sparse import INT8_DENSE, Layout, Pattern, keep_mask

__all__ = [
    "DENSITIES",
    "PATTERNS",
    "Product",
    "expected_seconds",
    "generic_products",
    "has_library",
    "known",
    "planned",
    "products_of",
    "profile",
    "profile_model",
    "workload_of_site",
]

Inputs = Mapping[str, npt.NDArray[np.generic]]

#: Shares of weights that are measured, in geometric steps.
DENSITIES = (0.5, 0.2, 0.08)

#: Patterns that are measured, those first that planners ask for most.
PATTERNS = ("16x1", "unstructured", "2:4", "16x4", "4x1", "1:4", "8x1", "4x4", "1x4")

#: Shares of the numbers of a weight that two factors hold.
_RANK_SHARES = (0.6, 0.4, 0.25, 0.12)

#: Ranks are multiples of it.
_RANK_MULTIPLE = 8

#: Rows of inputs, and (outputs, inputs), of the products of a generic profile; large ones with fewer rows.
_ROWS = (128, 1, 512, 16)
_WEIGHTS = ((384, 384), (1536, 384), (768, 768), (128, 512))
_LARGE_ROWS = (128, 1)
_LARGE_WEIGHTS = ((3072, 768), (768, 3072))

#: (inputs, outputs, kernel, stride, side of the output, groups) of the convolutions of a generic profile.
_CONVOLUTIONS = (
    (64, 64, 3, 1, 28, 1),
    (16, 16, 3, 1, 32, 1),
    (64, 128, 3, 2, 14, 1),
    (256, 256, 3, 1, 7, 1),
    (64, 256, 1, 1, 28, 1),
    (64, 64, 1, 1, 28, 1),
    (128, 128, 1, 1, 14, 1),
    (256, 64, 1, 1, 28, 1),
    (32, 192, 1, 1, 56, 1),
    (960, 160, 1, 1, 7, 1),
    (128, 256, 1, 2, 14, 1),
    (32, 32, 3, 1, 56, 32),
    (192, 192, 3, 2, 28, 192),
    (512, 512, 3, 1, 14, 512),
)


#: Bytes of the weights of the models that a general profile is made for.
_USUAL_BYTES = 8 << 20

#: Most seconds spent on timing one whole model, and one and two convolutions in a row.
_MODEL_SECONDS = 5.0
_PAIR_SECONDS = 1.0

#: What a measurement takes: about 80 runs of its forms, and making them.
_KEY_SECONDS = 1.0
_SECONDS_PER_MULTIPLICATION = 4e-9


@dataclass(frozen=True)
class Product:
    """A product to measure.

    Attributes:
        work: the product.
        model: makes a model of one site that computes it on an input of static shape.
        bytes: of all weights of the model that it is from.
    """

    work: Workload
    model: Callable[[], Model]
    bytes: int = _USUAL_BYTES

    @property
    def copies(self) -> int:
        """How many take turns, so that it finds its weights in the same cache as in its model."""
        return copies_of(4 * self.work.n * self.work.k, self.work.rows, whole=self.bytes)


def generic_products() -> list[Product]:
    """The products of a profile that is made for no model in particular."""
    sizes = [*itertools.product(_WEIGHTS, _ROWS), *itertools.product(_LARGE_WEIGHTS, _LARGE_ROWS)]
    linear = [Workload("MatMul", rows, n, k) for (n, k), rows in sizes]
    found = [Product(work, partial(_linear_model, work)) for work in linear]
    for inputs, outputs, side, stride, size, groups in _CONVOLUTIONS:
        work = Workload(
            "Conv", size * size, outputs, inputs // groups * side * side, (side, side), (stride, stride), groups,
            activation="" if groups > 1 else "Relu",  # depthwise ones have no sparse form that takes it in
        )  # fmt: skip
        found.append(Product(work, partial(_conv_model, work, size)))
    return found


def _linear_model(work: Workload) -> Model:
    return _parsed(
        f"(float[{work.rows},{work.k}] x) => (float[{work.rows},{work.n}] y) {{ p = MatMul(x, w) y = Add(p, b) }}",
        (work.k, work.n),
        work.n,
    )


def _conv_model(work: Workload, size: int) -> Model:
    (side, _), (stride, _) = work.kernel, work.strides
    channels = work.k // (side * side)
    pad = (side - 1) // 2
    return _parsed(
        f"(float[1,{channels * work.groups},{size * stride},{size * stride}] x) => "
        f"(float[1,{work.n},{size},{size}] y) {{ "
        f"c = Conv<strides=[{stride},{stride}], pads=[{pad},{pad},{pad},{pad}], group={work.groups}>(x, w, b) "
        "y = Relu(c) }",
        (work.n, channels, side, side),
        work.n,
    )


def _chain_model(work: Workload, shape: Sequence[int], count: int) -> Model:
    """``count`` equal convolutions with Relu one after the other on an input of ``shape``, which stays the same."""
    pads = [side // 2 for side in work.kernel] + [(side - 1) // 2 for side in work.kernel]
    sizes = ",".join(map(str, shape))
    steps = "".join(
        f"c{at} = Conv<pads={pads}, group={work.groups}>(x{at}, w, b) x{at + 1} = Relu(c{at}) "
        for at in range(count)
    )
    channels = work.k // math.prod(work.kernel)
    graph = f"(float[{sizes}] x0) => (float[{sizes}] x{count}) {{ {steps} }}"
    return _parsed(graph, (work.n, channels, *work.kernel), work.n)


def _parsed(graph: str, shape: tuple[int, ...], outputs: int) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')
    for name, array in (("w", np.ones(shape, np.float32)), ("b", np.zeros(outputs, np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def products_of(model: Model, inputs: Inputs) -> list[Product]:
    """The different products of the sites of ``model`` on ``inputs``; each with the activation behind it.

    They are those after ``tidy``, with which pipelines begin. Left out are sites of other operators, those that
    ``inputs`` do not reach, and quantised ones.
    """
    model = model.copy()
    Tidy().run(model, PassContext())
    shapes = input_shapes_of_sites(model, inputs)
    size = weight_bytes(model.sites())
    found: dict[Workload, Product] = {}
    for site in model.sites():
        shape = shapes.get(site.name)
        if shape is None or site.quantization is not None or site.op not in ("MatMul", "Gemm", "Conv"):
            continue
        try:
            work = workload_of_site(model, site, shape)
        except MeasurementError:
            continue
        found.setdefault(work, Product(work, partial(_part, model, site, shape), size))
    return list(found.values())


def workload_of_site(model: Model, site: Site, shape: Sequence[int]) -> Workload:
    """What ``site`` computes on an input of ``shape``, with the activation that its sparse form takes in."""
    try:
        suffix = linear_form(model, site, site.node).activation.suffix
    except Refusal:
        suffix = ""
    return workload_of(site, shape, suffix)


def _part(model: Model, site: Site, shape: tuple[int, ...]) -> Model:
    try:
        return site_model(linear_form(model, site, site.node), shape, model)
    except Refusal:
        ends = borders(site.node)
        assert ends is not None, "sites that are not quantised have borders"
        return part_model([ends], shape, model)


def planned(products: Iterable[Product], threads: int, seed: int, library: bool) -> list[ProfileKey]:
    """Keys of what is measured of ``products``: all of one form before the next, the most asked for first.

    Without the operator ``library`` there is nothing sparse to measure.
    """
    everything = list(products)
    keys: list[ProfileKey] = []

    def add(series: str, product: Product, *shares: float) -> None:
        keys.extend(
            ProfileKey(product.work, series, float(f"{share:.6g}"), threads, product.copies, seed)
            for share in shares
        )

    for product in everything:
        if (
            product.work.kind != "linear" or not product.work.activation
        ):  # what follows bytes is not computed with them
            add("static dense", product, 1.0)
        if _can_follow_itself(product.work):
            add("pair", product, 1.0)
        if product.work.kind not in ("depthwise", "grouped"):
            add("low-rank", product, *_low_ranks(product.work))
    for text in PATTERNS if library else ():
        pattern = Pattern.parse(text)
        shares = (pattern.density(),) if pattern.kind == "nm" else DENSITIES
        for product in everything:
            if product.work.kind != "depthwise":
                add(f"pattern {pattern}", product, *shares)
    return list(dict.fromkeys(keys))  # models may have products in common


def _can_follow_itself(work: Workload) -> bool:
    """Whether the output of a convolution can be its input, up to the border."""
    return work.kind in ("conv", "pointwise") and work.inputs == work.outputs and set(work.strides) == {1}


def _low_ranks(work: Workload) -> list[float]:
    """Shares of the numbers of a weight at ranks that are multiples and lie near the shares wanted."""
    dense, one = work.n * work.k, work.n + work.k
    ranks = {round(share * dense / one / _RANK_MULTIPLE) * _RANK_MULTIPLE for share in _RANK_SHARES}
    return [rank * one / dense for rank in sorted(ranks, reverse=True) if 0 < rank * one < dense]


def has_library() -> bool:
    """Whether the operator library is there, so that sparse forms can be measured."""
    try:
        get_library_path()
    except RuntimeMissingError:
        return False
    return True


def known(table: CostTable, key: ProfileKey) -> bool:
    """Whether ``table`` has what is measured under ``key``."""
    return table.get(str(key), ("dense",)) is not None


def expected_seconds(keys: Iterable[ProfileKey]) -> float:
    """About how long measuring ``keys`` takes."""
    return sum(_KEY_SECONDS + _SECONDS_PER_MULTIPLICATION * key.work.multiplications for key in keys)


def profile(
    table: CostTable,
    products: Sequence[Product],
    keys: Sequence[ProfileKey],
    *,
    seconds: float = math.inf,
    progress: Progress = no_progress,
) -> tuple[int, list[str]]:
    """Measure what ``table`` does not have of ``keys`` and save it after each.

    Args:
        table: where times come from and go.
        products: with the models of the keys.
        keys: what to measure, in this order.
        seconds: no new measurement starts after so many.
        progress: told how far it is.

    Returns:
        How many of ``keys`` the table has now, and why others were not measured.
    """
    models = {product.work: product.model for product in products}
    end = time.monotonic() + seconds
    notes: list[str] = []
    missing = [key for key in keys if not known(table, key)]
    for done, key in enumerate(missing):
        progress("measuring", done, len(missing))
        if time.monotonic() >= end:
            break
        table.get_or_measure(call_key(key.threads), ("empty",), partial(_empty_call, key.threads))
        try:
            table.put(str(key), _measure(_model_for(key, models[key.work]), key))
        except RuntimeMissingError:
            raise
        except (SparseccError, Refusal) as reason:
            notes.append(f"{key}: {reason}")
            continue
        table.save()
    else:
        progress("measuring", len(missing), len(missing))
    return sum(known(table, key) for key in keys), notes


def profile_model(table: CostTable, model: Model, inputs: Inputs, threads: int) -> float:
    """The time of a whole model on this machine in ms, from ``table`` or measured and saved: plans begin with it."""

    def measure() -> dict[str, float]:
        result = verify.benchmark([model], inputs, threads=threads, max_seconds=_MODEL_SECONDS)
        return {"dense": result.models[0].median_ms}

    found = table.get_or_measure(model_key(model, inputs, threads), ("dense",), measure)["dense"]
    table.save()
    return found


def _empty_call(threads: int) -> dict[str, float]:
    """What every run of a session takes, which a site inside a model does not."""
    nothing = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    model = Model.from_proto(nothing)
    result = verify.benchmark([model], random_inputs(model, 0), threads=threads, max_seconds=1.0)
    return {"empty": result.models[0].median_ms}


def _model_for(key: ProfileKey, own: Callable[[], Model]) -> Model:
    """The model that is measured: a product of bytes has two axes, else onnxruntime fuses it only in larger models."""
    static = key.series.startswith("static") and key.work.kind == "linear"
    return _linear_model(key.work) if static else own()


def _measure(part: Model, key: ProfileKey) -> dict[str, float]:
    """Times in ms of the forms of one product by name, ``dense`` among them, in turns in one process."""
    rng = np.random.default_rng([key.seed, *str(key).encode()])
    (site,) = part.sites()
    series, _, text = key.series.partition(" ")
    weight = rng.standard_normal(site.shape, dtype=np.float32)
    if series == "pattern":
        weight = _rounded(weight)
        pattern = Pattern.parse(text)
        weight *= keep_mask(np.abs(weight), pattern, None if pattern.kind == "nm" else 1 - key.density)
    site.replace(weight)
    inputs = random_inputs(part, key.seed)
    costs = MeasuredCosts(CostTable(None, {}), inputs, key.threads, key.seed, lambda own, rows: key.copies)
    if series == "pair":
        return _pair_times(inputs, key)
    if series == "low-rank":
        return _low_rank_times(part, costs, key)
    if series == "static":
        return _static_times(part, costs, inputs)
    layouts = [Layout(pattern), Layout(pattern, "fp16")]
    if site.op == "Conv":
        return costs.site_times_ms(part, site, layouts)
    quantised = part.copy()
    Quantize().run(quantised, PassContext())
    (own,) = quantised.sites()
    layouts += [INT8_DENSE, Layout(pattern, "int8")]
    return costs.site_times_ms(quantised, own, layouts, part)


def _pair_times(inputs: Inputs, key: ProfileKey) -> dict[str, float]:
    """Times of a dense convolution and of two in a row, which need no reordering of what is between them."""
    (x,) = inputs.values()
    chains = [_chain_model(key.work, x.shape, count) for count in (1, 2)]
    result = verify.benchmark(
        chains, {"x0": x}, threads=key.threads, copies=key.copies, max_seconds=_PAIR_SECONDS
    )  # fmt: skip
    one, two = (timing.median_ms for timing in result.models)
    return {"dense": one, "pair": two}


def _rounded(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounded to what 16 bits hold, so that one weight can be stored in all types; no zero is made."""
    small = weight.astype(np.float16).astype(np.float32)
    return np.where(small == 0, np.float32(1), small)


def _low_rank_times(part: Model, costs: MeasuredCosts, key: ProfileKey) -> dict[str, float]:
    part.infer_shapes()
    (site,) = part.sites()
    factors = FactorSvd(multiple=_RANK_MULTIPLE, min_elements=1)
    n, k = site.shape
    outline = factors.outline_at(site, key.density + (n + k) / 2 / (n * k), PassContext(seed=key.seed))
    if isinstance(outline, str):
        raise MeasurementError(outline)
    cost = costs.rewritten(
        part, site, lambda model, own: rewrite(model, own, outline), str(key), custom_ops=False
    )  # fmt: skip
    return {"dense": cost.dense_ms, "low-rank": cost.ms}


def _static_times(part: Model, costs: MeasuredCosts, inputs: Inputs) -> dict[str, float]:
    """Times of the float form and of the one with activations in bytes, of a range known beforehand."""
    data = Calibration(lambda: iter([dict(inputs)]), "random", synthetic=True)
    quantised = part.copy()
    Quantize(activations="static").run(quantised, PassContext(calibration=data))
    (own,) = quantised.sites()
    times = costs.site_times_ms(quantised, own, [INT8_DENSE], part)
    return {"dense": times["dense"], f"static {INT8_DENSE}": times[str(INT8_DENSE)]}
