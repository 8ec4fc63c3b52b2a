r"""The text grammar ``name{key=value key="quoted value"}`` shared by targets, passes and pipelines.

``parse_specs`` and ``format_spec`` are inverse. Options are separated by spaces. A value that holds a
space, a comma, a brace, a quote or a backslash, or is empty, is written in double quotes, a quote as ``\"``
and a backslash as ``\\``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsecc.errors import SpecError

__all__ = ["Spec", "format_spec", "parse_specs", "suggestion"]


_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_BARE = re.compile(r"[^\s,{}\"\\]+")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Spec:
    """A name and its options, both still text. Keys are kebab-case and unique."""

    name: str
    options: dict[str, str] = field(default_factory=dict)


def parse_specs(text: str) -> list[Spec]:
    """Return the comma-separated specs of ``text``; a blank text has none.

    Raises:
        SpecError: the text does not follow the grammar; the message points at the place.
    """
    scanner = _Scanner(text)
    specs: list[Spec] = []
    scanner.skip_space()
    while not scanner.at_end():
        specs.append(_parse_spec(scanner))
        scanner.skip_space()
        if scanner.at_end():
            break
        scanner.expect(",")
        scanner.skip_space()
        if scanner.at_end():
            raise scanner.error("a name after the comma")
    return specs


def format_spec(name: str, options: dict[str, str]) -> str:
    """Return the text that ``parse_specs`` reads back as one spec of this name and these options."""
    if not options:
        return name
    return name + "{" + " ".join(f"{key}={_quote(value)}" for key, value in options.items()) + "}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _parse_spec(scanner: _Scanner) -> Spec:
    name = scanner.match(_NAME, "a kebab-case name")
    options: dict[str, str] = {}
    if not scanner.take("{"):
        return Spec(name, options)
    scanner.skip_space()
    while not scanner.take("}"):
        key = scanner.match(_KEY, "an option name or '}'").replace("_", "-")
        scanner.expect("=")
        if key in options:
            raise SpecError(f"'{name}' is given the option '{key}' twice; write it once")
        options[key] = scanner.quoted() if scanner.peek() == '"' else scanner.match(_BARE, "a value")
        if scanner.peek() != "}" and not scanner.skip_space():
            raise scanner.error("a space or '}' (spaces separate options; quote values with , { } or space)")
    return Spec(name, options)


def _quote(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


class _Scanner:
    """A cursor over the text; errors show where it stands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> bool:
        match = _SPACE.match(self.text, self.position)
        assert match is not None  # the expression matches the empty string
        self.position = match.end()
        return match.group() != ""

    def take(self, char: str) -> bool:
        if self.peek() != char:
            return False
        self.position += 1
        return True

    def expect(self, char: str) -> None:
        if not self.take(char):
            raise self.error(f"'{char}'")

    def match(self, expression: re.Pattern[str], wanted: str) -> str:
        match = expression.match(self.text, self.position)
        if match is None:
            raise self.error(wanted)
        self.position = match.end()
        return match.group()

    def quoted(self) -> str:
        start = self.position
        self.position += 1
        chars: list[str] = []
        while not self.at_end():
            char = self.peek()
            self.position += 1
            if char == '"':
                return "".join(chars)
            if char == "\\":
                char = self.peek()
                if char not in ('"', "\\"):
                    raise self.error('\\" or \\\\ (double each backslash inside quotes)')
                self.position += 1
            chars.append(char)
        self.position = start
        raise self.error("a closing '\"'")

    def error(self, wanted: str) -> SpecError:
        found = f"'{self.text[self.position : self.position + 12]}'" if not self.at_end() else "the end"
        return SpecError(
            f"in the spec '{self.text}' at character {self.position + 1}: expected {wanted}, found {found}"
        )
