"""Typed option values: text to value, value to text, and the check that a value has its declared type.

Supported annotations: ``bool``, ``int``, ``float``, ``str``, ``Literal`` of strings, ``T | None``,
``tuple[T, ...]`` and any class with a ``parse`` class method whose ``str()`` parses back (``Pattern``).
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from sparsecc.errors import SpecError

__all__ = ["OptionType", "format_value", "parse_value", "type_text", "validated", "value_pattern"]


OptionType = Any  # a runtime annotation: a class or a typing construct; typing has no closed name for it

_WORDS: dict[OptionType, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
#: A value in double quotes, and what bare values look like; all of them may be quoted too.
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PATTERNS: dict[OptionType, str] = {
    bool: f"(?:true|false|{_QUOTED})",
    int: rf"(?:[+-]?[0-9][0-9_]*|{_QUOTED})",
    float: rf"(?:[+-]?(?:[0-9_]+\.?[0-9_]*|\.[0-9_]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:inf|nan)|{_QUOTED})",
}
_LITERAL_NONE = re.compile(r"\\*none")  # text that must not be mistaken for "no value"


def parse_value(annotation: OptionType, text: str) -> Any:
    """Return the value that ``text`` stands for.

    Raises:
        SpecError: the text does not hold a value of this type. The message does not name the option.
    """
    inner = _optional_of(annotation)
    if inner is not None:
        if text == "none":
            return None
        return parse_value(inner, text[1:] if _is_escaped_none(text) else text)
    if _origin(annotation) is tuple:
        element = get_args(annotation)[0]
        return tuple(parse_value(element, part) for part in _split(text))
    if annotation is str or _origin(annotation) is Literal:
        return validated(annotation, text)
    if annotation is bool:
        return _parse_bool(text)
    parser: Callable[[str], Any] = annotation if annotation in (int, float) else annotation.parse
    try:
        return parser(text)
    except ValueError:
        raise SpecError(f"expected {type_text(annotation)}, got '{text}'") from None


def format_value(annotation: OptionType, value: Any) -> str:
    """Return the text that ``parse_value`` turns back into ``value``."""
    inner = _optional_of(annotation)
    if inner is not None:
        if value is None:
            return "none"
        text = format_value(inner, value)
        return "\\" + text if _LITERAL_NONE.fullmatch(text) else text
    if _origin(annotation) is tuple:
        element = get_args(annotation)[0]
        parts = [_escape(format_value(element, part)) for part in value]
        return ",".join(parts) + ("," if parts and not parts[-1] else "")
    if annotation is bool:
        return "true" if value else "false"
    return repr(float(value)) if annotation is float else str(value)


def validated(annotation: OptionType, value: Any) -> Any:
    """Return ``value`` as its declared type: whole numbers pass as floats, text as the classes that parse.

    Raises:
        SpecError: the value has another type. The message does not name the option.
    """
    inner = _optional_of(annotation)
    if inner is not None:
        return None if value is None else validated(inner, value)
    if _origin(annotation) is tuple:
        if not isinstance(value, tuple | list):
            raise SpecError(f"expected {type_text(annotation)}, got {value!r}")
        return tuple(validated(get_args(annotation)[0], part) for part in value)
    if _origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise SpecError(f"expected {type_text(annotation)}, got {value!r}")
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and hasattr(annotation, "parse"):
        return annotation.parse(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise SpecError(f"expected {type_text(annotation)}, got {value!r}")
    return value


def type_text(annotation: OptionType) -> str:
    """Return the type in words, for help and errors."""
    inner = _optional_of(annotation)
    if inner is not None:
        return f"{type_text(inner)} or none"
    if _origin(annotation) is tuple:
        return f"comma-separated list of {type_text(get_args(annotation)[0])}"
    if _origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    return _WORDS.get(annotation) or str(annotation.__name__).lower()


def value_pattern(annotation: OptionType) -> str:
    """Return a regular expression of the values as they stand in a spec, for schemas; also of some that are refused.

    It says what numbers, words and truth values look like; texts and classes that parse may be anything.
    """
    inner = _optional_of(annotation)
    if inner is not None:
        return f"(?:none|{value_pattern(inner)})"
    if _origin(annotation) is Literal:
        # A hyphen with a backslash is an error in the expressions of JSON Schema.
        words = "|".join(re.escape(str(word)).replace("\\-", "-") for word in get_args(annotation))
        return f"(?:{words}|{_QUOTED})"
    return _PATTERNS.get(annotation, rf'(?:[^\s,{{}}"\\]+|{_QUOTED})')


def _origin(annotation: OptionType) -> object:
    return get_origin(annotation)


def _optional_of(annotation: OptionType) -> OptionType | None:
    if _origin(annotation) not in (Union, types.UnionType):
        return None
    members = [item for item in get_args(annotation) if item is not type(None)]
    if len(members) != 1 or len(get_args(annotation)) != 2:
        raise TypeError(f"an option may be 'T' or 'T | None', not {annotation}")
    return members[0]


def _is_escaped_none(text: str) -> bool:
    return text.startswith("\\") and _LITERAL_NONE.fullmatch(text) is not None


def _parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise SpecError(f"expected true or false, got '{text}'")
    return text == "true"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _split(text: str) -> list[str]:
    """Split at commas that are not escaped; a trailing comma is dropped, so that ``""`` is the empty list."""
    parts, current, escaped = [], "", False
    for char in text:
        if escaped or char not in "\\,":
            current, escaped = current + char, False
        elif char == "\\":
            escaped = True
        else:
            parts.append(current)
            current = ""
    return [*parts, current] if current else parts
