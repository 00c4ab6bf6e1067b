"""Seeds of the parts of a job, from the seed of a training."""

from __future__ import annotations

import numpy as np

__all__ = ["derived_seed"]


def derived_seed(*parts: int) -> int:
    """Return a seed for one purpose from (seed, purpose, epoch, ...).

    Seeds of neighbours are independent.
    """
    # torch takes seeds of 63 bits without a sign.
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
