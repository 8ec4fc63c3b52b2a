"""Reading run documents, which may come from anybody.

Unknown keys are ignored, missing ones are empty, ``null`` is missing; what is there must have the right form. All text
is cleaned of characters that no file or page should hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsecc.errors import UsageError
from sparsecc.report.analysed import analysis_document, is_analysis
from sparsecc.report.schema import RunDocument

__all__ = ["parse_document", "read_document"]

#: Largest file that is read, and most cells along one side of a thumbnail.
_MOST_BYTES = 1 << 28
_MOST_CELLS = 128

#: Larger numbers stand for nothing real; sums and products of smaller ones are finite.
_MOST = 1e30

_T = TypeVar("_T")


def read_document(path: Path) -> RunDocument:
    """Read the run document in a file.

    What ``sparsecc analyze`` printed or saved counts as one.

    Raises:
        UsageError: the file is missing, too large, no JSON, or no run document; the message says where.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file: give what 'sparsecc optimize --json' printed")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{path} is larger than {_MOST_BYTES >> 20} MiB: no run document is")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise UsageError(
            f"{path} is no JSON ({_short(error)}): give what 'sparsecc optimize --json' printed"
        ) from None
    try:
        return parse_document(analysis_document(value) if is_analysis(value) else value)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def parse_document(value: object) -> RunDocument:
    """Return the run document that plain JSON values stand for.

    Raises:
        UsageError: it is none, or a part is malformed; the message names the part.
    """
    known = {_key(item) for item in dataclasses.fields(RunDocument)}
    if not isinstance(value, Mapping) or not known & value.keys():
        raise UsageError("no run document: it has no part that 'sparsecc optimize --json' prints")
    document = _record(RunDocument, value, "")
    for number, item in enumerate(document.items):
        if item.candidates and item.chosen is not None and not 0 <= item.chosen < len(item.candidates):
            raise UsageError(f"items[{number}].chosen is {item.chosen}, of {len(item.candidates)} candidates")
    for number, thumbnail in enumerate(document.thumbnails):
        for name in ("grid", "corner"):
            _check_grid(getattr(thumbnail, name), f"thumbnails[{number}].{name}")
    return document


def _check_grid(grid: tuple[tuple[float, ...], ...], where: str) -> None:
    if len({len(row) for row in grid}) > 1:
        raise UsageError(f"{where} has rows of different lengths")
    if len(grid) > _MOST_CELLS or any(len(row) > _MOST_CELLS for row in grid):
        raise UsageError(f"{where} has more than {_MOST_CELLS} cells along one side")


def _key(item: dataclasses.Field[Any]) -> str:
    return str(item.metadata.get("key", item.name))


@cache
def _hints(kind: Callable[..., Any]) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _record(kind: type[_T], value: object, where: str) -> _T:
    """Read one of the dataclasses above from a JSON object."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is {_shown(value)}, expected an object")
    given = {}
    hashable: Any = kind
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = _key(item)
        at = f"{where}.{key}".removeprefix(".")
        if value.get(key) is not None:
            given[item.name] = _read(_hints(hashable)[item.name], value[key], at)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{at} is missing")
    return kind(**given)


def _read(kind: Any, value: object, where: str) -> Any:
    """Read a value of the type ``kind``, which is one that the dataclasses above use."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _read(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} is {_shown(value)}, expected a list")
        return tuple(_read(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is not None:
        return _plain_mapping(value, where)
    if kind in (str, bool, int, float):
        return _scalar(kind, value, where)
    return _record(kind, value, where)


def _scalar(kind: type[Any], value: object, where: str) -> Any:
    if kind is str and isinstance(value, str):
        return _clean(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float):
        number = _number(value)
        if kind is float and number is not None:
            return number
        if number is not None and number.is_integer():
            return int(number)
    expected = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise UsageError(f"{where} is {_shown(value)}, expected {expected}")


def _number(value: object) -> float | None:
    """A number; infinities and NaN may be written as text, since JSON has none. What is huge counts as infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
        return None
    if isinstance(value, str) or abs(value) <= _MOST:
        return float(value)
    return math.inf if value > 0 else -math.inf if value < 0 else math.nan


def _plain_mapping(value: object, where: str) -> dict[str, Any]:
    """Read an object of texts, numbers and truth values by name."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is {_shown(value)}, expected an object")
    plain: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, list | tuple | Mapping):
            raise UsageError(
                f"{where}.{_clean(str(key))[:40]} is {_shown(item)}, expected a text or a number"
            )
        if isinstance(item, int | float) and abs(item) > _MOST:
            item = _number(item)
        if item is not None:
            plain[_clean(str(key))] = _clean(item) if isinstance(item, str) else item
    return plain


def _clean(text: str) -> str:
    """``text`` without control characters and halves of surrogate pairs, which neither UTF-8 nor HTML can hold."""
    return re.sub(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text
    )


def _shown(value: object) -> str:
    """A few words for a value in an error message."""
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else _short(repr(value))


def _short(value: object) -> str:
    text = _clean(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}..."
