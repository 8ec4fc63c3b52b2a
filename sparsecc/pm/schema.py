"""JSON Schema of recipes and plans, from the types of the options of all passes: for editors and other programs.

It admits every file that is read; what depends on several values at once is refused only by reading.
"""

from __future__ import annotations

from typing import Any

from sparsecc.pm.base import Pass, summary_of
from sparsecc.pm.choices import DENSE, ITEMS, NARROW
from sparsecc.pm.registry import get_pass, pass_names

__all__ = ["recipe_schema"]

#: Options in braces, whatever they are.
_OPTIONS = r'(?:\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\})?'

_STRING = {"type": "string"}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of recipe and plan files."""
    names = pass_names()
    one = f"(?:{'|'.join(names)}){_OPTIONS}"
    passes = {name: _pass_schema(get_pass(name)) for name in names}
    several = {
        "description": "Several passes with commas between them.",
        "type": "string",
        "pattern": rf"^\s*{one}(?:\s*,\s*{one})+\s*$",
    }
    any_pass = [{"$ref": f"#/$defs/{name}"} for name in names]
    spec = {"anyOf": [*any_pass, {"$ref": "#/$defs/several"}]}
    markers = {"enum": [ITEMS, NARROW], "description": "Where the passes of [[item]] tables go."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsecc recipe or plan",
        "type": "object",
        "required": ["pipeline"],
        "additionalProperties": False,
        "properties": {
            "pipeline": {"type": "array", "items": {"anyOf": [markers, {"$ref": "#/$defs/spec"}]}},
            "override": {"type": "array", "items": _override_schema()},
            "plan": {
                "type": "object",
                "description": "Where a plan is from, and what it predicts.",
                "additionalProperties": {"type": ["string", "number", "boolean"]},
                "properties": {"format": {"const": 1}},
            },
            "item": {"type": "array", "items": _item_schema()},
        },
        "$defs": {**passes, "several": several, "spec": spec},
    }


def _pass_schema(pass_type: type[Pass]) -> dict[str, Any]:
    """One pass as text: its name, and options in braces with spaces between them."""
    infos = pass_type.option_infos()
    options = "|".join(f"{info.name.replace('-', '[-_]')}={info.pattern}" for info in infos)
    braces = rf"(?:\{{\s*(?:(?:{options})(?:\s+(?:{options}))*)?\s*\}})?" if infos else r"(?:\{\s*\})?"
    lines = [f"{info.name}: {info.type}" + _default(info.default) for info in infos]
    return {
        "type": "string",
        "pattern": rf"^\s*{pass_type.name}{braces}\s*$",
        "description": "\n".join([f"{summary_of(pass_type)}.", *lines]),
    }


def _default(text: str | None) -> str:
    return ", required" if text is None else f", default {text}" if text else ""


def _override_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["match"],
        "additionalProperties": False,
        "properties": {
            "match": {"type": "string", "description": "A glob on names of sites, or re:EXPRESSION."},
            "pattern": {"type": "string", "description": "unstructured, dense, N:M or RxC."},
            "sparsity": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "param_ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "skip": {"type": "boolean", "description": "Leave these sites alone."},
        },
    }


def _item_schema() -> dict[str, Any]:
    choice = {"anyOf": [{"const": DENSE}, {"$ref": "#/$defs/spec"}]}
    return {
        "type": "object",
        "required": ["name", "sites", "choice"],
        "additionalProperties": False,
        "properties": {
            "name": _STRING,
            "sites": {"type": "array", "items": _STRING, "minItems": 1},
            "choice": {
                **choice,
                "description": "What the sites take: the name of a candidate or any passes.",
            },
            "sensitivity": {"type": "number"},
            "groups": {"type": "object", "additionalProperties": _STRING},
            "candidates": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "ms", "bytes", "error"],
                    "additionalProperties": False,
                    "properties": {
                        "name": choice,
                        "ms": {"type": "number"},
                        "bytes": {"type": "integer"},
                        "error": {"type": "number"},
                        "source": _STRING,
                        "spread": {"type": "number"},
                        "custom_ops": {"type": "boolean"},
                        "note": _STRING,
                    },
                },
            },
        },
    }
