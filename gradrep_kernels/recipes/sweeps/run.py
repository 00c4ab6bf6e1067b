"""A sweep: runs that differ in some options, each in a folder of its own, and one table of them all.

It can be killed at any moment and resumed, as a run can. A point whose summary.json is there is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrep_kernels.recipes import files, ranks
from gradrep_kernels.recipes.costs.run import COSTS
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.job import run_job
from gradrep_kernels.recipes.lock import Lock
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.runs import (
    POINTS,
    base_name,
    check_name,
    created,
    fresh_name,
    in_use,
    last_name,
    open_run,
    stored_options,
    stored_summary,
    taken,
)
from gradrep_kernels.recipes.shared_run import check_count, check_together, one_at_a_time, open_together
from gradrep_kernels.recipes.sweeps.points import Point, read_points, resolved_points
from gradrep_kernels.recipes.sweeps.report import sweep_lines, write_sweep
from gradrep_kernels.recipes.sweeps.sharing import take_over
from gradrep_kernels.recipes.trainings import RANKS, STATE

__all__ = ["Sweep", "is_sweep", "open_sweep", "run_sweep", "sweep_lines", "sweep_options"]


@dataclass(frozen=True)
class Sweep:
    """A folder that holds the runs of a sweep, each whole from its start.

    No other process can run it until the `with` block of this one ends, or the process.
    """

    folder: Path
    points: Mapping[str, Options]
    """In the order in which they are done."""
    swept: tuple[str, ...]
    """The options in which points differ, by attribute name."""
    base: str
    """The point that the others are compared with."""
    given: Mapping[str, Any] = field(repr=False, hash=False)
    """The options that the user gave now for all points."""
    lock: Lock = field(repr=False, compare=False)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def is_sweep(folder: Path) -> bool:
    """Whether the folder is that of a sweep."""
    return (folder / POINTS).is_file()


def sweep_options(texts: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each point as JSON, by its name. Nothing is started.

    Raises InputError as `open_sweep` does for the options.
    """
    return {name: options.to_json() for name, options in resolved_points(read_points(texts), given).items()}


def open_sweep(
    out: Path, name: str | None, given: Mapping[str, Any], texts: Sequence[str], base: str | None, *, resume: bool
) -> Sweep:
    """Start a sweep in a folder of `out`, or resume one, and return it on every rank.

    Without a name it takes that of a run, followed by the options that are swept. Every point is checked, down to its
    data and its network, before anything is trained. Rank 0 alone opens the folder, and holds its lock.

    Args:
        given: the options of all points, as `resolve` takes them.
        texts: the values of `--sweep`. Of a sweep that is resumed they may be left out.
        base: the point that the others are compared with, None for that of the start, the first if none was named.

    Raises:
        InputError: as `open_together` does, with the name of the point in front. Nothing is left behind.
    """
    given = one_at_a_time(given)
    own = _opened(out, name, given, texts, base, resume) if ranks.first() else None
    folder, *points = ranks.from_first(lambda: (own.folder, own.points, own.swept, own.base))
    return own or Sweep(folder, *points, given, Lock(folder))


def _opened(
    out: Path, name: str | None, given: Mapping[str, Any], texts: Sequence[str], base: str | None, resume: bool
) -> Sweep:
    if name is not None:
        check_name(name)
    points = read_points(texts)
    if resume:
        return _resumed(out, name, given, points, base)
    resolved = resolved_points(points, given)
    chosen = _base(base, list(resolved))
    swept = _swept(points)
    if name is not None and in_use(out / name):
        raise taken(out / name)

    def fill(unfinished: Path) -> None:
        for point in points:
            try:
                check_together(resolved[point.name])
                with open_run(unfinished, point.name, {**given, **point.given}, resume=False) as run:
                    (run.folder / STATE).mkdir()
                    files.write_json(run.folder / STATE / f"{RANKS}.json", ranks.count())
            except InputError as reason:
                raise InputError(f"point {point.name}: {reason}") from None
        stored = {"sweep": list(texts), "swept": swept, "points": list(resolved), "base": chosen}
        stored["processes"] = ranks.count()
        files.write_json(unfinished / POINTS, stored)

    while True:
        folder = out / (name or fresh_name(out, _default_name(points, resolved)))
        lock = created(folder, fill)
        if lock is not None:
            return Sweep(folder, resolved, tuple(swept), chosen, given, lock)
        if name is not None:
            raise taken(folder)


