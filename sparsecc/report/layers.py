"""The layers of a report: one row for each item of a plan, or for each site where nothing was planned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsecc.report.charts import pair
from sparsecc.report.schema import CandidateRow, ItemRow, RunDocument, SiteRow
from sparsecc.report.svg import Html
from sparsecc.report.text import format_bytes, number, percent, sides, times

__all__ = ["Form", "Layer", "Tried", "forms", "layers"]

_MOST_FORMS = 7  # that have a colour of their own
_MOST_REASONS, _MOST_NAMES = 12, 6  # of forms that are no candidates, for one layer


@dataclass(frozen=True)
class Tried:
    """A candidate of a layer as text, and why it was not taken if it was not."""

    name: str
    ms: str
    bytes: str
    error: str
    damage: str
    why: str
    chosen: bool


@dataclass(frozen=True)
class Layer:
    """One row of the table of layers.

    Attributes:
        name: of the item or the site.
        about: operator, shape, and the other sites of the item.
        form: what it became; ``dense`` if nothing.
        detail: its layouts, or the options of its passes.
        before_ms, after_ms, before_bytes, after_bytes, error: numbers, None where unknown.
        source: where the times are from, if they are not all measured.
        reason: why it became that.
        tried: its candidates, the chosen one among them.
        dropped: why other forms are no candidates, how many, and their names.
    """

    name: str
    about: str
    form: str
    detail: str
    before_ms: float | None
    after_ms: float | None
    before_bytes: float | None
    after_bytes: float | None
    error: float | None
    source: str
    reason: str
    tried: tuple[Tried, ...] = ()
    dropped: tuple[tuple[str, int, str], ...] = ()

    @property
    def summary(self) -> str:
        """How many forms there were."""
        dropped = sum(count for _, count, _ in self.dropped)
        said = [f"{len(self.tried)} forms compared"] if self.tried else []
        return ", ".join([*said, *([f"{dropped} dropped before"] if dropped else [])])

    def time_bars(self, most: float) -> Html | None:
        """Bars of both times as shares of ``most``; None where one is unknown."""
        if self.before_ms is None or self.after_ms is None:
            return None
        told = f"time {number(self.before_ms)} ms before, {number(self.after_ms)} ms after"
        return pair(self.before_ms, self.after_ms, most, told)

    def byte_bars(self, most: float) -> Html | None:
        """The same of both sizes."""
        if self.before_bytes is None or self.after_bytes is None:
            return None
        told = f"{format_bytes(self.before_bytes)} before, {format_bytes(self.after_bytes)} after"
        return pair(self.before_bytes, self.after_bytes, most, told)


@dataclass(frozen=True)
class Form:
    """All layers of one form together."""

    name: str
    kind: str
    count: int
    before_ms: float | None
    after_ms: float | None
    before_bytes: float | None
    after_bytes: float | None


def layers(document: RunDocument) -> list[Layer]:
    """Items first, in their order, then the sites that are in none."""
    sites = {row.site: row for row in document.sites}
    figures = _figures(document)
    rows = [_of_item(item, sites) for item in document.items]
    taken = {name for item in document.items for name in (item.name, *item.sites)}
    return rows + [
        _of_site(row, figures.get(row.site, {})) for row in document.sites if row.site not in taken
    ]


def forms(rows: Sequence[Layer]) -> list[Form]:
    """What became of the layers, summed up by form, dense first, then the most frequent; rare ones together."""
    names = [row.form for row in rows]
    ranked = sorted({*names} - {"dense"}, key=lambda name: (-names.count(name), name))
    own = [name for name in ("dense", *ranked[:_MOST_FORMS]) if name in names]
    summed = [
        _form(name, f"kind{0 if name == 'dense' else ranked.index(name) + 1}", rows, [name]) for name in own
    ]
    rest = ranked[_MOST_FORMS:]
    return [*summed, _form(f"{len(rest)} others", "kind8", rows, rest)] if rest else summed


def _form(name: str, kind: str, rows: Sequence[Layer], members: Sequence[str]) -> Form:
    inside = [row for row in rows if row.form in members]
    return Form(
        name, kind, len(inside),
        _total(row.before_ms for row in inside), _total(row.after_ms for row in inside),
        _total(row.before_bytes for row in inside), _total(row.after_bytes for row in inside),
    )  # fmt: skip


def _total(values: Iterator[float | None]) -> float | None:
    """The sum; None where any is unknown."""
    given = list(values)
    known = [value for value in given if value is not None and math.isfinite(value)]
    return math.fsum(known) if len(known) == len(given) else None


def _of_item(item: ItemRow, sites: Mapping[str, SiteRow]) -> Layer:
    members = item.sites or (item.name,)
    first = sites.get(members[0])
    about = f"{first.op} {sides(first.shape)}".strip() if first else ""
    if len(members) > 1:
        about = f"{about}, with {len(members) - 1} more: {', '.join(members[1:])}".removeprefix(", ")
    if not item.candidates:
        return Layer(item.name, about, "–", "", None, None, None, None, None, "", item.reason)
    before = item.candidates[0]
    if item.chosen is None:
        tried = tuple(_tried(row, None) for row in item.candidates) if len(item.candidates) > 1 else ()
        return Layer(
            item.name, about, "–", "", before.ms, None, before.bytes, None, None, "",
            item.reason or before.note or _open(item), tried, _dropped(item),
        )  # fmt: skip
    after = item.candidates[item.chosen]
    form = _short_form(after.name)
    layouts = sorted({sites[name].layout for name in members if name in sites} - {"", "dense"})
    reason = item.reason or (first.reason if first else "")
    return Layer(
        item.name,
        about,
        form,
        " + ".join(layouts) or _options(after.name),
        before.ms,
        after.ms,
        before.bytes,
        after.bytes,
        after.error,
        after.source if after.source not in ("", "measured") else "",
        reason or _gain(before, after),
        tuple(_tried(row, after) for row in item.candidates) if len(item.candidates) > 1 else (),
        _dropped(item),
    )


def _open(item: ItemRow) -> str:
    """What there is to gain where nothing is chosen yet."""
    before = item.candidates[0]
    said = []
    for field, word in (("ms", "fast"), ("bytes", "small")):
        mine = getattr(before, field)
        ratios = [times(mine, getattr(row, field)) for row in item.candidates[1:]]
        most = max((ratio for ratio in ratios if ratio is not None), default=None)
        if most is not None:
            said.append(f"{number(most)} times as {word}")
    return f"up to {' or '.join(said)}" if said else ""


def _dropped(item: ItemRow) -> tuple[tuple[str, int, str], ...]:
    """Reason, number and names of the forms that are no candidates; the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for row in item.dropped:
        by_reason.setdefault(row.note or "no reason was left", []).append(row.name)
    ranked = sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    rest = [name for _, names in ranked[_MOST_REASONS:] for name in names]
    told = [*ranked[:_MOST_REASONS], *([("other reasons", rest)] if rest else [])]
    return tuple((reason, len(names), _listed(names)) for reason, names in told)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _short_form(name: str) -> str:
    """The names of the passes in a candidate's name, without their options."""
    short, depth = "", 0
    for letter in name:
        depth += (letter == "{") - (letter == "}")
        short += letter if depth == 0 and letter != "}" else ""
    return short.replace(",", ", ") or "dense"


