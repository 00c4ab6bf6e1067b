"""The costs of rows: speed, memory and the largest batch of a training, and the speed of the deployed network.

Functions take what makes a row's network, batches, a step and settings. They know nothing of a run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels.recipes.build import Trainee, multiplier_bytes
from gradrep_kernels.recipes.costs.counts import deployed, form_costs
from gradrep_kernels.recipes.costs.memory import (
    Batch,
    Maker,
    Step,
    free_memory,
    largest_batch,
    largest_batch_within,
    step_memory,
    two_steps,
)
from gradrep_kernels.recipes.costs.turns import Timing, by_speed, in_turns, quartiles

__all__ = ["CostSettings", "costs_of", "inference_seconds", "repeated", "seconds_alone", "training_seconds"]

_WITHIN = 1 / 64  # The largest batch on a GPU, as a share of it.
_ROUNDS_AT_LARGEST = 3  # Each makes the networks anew.


@dataclass(frozen=True)
class CostSettings:
    """What is measured, and where."""

    device: str = "cpu"
    threads: int = 1
    memory: int | None = None
    """On the CPU: the bytes that a step may take at the largest batch. None leaves the largest batch out."""
    inference_batches: tuple[int, ...] = (1, 128)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Those of the deployed network."""
    channels_last: bool = False
    timing: Timing = dataclasses.field(default_factory=Timing)


def costs_of(
    makers: Mapping[str, Maker],
    batches: Sequence[Batch],
    step: Step,
    settings: CostSettings,
    sgs_steps: int | None = None,
    test_images: Tensor | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, Any]]:
    """The costs of each row, by its name. docs/howto/costs.md says what the keys mean.

    Args:
        makers:      what makes a row's network and optimizer
        batches:     of training, on the CPU  # ([N, C, H, W], [N]) each, of one size N
        step:        a training step
        sgs_steps:   training steps from an update of spatial gradient scaling to the next, for its share of the time
        test_images: of the size that the deployed network gets, on the CPU. None: those of `batches`
        say:         is told what is being measured
    """
    images, shape = len(batches[0][0]), batches[0][0].shape[1:]
    if test_images is None:
        test_images = batches[0][0]
    found: dict[str, dict[str, Any]] = {}
    with by_speed(settings.threads):
        for name, make in makers.items():
            say(f"{name}: multiply-adds and memory")
            found[name] = {"batch_size": images, **form_costs(make().model, shape, test_images.shape[1:])}
            batch_of = functools.partial(repeated, batches, images, settings.device)
            found[name]["peak_memory"] = step_memory(make, batch_of, step, settings.device)
        say("training steps in turns")
        ready = [(x.to(settings.device), labels.to(settings.device)) for x, labels in batches]
        seconds = training_seconds(makers, ready, step, settings.timing, settings.device)
        for name in makers:
            found[name] |= _training_figures(seconds[name], images, sgs_steps)
            found[name]["times_first"] = _ratios(seconds[name]["step"], seconds[next(iter(makers))]["step"])
        del ready  # The largest batch shall have all memory.
        for name, figures in _at_largest(makers, batches, step, settings, say).items():
            found[name]["largest_batch"] = figures
        say("inference in turns")
        for name, figures in _inference(makers, test_images, settings).items():
            found[name]["inference"] = figures
    return found


def _inference(makers: Mapping[str, Maker], images: Tensor, settings: CostSettings) -> dict[str, list[dict[str, Any]]]:
    """Images a second of the deployed networks, by batch size and dtype."""
    networks = {name: _laid_out(deployed(make().model), settings) for name, make in makers.items()}
    batch = [(images, torch.zeros(len(images)))]
    inputs = {n: _laid_out(repeated(batch, n, settings.device)[0], settings) for n in settings.inference_batches}
    times = inference_seconds(networks, inputs, settings.dtypes, settings.timing, settings.device)
    return {
        name: [
            {"batch_size": n, "dtype": _name(dtype), "images_per_second": _rates(times[name, n, dtype], n)}
            for dtype in settings.dtypes
            for n in settings.inference_batches
        ]
        for name in makers
    }


