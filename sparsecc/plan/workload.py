"""What the time of a linear site depends on besides the form of its weight."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecc.errors import MeasurementError, SpecError
from sparsecc.ir import Model, Site

__all__ = ["ProfileKey", "Workload", "call_key", "model_key", "workload_of"]

_TEXT = re.compile(
    r"(MatMul|Gemm|Conv) (\d{1,15})x(\d{1,15})x(\d{1,15})"
    r"(?: k(\d{1,9}(?:x\d{1,9}){0,2}) s(\d{1,9}(?:x\d{1,9}){0,2}) g(\d{1,9}))?(?: act=([A-Za-z]+))?"
)


@dataclass(frozen=True)
class Workload:
    """A product of ``rows`` vectors with a weight ``[n, k]``; ``str`` and ``parse`` are inverse.

    Attributes:
        op: ``MatMul``, ``Gemm`` or ``Conv``.
        rows: vectors multiplied: rows of the input, or places of a convolution's output in all pictures.
        n: outputs.
        k: inputs of each output: of one group, times the places of the kernel.
        kernel: entries by spatial axis; empty for MatMul and Gemm.
        strides: by spatial axis.
        groups: of the convolution.
        activation: suffix of what is computed with it, such as ``Relu``; empty for none.
    """

    op: str
    rows: int
    n: int
    k: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1
    activation: str = ""

    def __post_init__(self) -> None:
        sizes = (self.rows, self.n, self.k, self.groups, *self.kernel, *self.strides)
        if (
            min(sizes) < 1
            or len(self.kernel) != len(self.strides)
            or (self.op == "Conv") != bool(self.kernel)
        ):
            raise SpecError(
                f"no such product: {self}; sizes are at least 1, and only Conv has a kernel and strides"
            )

    @property
    def multiplications(self) -> int:
        """Of the dense product."""
        return self.rows * self.n * self.k

    @property
    def inputs(self) -> int:
        """Numbers that are read besides the weight, without those of the border."""
        places = self.rows * math.prod(self.strides)
        return places * self.k * self.groups // math.prod(self.kernel)

    @property
    def outputs(self) -> int:
        """Numbers that are written."""
        return self.rows * self.n

    @property
    def kind(self) -> str:
        """``linear``, ``pointwise``, ``depthwise``, ``grouped`` or ``conv``: what is computed by other code."""
        if self.op != "Conv":
            return "linear"
        if self.groups > 1:
            return "depthwise" if self.k == math.prod(self.kernel) else "grouped"
        return "pointwise" if math.prod(self.kernel) == 1 else "conv"

    def __str__(self) -> str:
        text = f"{self.op} {self.rows}x{self.n}x{self.k}"
        if self.kernel:
            text += f" k{_sides(self.kernel)} s{_sides(self.strides)} g{self.groups}"
        return text + (f" act={self.activation}" if self.activation else "")

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Return the product that ``str`` wrote so.

        Raises:
            SpecError: it is none.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SpecError(f"no product such as 'MatMul 128x1536x384': {text[:80]!r}")
        op, rows, n, k, kernel, strides, groups, activation = found.groups()
        return cls(
            op, int(rows), int(n), int(k), _numbers(kernel), _numbers(strides), int(groups or 1), activation or ""
        )  # fmt: skip


def _sides(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split("x"))) if text else ()


def workload_of(site: Site, shape: Sequence[int], activation: str = "") -> Workload:
    """What ``site`` computes on an input of ``shape``.

    Args:
        site: a MatMul, Gemm or Conv.
        shape: concrete, of what its first node reads (``input_shapes_of_sites``).
        activation: what follows it and is computed with it.

    Raises:
        MeasurementError: another operator, or the shape does not fit.
    """
    n, k = site.shape
    if site.conv is not None:
        geometry = site.conv
        if geometry.pads is None or len(shape) != geometry.ndim + 2:
            raise MeasurementError("the size of its output is not known")
        axes = zip(
            shape[2:], geometry.pads[: geometry.ndim], geometry.pads[geometry.ndim :],
            geometry.kernel_shape, geometry.dilations, geometry.strides, strict=True,
        )  # fmt: skip
        places = [
            (size + before + after - dilation * (side - 1) - 1) // stride + 1
            for size, before, after, side, dilation, stride in axes
        ]
        rows = shape[0] * math.prod(places)
        return Workload(
            "Conv", rows, n, k, geometry.kernel_shape, geometry.strides, geometry.group, activation
        )  # fmt: skip
    if site.op not in ("MatMul", "Gemm"):
        raise MeasurementError(f"no cost model of {site.op}")
    return Workload(site.op, math.prod(shape) // k, n, k, activation=activation)


_KEY = re.compile(
    r"profile (.+): ([a-z-]+(?: [a-z0-9:x]+)?) density=([01](?:\.\d{1,9})?|\d(?:\.\d{1,6})?e-\d\d)"
    r" threads=(\d{1,4}) copies=(\d{1,4}) seed=(\d{1,18})"
)


@dataclass(frozen=True)
class ProfileKey:
    """Key of the measured times of one product in a cost table; ``str`` and ``parse`` are inverse.

    Attributes:
        work: the product.
        series: what is varied: ``pattern 16x1`` (float and dynamically quantised forms of one mask), ``static 16x4``
            (activations of fixed range), ``low-rank``, ``dense``.
        density: share of the numbers of the weight that are left.
        threads: of the sessions.
        copies: that took turns (see ``verify.benchmark``).
        seed: of weights, masks and activations.
    """

    work: Workload
    series: str
    density: float
    threads: int
    copies: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise SpecError(f"a density lies in (0, 1], not {self.density:g}")

    def __str__(self) -> str:
        return (
            f"profile {self.work}: {self.series} density={self.density:.6g} threads={self.threads} "
            f"copies={self.copies} seed={self.seed}"
        )

    @classmethod
    def parse(cls, text: str) -> ProfileKey | None:
        """Return the key that ``str`` wrote so; None for keys of other entries.

        Raises:
            SpecError: it begins like one, and is none.
        """
        if not text.startswith("profile "):
            return None
        found = _KEY.fullmatch(text)
        if found is None:
            raise SpecError(f"no key of a profile: {text[:80]!r}")
        work, series, share, *counts = found.groups()
        return cls(Workload.parse(work), series, float(share), *map(int, counts))


def call_key(threads: int) -> str:
    """Key of what running a session costs that computes nothing, ``empty`` in ms."""
    return f"call threads={threads}"


def model_key(model: Model, inputs: Mapping[str, npt.NDArray[np.generic]], threads: int) -> str:
    """Key of the time of a whole model as it is, ``dense`` in ms, on inputs of these shapes."""
    shapes = {name: list(array.shape) for name, array in sorted(inputs.items())}
    text = f"{model.fingerprint()} {json.dumps(shapes)}"
    return f"whole {hashlib.sha256(text.encode()).hexdigest()[:16]} threads={threads}"
