"""Open a run for one process, or for those that train together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradrep_kernels.recipes import ranks
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.lock import Lock
from gradrep_kernels.recipes.options.resolve import Options, resolve
from gradrep_kernels.recipes.runs import Run, open_run
from gradrep_kernels.recipes.validation import load_job_data

__all__ = ["check_count", "check_together", "one_at_a_time", "open_together"]

_LEAST = 2  # images that batch normalisation needs where maps have one pixel


def open_together(out: Path, name: str | None, given: Mapping[str, Any], *, resume: bool, search: bool = False) -> Run:
    """Start or resume a run, as `open_run` does, and return it on every rank.

    Rank 0 alone opens the folder, and holds its lock. Raises InputError too where the processes of torchrun cannot
    train with these options. Nothing is left behind then.
    """
    given = one_at_a_time(given)

    def opened() -> Run:
        if not resume:
            check_together(resolve(given, search))
        return open_run(out, name, given, resume=resume, search=search)

    own = opened() if ranks.first() else None
    folder, options = ranks.from_first(lambda: (own.folder, own.options))
    check_together(options)
    return own or Run(folder, options, load_job_data(options), Lock(folder))


def one_at_a_time(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options with which processes that train together do one training at a time. Those of one process are as given.

    Raises InputError for more workers.
    """
    if ranks.count() == 1:
        return given
    if given.get("workers", 1) != 1:
        together = f"the {ranks.count()} processes of torchrun do one training at a time"
        raise InputError(f"--workers {given['workers']}: {together}; leave it out")
    return {**given, "workers": 1}


def check_count(folder: Path, was: int) -> None:
    """Raise InputError where `was`, how many processes began what lies in a folder, is not how many there are.

    Results depend on it.
    """
    now = ranks.count()
    if was != now:
        resumed_by = f"--nproc-per-node for {was} in all" if was > 1 else "a command without torchrun"
        raise InputError(
            f"{folder} was started on {was} process{'es' * (was > 1)}, now there are {now}; resume it by {resumed_by}"
        )


def check_together(options: Options) -> None:
    """Raise InputError where a batch or a device does not go with the number of processes."""
    processes = ranks.count()
    _check_parts("--batch-size", options.batch_size, options.accumulate)
    if options.recipe:
        _check_parts("--search-batch-size", options.search_batch_size, options.accumulate)
    if processes == 1:
        return
    device = torch.device(options.device)
    if device.type == "cpu":
        if options.sync_bn:
            raise InputError("--sync-bn needs GPUs: torch's SyncBatchNorm has no form for CPUs; leave it out")
        return
    if device.index is not None:
        raise InputError(f"--device {options.device}: under torchrun each process has a GPU of its own; give cuda")
    if ranks.local_rank() >= torch.cuda.device_count():
        here = f"process {ranks.local_rank()} of this machine has no GPU, there are {torch.cuda.device_count()}"
        raise InputError(f"--device {options.device}: {here}, counted from 0; lower torchrun's --nproc-per-node")


def _check_parts(flag: str, batch: int, accumulate: int) -> None:
    parts = ranks.count() * accumulate
    if parts > 1 and batch // parts < _LEAST:
        made_of = f"{ranks.count()} processes, each with {accumulate} parts" if accumulate > 1 else f"{parts} processes"
        made_of = f"{accumulate} parts" if ranks.count() == 1 else made_of
        raise InputError(f"{flag} must be at least {_LEAST * parts}, {_LEAST} for each of {made_of}, got {batch}")
