"""``sparsecc cache``: what earlier runs have left, and clearing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.output import format_bytes, json_option, print_json, print_table

if TYPE_CHECKING:
    from sparsecc.plan.cache import CachedFile

__all__ = ["command"]

_OPTIONS = (
    click.option(
        "--kind", "kinds", metavar="KIND", multiple=True, help="Only files of this kind; repeatable."
    ),
    click.option(
        "--older-than", metavar="30d", help="Only files written that long ago: minutes m, h, d or weeks w."
    ),
    json_option,
)


def _which(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group("cache")
def command() -> None:
    """What earlier runs have left in the folder for cached data: measured times, errors of forms, scores of models.

    The folder is SPARSECC_CACHE_DIR, by default sparsecc in that of the user. Nothing in it is ever needed: what is
    missing is measured again.

    Example: sparsecc cache show
    """


@command.command("show")
@_which
def show(kinds: tuple[str, ...], older_than: str | None, as_json: bool) -> None:
    """Show where the cached data is and what it takes.

    Example: sparsecc cache show --json
    """
    from sparsecc.plan import cache_directory
    from sparsecc.plan.cache import KINDS

    files = _chosen(kinds, older_than)
    rows = _by_kind(files)
    nbytes = sum(item.nbytes for item in files)
    if as_json:
        return print_json(
            {
                "folder": str(cache_directory()),
                "nbytes": nbytes,
                "kinds": [
                    {"kind": kind, "files": count, "nbytes": size, "newest": newest}
                    for kind, count, size, newest in rows
                ],
            }
        )
    print_table(
        ("kind", ">files", ">size", "last", "what"),
        [
            (kind, count, format_bytes(size), _day(newest), KINDS.get(kind, ""))
            for kind, count, size, newest in rows
        ],
    )
    click.echo(f"{cache_directory()}: {format_bytes(nbytes)} in {len(files)} files")


@command.command("clear")
@_which
def clear(kinds: tuple[str, ...], older_than: str | None, as_json: bool) -> None:
    """Delete cached data; files that sparsecc did not write stay.

    Example: sparsecc cache clear --older-than 30d
    """
    from sparsecc.plan import cache_directory
    from sparsecc.plan.cache import remove

    files = _chosen(kinds, older_than)
    remove(files)
    nbytes = sum(item.nbytes for item in files)
    if as_json:
        return print_json({"folder": str(cache_directory()), "files": len(files), "nbytes": nbytes})
    click.echo(f"deleted {len(files)} files, {format_bytes(nbytes)}, from {cache_directory()}")


def _chosen(kinds: tuple[str, ...], older_than: str | None) -> list[CachedFile]:
    """The files that the options name.

    Raises:
        UsageError: there is no such kind, or an age of another form.
    """
    from sparsecc.errors import UsageError
    from sparsecc.plan.cache import KINDS, cached_files, older, parse_age
    from sparsecc.target.spec import suggestion

    age = None if older_than is None else parse_age(older_than)
    files = cached_files()
    known = [*KINDS, *sorted({item.kind for item in files} - KINDS.keys())]
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"no kind '{kind}'{suggestion(kind, known)}; known: {', '.join(known)}")
    files = [item for item in files if not kinds or item.kind in kinds]
    return files if age is None else older(files, age)


def _by_kind(files: list[CachedFile]) -> list[tuple[str, int, int, float]]:
    """Kind, number of files, bytes, and when the last was written; the largest first."""
    found: dict[str, tuple[int, int, float]] = {}
    for item in files:
        count, nbytes, newest = found.get(item.kind, (0, 0, 0.0))
        found[item.kind] = (count + 1, nbytes + item.nbytes, max(newest, item.changed))
    return sorted(((kind, *row) for kind, row in found.items()), key=lambda row: -row[2])


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
