"""How long the commands of docs/experiments.md take on this machine, from the time of a few steps.

    python bench/study_durations.py [--seconds 20] [--threads 2] [--results DIR] [SOURCE ...]

Nothing is trained. Of each row of a command the network is built and a few steps are timed, on random images of the
size that the paper's have. A step of a whole batch is taken for as many times as long as it has more images. Updates
of G, evaluation and reading of images are not in it. Everything is computed in float32 and torch's usual layout: what
--amp and --channels-last gain is for other machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import ROOT, commit, machine, versions
from report import table

from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import build, plain_model, search_model
from gradrep_kernels.recipes.data.load import Data, Images
from gradrep_kernels.recipes.options.arguments import parsed
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options, resolve
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.training import repeatable, train_step

SIZES = {"cifar10": (50_000, 10, 32), "cifar100": (50_000, 100, 32), "folder": (1_281_167, 1000, 224)}
"""Kind of data -> training images, classes and side of the published set: CIFAR, ImageNet."""
CALTECH = (24_581, 257, 224)
"""Caltech256 with 20 images of each class kept for the test (30,607 in all, 256 classes and clutter)."""
MAX_IMAGES = {32: 64, 224: 4}
"""Images of a timed step by their side: what 24 GiB hold of every network."""


@dataclass(frozen=True)
class Command:
    """A row of the page: its source, its options at the first point of its sweep, and how many points there are."""

    source: str
    what: str
    options: Options
    search: bool
    points: int


def commands(page: Path) -> list[Command]:
    """The commands of the page that train."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"\| ([^|]+) \| ([^|]+) \| `gradrep (train|search) (.+)` \|", line)
        if match is None:
            continue
        source, what, name, rest = match.groups()
        words, points = shlex.split(rest), 1
        while "--sweep" in words:
            at = words.index("--sweep")
            option, _, values = words[at + 1].partition("=")
            listed = re.split(";" if ";" in values else ",", values)
            points *= len(listed)
            words[at : at + 2] = [f"--{option}", listed[0]]
        given = parsed([name, *words], "gradrep")
        given = {option: value for option, value in given.items() if option in OPTIONS}
        found.append(
            Command(source, what, resolve({**given, "workers": 1}, name == "search"), name == "search", points)
        )
    return found


def size(options: Options) -> tuple[int, int, int]:
    return CALTECH if options.preset == "repopt-caltech" else SIZES[options.data.kind]


def drawn(options: Options, count: int) -> Data:
    """Random images of the size of the published set."""
    _, classes, side = size(options)
    labels = torch.arange(count) % classes
    images = Images(labels, lambda at: torch.rand(len(at), 3, side, side))
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
    return Data(options.data.kind, images, images, tuple(map(str, range(classes))), side, mean, std)


def seconds_of_image(options: Options, row, count: int, budget: float) -> float:
    """Seconds a training step takes, over its images. None of `row` stands for the Hyper-Search."""
    data = drawn(options, count)
    x, labels = data.standardise(data.train.read(torch.arange(count))), data.train.labels
    with repeatable(options.threads, options.device):
        if row is None:
            trainee = search_model(options.of_search(), data)
        else:
            scales = initial_scales(plain_model(options, data, 0)) if row.needs_search else None
            trainee = build(row, options, data, scales, 0, options.lr[0])
        trainee.model.train()
        times, start = [], time.monotonic()
        while len(times) < 2 or (time.monotonic() - start < budget and len(times) < 8):
            begin = time.perf_counter()
            train_step(trainee, options, x, labels)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) / count  # The first one makes memory and plans.


def measured(command: Command, budget: float, known: dict) -> dict:
    """What a command costs here."""
    options = dataclasses.replace(command.options, amp=None, channels_last=False)
    images, _, side = size(options)
    rows = {None: None} if command.search else {row.name: row for row in options.rows}
    if not command.search and options.scales is None and any(row.needs_search for row in options.rows):
        rows[None] = None
    total, trainings, seconds = 0.0, 0, {}
    for name, row in rows.items():
        settings = options.of_search() if row is None else options
        key = (settings.model, name, side, settings.se, settings.strides, settings.optimizer)
        if key not in known:
            known[key] = seconds_of_image(options, row, min(MAX_IMAGES[side], settings.batch_size), budget)
        seconds["search" if name is None else name] = known[key] * settings.batch_size
        runs = 1 if row is None else options.seeds * len(options.lr)
        steps = images // settings.batch_size * (options.search_epochs if row is None else options.epochs)
        total += runs * steps * known[key] * settings.batch_size * command.points
        trainings += runs * command.points
    return {
        "source": command.source, "what": command.what, "model": options.model, "trainings": trainings,
        "steps": images // options.batch_size * (options.search_epochs if command.search else options.epochs),
        "seconds_per_step": seconds, "days": total / 86400,
    }  # fmt: skip


def page(found: dict) -> str:
    def days(value: float) -> str:
        if value > 3650:
            return f"{value / 365:,.0f} years"
        return f"{24 * value:.1f} hours" if value < 1 else f"{value:,.0f} days"

    head = ["source", "what", "network", "trainings", "steps of each", "seconds a step here", "all of it here"]
    rows = [
        [
            row["source"], row["what"], row["model"], str(row["trainings"]), f"{row['steps']:,}",
            ", ".join(f"{name} {value:.3g}" for name, value in row["seconds_per_step"].items()), days(row["days"]),
        ]
        for row in found["commands"]
    ]  # fmt: skip
    where = f"{found['machine']['cpu']}, {found['threads']} threads, torch {found['versions']['torch']}"
    return "\n".join([*table(head, rows), f"{where}, commit {found['commit']}. `{found['command']}`", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="*", help="what the sources begin with (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each network, about (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "studies" / "durations")
    given = parser.parse_args(argv)
    chosen = [
        command
        for command in commands(ROOT / "docs" / "experiments.md")
        if not given.source or command.source.startswith(tuple(given.source))
    ]
    words = ["python", "bench/study_durations.py", *(sys.argv[1:] if argv is None else argv)]
    found = {
        "command": " ".join(words), "commit": commit(), "versions": versions(), "threads": given.threads,
        "machine": machine(torch.device("cpu")), "commands": [],
    }  # fmt: skip
    given.results.mkdir(parents=True, exist_ok=True)
    known: dict = {}
    for command in chosen:
        found["commands"].append(measured(command, given.seconds, known))
        print(found["commands"][-1], flush=True)
        files.write_json(given.results / "durations.json", found)
        files.write_text(given.results / "durations.md", page(found))
    assert math.isfinite(sum(row["days"] for row in found["commands"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
