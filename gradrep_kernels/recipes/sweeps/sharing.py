"""Which trainings of a sweep are the same at two points, so that they are done once and taken over.

An option counts as touching every training, unless this file says which it touches. A new option therefore costs
trainings at first, and never makes a result wrong.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.groups import SEARCHED, Scaling, Search
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options
from gradrep_kernels.recipes.runs import SCALES
from gradrep_kernels.recipes.table import Recipe
from gradrep_kernels.recipes.trainings import CHECK, SEARCH, STATE, WEIGHTS, names_of

__all__ = ["TAKEN_FROM", "same_parts", "take_over", "touches_row", "touches_search"]

TAKEN_FROM = "taken_from"
"""In the figures of a training: the point that did it."""

_NAMES_ONLY = ("preset", "quick")  # What they stand for are options too, each with its value.
_BRANCHES = ("branches", "hs_init", "scales")
_OF_TRAININGS = ("lr", "lr_seeds", "optimizer", "momentum_dtype", "ema_decay", *SEARCHED.values())
"""The Hyper-Search has its own, or none: `Options.of_search`."""

_ROWS_TOUCHED: dict[str, Callable[[Recipe], bool]] = {
    **dict.fromkeys(Scaling.__dataclass_fields__, lambda row: row.sgs or row.fixed_scaling),
    **dict.fromkeys(Search.__dataclass_fields__, lambda row: row.needs_search),
    **dict.fromkeys(_BRANCHES, lambda row: row.uses_branches),
    # Which rows there are touches none of them, but for the choice of a learning rate (`_key`).
    **dict.fromkeys(("recipe", "ablate", "check_steps", *_NAMES_ONLY), lambda row: False),
}
"""Option -> the rows that it touches. Those that are not here touch all."""
_NOT_OF_SEARCH = {
    *Scaling.__dataclass_fields__,
    "scales",
    "recipe",
    "ablate",
    "check_steps",
    *_NAMES_ONLY,
    *_OF_TRAININGS,
}


def touches_row(option: str, row: Recipe) -> bool:
    """Whether trainings of a row depend on an option."""
    return OPTIONS[option].outcome and _ROWS_TOUCHED.get(option, lambda row: True)(row)


def touches_search(option: str) -> bool:
    """Whether the Hyper-Search depends on an option."""
    return OPTIONS[option].outcome and option not in _NOT_OF_SEARCH


def same_parts(options: Options, other: Options) -> list[str]:
    """The rows, the Hyper-Search (`search`) and the check CSLA = GR (`check`) that are the same with both options."""
    rows = [row.name for row in options.rows if row in other.rows and _key(options, row) == _key(other, row)]
    searches = [one.searches and _values(one, touches_search) for one in (options, other)]
    parts = [SEARCH] if searches[0] and searches[0] == searches[1] else []
    # Trains the branches for some steps, and may look at any option but those of scalings.
    checks = [
        _values(one, lambda name: OPTIONS[name].outcome and name not in _NOT_OF_CHECK) for one in (options, other)
    ]
    return rows + parts + [CHECK] * (checks[0] == checks[1])


_NOT_OF_CHECK = (*Scaling.__dataclass_fields__, "recipe", "ablate", *_NAMES_ONLY)


def _values(options: Options, touching: Callable[[str], bool]) -> dict[str, Any]:
    return {name: value for name, value in options.to_json().items() if touching(name)}


def _key(options: Options, row: Recipe) -> dict[str, Any]:
    """All that the trainings of a row depend on."""
    key = _values(options, lambda name: touches_row(name, row))
    chooser = next((other for other in options.rows if other.name == row.rate_of), row)
    if len(options.lr) > 1 and chooser is not row:  # Its learning rate is one that another row chooses.
        key = {"chooser": chooser.name, **key, **_values(options, lambda name: touches_row(name, chooser))}
    return key


def take_over(folder: Path, earlier: Mapping[str, Path], options: Mapping[str, Options]) -> dict[str, str]:
    """Copy what points before this one have trained already into its folder.

    Args:
        folder: of the point, whose name is that in `options`.
        earlier: {name: folder} of the points that are done, in their order.
        options: those of each point by its name.

    Returns {row, 'search' or 'check': the point that it is taken from}. What the folder has already is left as it is.
    Scales and weights are copied before the figures, which say that they are there.

    Raises InputError where a file of an earlier point is gone or cannot be read.
    """
    found: dict[str, str] = {}
    (folder / STATE).mkdir(exist_ok=True)
    for name, other in earlier.items():
        for part in same_parts(options[folder.name], options[name]):
            if part not in found and _copy_part(part, other, folder):
                found[part] = name
    return found


def _copy_part(part: str, other: Path, folder: Path) -> bool:
    """Copy the files of a part. Returns whether there were any."""
    of_part = re.compile(part) if part in (SEARCH, CHECK) else names_of(part)
    sources = sorted(path for path in (other / STATE).glob("*.json") if of_part.fullmatch(path.stem))
    for source in sources:
        if (folder / STATE / source.name).exists():
            continue
        try:
            figures = json.loads(source.read_text(encoding="utf-8"))
            if part == SEARCH and figures["diverged"] is None:
                _copy(other / SCALES, folder / SCALES)
            elif part not in (SEARCH, CHECK):
                (folder / WEIGHTS).mkdir(exist_ok=True)
                _copy(other / WEIGHTS / f"{source.stem}.pt", folder / WEIGHTS / f"{source.stem}.pt")
        except (OSError, ValueError) as reason:
            raise InputError(f"{source} cannot be taken over into {folder.name}: {reason}") from None
        if part != CHECK:
            figures[TAKEN_FROM] = other.name
        files.write_json(folder / STATE / source.name, figures)
    return bool(sources)


def _copy(source: Path, to: Path) -> None:
    with files.whole(to) as temporary:
        shutil.copyfile(source, temporary)
