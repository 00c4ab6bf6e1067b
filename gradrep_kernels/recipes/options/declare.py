"""Declarations of options, and the readers and checks that they share."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradrep_kernels.recipes.errors import InputError

__all__ = [
    "BOTH",
    "NEW",
    "TRAIN",
    "Option",
    "absolute_path",
    "at_least",
    "between",
    "declared_fields",
    "number",
    "one_of",
    "option",
    "shown",
    "some_of",
]

Reader = Callable[[str, Any], Any]
"""(flag, value as given) -> the option's value. Raises InputError that begins with the flag."""
Check = Callable[[str, Any], None]
"""(flag, value) -> None. Raises InputError that begins with the flag where the value is out of range."""

TRAIN, BOTH = ("train",), ("train", "search")
"""Values of `commands`: where the command line has the option."""

NEW: Any = object()
"""The value of `earlier` of an option without which runs cannot be resumed."""

_DEFAULTS_OF = {
    "digits": ("digits",),
    "cifar": ("cifar10", "cifar100"),
    "small": ("mnist", "fashion", "svhn"),
    "folder": ("folder",),
}
"""Keyword of `option` -> the kinds of data whose default it gives."""


@dataclass(frozen=True)
class Option:
    """One option.

    `groups.py` declares it as a field of a group, whose name and type become this one's.
    """

    help: str
    default: Any = None
    """As a user would give it, or a function of the values of the options declared before (a dict by name)."""
    default_of_kind: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Defaults of the kinds of data (digits, cifar10, ...) that do not take `default`."""
    quick: Any = None
    """The default of a quick job, None for that of all others."""
    default_help: str | None = None
    """The default in the words of the help, where its value does not say it."""
    commands: tuple[str, ...] = BOTH
    metavar: str | None = None
    """The name of the value in the help, None for that of its type."""
    kinds: tuple[str, ...] | None = None
    """The kinds of data that have the option, None for all."""
    reader: Reader | None = None
    """Makes the value from what a user gave. None takes it as it is."""
    checker: Check | None = None
    """Checks the value. None accepts all."""
    outcome: bool = True
    """Whether results depend on it. A resumed run may have another value of those that they do not depend on."""
    earlier: Any = NEW
    """The value in runs that were started before there was this option, as `to_json` would write it. NEW: such runs
    cannot be resumed."""
    name: str = ""
    type: type = str
    group: str = ""
    """The heading in the help."""

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    def default_for(self, kind: str, quick: bool = False) -> Any:
        """The default with one kind of data, as a user would give it."""
        if quick and self.quick is not None:
            return self.quick
        return self.default_of_kind.get(kind, self.default)

    def read(self, value: Any) -> Any:
        """The value of the option from that given by a user.

        Raises InputError that names the option.
        """
        return value if value is None or self.reader is None else self.reader(self.flag, value)

    def check(self, value: Any) -> None:
        """Raise InputError that names the option where `value` is out of range. None is always accepted."""
        if value is not None and self.checker is not None:
            self.checker(self.flag, value)

    def is_for(self, kind: str) -> bool:
        """Whether this kind of data has the option."""
        return self.kinds is None or kind in self.kinds

    def check_kind(self, kind: str) -> None:
        """Raise InputError where the option is not for this kind of data."""
        if not self.is_for(kind):
            needed = " or ".join(f"{has_it}:DIR" for has_it in self.kinds)
            raise InputError(f"{self.flag} is for {needed}, {kind} has its own")

    def help_text(self, kinds: Iterable[str]) -> str:
        """The help with the default at its end, one for all `kinds` of data or one for each."""
        text = self.default_help
        if text is None:
            defaults = {kind: shown(self.default_for(kind)) for kind in kinds}
            if len(set(defaults.values())) == 1:
                (text,) = set(defaults.values())
            else:
                text = ", ".join(f"{value} ({kind})" for kind, value in defaults.items() if value != "None")
        if self.quick is not None:
            text = f"{text}; quick: {shown(self.quick)}"
        return f"{self.help}; default: {text}"


def option(help: str, default: Any = None, check: Check | None = None, **settings: Any) -> Any:
    """Declare a field of `Options`.

    `settings` are other fields of `Option`, or defaults of kinds of data. `digits=`, `cifar=` (both of them), `small=`
    (MNIST, Fashion-MNIST, SVHN) and `folder=` give the default of a kind of data.
    """
    of_kind = {kind: settings[name] for name, kinds in _DEFAULTS_OF.items() if name in settings for kind in kinds}
    others = {name: value for name, value in settings.items() if name not in _DEFAULTS_OF}
    declared = Option(help, default, of_kind, checker=check, **others)
    return dataclasses.field(metadata={"option": declared})


def declared_fields(cls: type) -> dict[str, Option]:
    """Every option that a dataclass declares, by its name, in the order of the declarations.

    Each has the name and the plain type of its field. Its group is the docstring of the class that declares it.
    """
    hints = typing.get_type_hints(cls)
    headings = {name: base.__doc__ for base in cls.__mro__ for name in inspect.get_annotations(base)}
    declared = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # X | None
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        plain_type = typing.get_origin(hint) or hint
        declared[field.name] = dataclasses.replace(
            field.metadata["option"], name=field.name, type=plain_type, group=headings[field.name]
        )
    return declared


def shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def one_of(names: Iterable[str]) -> Reader:
    """A reader that accepts one of `names`."""
    names = tuple(names)

    def read(flag: str, value: str) -> str:
        if value not in names:
            near = difflib.get_close_matches(str(value), names, n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(f"{flag} must be one of {', '.join(names)}, got {value!r}{hint}")
        return value

    return read


def some_of(names: Iterable[str]) -> Reader:
    """A reader that accepts several of `names`.

    It returns a tuple with each name once, in the order of `names`.
    """
    names = tuple(names)
    check_name = one_of(names)

    def read(flag: str, value: Iterable[str]) -> tuple[str, ...]:
        given = [check_name(flag, name) for name in value]
        return tuple(name for name in names if name in given)

    return read


def absolute_path(flag: str, value: str) -> str:
    """A reader of paths. The working directory of a resumed run may be another."""
    return str(Path(value).absolute())


def number(holds: Callable[[float], bool], needed: str) -> Check:
    """A check of a number: `holds(value)`, and `needed` says in words which numbers do."""

    def check(flag: str, value: float) -> None:
        if not holds(value):
            raise InputError(f"{flag} must be {needed}, got {value}")

    return check


def at_least(least: float, reason: str = "") -> Check:
    """A check of a number. NaN and infinity fail."""
    return number(lambda value: least <= value < float("inf"), f"at least {least}{reason}")


def between(least: float, most: float) -> Check:
    """A check of a number from `least` to `most`. Beyond that something below breaks in words of its own."""
    return number(lambda value: least <= value <= most, f"from {least} to {most}")
