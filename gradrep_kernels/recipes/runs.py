"""The folder of a run: naming it, starting it, and finding it again to resume it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.scales import match
from gradrep_kernels.messages import first_few
from gradrep_kernels.models.modes import branch_form
from gradrep_kernels.ops import backends, registry
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.errors import InputError, OutputError, extra
from gradrep_kernels.recipes.lock import Lock
from gradrep_kernels.recipes.options.resolve import Options, resolve
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.validation import load_job_data

__all__ = [
    "POINTS",
    "SCALES",
    "SUMMARY",
    "Run",
    "base_name",
    "check_name",
    "created",
    "fresh_name",
    "in_use",
    "last_name",
    "open_run",
    "run_folder",
    "stored_options",
    "stored_summary",
    "taken",
]

SCALES = "scales.pt"
"""The scales file in the folder of a run."""
POINTS = "points.json"
"""What the folder of a sweep has, whose folders are runs."""
SUMMARY = "summary.json"
"""Its figures. A run that has it is done."""
_FIGURES = {"recipes", "seeds", "data", "options", "search", "compared", "csla_equals_gr", "not_trained", "seconds"}
_OPTIONS = "options.json"
_LONGEST_NAME = 200  # File systems take 255 bytes, and temporary names are longer.


@dataclass(frozen=True)
class Run:
    """A folder that holds a job: options.json when it is new, everything when it is done.

    No other process can run it until the `with` block of this one ends, or the process.
    """

    folder: Path
    options: Options
    data: Data
    lock: Lock = field(repr=False, compare=False)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def run_folder(run: str | Path, out: Path) -> Path:
    """The folder that RUN names: itself, or one in `out`. Raises InputError where there is no finished run."""
    places = [Path(run), out / run]
    found = next((place for place in places if (place / _OPTIONS).exists()), None)
    if found is None:
        points = next((sorted(place.glob(f"*/{_OPTIONS}")) for place in places if (place / POINTS).exists()), None)
        if points:
            names = first_few([path.parent.name for path in points], between=", ")
            raise InputError(f"{run} is a sweep: name one of its runs, {run}/POINT, of {names}")
        places_in_words = "" if Path(run).is_absolute() else f", neither as a folder nor in {out}"
        raise InputError(f"{run}: no run of `train`{places_in_words}")
    if not (found / SUMMARY).exists():
        raise InputError(f"{found}: this run is not finished; `train --resume --name {found.name}` goes on with it")
    return found


def open_run(out: Path, name: str | None, given: Mapping[str, Any], *, resume: bool, search: bool = False) -> Run:
    """Start a run in a folder of `out`, or resume one.

    Without a name a new run takes DATA-MODEL, followed by -BRANCHES where they were given, or DATA-MODEL-2, -3, ...
    where that is taken, and resuming takes the last of them. A resumed run keeps the options that it was started with.

    Args:
        given: the options that a user gave, as `resolve` takes them.
        search: whether the run is a Hyper-Search alone.

    Raises:
        InputError: the name is none, the folder has something in it, there is no run to resume, another process runs
            it, an option differs, data or scales are not what they should be, or a package is missing. Nothing is left
            behind.
    """
    if name is not None:
        check_name(name)
    extra("matplotlib.figure", "matplotlib")  # It is needed at the end only, but the user should hear of it now.
    if resume:
        return _resumed(out / (name or last_name(out, base_name(resolve(given, search)))), given, search)
    return _started(out, name, resolve(given, search))


def check_name(name: str) -> None:
    """Raise InputError unless `name` is that of a folder in `--out`, on any system."""
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\:") or name != name.strip():
        raise InputError(f"--name must name a folder in --out, without a dot at its front and without /, got {name!r}")
    if len(name.encode()) > _LONGEST_NAME:
        raise InputError(f"--name must have at most {_LONGEST_NAME} bytes, got {len(name.encode())}")


def _started(out: Path, name: str | None, options: Options) -> Run:
    if name is not None and in_use(out / name):
        raise taken(out / name)
    _check_backend(options)
    data = load_job_data(options, options.download)
    if len(options.lr) > 1 and not int(len(data.train) * options.validation):
        share = f"--validation {options.validation} of {len(data.train)} training images"
        raise InputError(f"{share} is none: it takes one at least to choose among several --lr")
    _check_parts(options, data)
    scales = _given_scales(options, data)

    def fill(unfinished: Path) -> None:
        if scales is not None:
            with files.writing(unfinished / SCALES):
                csla.save_scales(scales, unfinished / SCALES)
        stored = {"options": options.to_json(), "data": data.description(), "versions": versions()}
        files.write_json(unfinished / _OPTIONS, stored)

    while True:
        folder = out / (name or fresh_name(out, base_name(options)))
        lock = created(folder, fill)
        if lock is not None:
            return Run(folder, options, data, lock)
        if name is not None:
            raise taken(folder)


def _check_parts(options: Options, data: Data) -> None:
    """Raise InputError where all training images together are too few to be cut into the parts of a batch."""
    images, least = len(data.train) - int(len(data.train) * options.validation), 2 * options.accumulate
    if options.accumulate > 1 and images < least:
        raise InputError(
            f"--accumulate {options.accumulate}: of {images} training images a batch has no 2 for each part; there "
            f"must be at least {least}"
        )


def in_use(folder: Path) -> bool:
    """Whether there is something under the name of a new run."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def taken(folder: Path) -> InputError:
    """The error of a new run whose folder is in use."""
    return InputError(f"{folder} has something in it already: --resume continues a run, another --name starts one")


