"""The costs of a run's rows: costs.json and costs.md in its folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels import csla
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import Trainee, build
from gradrep_kernels.recipes.cores import processor
from gradrep_kernels.recipes.costs.memory import MOST_IMAGES, Maker
from gradrep_kernels.recipes.costs.page import costs_page
from gradrep_kernels.recipes.costs.rows import CostSettings, costs_of
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.environment import commit, versions
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.declare import between
from gradrep_kernels.recipes.options.readers import ABOVE_0, check_device, read_numbers
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.runs import Run, open_run, stored_summary
from gradrep_kernels.recipes.steps import AMP_DTYPES, TrainingSteps
from gradrep_kernels.recipes.table import Recipe
from gradrep_kernels.recipes.training import epoch_batches
from gradrep_kernels.recipes.trainings import WEIGHTS, names_of, searched_scales
from gradrep_kernels.recipes.validation import hold_out
from gradrep_kernels.wrappers import plain_name, unwrapped

__all__ = ["COSTS", "INFERENCE_BATCHES", "cost_settings", "costs_of_run", "write_costs"]

COSTS = "costs"
"""The name of both files in the folder of a run."""
INFERENCE_BATCHES = (1, 128)
_TEST_IMAGES = 32
_BATCHES = 4  # Different ones, so that no step finds its images in a cache.
_COUNTED = {
    "cpu": "the most bytes that torch's allocator has handed out at one time during a step (network, optimizer, batch, "
    "activations, gradients, and what is given back within the step), without Python, torch and oneDNN's scratch",
    "cuda": "torch.cuda.max_memory_allocated of a step, less what was there before the row's network: without the "
    "context, and without blocks that the allocator keeps for later",
}


def cost_settings(
    options: Options,
    device: str | None = None,
    memory: float | None = None,
    inference_batches: Sequence[str | int] = INFERENCE_BATCHES,
) -> CostSettings:
    """The settings for a run with these options.

    Args:
        device: another one than the run's.
        memory: GiB that a step may take on the CPU, where the largest batch is looked for.

    Raises InputError that names the flag.
    """
    device = options.device if device is None else device
    check_device("--device", device)
    if memory is not None:
        ABOVE_0("--memory", memory)
        if torch.device(device).type == "cuda":
            raise InputError(f"--memory is for the CPU, on {device} the device's memory is the limit")
    batches = read_numbers("--inference-batches", inference_batches)
    between(1, MOST_IMAGES)("--inference-batches", max(batches))
    return CostSettings(
        device=device,
        threads=options.threads,
        memory=None if memory is None else int(memory * 2**30),
        inference_batches=tuple(dict.fromkeys(batches)),
        dtypes=(torch.float32, *([AMP_DTYPES[options.amp]] if options.amp else [])),
        channels_last=options.channels_last,
    )


def costs_of_run(
    folder: Path,
    given: Mapping[str, Any],
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure the rows of the finished run in `folder`, which `run_folder` gives, as `write_costs` does.

    Args:
        given: keyword arguments of `cost_settings`.

    Raises InputError where another process runs it, or a setting is out of range.
    """
    folder = folder.resolve()
    with open_run(folder.parent, folder.name, {}, resume=True) as run:
        summary = stored_summary(folder)
        return write_costs(run, cost_settings(run.options, **given), summary, say)


