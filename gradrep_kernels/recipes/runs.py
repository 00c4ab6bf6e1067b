"""The folder of a run: naming it, starting it, and finding it again to resume it."""

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
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data import Data, load_data
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.options import Options, resolve
from gradrep_kernels.recipes.scale_sources import initial_scales

__all__ = ["SCALES", "Run", "open_run"]

SCALES = "scales.pt"
"""The scales file in the folder of a run."""
_OPTIONS = "options.json"


@dataclass(frozen=True)
class Run:
    """A folder that holds a job: options.json when it is new, everything when it is done."""

    folder: Path
    options: Options
    data: Data


def open_run(out: Path, name: str | None, given: Mapping[str, Any], *, resume: bool, search: bool = False) -> Run:
    """Start a run in a folder of `out`, or resume one.

    Without a name a new run takes DATA-MODEL, or DATA-MODEL-2, -3, ... where that is taken, and resuming takes the last
    of them. A resumed run keeps the options that it was started with.

    Args:
        given: the options that a user gave, as `resolve` takes them.
        search: whether the run is a Hyper-Search alone.

    Raises:
        InputError: the folder has something in it, there is no run to resume, an option differs, data or scales are not
            what they should be, or a package is missing. Nothing is left behind.
    """
    extra("matplotlib.figure", "matplotlib")  # It is needed at the end only, but the user should hear of it now.
    of_command = {**given, "recipe": ()} if search else given
    if resume:
        folder = out / (name or _last_name(out, _base_name(resolve(of_command))))
        return _resumed(folder, given, search)
    options = resolve(of_command)
    return _started(out / (name or _fresh_name(out, _base_name(options))), options)


def _started(folder: Path, options: Options) -> Run:
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
        stored = {"options": options.to_json(), "data": data.description(), "versions": versions()}
        files.write_json(unfinished / _OPTIONS, stored)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as reason:
        raise InputError(f"{folder} cannot be written: {reason.strerror or reason}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Run(folder, options, data)


def _resumed(folder: Path, given: Mapping[str, Any], search: bool) -> Run:
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
        now_and_then = f"{data.description()}, then {stored['data']}"
        raise InputError(f"{options.data} is not what it was when {folder} was started: {now_and_then}")
    for leftover in folder.rglob(f"*{files.TEMPORARY}"):
        leftover.unlink()
    return Run(folder, options, data)


def _base_name(options: Options) -> str:
    name = f"{options.data.kind}-{options.model.removeprefix('repopt_vgg_')}"
    return name if options.recipe else f"{name}-search"


def _taken_numbers(out: Path, base: str) -> list[int]:
    """The numbers of the runs with this default name.

    The first has none and counts as 1.
    """
    names = (entry.name for entry in out.iterdir()) if out.is_dir() else ()
    matches = (re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name) for name in names)
    return sorted(int(match[1] or 1) for match in matches if match)


def _fresh_name(out: Path, base: str) -> str:
    taken = _taken_numbers(out, base)
    return f"{base}-{taken[-1] + 1}" if taken else base


def _last_name(out: Path, base: str) -> str:
    taken = _taken_numbers(out, base)
    return f"{base}-{taken[-1]}" if taken and taken[-1] > 1 else base


def _given_scales(options: Options, data: Data) -> csla.Scales | None:
    """Scales of the file of --scales, by the names of the model's convolutions.

    None without --scales. Raises InputError where the file cannot be read or does not fit, or where the model cannot be
    converted as the rows of the table need it.
    """
    if options.rows and not any(recipe.uses_branches for recipe in options.rows):
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
    return {site.name: branch_scales for site, branch_scales in matched}  # Published files name blocks instead.