def created(folder: Path, fill: Callable[[Path], None]) -> Lock | None:
    """Make the folder of a new run, whole and locked. `fill` writes what it begins with.

    None where there is one already, which another process may have made meanwhile. Raises InputError where it cannot be
    written, and what `fill` raises. Nothing is left behind then.
    """
    place = folder.resolve()  # An empty folder may be a link to another disk.
    unfinished = place.with_name(f".{place.name}.{os.getpid()}{files.TEMPORARY}")
    lock = Lock(unfinished)
    try:
        unfinished.mkdir(parents=True)
        lock.take()
        fill(unfinished)
        with contextlib.suppress(OSError):
            place.rmdir()  # Windows renames to no folder that exists, not even an empty one.
        # This alone decides who gets the name: it fails where there is a folder with something in it.
        unfinished.rename(place)
        lock.folder = folder
        return lock
    except OSError as reason:
        if reason.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise InputError(f"{folder} cannot be written: {reason.strerror or reason}") from None
    except OutputError as reason:  # There is nothing to resume.
        raise InputError(f"{folder} cannot be written: {reason.reason}") from None
    finally:
        if lock.folder is not folder:
            lock.release()
            shutil.rmtree(unfinished, ignore_errors=True)


def _check_backend(options: Options) -> None:
    """Raise InputError where GRADREP_BACKEND names no backend, or one that cannot serve these options."""
    try:
        needed = options.beyond_torch or any(row.extended for row in options.rows)
        if backends.forced() == "auto" or not needed:
            return
        for op in registry.OPS.values():
            if op.reference is not None:
                backends.implementation(op.name, torch.device(options.device).type)
    except (ValueError, backends.Unavailable) as reason:
        raise InputError(str(reason)) from None


def _resumed(folder: Path, given: Mapping[str, Any], search: bool) -> Run:
    if not (folder / _OPTIONS).exists():
        raise InputError(f"{folder}: there is no run to resume; start it without --resume")
    lock = Lock(folder)
    lock.take()
    try:
        options, data = _read_again(folder, given, search)
        for leftover in folder.rglob(f"*{files.TEMPORARY}"):
            with files.writing(leftover):
                leftover.unlink()
    except BaseException:
        lock.release()
        raise
    return Run(folder, options, data, lock)


def stored_options(folder: Path) -> Options:
    """The options of a run that was started.

    Raises InputError where they cannot be read.
    """
    return _stored(folder)[0]


def stored_summary(folder: Path) -> dict[str, Any]:
    """The figures of a run that is done.

    Raises InputError where they cannot be read.
    """
    summary = files.read_json(folder / SUMMARY, "remove it, and `train --resume` makes it anew")
    if not isinstance(summary, dict) or not summary.keys() >= _FIGURES:
        raise InputError(f"{folder / SUMMARY} is not of this version; remove it, and `train --resume` makes it anew")
    return summary