def write_costs(
    run: Run, settings: CostSettings, summary: Mapping[str, Any], say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measure the rows of a run, write costs.json and costs.md into its folder, and return the former.

    Rows whose networks cannot be made again are left out, with the reason: where the Hyper-Search diverged, and where
    the kept weights are those of another structure than a row begins with.

    Args:
        summary: of the run, for the learning rates
        say:     is told what is being measured
    """
    folder, options = run.folder, run.options
    data, _ = hold_out(run.data, options.validation)
    options = dataclasses.replace(options, device=settings.device)
    on_host = dataclasses.replace(options, device="cpu")
    scales = searched_scales(folder)
    with torch.random.fork_rng():
        batches = list(itertools.islice(epoch_batches(data, on_host, options.seed, 0), _BATCHES))
        test_images, _ = next(iter(Loader(data, data.test, _TEST_IMAGES)))
        makers = {row.name: _maker(row, options, data, scales, folder) for row in options.rows}
        reasons = {row.name: _cannot(row, makers[row.name], scales, folder) for row in options.rows}
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        measured = costs_of(
            {name: make for name, make in makers.items() if name not in left_out},
            batches,
            _step,
            settings,
            options.sgs_every * len(epoch_batches(data, on_host, options.seed, 0)),
            test_images,
            say,
        )
    for name, row in measured.items():
        largest = row["largest_batch"]
        if "lr_factor" in largest:
            largest["learning_rate"] = summary["recipes"][name]["learning_rate"] * largest["lr_factor"]
    on_gpu = torch.device(settings.device).type == "cuda"
    costs = {
        "run": folder.name,
        "versions": versions(),
        "commit": commit(),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name(settings.device) if on_gpu else None,
        "device": settings.device,
        "threads": settings.threads,
        "model": options.model,
        "image": list(batches[0][0].shape[1:]),
        "test_image": list(test_images.shape[1:]),
        "settings": {
            "batch_size": len(batches[0][0]),
            **{name: getattr(options, name) for name in ("amp", "channels_last", "compile", "accumulate")},
            "memory": settings.memory,
            "rounds": settings.timing.rounds,
            "seconds": settings.timing.seconds,
        },
        "memory_counts": _COUNTED["cuda" if on_gpu else "cpu"],
        "recipes": {
            row.name: {"not_measured": left_out[row.name]} if row.name in left_out else measured[row.name]
            for row in options.rows
        },
    }
    files.write_json(folder / f"{COSTS}.json", costs)
    files.write_text(folder / f"{COSTS}.md", costs_page(costs))
    return costs


@dataclasses.dataclass
class _Stepped(Trainee):
    """A trainee with its steps, which compile once and remember the scale of --amp fp16."""

    steps: TrainingSteps | None = None


def _maker(row: Recipe, options: Options, data: Data, scales: csla.Scales | None, folder: Path) -> Maker:
    def make() -> _Stepped:
        trainee = build(row, options, data, scales, options.seed, options.lr[0])
        kept = None if trainee.structure is None else _kept_weights(row, folder)
        if kept is not None:
            weights = torch.load(kept, map_location="cpu", mmap=True, weights_only=True)
            trainee.structure.take_structure_of(weights)
        stepped = _Stepped(**{field.name: getattr(trainee, field.name) for field in dataclasses.fields(trainee)})
        stepped.steps = TrainingSteps(stepped, options)
        return stepped

    return make


def _step(trainee: _Stepped, x: Tensor, labels: Tensor) -> None:
    """A training step in the layout and the precision of a run."""
    trainee.steps(x, labels)


def _cannot(row: Recipe, make: Maker, scales: csla.Scales | None, folder: Path) -> str | None:
    """Why a row cannot be measured, None where it can."""
    if row.needs_search and scales is None:
        return "the Hyper-Search diverged"
    kept = _kept_weights(row, folder)
    if kept is None:
        return "the run has no weights of it"
    tensors = torch.load(kept, map_location="cpu", mmap=True, weights_only=True)
    now = unwrapped(make().model).state_dict()
    if {plain_name(name): t.shape for name, t in tensors.items()} != {name: t.shape for name, t in now.items()}:
        return f"{kept.name} has another structure than a new network, which cannot be made again from it"
    return None


def _kept_weights(row: Recipe, folder: Path) -> Path | None:
    """The weights of one training of the row."""
    named = names_of(row.name)
    found = sorted(path for path in (folder / WEIGHTS).glob("*.pt") if named.fullmatch(path.stem))
    return found[0] if found else None
