"""Recipes on disk: TOML with the pipeline as a list of specs and per-site overrides.

pipeline = ["tidy", "prune-magnitude{pattern=2:4}"]

[[override]]
match = "re:.*classifier.*"
skip = true

A plan is a recipe with choices per site, see ``sparsecc.pm.choices``; its table ``[plan]`` says where it is from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from sparsecc.errors import SpecError
from sparsecc.pm.choices import expanded, parse_choices
from sparsecc.pm.context import SiteOverride
from sparsecc.sparse import Pattern
from sparsecc.target.spec import suggestion

__all__ = [
    "RECIPE_KEYS",
    "basic_string",
    "format_overrides",
    "format_recipe",
    "format_steps",
    "load_document",
    "parse_recipe",
    "recipe_parts",
    "refuse_huge",
]

#: Keys of a recipe; the last two are those of a plan.
RECIPE_KEYS = ("pipeline", "override", "plan", "item")

_OVERRIDE_TYPES: dict[str, tuple[type, ...]] = {
    "match": (str,),
    "pattern": (str,),
    "sparsity": (float, int),
    "skip": (bool,),
    "param_ratio": (float, int),
}
_NUMBERS = ("sparsity", "param_ratio")


def parse_recipe(text: str, source: str) -> tuple[list[str], tuple[SiteOverride, ...]]:
    """Return the pass specs and overrides of a recipe or plan; ``source`` names it in errors.

    Raises:
        SpecError: not TOML, an unknown key, or a value of the wrong type.
    """
    document = load_document(text, source)
    steps, overrides = recipe_parts(document, source)
    return expanded(steps, parse_choices(document.get("item", []), source), source), overrides


def load_document(text: str, source: str) -> dict[str, Any]:
    """Return the TOML document of a recipe, whose keys are known.

    Raises:
        SpecError: not TOML, or an unknown key.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{source}: not a TOML recipe: {error}") from error
    _refuse_unknown(document, RECIPE_KEYS, source)
    return document


def recipe_parts(document: dict[str, Any], source: str) -> tuple[list[str], tuple[SiteOverride, ...]]:
    """Return the steps of the pipeline as they are written, and the overrides.

    Raises:
        SpecError: a value of the wrong type.
    """
    specs = document.get("pipeline")
    if not isinstance(specs, list) or not all(isinstance(item, str) for item in specs):
        raise SpecError(f'{source}: needs pipeline = ["tidy", ...], a list of pass specs')
    overrides = document.get("override", [])
    if not isinstance(overrides, list):
        raise SpecError(f"{source}: override must be a list of tables; write [[override]] with two brackets")
    return specs, tuple(
        _parse_override(table, f"{source}: override {i + 1}") for i, table in enumerate(overrides)
    )


def format_recipe(specs: Sequence[str], overrides: Sequence[SiteOverride]) -> str:
    """Return the TOML text that ``parse_recipe`` reads back."""
    return "\n".join([format_steps(specs), *format_overrides(overrides)]) + "\n"


def format_steps(steps: Sequence[str]) -> str:
    """Return the key ``pipeline`` of a recipe, without a line end behind it."""
    return "\n".join(["pipeline = [", *(f"  {basic_string(step)}," for step in steps), "]"])


def format_overrides(overrides: Sequence[SiteOverride]) -> list[str]:
    """Return the lines of the tables ``[[override]]``, each with an empty one before it."""
    lines = []
    for item in overrides:
        lines += ["", "[[override]]", f"match = {basic_string(item.match)}"]
        if item.pattern is not None:
            lines.append(f"pattern = {basic_string(str(item.pattern))}")
        for key in _NUMBERS:
            if getattr(item, key) is not None:
                lines.append(f"{key} = {float(getattr(item, key))!r}")
        if item.skip:
            lines.append("skip = true")
    return lines


def _parse_override(table: object, where: str) -> SiteOverride:
    if not isinstance(table, dict):
        raise SpecError(f"{where}: must be a table; write [[override]] above its keys")
    _refuse_unknown(table, _OVERRIDE_TYPES, where)
    if "match" not in table:
        raise SpecError(f'{where}: needs match = "GLOB" or match = "re:EXPRESSION"')
    for key, value in table.items():
        if not isinstance(value, _OVERRIDE_TYPES[key]) or (isinstance(value, bool) and key != "skip"):
            wanted = "a number" if key in _NUMBERS else {"skip": "true or false"}.get(key, "text in quotes")
            raise SpecError(f"{where}: {key} must be {wanted}, got {value!r}")
        refuse_huge(value, f"{where}: {key}")
    sparsity, ratio = (float(table[key]) if key in table else None for key in _NUMBERS)
    try:
        pattern = Pattern.parse(table["pattern"]) if "pattern" in table else None
        return SiteOverride(table["match"], pattern, sparsity, table.get("skip", False), ratio)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def refuse_huge(value: object, what: str) -> None:
    """Raise ``SpecError`` if ``value`` is a whole number of more than 64 bits, which TOML does not have."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise SpecError(f"{what} is a number of too many digits")


def _refuse_unknown(table: dict[str, Any], known: Sequence[str] | dict[str, Any], where: str) -> None:
    for key in table:
        if key not in known:
            raise SpecError(
                f"{where}: unknown key '{key}'{suggestion(key, known)}; known: {', '.join(known)}"
            )


def basic_string(text: str) -> str:
    """Return ``text`` as a TOML basic string; control characters and the two specials are escaped."""
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    escaped = [
        named.get(char) or (f"\\u{ord(char):04X}" if ord(char) < 32 or ord(char) == 127 else char)
        for char in text
    ]
    return '"' + "".join(escaped) + '"'
