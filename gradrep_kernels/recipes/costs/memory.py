"""The memory of a training step, and the largest batch that fits into it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.build import Trainee

__all__ = [
    "MOST_IMAGES",
    "Batch",
    "Maker",
    "Step",
    "free_memory",
    "largest_batch",
    "largest_batch_within",
    "step_memory",
    "two_steps",
]

Batch = tuple[Tensor, Tensor]
"""Images x [n, C, H, W] and labels [n]."""
Maker = Callable[[], Trainee]
"""Makes a new network with its optimizer, at the start of a training."""
Step = Callable[[Trainee, Tensor, Tensor], object]
"""Does one training step on a batch."""

_SETTLED = 2  # After two steps the states of the optimizer and its plan are there.
_MARK = "gradrep_kernels: the step that is measured"
MOST_IMAGES = 1 << 16


def free_memory(device: str) -> None:
    """Give back to a GPU what nobody holds, so that the next network finds all its memory."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def step_memory(make: Maker, batch_of: Callable[[], Batch], step: Step, device: str) -> int:
    """The most bytes that torch's allocator has handed out at one time during a training step.

    Counts whatever the row allocates: its network, optimizer and multipliers, the batch, activations, gradients, and
    what is given back within the step. Does not count what was there before, blocks that the allocator keeps for
    later, nor what libraries allocate by themselves (on a CPU oneDNN's scratch, torch, Python). It is the third step
    that is measured, when the states of the optimizer are there.

    On a GPU it is torch.cuda.max_memory_allocated. On the CPU torch.profiler records each allocation. Not to be
    called inside another profiler.
    """
    free_memory(device)
    if torch.device(device).type == "cuda":
        return _on_gpu(make, batch_of, step, device)
    return _on_cpu(make, batch_of, step)


def _on_gpu(make: Maker, batch_of: Callable[[], Batch], step: Step, device: str) -> int:
    before = torch.cuda.memory_allocated(device)
    trainee, batch = make(), batch_of()
    trainee.model.train()
    for _ in range(_SETTLED):
        step(trainee, *batch)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(trainee, *batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(make: Maker, batch_of: Callable[[], Batch], step: Step) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainee, batch = make(), batch_of()
        trainee.model.train()
        for _ in range(_SETTLED):
            step(trainee, *batch)
        with record_function(_MARK):
            step(trainee, *batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return _peak(events)


def _peak(events: list[dict]) -> int:
    """The most bytes in use during the mark, of the blocks that were allocated while the profiler ran."""
    (mark,) = (e for e in events if e["name"] == _MARK and e.get("ph") == "X")
    blocks: dict[int, int] = {}  # A block of before the profiler may be given back under it.
    in_use = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        block, size = event["args"]["Addr"], event["args"]["Bytes"]
        if event["ts"] > mark["ts"] + mark["dur"]:
            break
        if event["ts"] >= mark["ts"]:
            peak = max(peak, in_use)
        if size > 0:
            blocks[block] = size
            in_use += size
        else:
            in_use -= blocks.pop(block, 0)
    return max(peak, in_use)


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library, which reads this when it starts, from writing to standard error."""
    name = "KINETO_LOG_LEVEL"
    given = name in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def two_steps(make: Maker, batch_of: Callable[[int], Batch], step: Step, device: str) -> Callable[[int], None]:
    """What `largest_batch` tries: two steps of a new network on a batch of n images, alone in memory.

    The first makes the states of the optimizer, so the second shows whether there is room for both.
    """

    def step_at(n: int) -> None:
        free_memory(device)
        trainee, batch = make(), batch_of(n)
        trainee.model.train()
        for _ in range(2):
            step(trainee, *batch)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    return step_at


def largest_batch(
    step_at: Callable[[int], object], start: int = 2, *, least: int = 2, most: int = MOST_IMAGES, within: float = 0.0
) -> int | None:
    """The largest n from `least` to `most` for which `step_at(n)` raises no torch.OutOfMemoryError, None if none is.

    Doubles n from `start` until it does not fit, then halves the distance, to one image or to a share `within` of n.
    All other exceptions pass.
    """
    if not 1 <= least <= start <= most:
        raise ValueError(f"start must be from least={least} to most={most}, and least at least 1, got {start}")
    fitting, n = 0, start
    while _fits(step_at, n):
        if n == most:
            return n
        fitting, n = n, min(2 * n, most)
    if not fitting:
        if start == least or not _fits(step_at, least):
            return None
        fitting = least
    too_many = n
    while too_many - fitting > max(1, int(within * fitting)):
        n = (fitting + too_many) // 2
        fitting, too_many = (n, too_many) if _fits(step_at, n) else (fitting, n)
    return fitting


def _fits(step_at: Callable[[int], object], n: int) -> bool:
    interrupts.check()
    try:
        step_at(n)
    except torch.OutOfMemoryError:
        return False
    return True


def largest_batch_within(
    memory_at: Callable[[int], int], limit: int, start: int = 2, *, least: int = 2, most: int = MOST_IMAGES
) -> int | None:
    """The largest batch whose step takes at most `limit` bytes, None where not even `least` images do.

    `memory_at(n)` measures a step with n images. Two measurements give the bytes of an image and of all else. A third
    one, of the batch that they give, confirms it, or lowers the batch until it is within the limit.
    """
    first, second = memory_at(start), memory_at(2 * start)
    each = max((second - first) / start, 1.0)
    n = min(most, int((limit - (first - each * start)) // each))
    while n >= least:
        taken = memory_at(n)
        if taken <= limit:
            return n
        n = min(n - 1, int(n * limit / taken))
    return None
