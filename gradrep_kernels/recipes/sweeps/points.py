"""The points of a sweep: which options each has of its own.

`--sweep NAME=V1,V2` gives a point for each value, several of them the grid of all combinations, and `--sweep FILE` a
point for each set of options in a file.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.declare import Option, absolute_path, shown
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options, resolve
from gradrep_kernels.recipes.sweeps.sharing import same_parts
from gradrep_kernels.recipes.trainings import SEARCH

__all__ = ["Point", "read_points", "resolved_points"]

_LONGEST_NAME = 150
_MOST_POINTS = 1000
_DEFAULT = "default"  # As a value: this point does not give the option.
_TRUE, _FALSE = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
_NEEDED = {int: "a whole number", float: "a number", bool: "yes or no", tuple: "a list", str: "a text"}


@dataclass(frozen=True)
class Point:
    """A point by its name, with the options that are its own, as `resolve` takes them."""

    name: str
    given: Mapping[str, Any] = field(hash=False)


def read_points(texts: Sequence[str]) -> list[Point]:
    """The points that the values of `--sweep` ask for, the last one's changing fastest. None for no values.

    Raises InputError where an option does not exist, a value is of another type, a file cannot be read, two points
    have one name, or an option is swept twice.
    """
    if not texts:
        return []
    axes = [_of_file(Path(text)) if _names_a_file(text) else _of_text(text) for text in texts]
    swept = [{name for point in axis for name in point.given} for axis in axes]
    for (one, text), (other, again) in itertools.combinations(list(zip(swept, texts)), 2):
        if one & other:
            flags = ", ".join(OPTIONS[name].flag for name in sorted(one & other))
            raise InputError(f"--sweep {text} and --sweep {again} both give {flags}")
    points = []
    for parts in itertools.product(*axes):
        given = {name: value for part in parts for name, value in part.given.items()}
        points.append(Point(_as_folder("_".join(part.name for part in parts)), given))
        if len(points) > _MOST_POINTS:
            raise InputError(f"--sweep {' --sweep '.join(texts)} asks for more than {_MOST_POINTS} points")
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--sweep has two points of the name {name}; in a file each set may have a `name`")
    return points


def resolved_points(points: Sequence[Point], given: Mapping[str, Any]) -> dict[str, Options]:
    """The options of each point by its name. `given` are those that a user gave for all.

    Raises InputError, naming the point, where a value is wrong, where an option is given for all too, where two points
    are the same, or where they take presets of two papers that nobody named.
    """
    swept = {name for point in points for name in point.given}
    for name in swept & given.keys():
        raise InputError(f"{OPTIONS[name].flag} is swept, so leave {OPTIONS[name].flag} {shown(given[name])} out")
    found: dict[str, Options] = {}
    for point in points:
        try:
            options = resolve({**given, **point.given})
        except InputError as reason:
            raise InputError(f"point {point.name}: {reason}") from None
        for name, other in found.items():
            if other == options:
                raise InputError(f"points {name} and {point.name} of --sweep are the same: all their options are equal")
            if other.data == options.data and other.preset != options.preset and "preset" not in swept:
                raise InputError(
                    f"points {name} and {point.name} of --sweep would take the settings of {other.preset} and "
                    f"{options.preset}; name one by --preset"
                )
        found[point.name] = options
    _check_touching(found, swept)
    return found


def _check_touching(points: Mapping[str, Options], swept: Iterable[str]) -> None:
    """Raise InputError where nothing that is trained depends on an option that is swept."""
    first, *others = points.values()
    names = {*(row.name for row in first.rows), *[SEARCH] * first.searches}
    if others and all(other.rows == first.rows and names <= {*same_parts(first, other)} for other in others):
        flags = ", ".join(OPTIONS[name].flag for name in swept)
        raise InputError(f"--sweep: {flags} changes nothing of {', '.join(row.name for row in first.rows)}")


def _names_a_file(text: str) -> bool:
    return "=" not in text or Path(text).is_file()


def _of_text(text: str) -> list[Point]:
    """Points of NAME=V1,V2. Semicolons separate values where there is one, for values that are lists."""
    name, _, values = text.partition("=")
    declared = _option(name, f"--sweep {text}")
    given = [value.strip() for value in values.split(";" if ";" in values else ",")]
    given = [value for value in given if value]
    if not given:
        raise InputError(f"--sweep {text} has no values; write {name}=V1,V2")
    return [
        _point({declared.name: _read(declared, value, f"--sweep {text}")}, {declared.name: value}) for value in given
    ]


def _of_file(path: Path) -> list[Point]:
    """Points of a JSON or TOML file: a list of sets of options, in TOML of the name `points`."""
    where = f"--sweep {path}"
    content = _content(path)
    sets = content.get("points") if isinstance(content, dict) else content
    if not isinstance(sets, list) or not sets or not all(isinstance(one, dict) for one in sets):
        raise InputError(f"{where} must hold a list of option sets, in TOML as [[points]]")
    points = []
    for one in sets:
        given: dict[str, Any] = {}
        for key, value in one.items():
            if key != "name":
                declared = _option(key, where)
                given[declared.name] = _read(declared, value, where)
        points.append(_point(given, one, one.get("name"), where))
    return points


def _content(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".toml":
            try:
                import tomllib
            except ImportError:
                raise InputError(f"--sweep {path}: TOML needs Python 3.11; write the points as JSON") from None
            return tomllib.loads(path.read_text(encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        needed = "; points are NAME=V1,V2 or a JSON or TOML file"
        raise InputError(f"--sweep {path}: {reason.strerror or reason}{needed}") from None
    except ValueError as reason:  # of JSON, of TOML, or no UTF-8
        if isinstance(reason, InputError):
            raise
        raise InputError(f"--sweep {path} cannot be read: {reason}") from None


def _option(name: str, where: str) -> Option:
    """The option of a name with or without its dashes."""
    plain = name.strip().removeprefix("--").replace("-", "_")
    if plain not in OPTIONS or "train" not in OPTIONS[plain].commands:
        near = difflib.get_close_matches(plain, OPTIONS, n=1)
        meant = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
        raise InputError(f"{where}: `train` has no option {name.strip()!r}{meant}")
    if not OPTIONS[plain].outcome:
        raise InputError(f"{where}: no result depends on {OPTIONS[plain].flag}, so it is not swept")
    return OPTIONS[plain]


def _read(declared: Option, value: Any, where: str) -> Any:
    """A value as argparse would leave it, None for the default. It comes as text, or as JSON has it."""
    if value is None or value == _DEFAULT:
        return None
    try:
        return _of_type(declared.type, value)
    except (ValueError, TypeError):
        raise InputError(
            f"{where}: {declared.flag} must be {_NEEDED.get(declared.type, 'a text')}, got {value!r}"
        ) from None


def _of_type(of: type, value: Any) -> Any:
    """`value` as one of the type. Raises ValueError or TypeError where it is none."""
    if of is tuple:
        parts = value if isinstance(value, list) else str(value).split(",")
        if not all(isinstance(part, (str, int, float)) for part in parts):
            raise TypeError
        return tuple(str(part).strip() for part in parts if str(part).strip() not in ("", "none"))
    if of is bool:
        word = str(value).lower()
        if word not in _TRUE + _FALSE:
            raise ValueError
        return word in _TRUE
    if isinstance(value, (bool, list, dict)) or (of is int and isinstance(value, float)):
        raise TypeError
    return of(value) if of in (int, float) else str(value)


def _point(given: dict[str, Any], written: Mapping[str, Any], name: Any = None, where: str = "") -> Point:
    """A point of an axis. Its name is its own, or NAME=VALUE as they are `written`."""
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise InputError(f"{where}: the name of a point must be a text, got {name!r}")
    values = {key: written[key] for key in written if key != "name"}
    parts = (f"{key.removeprefix('--').replace('_', '-')}={_label(key, value)}" for key, value in values.items())
    own = {key: value for key, value in given.items() if value is not None}
    return Point(name or "_".join(parts) or "as-given", own)


def _label(key: str, value: Any) -> str:
    """A value in the name of a point."""
    declared = OPTIONS[key.removeprefix("--").replace("-", "_")]
    if value is None:
        return _DEFAULT
    if declared.reader is absolute_path and value != _DEFAULT:
        return Path(str(value)).name
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_folder(name: str) -> str:
    """The name as that of a folder on any system."""
    plain = "".join("-" if letter in '/\\:*?"<>|' or not letter.isprintable() else letter for letter in name)
    return plain.strip(" .")[:_LONGEST_NAME] or "point"
