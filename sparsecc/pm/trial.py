"""Runs of passes whose results are compared and thrown away."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["Trial"]

Found = TypeVar("Found")


class Trial:
    """What runs of passes on copies of one model, with the same data, have in common.

    Only what comes out of them is looked at, so that fits may also stop when little is left to gain.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """Return what ``make`` gives, which is called for the first with this key only.

        Args:
            key: says all that it depends on beside model and data, the name of the pass too.
            make: computes it.
        """
        if key not in self._found:
            self._found[key] = make()
        found: Found = self._found[key]
        return found

    def forget(self) -> None:
        """Let go of all that is kept."""
        self._found.clear()
