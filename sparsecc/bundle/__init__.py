"""Everything a device needs to run a model, in one folder: ``sparsecc bundle``."""

from __future__ import annotations

from sparsecc.bundle.make import Bundle, make_bundle
from sparsecc.bundle.native import TRIPLES

__all__ = ["TRIPLES", "Bundle", "make_bundle"]