def _stored(folder: Path) -> tuple[Options, Any]:
    """The options of a run that was started, and the description of its data."""
    try:
        stored = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
        return Options.from_json(stored["options"]), stored["data"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise InputError(f"{folder / _OPTIONS} cannot be read by this version ({reason})") from None


def _read_again(folder: Path, given: Mapping[str, Any], search: bool) -> tuple[Options, Data]:
    """The options of a run that was started, and its data."""
    options, described = _stored(folder)
    if search != (not options.recipe):
        raise InputError(f"{folder} was started by `{'train' if options.recipe else 'search'}`")
    options.check_against(given)
    options = options.resumed_with(given)
    options.check()
    _check_backend(options)
    data = load_job_data(options, options.download)
    if data.description() != described:
        now_and_then = f"{data.description()}, then {described}"
        raise InputError(f"{options.data} is not what it was when {folder} was started: {now_and_then}")
    return options, data


def base_name(options: Options) -> str:
    """The default name of a run, without a number."""
    name = f"{options.data.kind}-{options.model.removeprefix('repopt_vgg_').replace(':', '-')}"
    if options.branches is not None:
        name += "-" + options.branches.replace(":", "")  # No folder on Windows has a colon in its name.
    return name if options.recipe else f"{name}-search"


def _taken_numbers(out: Path, base: str) -> list[int]:
    """The numbers of the runs with this default name.

    The first has none and counts as 1.
    """
    names = (entry.name for entry in out.iterdir()) if out.is_dir() else ()
    matches = (re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name) for name in names)
    return sorted(int(match[1] or 1) for match in matches if match)


def fresh_name(out: Path, base: str) -> str:
    """The name with the number that follows all in `out`."""
    numbers = _taken_numbers(out, base)
    return f"{base}-{numbers[-1] + 1}" if numbers else base


def last_name(out: Path, base: str) -> str:
    """The name with the highest number in `out`."""
    numbers = _taken_numbers(out, base)
    return f"{base}-{numbers[-1]}" if numbers and numbers[-1] > 1 else base


def _given_scales(options: Options, data: Data) -> csla.Scales | None:
    """Scales of the file of --scales, by the names of the model's convolutions.

    None without --scales. Raises InputError where the file cannot be read or does not fit, or where the model cannot be
    converted as the rows of the table need it.
    """
    if options.rows and not any(recipe.uses_branches for recipe in options.rows):
        return None
    with torch.random.fork_rng():
        model = plain_model(options, data, options.seed)
        initial = _initial_scales(options, model)
        if options.scales is None:
            return None
        try:
            matched = match(model, csla.load_scales(options.scales), partial=branch_form(model).partial)
        except (OSError, ValueError) as reason:
            said, left_out, _ = str(reason).partition(" (partial=True")
            needed = "; the commands need scales of every convolution and of its shortcut" if left_out else ""
            raise InputError(f"--scales {options.scales}: {said}{needed}") from None
    scales = {site.name: value for site, value in matched}  # Published files name blocks instead.
    unlike = [
        f"{name}: {_branches_of(scales.get(name))}, not {_branches_of(initial.get(name))}"
        for name in {**initial, **scales}
        if _branches_of(scales.get(name)) != _branches_of(initial.get(name))
    ]
    if unlike:
        has = f"--branches {options.branches}" if options.branches else f"--model {options.model} without --branches"
        raise InputError(f"--scales {options.scales}: other branches than {has} has: {first_few(unlike)}")
    return scales


def _initial_scales(options: Options, model: nn.Module) -> csla.Scales:
    """Where a Hyper-Search of `model` starts. Raises InputError where a row, or the search, has no such network."""
    named = f"--branches {options.branches}" if options.branches else f"--model {options.model}"
    try:
        scales = initial_scales(model)
    except ValueError as reason:
        said = str(reason).partition("; `where`")[0]  # which the commands do not have
        raise InputError(f"{named}: {said}") from None
    for row in options.rows:
        if row.scales is None and row.uses_branches:
            try:
                row.network(model, None)
            except ValueError as reason:
                raise InputError(f"{named}: {reason}; leave {row.name} out of --recipe") from None
    return scales


def _branches_of(scales: BranchScales | None) -> str:
    """The branches of a block in words."""
    if scales is None:
        return "no branches"
    names = {"conv": "kxk", **{name: name for name in scales.tensors() if name not in ("conv", "identity")}}
    parts = [*sorted(names.values(), key=lambda name: (name != "kxk", name)), *["identity"] * scales.has_identity]
    constants = {"identity": scales.constant_identity, "average": scales.constant_average}
    return " + ".join([*parts, *(f"{name}={value:g}" for name, value in constants.items() if value)])
