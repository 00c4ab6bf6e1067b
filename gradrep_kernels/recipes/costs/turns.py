"""Time several works in turns, so that a slow moment of the machine does not fall on one of them alone."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.training import now

__all__ = ["Timing", "by_speed", "in_turns", "quartiles"]

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How long to measure: `rounds` turns of each work, of about `seconds` each, after `warm_up` calls."""

    rounds: int = 7
    seconds: float = 0.3
    warm_up: int = 3  # A FusedRepSGD makes its plan in the second step.


@contextlib.contextmanager
def by_speed(threads: int) -> Iterator[None]:
    """Let algorithms be chosen by speed, as a training that need not repeat its bits would.

    On a GPU deterministic algorithms are not forced, and cuDNN tries which of its own is the fastest. All settings are
    restored afterwards, the default generators too.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    forced = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = False, True
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        torch.use_deterministic_algorithms(forced[0], warn_only=forced[1])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and quartiles of n values: `median`, `low`, `high`, `n`."""
    low, middle, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def in_turns(works: Mapping[K, Callable[[], object]], timing: Timing, device: str) -> dict[K, list[float]]:
    """Seconds of a call of each work, one figure for each round.

    A work is called for about `timing.seconds` in its turn, and the clock is read before and after, so that a GPU is
    kept busy. Who begins changes from round to round. The first call of a turn is not counted: it finds what another
    work left in the caches.
    """
    calls, names = {}, list(works)
    for name, work in works.items():
        _call(work, timing.warm_up)
        calls[name] = max(1, math.ceil(timing.seconds / max(_seconds(work, 1, device), 1e-6)))
    seconds: dict[K, list[float]] = {name: [] for name in names}
    with _without_collection():
        for turn in range(timing.rounds):
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                _call(works[name], 1)
                seconds[name].append(_seconds(works[name], calls[name], device))
    return seconds


def _call(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        interrupts.check()
        work()


def _seconds(work: Callable[[], object], calls: int, device: str) -> float:
    start = now(device)
    _call(work, calls)
    return (now(device) - start) / calls


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
