"""Choices per site in a recipe: which passes each item takes, and the pipeline that this makes.

pipeline = ["tidy", "@items", "@narrow", "choose-layout", "confirm-layout", "lower-sparse"]

[[item]]
name = "fc1"
sites = ["fc1"]
choice = "prune-wanda{pattern=16x1 sparsity=0.5},quantize"

Items that take the same pass share one, which matches just their sites. In the place of ``@items`` come the passes that
remove, factorise and prune, in that order; in the place of ``@narrow`` those that make types of values narrower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsecc.errors import SpecError
from sparsecc.target.spec import Spec, format_spec, parse_specs, suggestion

__all__ = [
    "DENSE",
    "ITEMS",
    "NARROW",
    "SiteChoice",
    "changes_names",
    "exact_match",
    "expanded",
    "parse_choices",
    "split_specs",
]

#: The choice of what the sites have already.
DENSE = "dense"

#: Where in a pipeline the passes of items go, and those of them that only make types narrower.
ITEMS, NARROW = "@items", "@narrow"

#: Passes that remove whole units or blocks, and those beside ``factor-...`` that split weights.
_REMOVING = ("prune-structured", "prune-depth", "prune-experts", "share-weights")
_SPLITTING = ("sparse-lowrank", "prune-tiles", "prune-armor")


@dataclass(frozen=True)
class SiteChoice:
    """Sites that take the same passes, as specs without ``match``, in order."""

    sites: tuple[str, ...]
    passes: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """One pass for some sites, and where it stands among others."""

    rank: int
    place: int
    spec: str


@dataclass(frozen=True)
class _Group:
    """Sites that take a pass: as they are, or after other passes that may have made several of one."""

    sites: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)


def split_specs(text: str) -> tuple[str, ...]:
    """Return the specs of a choice, each as text; none for ``dense``.

    Raises:
        SpecError: not specs.
    """
    return () if text == DENSE else tuple(format_spec(spec.name, spec.options) for spec in parse_specs(text))


def parse_choices(tables: object, source: str) -> list[SiteChoice]:
    """Return what the tables ``[[item]]`` of a recipe choose.

    Raises:
        SpecError: a table that is no item, or a choice that is neither a candidate nor specs of passes.
    """
    if not isinstance(tables, list):
        raise SpecError(f"{source}: item must be a list of tables; write [[item]] with two brackets")
    choices, seen = [], dict[str, str]()
    for number, table in enumerate(tables, 1):
        choice = _parse_choice(table, f"{source}: item {number}")
        for site in choice.sites:
            if site in seen:
                raise SpecError(f"{source}: the site '{site}' is in the items {seen[site]} and {number}")
            seen[site] = str(number)
        choices.append(choice)
    return choices


def _parse_choice(table: object, where: str) -> SiteChoice:
    if not isinstance(table, dict):
        raise SpecError(f"{where}: must be a table; write [[item]] above its keys")
    name, sites, text = table.get("name"), table.get("sites"), table.get("choice")
    if not isinstance(name, str) or not isinstance(text, str):
        raise SpecError(f'{where}: needs name = "..." and choice = "..."')
    where = f"{where} '{name}'"
    if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
        raise SpecError(f'{where}: needs sites = ["..."], the names of its sites')
    try:
        specs = [] if text == DENSE else parse_specs(text)
        for spec in specs:
            _check(spec)
    except SpecError as error:
        known = _candidate_names(table)
        listed = f" or one of its candidates ({'; '.join(known)})" if known else ""
        raise SpecError(
            f"{where}: choice '{text}'{suggestion(text, known)} must be specs of passes{listed}: {error}"
        ) from None
    return SiteChoice(tuple(sites), tuple(format_spec(spec.name, spec.options) for spec in specs))


def _candidate_names(table: dict[str, Any]) -> list[str]:
    candidates = table.get("candidates")
    if not isinstance(candidates, list):
        return []
    names = [own.get("name") for own in candidates if isinstance(own, dict)]
    return [name for name in names if isinstance(name, str)]


def _check(spec: Spec) -> None:
    """Refuse what is no pass with options of its own, or says itself where it applies."""
    from sparsecc.pm.registry import get_pass

    if "match" in spec.options:
        raise SpecError(f"{spec.name}: leave match out, an item has its own sites")
    known = [info.name for info in get_pass(spec.name).option_infos()]
    if "match" not in known:
        raise SpecError(f"{spec.name} is for whole models: put it into the pipeline")
    get_pass(spec.name).from_options(spec.options)


def expanded(steps: Sequence[str], choices: Sequence[SiteChoice], source: str) -> list[str]:
    """Return the specs of a pipeline whose ``steps`` may be ``@items`` and ``@narrow``.

    Without ``@narrow`` all passes of items go where ``@items`` is. Where items take 16-bit values, ``choose-layout``
    may store them.

    Raises:
        SpecError: markers that are missing, unknown or there twice; items that take different types of values.
    """
    for step in steps:
        if step.startswith("@") and step not in (ITEMS, NARROW):
            raise SpecError(
                f"{source}: unknown '{step}' in the pipeline{suggestion(step, (ITEMS, NARROW))}; "
                f"known: {ITEMS}, {NARROW}"
            )
    for marker in (ITEMS, NARROW):
        if list(steps).count(marker) > 1:
            raise SpecError(f"{source}: '{marker}' is in the pipeline twice; write it once")
    if choices and ITEMS not in steps:
        raise SpecError(f"{source}: needs '{ITEMS}' in its pipeline, where the passes of items go")
    if NARROW in steps and (ITEMS not in steps or list(steps).index(NARROW) < list(steps).index(ITEMS)):
        raise SpecError(f"{source}: '{NARROW}' must come behind '{ITEMS}' in the pipeline")
    wide, narrow = _grouped(choices)
    if NARROW not in steps:
        wide, narrow = wide + narrow, []
    places = {ITEMS: wide, NARROW: narrow}
    values = _one_type(choices, source)
    return [_storing(spec, values, source) for step in steps for spec in places.get(step, [step])]


def _one_type(choices: Sequence[SiteChoice], source: str) -> str | None:
    """The type of 16-bit values that items take, if any.

    Raises:
        SpecError: there are two, or several ways to quantise; a model has one of each.
    """
    from sparsecc.pm.registry import get_pass

    ways, types = dict[str, None](), dict[str, None]()
    for choice in choices:
        passes = [
            get_pass(spec.name).from_options(spec.options)
            for own in choice.passes
            for spec in parse_specs(own)
        ]
        narrow = [item for item in passes if item.narrows]
        if len(narrow) > len({item.name for item in narrow}):
            raise SpecError(
                f"{source}: the choice of '{choice.sites[0]}' has {narrow[-1].name} twice: leave one out"
            )
        ways |= {str(item): None for item in narrow if item.name == "quantize"}
        types |= {str(vars(item)["values"]): None for item in narrow if item.name == "round-weights"}
    if len(ways) > 1:
        raise SpecError(
            f"{source}: items take {' and '.join(ways)}: a model is quantised in one way, choose one"
        )
    if len(types) > 1:
        raise SpecError(
            f"{source}: items take values of {' and '.join(types)}: a model has one 16-bit type, choose one"
        )
    return next(iter(types), None)


def _storing(spec: str, values: str | None, source: str) -> str:
    """The same step; ``choose-layout`` with the type of values that items take.

    Raises:
        SpecError: it says another one.
    """
    if values is None or not spec.startswith("choose-layout"):
        return spec
    (parsed,) = parse_specs(spec)
    own = parsed.options.get("values", values)
    if own != values:
        raise SpecError(
            f"{source}: {spec} stores values of {own}, items take {values}: write values={values} into the pipeline"
        )
    return format_spec(parsed.name, {**parsed.options, "values": values})


def _grouped(choices: Sequence[SiteChoice]) -> tuple[list[str], list[str]]:
    """One pass for all sites that take it at the same place: those that are not narrow, and the narrow ones."""
    groups: dict[_Step, _Group] = {}
    for choice in choices:
        for number, step in enumerate(_steps(choice.passes)):
            group = groups.setdefault(step, _Group())
            (group.made if number else group.sites).extend(choice.sites)
    everything = [site for choice in choices for site in choice.sites]
    wide, narrow = list[str](), list[str]()
    for step in sorted(groups, key=_order):  # then in the order of items
        group = groups[step]
        own = {*group.sites, *group.made}
        match = exact_match(group.sites, group.made, [site for site in everything if site not in own])
        (spec,) = parse_specs(step.spec)
        text = format_spec(spec.name, {**spec.options, "match": match})
        (narrow if step.rank == _NARROW_RANK else wide).append(text)
    return wide, narrow


def _order(step: _Step) -> tuple[int, bool, int]:
    """Quantising comes last: what measures whether it pays compares with the model before it."""
    return step.rank, step.spec.startswith("quantize"), step.place


_NARROW_RANK = 4


def _steps(passes: Iterable[str]) -> list[_Step]:
    """The passes of one choice, whose order stays: one that would go before another goes beside it."""
    steps: list[_Step] = []
    for spec in passes:
        rank = max(_rank(spec), steps[-1].rank if steps else 0)
        place = sum(step.rank == rank for step in steps)
        steps.append(_Step(rank, place, spec))
    return steps


def _rank(spec: str) -> int:
    """Where a pass goes: removal, factorisation, order of channels, pruning, narrower types."""
    from sparsecc.pm.registry import get_pass

    (parsed,) = parse_specs(spec)
    if get_pass(parsed.name).narrows:
        return _NARROW_RANK
    if parsed.name in _REMOVING:
        return 0
    if changes_names(parsed.name):
        return 1
    return 2 if parsed.name == "permute" else 3


def changes_names(pass_name: str) -> bool:
    """Return whether the pass puts several sites, with names of their own, in the place of one."""
    return pass_name.startswith("factor-") or pass_name in _SPLITTING


def exact_match(sites: Sequence[str], made: Sequence[str] = (), others: Sequence[str] = ()) -> str:
    """Return the ``match`` that selects just these sites.

    Args:
        sites: their names.
        made: sites that count with what was made of them, whose names begin with theirs and a point.
        others: sites that are not meant, nor what was made of them, although their names may begin so too.
    """
    if not made:
        return rf"re:^{_alternatives(sites)}\Z"
    alike = [name for name in others if any(name.startswith(f"{site}.") for site in made)]
    refused = rf"(?!{_alternatives(alike)}(?:\..*)?\Z)" if alike else ""
    exact = f"{_alternatives(sites)}|" if sites else ""
    return rf"re:^{refused}(?:{exact}{_alternatives(made)}(?:\..*)?)\Z"


def _alternatives(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(name) for name in names)})"