def _laid_out(what: Any, settings: CostSettings) -> Any:
    return what.to(memory_format=torch.channels_last) if settings.channels_last else what


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rates(seconds: Sequence[float], images: int) -> dict[str, float]:
    """Quartiles of images a second."""
    return quartiles([images / s for s in seconds])


def _ratios(seconds: Sequence[float], of_first: Sequence[float]) -> dict[str, float]:
    """How many times longer than the first row's, round by round: a busy machine spoils the ratio of medians."""
    return quartiles([a / b for a, b in zip(seconds, of_first)])


def _training_figures(seconds: Mapping[str, Any], images: int, sgs_steps: int | None) -> dict[str, Any]:
    step = quartiles(seconds["step"])
    figures = {
        "images_per_second": _rates(seconds["step"], images),
        "seconds_per_step": step,
        "optimizer_seconds": quartiles(seconds["optimizer"]),
        "multiplier_bytes": seconds["multiplier_bytes"],
        "sgs_update_seconds": None,
        "sgs_share": None,
    }
    if seconds["sgs_update"] is not None:
        update = quartiles(seconds["sgs_update"])
        figures["sgs_update_seconds"] = update
        if sgs_steps is not None:
            figures["sgs_share"] = update["median"] / (update["median"] + sgs_steps * step["median"])
    return figures


