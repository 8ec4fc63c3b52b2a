"""Plans on disk: a TOML recipe that says of each item what was chosen, and what else there was to choose.

pipeline = ["tidy", "@items", "@narrow", "choose-layout", "confirm-layout", "lower-sparse"]

[plan]
model = "<SHA-256 of the model file>"
ms = 3.5

[[item]]
name = "fc1"
sites = ["fc1"]
choice = "prune-wanda{pattern=16x1 sparsity=0.5}"
candidates = [
  {name = "dense", ms = 2.0, bytes = 4096, error = 0.0},
  {name = "prune-wanda{pattern=16x1 sparsity=0.5}", ms = 1.1, bytes = 2304, error = 0.08},
]

``optimize --recipe`` runs it; what it runs follows from ``pipeline`` and the choices alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.ir.replacing import replacing
from sparsecc.plan.choose import choice_of
from sparsecc.plan.items import Candidate, Choice, Estimate, Item
from sparsecc.plan.presets import preset
from sparsecc.plan.tables import table_shapes
from sparsecc.pm import Pipeline, SiteOverride
from sparsecc.pm.choices import ITEMS, NARROW, SiteChoice, expanded, parse_choices, split_specs
from sparsecc.pm.pipeline import read_recipe
from sparsecc.pm.recipe import (
    basic_string,
    format_overrides,
    format_steps,
    load_document,
    recipe_parts,
    refuse_huge,
)
from sparsecc.target.spec import parse_specs, suggestion

__all__ = [
    "PlanFile",
    "Value",
    "format_plan",
    "parse_plan",
    "pipeline_of",
    "plan_of",
    "read_plan",
    "site_names",
    "write_plan",
]

Value = str | int | float | bool

#: Version of the format, in ``[plan]``.
_FORMAT = 1

#: Types of the values of a candidate, and what is left out where it is the default.
_CANDIDATE_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "ms": (float, int), "bytes": (int,), "error": (float, int), "source": (str,),
    "spread": (float, int), "custom_ops": (bool,), "note": (str,),
}  # fmt: skip
_ITEM_KEYS = ("name", "sites", "choice", "sensitivity", "groups", "candidates")

_HEAD = """\
# Change the choice of an item to the name of another candidate, or to any passes such as
# "prune-magnitude{pattern=2:4},quantize", and run `sparsecc optimize MODEL --recipe FILE` again.
"""


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds.

    Attributes:
        items: what there was to choose between.
        chosen: by name of the item the specs that were chosen; ``dense`` for none.
        steps: the pipeline, in which ``@items`` and ``@narrow`` stand for the passes of items.
        overrides: per-site settings.
        about: where it is from: ``model`` and ``data`` (digests), ``seed``, ``metric``, ``budget`` and others.
    """

    items: tuple[Item, ...]
    chosen: Mapping[str, str]
    steps: tuple[str, ...]
    overrides: tuple[SiteOverride, ...] = ()
    about: Mapping[str, Value] = field(default_factory=dict)

    @property
    def pipeline(self) -> Pipeline:
        """What makes the model: the same as ``Pipeline.from_toml`` of the file."""
        choices = [SiteChoice(item.sites, split_specs(self.chosen[item.name])) for item in self.items]
        return Pipeline.parse_all(expanded(self.steps, choices, "plan"), self.overrides)

    @property
    def choice(self) -> Choice | None:
        """The choice with its predicted sums; None where something was chosen that is no candidate."""
        numbers = {}
        for item in self.items:
            names = [candidate.name for candidate in item.candidates]
            if self.chosen[item.name] not in names:
                return None
            numbers[item.name] = names.index(self.chosen[item.name])
        return choice_of(self.items, numbers)


def plan_of(
    items: Sequence[Item],
    choice: Choice,
    *,
    about: Mapping[str, Value] | None = None,
    overrides: Sequence[SiteOverride] = (),
    **options: Any,
) -> PlanFile:
    """Return the plan of ``choice``.

    Args:
        items: what was chosen for.
        choice: one of the candidates of each.
        about: where it is from.
        overrides: per-site settings.
        options: of ``sparsecc.plan.preset`` for what stands around the passes of items: ``recover``,
            ``keep_slower``, ``standard_ops_only``, ``calibrated``. The type of values is that of the choices.
    """
    chosen = {item.name: item.candidates[choice.chosen[item.name]].name for item in items}
    types = {
        spec.options.get("values", "fp16")
        for text in chosen.values()
        for spec in (() if text == "dense" else parse_specs(text))
        if spec.name == "round-weights"
    }
    if len(types) == 1:
        options = {"values": types.pop(), **options}
    return PlanFile(tuple(items), chosen, _steps(**options), tuple(overrides), dict(about or {}))