def _options(name: str) -> str:
    """The options in a candidate's name, which tell what its short form leaves out."""
    return "; ".join(re.findall(r"\{([^{}]+)\}", name))


def _gain(before: CandidateRow, after: CandidateRow) -> str:
    if after is before:
        return "no other form was worth what it costs"
    ratio = times(before.ms, after.ms)
    return "" if ratio is None else f"{number(ratio)} times as fast as before"


def _tried(row: CandidateRow, chosen: CandidateRow | None) -> Tried:
    return Tried(
        row.name,
        f"{number(row.ms)} ms" + (f" ({row.source})" if row.source not in ("", "measured") else ""),
        "–" if row.bytes is None else format_bytes(row.bytes),
        number(row.error),
        number(row.damage),
        row.note or ("" if chosen is None or row is chosen else _why_not(row, chosen)),
        row is chosen,
    )


def _why_not(row: CandidateRow, chosen: CandidateRow) -> str:
    """What the figures say against a candidate, where the planner left no words."""
    worse, better = [], []
    for name, mine, theirs in (
        ("slower", row.ms, chosen.ms),
        ("larger", row.bytes, chosen.bytes),
        ("loses more", _loss(row), _loss(chosen)),
    ):
        if mine is not None and theirs is not None and mine > theirs:
            worse.append(name)
        elif mine is not None and theirs is not None and mine < theirs:
            better.append(name)
    if not worse:
        return "it gains what the budget does not ask for" if better else ""
    text = " and ".join(worse)
    if not better:
        return text
    return f"{text}, though it {'loses less' if 'loses more' in better else 'is cheaper'}"


def _loss(row: CandidateRow) -> float | None:
    return row.error if row.damage is None else row.damage


def _figures(document: RunDocument) -> dict[str, dict[str, float]]:
    """Figures by site that the passes measured; the last one counts."""
    found: dict[str, dict[str, float]] = {}
    for run in document.passes:
        for item in run.changed:
            known = found.setdefault(item.site, {})
            for name in ("dense_ms", "sparse_ms", "dense_bytes", "packed_bytes", "relative_error"):
                value = item.numbers.get(name)
                if isinstance(value, int | float) and math.isfinite(value):
                    known[name] = float(value)
    return found


def _of_site(row: SiteRow, figures: Mapping[str, float]) -> Layer:
    sparse = row.layout not in ("", "dense")
    before, size = figures.get("dense_ms"), figures.get("dense_bytes")
    about = f"{row.op} {sides(row.shape)}".strip()
    if row.density is not None and row.density < 1:
        about += f", {percent(row.density)} kept"
    return Layer(
        row.site,
        about,
        row.layout or "–",
        "",
        before,
        figures.get("sparse_ms") if sparse else before,
        size,
        figures.get("packed_bytes") if sparse else size,
        figures.get("relative_error"),
        "",
        row.reason,
    )
