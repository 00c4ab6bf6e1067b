"""Seconds of a training step of each row, measured one after the other with nothing else of the job running."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path

from gradrep_kernels.recipes import ranks
from gradrep_kernels.recipes.build import build
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.steps import TrainingSteps
from gradrep_kernels.recipes.training import epoch_batches, now, repeatable
from gradrep_kernels.recipes.trainings import searched_scales, take_structure

__all__ = ["seconds_per_step"]

_ROUNDS, _WARM_UP, _STEPS = 5, 3, 3  # A FusedRepSGD makes its plan in the second step.
_LONGEST = 60.0  # seconds, after which no round begins


def seconds_per_step(folder: Path, options: Options, data: Data, rates: Mapping[str, float]) -> dict[str, list[float]]:
    """Quartiles of the seconds of a step (forward, backward, optimizer) of each row in `rates` ({name: learning rate}).

    Rows take turns, so that a slow moment of the machine does not fall on one of them alone. Each turn begins with a
    new network, which has the structure of the trained one. After a minute no turn begins. Batches are read beforehand.
    Updates of spatial gradient scaling and of the structure are not in it. All ranks step together, and each returns
    what its clock says.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rates}
    with repeatable(options.threads, options.device):
        scales = ranks.from_first(lambda: searched_scales(folder))
        batches = list(itertools.islice(epoch_batches(data, options, options.seed, 0), _WARM_UP + _STEPS))
        begin = now(options.device)
        for n in range(_ROUNDS):
            if n and ranks.from_first(lambda: now(options.device) - begin > _LONGEST):
                break
            for row in options.rows:
                if row.name not in rates:
                    continue
                trainee = build(row, options, data, scales, options.seed, rates[row.name])
                take_structure(folder, trainee, row.name, options.seed, rates[row.name])
                step = TrainingSteps(trainee, options)
                trainee.model.train()
                for n, (x, labels) in enumerate(itertools.islice(itertools.cycle(batches), _WARM_UP + _STEPS)):
                    start = now(options.device)
                    step(x, labels)
                    if n >= _WARM_UP:
                        seconds[row.name].append(now(options.device) - start)
    return {name: statistics.quantiles(times, method="inclusive") for name, times in seconds.items()}
