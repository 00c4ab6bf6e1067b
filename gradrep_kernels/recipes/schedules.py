"""The learning rate of a step: linear warm-up, then cosine annealing.

Source: both papers (RepOptimizers, section 4.1).
"""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, warmup: int, base: float) -> float:
    """Return the learning rate of one step.

    `step` counts from 0, below `steps`, and the first `warmup` steps are warm-up. The rate rises linearly to reach
    `base` in the last step of the warm-up, then falls as half a cosine towards 0 at step `steps` (torch's LinearLR and
    CosineAnnealingLR, stepped per batch). It depends on the step alone, so that a resumed run has nothing to restore.

    Raises:
        ValueError: step outside [0, steps), or a warm-up outside [0, steps].
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in [0, {steps}), got {step}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie in [0, {steps}], got {warmup}")
    if step < warmup:
        return base * ((step + 1) / warmup)  # In this order the last one is exactly `base`.
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