def _swept(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point.given))


def _default_name(points: Sequence[Point], resolved: Mapping[str, Options]) -> str:
    flags = (OPTIONS[name].flag.removeprefix("--") for name in _swept(points))
    return "-".join([base_name(next(iter(resolved.values()))), "sweep", *flags])[:150]


def _base(base: str | None, names: Sequence[str]) -> str:
    if base is not None and base not in names:
        raise InputError(f"--sweep-base must name a point of {', '.join(names)}, got {base!r}")
    return base or names[0]


def _resumed(out: Path, name: str | None, given: Mapping[str, Any], points: Sequence[Point], base: str | None) -> Sweep:
    if name is None:
        name = last_name(out, _default_name(points, resolved_points(points, given)))
    folder = out / name
    if not is_sweep(folder):
        raise InputError(f"{folder}: there is no sweep to resume; start it without --resume")
    lock = Lock(folder)
    lock.take()
    try:
        try:
            stored = json.loads((folder / POINTS).read_text(encoding="utf-8"))
            names, swept, processes = list(stored["points"]), tuple(stored["swept"]), int(stored.get("processes", 1))
            base = base or stored.get("base")
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise InputError(f"{folder / POINTS} cannot be read by this version ({reason})") from None
        check_count(folder, processes)
        own = {point.name: point.given for point in points}
        if points and list(own) != names:
            raise InputError(f"{folder} is a sweep of {', '.join(names)}; leave --sweep out to resume it")
        resolved = {}
        for point in names:
            resolved[point] = stored_options(folder / point)
            resolved[point].check_against({**given, **own.get(point, {})})
        for leftover in folder.glob(f"*{files.TEMPORARY}"):
            with files.writing(leftover):
                leftover.unlink()
        return Sweep(folder, resolved, swept, _base(base, names), given, lock)
    except BaseException:
        lock.release()
        raise


def run_sweep(sweep: Sweep, reporter: Reporter) -> dict[str, Any]:
    """Do the rest of a sweep and write its table. `reporter` is told of points.

    Returns what sweep.json holds, on every rank.
    """
    summaries: dict[str, dict[str, Any]] = {}
    for n, name in enumerate(sweep.points, start=1):
        folder = sweep.folder / name
        with_costs = sweep.points[name].costs or sweep.given.get("costs", False)
        if not ranks.from_first(lambda: _is_done(folder, with_costs)):  # noqa: B023 (it is called here)
            with open_together(sweep.folder, name, sweep.given, resume=True) as run:
                if ranks.first():
                    taken_over = take_over(folder, {other: sweep.folder / other for other in summaries}, sweep.points)
                    reporter.line(f"Point {n} of {len(sweep.points)}, {name}{_taken_words(taken_over)}")
                run_job(run, Reporter(reporter.stream, silent=reporter.silent))
        summaries[name] = ranks.from_first(lambda: stored_summary(folder))  # noqa: B023
    table = ranks.from_first(lambda: write_sweep(sweep.folder, sweep.swept, sweep.base, sweep.points, summaries))
    reporter.close()
    return table


def _is_done(folder: Path, with_costs: bool) -> bool:
    return all((folder / f"{name}.json").exists() for name in ("summary", *[COSTS] * with_costs))


def _taken_words(taken_over: Mapping[str, str]) -> str:
    parts = (f"{part} from {point}" for part, point in taken_over.items())
    return f": taken over {', '.join(parts)}" if taken_over else ""
