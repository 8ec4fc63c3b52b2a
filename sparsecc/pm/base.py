"""The pass: a frozen dataclass whose fields are its options and whose ``str()`` is its text spec."""

from __future__ import annotations

import functools
import inspect
import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from sparsecc.errors import SpecError
from sparsecc.pm.options import OptionType, format_value, parse_value, type_text, validated, value_pattern
from sparsecc.pm.search import Range
from sparsecc.target.spec import format_spec, suggestion

if TYPE_CHECKING:
    from sparsecc.ir import Model
    from sparsecc.pm.context import PassContext
    from sparsecc.pm.report import PassReport

__all__ = ["OptionInfo", "Pass", "summary_of"]


_KEBAB = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class OptionInfo:
    """One option of a pass as help shows it: name in kebab-case, type in words, default as text.

    ``pattern`` is a regular expression of its values as they stand in a spec.
    """

    name: str
    type: str
    default: str | None
    pattern: str


@dataclass(frozen=True)
class Pass(ABC):
    """A step that changes a model in place and reports what it did.

    Subclasses are frozen dataclasses. Their fields are the options: ``bool``, ``int``, ``float``, ``str``,
    ``Literal``, ``Pattern``, ``T | None`` or ``tuple[T, ...]``. Text given for a ``Pattern`` is parsed.

    Class attributes:
        name: kebab-case name, unique in the registry.
        requires_calibration: ``run`` needs ``ctx.calibration``.
        lossless: outputs stay the same to rounding, so a verify-each instrument may insist on it.
        recovers: fits a model around what was pruned of it, which can take long and cannot be undone site by site.
        search: option values that are worth trying where something is to be chosen for each site.
        narrows: only makes the type of values narrower, so that it may follow any other pass at a site.
        by_outputs: what an output of a site becomes hardly depends on the others, so that some of them, in whole blocks
            of 16, tell the error of all.
    """

    name: ClassVar[str] = ""
    requires_calibration: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    recovers: ClassVar[bool] = False
    search: ClassVar[tuple[Range, ...]] = ()
    narrows: ClassVar[bool] = False
    by_outputs: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls) and cls.name and not _KEBAB.fullmatch(cls.name):
            raise TypeError(f"{cls.__qualname__}.name must be kebab-case, got '{cls.name}'")

    def __post_init__(self) -> None:
        for option, annotation in _option_types(type(self)).items():
            try:
                value = validated(annotation, getattr(self, option))
            except SpecError as error:
                raise SpecError(f"{self.name}: option '{_kebab(option)}': {error}") from None
            object.__setattr__(self, option, value)  # frozen: the only place that may still write

    def require_at_least(self, **least: float) -> None:
        """Check options that have a smallest value, by their field names; None stands for no value.

        Raises:
            SpecError: one is smaller.
        """
        for option, smallest in least.items():
            value = getattr(self, option)
            if value is not None and value < smallest:
                shown = f"{value:g}" if isinstance(value, float) else value
                raise SpecError(f"{self.name}: {_kebab(option)} must be {smallest} or more, got {shown}")

    @abstractmethod
    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Change ``model`` in place; graph inputs and outputs keep their names, dtypes and ranks.

        Errors of the caller's making (options, calibration) are raised as ``SparseccError``; a site that
        cannot be handled is not an error but a skip with a reason.
        """

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Give the sites of ``model`` the form that ``run`` gives, with other values, as quickly as possible.

        What is sketched takes as long to run and as many bytes, so that forms which do not pay need not be fitted.
        """
        return self.run(model, ctx)

    @classmethod
    def option_infos(cls) -> tuple[OptionInfo, ...]:
        """Return the options in declaration order."""
        infos = []
        for option, annotation in _option_types(cls).items():
            default = _defaults(cls)[option]
            text = None if default is MISSING else format_value(annotation, validated(annotation, default))
            infos.append(OptionInfo(_kebab(option), type_text(annotation), text, value_pattern(annotation)))
        return tuple(infos)

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Self:
        """Return the pass with these options, still text, keys kebab-case or snake_case.

        Raises:
            SpecError: an option is unknown (the known ones are listed), missing, or of the wrong type.
        """
        types, values = _option_types(cls), {}
        for key, text in options.items():
            option = key.replace("-", "_")
            if option not in types:
                known = [_kebab(item) for item in types]
                listed = f"known: {', '.join(known)}" if known else "it has no options"
                raise SpecError(
                    f"{cls.name}: unknown option '{key}'{suggestion(_kebab(option), known)}; {listed}"
                )
            try:
                values[option] = parse_value(types[option], text)
            except SpecError as error:
                raise SpecError(f"{cls.name}: option '{key}': {error}") from None
        missing = [
            _kebab(item)
            for item, default in _defaults(cls).items()
            if default is MISSING and item not in values
        ]
        if missing:
            raise SpecError(
                f"{cls.name}: needs the option{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            )
        return cls(**values)

    def __str__(self) -> str:
        defaults, options = _defaults(type(self)), {}
        for option, annotation in _option_types(type(self)).items():
            value, default = getattr(self, option), defaults[option]
            if default is MISSING or value != validated(annotation, default):
                options[_kebab(option)] = format_value(annotation, value)
        return format_spec(self.name, options)


def summary_of(pass_type: type[Pass]) -> str:
    """Return the first line of the docstring, without its full stop."""
    lines = (inspect.getdoc(pass_type) or "").strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


@functools.cache
def _option_types(pass_type: type[Pass]) -> dict[str, OptionType]:
    hints = get_type_hints(pass_type)
    return {item.name: hints[item.name] for item in fields(pass_type)}


def _defaults(pass_type: type[Pass]) -> dict[str, Any]:
    return {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(pass_type)
    }


def _kebab(option: str) -> str:
    return option.replace("_", "-")
