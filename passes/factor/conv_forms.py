"""Forms of a convolution's weight: several smaller convolutions in a row."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir

from sparsecc.ir import Site
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.prune.gram import Matrix

__all__ = ["Canonical", "KernelForm", "Separable", "Spatial", "Tucker", "stage"]


def stage(site: Site, axes: Iterable[int], groups: int = 1) -> dict[str, onnx_ir.Attr]:
    """Return the attributes of a convolution that takes over the geometry of the site's along some spatial axes.

    Along all others its kernel has one entry, steps by one and pads nothing.
    """
    conv = site.conv
    assert conv is not None, "a form of convolutions"
    axes = set(axes)

    def chosen(values: tuple[int, ...], other: int) -> list[int]:
        return [value if at % conv.ndim in axes else other for at, value in enumerate(values)]

    found: dict[str, list[int] | int | str] = {
        "kernel_shape": chosen(conv.kernel_shape, 1),
        "strides": chosen(conv.strides, 1),
        "dilations": chosen(conv.dilations, 1),
        "group": groups,
    }
    if conv.pads is not None:
        found["pads"] = chosen(conv.pads, 0)
    else:  # SAME_* at an unknown size: nothing is added where kernel and step are 1
        found["auto_pad"] = site.node.attributes["auto_pad"].as_string()
    return {name: onnx_ir.convenience.convert_attribute(name, value) for name, value in found.items()}


@dataclass(frozen=True)
class KernelForm(Form):
    """Base of forms for convolutions of one group.

    Attributes:
        strides: of the site, per spatial axis: what comes before a step works on more positions.
    """

    strides: tuple[int, ...]

    @abstractmethod
    def tensor(self) -> Matrix:
        """Return the weight that it stands for, ``[N, C, *kernel]``."""

    def dense(self) -> Matrix:
        """Return the weight ``[N, K]``."""
        found = self.tensor()
        return found.reshape(len(found), -1)

    @property
    def before(self) -> int:
        """Positions of the input per position of the output."""
        return math.prod(self.strides)


@dataclass(frozen=True)
class Spatial(KernelForm):
    """A convolution along the first axis of the kernel, then one along the others.

    Attributes:
        left: ``[N, r, *rest]``.
        right: ``[r, C, first]``.
    """

    left: Matrix
    right: Matrix

    def tensor(self) -> Matrix:
        """Return the weight."""
        parts = self.left.astype(np.float64), self.right.astype(np.float64)
        return np.asarray(np.einsum("or...,rci->oci...", *parts))

    @property
    def macs(self) -> int:
        """The first one steps along its own axis only."""
        return self.left.size + self.right.size * math.prod(self.strides[1:])

    def describe(self) -> str:
        """The channels between."""
        return f"spatial rank {len(self.right)}"

    def emit(self, chain: Chain) -> None:
        """Add both; each pads and steps along its own axes."""
        site, ndim = chain.site, len(self.strides)
        right = self.right.reshape(*self.right.shape, *(1,) * (ndim - 1))
        inner = chain.conv(chain.source, right, "right", list(stage(site, [0]).values()))
        left = np.expand_dims(self.left, 2)
        chain.finish(chain.conv(inner, left, "left", list(stage(site, range(1, ndim)).values())))


@dataclass(frozen=True)
class Tucker(KernelForm):
    """Fewer channels in front of the kernel and behind it.

    Attributes:
        core: ``[r_out, r_in, *kernel]``.
        left: ``[N, r_out]``, or None where the core gives all N.
        right: ``[r_in, C]``, or None where the core reads all C.
    """

    core: Matrix
    left: Matrix | None
    right: Matrix | None

    def tensor(self) -> Matrix:
        """Return the weight."""
        found = self.core.astype(np.float64)
        if self.left is not None:
            found = np.tensordot(self.left.astype(np.float64), found, axes=1)
        if self.right is not None:
            found = np.einsum("oa...,ac->oc...", found, self.right.astype(np.float64))
        return found

    @property
    def macs(self) -> int:
        """The first one works on all positions of the input."""
        return self.numbers + (0 if self.right is None else self.right.size * (self.before - 1))

    def describe(self) -> str:
        """Both ranks."""
        return f"Tucker ranks {self.core.shape[1]} to {self.core.shape[0]}"

    def emit(self, chain: Chain) -> None:
        """Add up to three convolutions, the outer ones 1x1."""
        value = chain.source
        if self.right is not None:
            value = chain.pointwise(value, self.right, "right")
        value = chain.conv(value, self.core, "core", chain.geometry)
        chain.finish(value if self.left is None else chain.pointwise(value, self.left, "left"))


@dataclass(frozen=True)
class Canonical(KernelForm):
    """Products of vectors: 1x1, one kernel per channel, 1x1.

    Attributes:
        left: ``[N, r]``.
        right: ``[r, C]``.
        kernels: ``[r, kernel]``, the entries of all axes flat.
        kernel: entries per axis.
    """

    left: Matrix
    right: Matrix
    kernels: Matrix
    kernel: tuple[int, ...]

    def tensor(self) -> Matrix:
        """Return the weight."""
        parts = [part.astype(np.float64) for part in (self.left, self.right, self.kernels)]
        found = np.einsum("or,rc,rp->ocp", *parts, optimize=True)
        return np.asarray(found.reshape(*found.shape[:2], *self.kernel))

    @property
    def macs(self) -> int:
        """The first one works on all positions of the input."""
        return self.numbers + self.right.size * (self.before - 1)

    def describe(self) -> str:
        """The number of components."""
        return f"CP rank {len(self.right)}"

    def emit(self, chain: Chain) -> None:
        """Add three convolutions; the depthwise one has the geometry of the site."""
        rank, axes = len(self.right), range(len(self.kernel))
        value = chain.pointwise(chain.source, self.right, "right")
        kernels = self.kernels.reshape(rank, 1, *self.kernel)
        value = chain.conv(value, kernels, "kernels", list(stage(chain.site, axes, rank).values()))
        chain.finish(chain.pointwise(value, self.left, "left"))


@dataclass(frozen=True)
class Separable(KernelForm):
    """Some kernels for each channel of the input, then 1x1.

    Attributes:
        left: ``[N, C, r]``.
        right: ``[C, r, *kernel]``.
    """

    left: Matrix
    right: Matrix

    def tensor(self) -> Matrix:
        """Return the weight."""
        parts = self.left.astype(np.float64), self.right.astype(np.float64)
        return np.asarray(np.einsum("oct,ct...->oc...", *parts))

    @property
    def macs(self) -> int:
        """All of it works on positions of the output."""
        return self.numbers

    def describe(self) -> str:
        """Kernels per channel."""
        return f"{self.right.shape[1]} kernels per channel, then 1x1"

    def emit(self, chain: Chain) -> None:
        """Add depthwise convolutions, one for each kernel of a channel, side by side, then 1x1.

        One grouped convolution with several outputs per group is the same, but onnxruntime has no fast kernel for it.
        """
        channels, count = self.right.shape[:2]
        geometry = list(stage(chain.site, range(len(self.strides)), channels).values())
        parts = [
            chain.conv(chain.source, self.right[:, [at]], f"kernel{at}", geometry) for at in range(count)
        ]
        value = parts[0] if count == 1 else chain.node("Concat", parts, "kernels", {"axis": 1})
        left = self.left.transpose(0, 2, 1).reshape(len(self.left), -1)
        chain.finish(chain.pointwise(value, left, "left"))