def pipeline_of(items: Sequence[Item], choice: Choice, **options: Any) -> Pipeline:
    """Return the pipeline that makes the model of ``choice``; the arguments are those of ``plan_of``."""
    return plan_of(items, choice, **options).pipeline


def _steps(**options: Any) -> tuple[str, ...]:
    """The steps of the preset that prunes and quantises, with markers in the place of what does."""
    steps: list[str] = []
    for step in preset(method="magnitude", quantize="int8", **options).passes:
        marker = {"prune-magnitude": ITEMS, "round-weights": NARROW, "quantize": NARROW}.get(step.name)
        if marker is None:
            steps.append(str(step))
        elif marker not in steps:
            steps.append(marker)
    return tuple(steps)


def write_plan(path: str | Path, plan: PlanFile) -> None:
    """Write ``plan`` to ``path``, whole or not at all; equal plans give equal bytes.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(Path(path)) as stream:
        stream.write(format_plan(plan).encode())


def format_plan(plan: PlanFile) -> str:
    """Return the TOML text that ``parse_plan`` reads back."""
    about: dict[str, Value] = {"format": _FORMAT, **dict(sorted(plan.about.items()))}
    choice = plan.choice
    if choice is not None:
        about |= {"ms": float(choice.ms), "bytes": choice.bytes, "damage": float(choice.damage)}
    lines = [_HEAD + format_steps(plan.steps), "", "[plan]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in about.items()]
    lines += format_overrides(plan.overrides)
    for item in plan.items:
        lines += ["", "[[item]]", f"name = {basic_string(item.name)}"]
        lines.append(f"sites = [{', '.join(basic_string(site) for site in item.sites)}]")
        lines.append(f"choice = {basic_string(plan.chosen[item.name])}")
        if item.sensitivity != 1.0:
            lines.append(f"sensitivity = {_value(float(item.sensitivity))}")
        if item.groups is not None:
            lines.append(f"groups = {_inline(dict(sorted(item.groups.items())))}")
        lines.append("candidates = [")
        lines += [f"  {_inline(_candidate_table(own))}," for own in item.candidates]
        lines.append("]")
    return "\n".join(lines) + "\n"


def _candidate_table(candidate: Candidate) -> dict[str, Value]:
    table: dict[str, Value] = {
        "name": candidate.name,
        "ms": float(candidate.time.ms),
        "bytes": int(candidate.bytes),
        "error": float(candidate.error),
    }
    if candidate.time.source != "measured":
        table["source"] = candidate.time.source
    if candidate.time.spread:
        table["spread"] = float(candidate.time.spread)
    if candidate.custom_ops:
        table["custom_ops"] = True
    if candidate.note:
        table["note"] = candidate.note
    return table


def _inline(table: Mapping[str, Value]) -> str:
    return "{" + ", ".join(f"{_key(key)} = {_value(value)}" for key, value in table.items()) + "}"


def _key(text: str) -> str:
    """A TOML key: bare where it may be."""
    bare = text.isascii() and text.replace("_", "").replace("-", "").isalnum()
    return text if bare else basic_string(text)


def _value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return basic_string(value)
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def read_plan(
    path: str | Path, *, sites: Collection[str] | None = None, model: str | None = None
) -> tuple[PlanFile, list[str]]:
    """Return the plan in a file, and warnings.

    Args:
        path: the file.
        sites: names of those that the model has; none are checked by default.
        model: digest of the model file; another one than the plan was made for is a warning.

    Raises:
        UsageError: the file cannot be read.
        SpecError: it is no plan, or names sites that the model does not have.
    """
    plan = parse_plan(read_recipe(path), source=str(path))
    if sites is not None:
        for item in plan.items:
            for site in item.sites:
                if site not in sites:
                    raise SpecError(
                        f"{path}: item '{item.name}': the model has no site '{site}'{suggestion(site, sites)}; "
                        "make a plan for this model"
                    )
    made_for = plan.about.get("model")
    if model is not None and made_for is not None and made_for != model:
        return plan, [f"{path} was made for another model file: its predictions may not hold"]
    return plan, []


def site_names(model: Model) -> list[str]:
    """Names that a plan for ``model`` may use, of sites, of what could be some, and of tables of embeddings."""
    sites = [*(site.name for site in model.sites()), *(name for name, _ in model.unsupported_sites())]
    return [*sites, *table_shapes(model)]


def parse_plan(text: str, *, source: str = "plan") -> PlanFile:
    """Return the plan of a file's text; ``source`` names it in errors.

    Raises:
        SpecError: it is no plan.
    """
    document = load_document(text, source)
    steps, overrides = recipe_parts(document, source)
    tables = document.get("item", [])
    choices = parse_choices(tables, source)
    expanded(steps, choices, source)
    items, chosen = [], {}
    for number, (table, choice) in enumerate(zip(tables, choices, strict=True), 1):
        item = _parse_item(table, f"{source}: item {number}")
        if item.name in chosen:
            raise SpecError(f"{source}: item {number}: there is another '{item.name}'")
        items.append(item)
        chosen[item.name] = ",".join(choice.passes) or "dense"
    about = document.get("plan", {})
    if not isinstance(about, dict) or not all(isinstance(own, str | int | float) for own in about.values()):
        raise SpecError(f"{source}: [plan] must be a table of texts and numbers")
    if about.get("format", _FORMAT) != _FORMAT:
        raise SpecError(f"{source}: plan format {about['format']}, expected {_FORMAT}; make the plan again")
    predicted = ("format", "ms", "bytes", "damage")
    rest = {key: value for key, value in about.items() if key not in predicted}
    return PlanFile(tuple(items), chosen, tuple(steps), overrides, rest)


def _parse_item(table: dict[str, Any], where: str) -> Item:
    """An item whose name, sites and choice are known to be right."""
    where = f"{where} '{table['name']}'"
    for key in table:
        if key not in _ITEM_KEYS:
            raise SpecError(
                f"{where}: unknown key '{key}'{suggestion(key, _ITEM_KEYS)}; known: {', '.join(_ITEM_KEYS)}"
            )
    sensitivity, groups = table.get("sensitivity", 1.0), table.get("groups")
    if isinstance(sensitivity, bool) or not isinstance(sensitivity, float | int):
        raise SpecError(f"{where}: sensitivity must be a number, got {sensitivity!r}")
    refuse_huge(sensitivity, f"{where}: sensitivity")
    if groups is not None and not (
        isinstance(groups, dict) and all(isinstance(own, str) for own in groups.values())
    ):
        raise SpecError(f"{where}: groups must be a table of texts")
    candidates = table.get("candidates", [])
    if not isinstance(candidates, list):
        raise SpecError(f"{where}: candidates must be a list of tables")
    found = tuple(_parse_candidate(own, f"{where}: candidate {n}") for n, own in enumerate(candidates, 1))
    return Item(table["name"], tuple(table["sites"]), found, float(sensitivity), groups)


def _parse_candidate(table: object, where: str) -> Candidate:
    if not isinstance(table, dict):
        raise SpecError(
            f'{where}: must be a table such as {{name = "dense", ms = 1.0, bytes = 8, error = 0.0}}'
        )
    for key, value in table.items():
        if key not in _CANDIDATE_TYPES:
            raise SpecError(
                f"{where}: unknown key '{key}'{suggestion(key, _CANDIDATE_TYPES)}; "
                f"known: {', '.join(_CANDIDATE_TYPES)}"
            )
        types = _CANDIDATE_TYPES[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SpecError(f"{where}: {key} must be {_WORDS[types[0]]}, got {value!r}")
        refuse_huge(value, f"{where}: {key}")
    missing = [key for key in ("name", "ms", "bytes", "error") if key not in table]
    if missing:
        raise SpecError(f"{where}: needs {', '.join(missing)}")
    try:
        passes = split_specs(table["name"])
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    time = Estimate(float(table["ms"]), table.get("source", "measured"), float(table.get("spread", 0.0)))
    custom, note = table.get("custom_ops", False), table.get("note", "")
    return Candidate(passes, float(table["error"]), time, table["bytes"], custom, note)


_WORDS = {str: "text in quotes", float: "a number", int: "a whole number", bool: "true or false"}