def _at_largest(
    makers: Mapping[str, Maker],
    batches: Sequence[Batch],
    step: Step,
    settings: CostSettings,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The largest batch of each row, and images a second with it."""
    on_gpu = torch.device(settings.device).type == "cuda"
    if not on_gpu and settings.memory is None:
        return {name: {"not_measured": "on a CPU it needs a limit, --memory GiB"} for name in makers}
    images = len(batches[0][0])
    found: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        say(f"{name}: the largest batch")
        n = _largest_on_gpu(make, batches, step, settings) if on_gpu else _largest_on_cpu(make, batches, step, settings)
        found[name] = {"images": n, "not_measured": "not even 2 images fit"} if n is None else {"images": n}
        if n is not None:
            found[name]["lr_factor"] = n / images
    alone = {
        name: (makers[name], functools.partial(repeated, batches, figures["images"], settings.device))
        for name, figures in found.items()
        if figures["images"] is not None
    }
    say("training steps with the largest batches")
    timing = dataclasses.replace(settings.timing, rounds=min(_ROUNDS_AT_LARGEST, settings.timing.rounds))
    times = seconds_alone(alone, step, timing, settings.device)
    for name in alone:
        if name in times:
            found[name]["images_per_second"] = _rates(times[name], found[name]["images"])
        else:
            found[name]["not_measured"] = "two steps fit, but not those that were timed"
    return found


def _largest_on_gpu(make: Maker, batches: Sequence[Batch], step: Step, settings: CostSettings) -> int | None:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # Else cuDNN tries its algorithms anew with each size of a batch.
    try:
        steps = two_steps(make, lambda n: repeated(batches, n, settings.device), step, settings.device)
        return largest_batch(steps, len(batches[0][0]), within=_WITHIN)
    finally:
        torch.backends.cudnn.benchmark = before


def _largest_on_cpu(make: Maker, batches: Sequence[Batch], step: Step, settings: CostSettings) -> int | None:
    def memory_at(n: int) -> int:
        return step_memory(make, lambda: repeated(batches, n, settings.device), step, settings.device)

    return largest_batch_within(memory_at, settings.memory, len(batches[0][0]))


def training_seconds(
    makers: Mapping[str, Maker], batches: Sequence[Batch], step: Step, timing: Timing, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds that each row takes, in turns, one figure for each round.

    Returns `step` (forward, backward, optimizer), `optimizer` (its step alone), `sgs_update` (an update of spatial
    gradient scaling, None where there is none), and `multiplier_bytes`. Scalings are learned beforehand, so that a step
    multiplies by them. Batches lie ready on the device. All learning rates are 0, so that nothing diverges: no cost
    depends on them.
    """
    trainees = {name: _standing_still(make()) for name, make in makers.items()}
    seconds: dict[str, dict[str, Any]] = {name: {"sgs_update": None} for name in makers}
    learning = {name: trainee.sgs for name, trainee in trainees.items() if trainee.sgs is not None}
    images = [x for x, _ in batches]
    updates = {
        name: lambda sgs=sgs: sgs.update(list(itertools.islice(itertools.cycle(images), sgs.batches)))
        for name, sgs in learning.items()
    }
    for name, times in in_turns(updates, timing, device).items():
        seconds[name]["sgs_update"] = times

    def one_step(trainee: Trainee) -> Callable[[], object]:
        turn = itertools.cycle(batches)
        return lambda: step(trainee, *next(turn))

    for trainee in trainees.values():
        trainee.model.train()
    steps = in_turns({name: one_step(trainee) for name, trainee in trainees.items()}, timing, device)
    for trainee in trainees.values():
        for p in trainee.model.parameters():
            if p.requires_grad and p.grad is None:  # A step may give its gradients back.
                p.grad = torch.zeros_like(p)
    alone = in_turns({name: trainee.optimizer.step for name, trainee in trainees.items()}, timing, device)
    for name, trainee in trainees.items():
        seconds[name] |= {"step": steps[name], "optimizer": alone[name]}
        seconds[name]["multiplier_bytes"] = multiplier_bytes(trainee)
    return seconds


def _standing_still(trainee: Trainee) -> Trainee:
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    return trainee


def seconds_alone(
    makers: Mapping[str, tuple[Maker, Callable[[], Batch]]], step: Step, timing: Timing, device: str
) -> dict[str, list[float]]:
    """Seconds of a step of each row, one figure for each round, where two rows do not fit into memory at once.

    Each turn makes the network and the batch anew, and is alone in memory. A row that runs out of memory on a GPU has
    no figures.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(timing.rounds):
        for name in list(seconds):
            make, batch_of = makers[name]
            free_memory(device)
            try:
                turn = in_turns({name: _step_of(make, batch_of, step)}, Timing(1, timing.seconds, 2), device)
            except torch.OutOfMemoryError:
                del seconds[name]
            else:
                seconds[name] += turn[name]
    free_memory(device)
    return seconds


def _step_of(make: Maker, batch_of: Callable[[], Batch], step: Step) -> Callable[[], object]:
    trainee, batch = _standing_still(make()), batch_of()
    trainee.model.train()
    return lambda: step(trainee, *batch)


def repeated(batches: Sequence[Batch], n: int, device: str) -> Batch:
    """A batch of n images on the device: those of `batches` over and over."""
    x, labels = (torch.cat(parts) for parts in zip(*batches))
    at = torch.arange(n, device=x.device) % len(x)
    return x[at].to(device), labels[at].to(device)


def inference_seconds(
    networks: Mapping[str, nn.Module],
    batches: Mapping[int, Tensor],
    dtypes: Sequence[torch.dtype],
    timing: Timing,
    device: str,
) -> dict[tuple[str, int, torch.dtype], list[float]]:
    """Seconds of a forward pass of each network, by (name, batch size, dtype), one figure for each round.

    In eval mode and inference mode, with weights and images of the dtype: a network is not changed, but copied.

    Args:
        batches: the images of each batch size  # [n, C, H, W]
    """
    works = {
        (name, n, dtype): functools.partial(cast, x.to(dtype))
        for dtype in dtypes
        for name, network in networks.items()
        for cast in (copy.deepcopy(network).to(dtype).eval(),)
        for n, x in batches.items()
    }
    with torch.inference_mode():
        return in_turns(works, timing, device)
