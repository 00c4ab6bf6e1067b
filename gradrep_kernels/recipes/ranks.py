"""Processes that train together: torchrun starts them, and each takes its part of every batch.

Rank 0 alone opens the folder of the run, writes and prints, and tells the others what they need. The first process that
fails says why. The others end with it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from os import _exit
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradrep_kernels.recipes.errors import InputError

__all__ = [
    "alone",
    "average_norms",
    "count",
    "first",
    "from_first",
    "joined",
    "leave",
    "local_rank",
    "lost_another",
    "rank",
    "share_buffers",
    "silent",
    "speaks",
    "summed",
]

_T = TypeVar("_T")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""torchrun sets them. Other launchers leave LOCAL_RANK out, and start programs that know nothing of each other."""
_PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for what rank 0 does alone: the check CSLA = GR in float64, and the report."""
_WATCH_SECONDS = 0.5
_FAILED = "gradrep_kernels/failed/{}"
"""A key in the store that all processes reach, which outlives those that torchrun starts again."""
_CAUSE_SECONDS = 1.0  # How long the process that failed may take to say why, before one that lost it speaks.
_OF_THE_LOST = (  # in what torch says where another process is gone
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL", "other rank(s)",
    "failed to connect", "recvValue failed", "Application timeout",
)  # fmt: skip

_store: Any = None
_together = False


def _launched() -> bool:
    """Whether this is one of several processes of torchrun."""
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def silent() -> bool:
    """Whether another process prints what this one would."""
    return _launched() and os.environ["RANK"] != "0"


def count() -> int:
    """How many processes train together, 1 for one that is alone."""
    return dist.get_world_size() if _together else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if _together else 0


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if _together else 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes of torchrun for the block, if there are any.

    'cuda' is then the GPU of this process. Messages below errors are those of rank 0 alone. A process whose torchrun
    is gone ends at once. Raises InputError where the processes do not meet.
    """
    global _store, _together
    if not _launched():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        _store, number, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as reason:
        raise InputError(f"the processes of torchrun do not meet: {str(reason).splitlines()[0]}") from None
    _end_with(os.getppid())
    _together = True
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not first():
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
        # After an error the others may be in the middle of something, and `leave` ends this process.
        dist.destroy_process_group()
        _store = None
    finally:
        _together = False
        logging.disable(level)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a torchrun that was killed ends nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        _exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process compute by itself inside the block, as if it were the only one. The others do not wait."""
    global _together
    before, _together = _together, False
    try:
        yield
    finally:
        _together = before


def from_first(make: Callable[[], _T]) -> _T:
    """What `make()` returns on rank 0, on every rank. The others do not call it.

    It is pickled. Tensors in it are on the CPU.
    """
    if count() == 1:
        return make()
    box = [make() if first() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def summed(*values: Tensor | float, device: str) -> tuple[float, ...]:
    """The sums of numbers over the ranks, in float64."""
    if count() == 1:
        return tuple(map(float, values))
    parts = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(parts)
    return tuple(parts.tolist())


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: each has collected statistics of its own parts of the batches."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def average_norms(model: nn.Module) -> None:
    """Make the statistics of batch norms their mean over the ranks."""
    if count() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= count()


def lost_another(wrong: BaseException) -> bool:
    """Whether an exception says that another process is gone, or has failed."""
    return _launched() and isinstance(wrong, RuntimeError) and any(part in str(wrong) for part in _OF_THE_LOST)


def speaks(wrong: BaseException) -> bool:
    """Whether this process is the first that fails, which it tells the others. `wrong` is what ends it."""
    if not _launched():
        return True
    if _store is None:  # All of them read the same arguments.
        return not silent()
    if lost_another(wrong):
        time.sleep(_CAUSE_SECONDS)
    try:
        return _store.add(_FAILED.format(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), 1) == 1
    except RuntimeError:  # The process that counts is gone.
        return True


def leave(status: int) -> None:
    """End this process if it has left the others in the middle of something.

    Threads of gloo that are torn down at exit end one process in ten by std::terminate.
    """
    if dist.is_available() and dist.is_initialized() and _launched():
        _exit(status)
