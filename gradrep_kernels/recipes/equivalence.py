"""The check CSLA = GR of a job, on its network and its images."""

from __future__ import annotations

import itertools
import math

from torch.nn import functional as F

from gradrep_kernels.csla import Scales
from gradrep_kernels.equivalence import check_equivalence
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.loader import Loader, derived_seed
from gradrep_kernels.recipes.options import Options

__all__ = ["csla_equals_gr"]

_BATCH = 16
_PURPOSE = 4  # for derived_seed


def csla_equals_gr(options: Options, data: Data, scales: Scales) -> dict[str, float | int | bool | None]:
    """Train a network both ways on the CPU, as `csla.check_equivalence` does, and compare.

    Both see `check_steps` batches of 16 images, with the search's learning rate, and the job's
    momentum and weight decay.

    Returns `steps`, the largest differences `outputs` and `weights`, and whether both are within 1e-10 (`agrees`).
    A difference that is not finite is None, and both are where the training diverges.
    """
    try:
        found = check_equivalence(
            plain_model(options, data, options.seed),
            scales,
            _batches(data, options.seed),
            loss=lambda y, batch: F.cross_entropy(y, batch[1]),
            steps=options.check_steps,
            lr=options.search_lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
    except FloatingPointError:
        return {"steps": options.check_steps, "outputs": None, "weights": None, "agrees": False}
    # JSON has no infinity, which a difference is where one of the two alone is not finite.
    outputs, weights = (value if math.isfinite(value) else None for value in (found.outputs, found.weights))
    return {"steps": found.steps, "outputs": outputs, "weights": weights, "agrees": found.agrees}


def _batches(data: Data, seed: int):
    for epoch in itertools.count():
        yield from Loader(data, data.train, _BATCH, seed=derived_seed(seed, _PURPOSE, epoch))
