"""The check CSLA = GR of a job, on its network and its images."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch.nn import functional as F

from gradrep_kernels.csla import Scales
from gradrep_kernels.equivalence import check_equivalence
from gradrep_kernels.models.modes import branch_form
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import Loader, derived_seed
from gradrep_kernels.recipes.options.resolve import Options

__all__ = ["csla_equals_gr"]

_BATCH = 16
_PURPOSE = 4  # for derived_seed
# A training magnifies rounding from step to step. RepOpt-GhostNet on digits does so tenfold a step at a rate of 0.1,
# from whichever rounding, one of the first weights included. A wrong rule differs in proportion to the rate, so that at
# this share of it the check still sees multipliers that are 0.1 % off.
_CALMER = 1e-4


def csla_equals_gr(options: Options, data: Data, scales: Scales) -> dict[str, float | int | bool | None]:
    """Train a network both ways on the CPU, as `csla.check_equivalence` does, and compare.

    Both see `check_steps` batches of 16 images, with the search's learning rate, and the job's momentum and weight
    decay. Where they then differ by more than 1e-10, they are trained again with a 10000th of the learning rate, at
    which rounding hardly grows. Without weight decay where there are constant branches, which decay in one form alone.

    Returns `steps`, `lr`, `weight_decay`, the largest differences `outputs` and `weights`, whether both are within
    1e-10 (`agrees`), and the outputs' difference at the search's learning rate (`at_search_lr`). A difference that is
    not finite is None, and all are where the training diverges.
    """
    constant = any(value.constant_identity or value.constant_average for value in scales.values())
    weight_decay = 0.0 if constant else options.weight_decay
    found = _compared(options, data, scales, options.search_lr, weight_decay)
    at_search_lr = found["outputs"]
    if not found["agrees"] and found["outputs"] is not None and found["weights"] is not None:
        found = _compared(options, data, scales, options.search_lr * _CALMER, weight_decay)
    return {**found, "at_search_lr": at_search_lr}


def _compared(options: Options, data: Data, scales: Scales, lr: float, weight_decay: float) -> dict[str, Any]:
    model = plain_model(options, data, options.seed)
    settings = {"lr": lr, "weight_decay": weight_decay}
    try:
        found = check_equivalence(
            model,
            scales,
            _batches(data, options.seed),
            loss=lambda y, batch: F.cross_entropy(y, batch[1]),
            steps=options.check_steps,
            momentum=options.momentum,
            partial=branch_form(model).partial,
            **settings,
        )
    except FloatingPointError:
        return {"steps": options.check_steps, **settings, "outputs": None, "weights": None, "agrees": False}
    # JSON has no infinity, which a difference is where one of the two alone is not finite.
    outputs, weights = (value if math.isfinite(value) else None for value in (found.outputs, found.weights))
    return {"steps": found.steps, **settings, "outputs": outputs, "weights": weights, "agrees": found.agrees}


def _batches(data: Data, seed: int):
    for epoch in itertools.count():
        yield from Loader(data, data.train, _BATCH, seed=derived_seed(seed, _PURPOSE, epoch))
