"""Models: loading, saving, and the linear sites in them, over onnx-ir.

``sparsecc.ir.graphsurgeon`` lends a model to ONNX GraphSurgeon; ``sparsecc.ir.sparse_ops`` makes sparse
nodes.
"""

from __future__ import annotations

from sparsecc.ir.geometry import ConvGeometry, conv_geometry
from sparsecc.ir.model import Model
from sparsecc.ir.planes import Planes
from sparsecc.ir.shapes import TensorSpec
from sparsecc.ir.sites import Site, name_matches
from sparsecc.ir.sparse_tensors import sparse_tensors

__all__ = [
    "ConvGeometry",
    "Model",
    "Planes",
    "Site",
    "TensorSpec",
    "conv_geometry",
    "name_matches",
    "sparse_tensors",
]
