"""The folder of a run: its name, a new one, one that is gone on with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradrep_kernels import csla
from gradrep_kernels.branches.scales import match
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import initial_scales, plain_model, rows
from gradrep_kernels.recipes.data import Data, load_data, split_source
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.options import Options, resolve

__all__ = ["SCALES", "Run", "open_run"]

SCALES = "scales.pt"
_OPTIONS = "options.json"


@dataclass(frozen=True)
class Run:
    """A folder that holds a job: options.json when it is new, everything when it is done."""

    folder: Path
    options: Options
    data: Data


def open_run(out: Path, name: str | None, given: Mapping[str, Any], *, resume: bool, search: bool = False) -> Run:
    """Start or resume a run. `given` are the options that were given (see `resolve`); `search`: Hyper-Search alone.

    Without a name a new run takes DATA-MODEL, or DATA-MODEL-2, -3, ... where that is taken; resuming takes the last of
    them. A resumed run keeps the options that it was started with.

    Raises InputError, and leaves nothing behind: the folder has something in it, there is no run to resume, an option
    differs, data or scales are not what they should be, a package is missing.
    """
    extra("matplotlib.figure", "matplotlib")  # needed at the end only, but hours earlier is the time to say so
    return (
        _resumed(out, name, given, search)
        if resume
        else _started(out, name, {**given, **({"recipe": ()} if search else {})})
    )


def _started(out: Path, name: str | None, given: Mapping[str, Any]) -> Run:
    options = resolve(given)
    folder = out / (name or _fresh_name(out, options))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} has something in it already: --resume continues a run, another --name starts one")
    data = load_data(options.data, options.image_size)
    scales = _given_scales(options, data)
    unfinished = folder.with_name(f".{folder.name}{files.TEMPORARY}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        if scales is not None:
            csla.save_scales(scales, unfinished / SCALES)
        files.write_json(
            unfinished / _OPTIONS, {"options": options.to_json(), "data": data.description(), "versions": versions()}
        )
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as reason:
        raise InputError(f"{folder} cannot be written: {reason.strerror or reason}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Run(folder, options, data)


def _resumed(out: Path, name: str | None, given: Mapping[str, Any], search: bool) -> Run:
    folder = out / (name or _last_name(out, _base_name(resolve({**given, **({"recipe": ()} if search else {})}))))
    try:
        stored = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
        options = Options.from_json(stored["options"])
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no run to resume; start it without --resume") from None
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise InputError(f"{folder / _OPTIONS} cannot be read by this version ({reason})") from None
    if search != (not options.recipe):
        raise InputError(f"{folder} was started by `{'train' if options.recipe else 'search'}`")
    options.check_against(given)
    options.check()
    data = load_data(options.data, options.image_size)
    if data.description() != stored["data"]:
        raise InputError(
            f"{options.data} is not what it was when {folder} was started: {data.description()}, then {stored['data']}"
        )
    for leftover in folder.rglob(f"*{files.TEMPORARY}"):
        leftover.unlink()
    return Run(folder, options, data)


def _base_name(options: Options) -> str:
    kind, model = split_source(options.data)[0], options.model.removeprefix("repopt_vgg_")
    return f"{kind}-{model}" if options.recipe else f"{kind}-{model}-search"


def _taken(out: Path, base: str) -> list[int]:
    """The numbers of the runs with this default name; the first has none and counts as 1."""
    names = (entry.name for entry in out.iterdir()) if out.is_dir() else ()
    matches = (re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name) for name in names)
    return sorted(int(match[1] or 1) for match in matches if match)


def _fresh_name(out: Path, options: Options) -> str:
    base = _base_name(options)
    taken = _taken(out, base)
    return f"{base}-{taken[-1] + 1}" if taken else base


def _last_name(out: Path, base: str) -> str:
    taken = _taken(out, base)
    return f"{base}-{taken[-1]}" if taken and taken[-1] > 1 else base


def _given_scales(options: Options, data: Data) -> csla.Scales | None:
    """What --scales names, known to fit; and the model known to be one that the recipes can convert."""
    if not any(row.recipe not in ("sgd", "sgs") for row in rows(options)) and options.recipe:
        if options.scales is not None:
            raise InputError(f"--scales {options.scales}: none of the recipes {', '.join(options.recipe)} uses scales")
        return None
    with torch.random.fork_rng():
        model = plain_model(options, data, options.seed)
        try:
            initial_scales(model)
        except ValueError as reason:
            raise InputError(f"--model {options.model}: {reason}") from None
        if options.scales is None:
            return None
        try:
            matched = match(model, csla.load_scales(options.scales))
        except (OSError, ValueError) as reason:
            raise InputError(f"--scales {options.scales}: {reason}") from None
    return {site.name: value for site, value in matched}  # published files name blocks
