"""The learning rate of a step: linear warm-up, then cosine annealing.

Source: both papers (RepOptimizers, section 4.1), and their code.
"""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES = {
    "cosine": "half a cosine over the steps after it",
    "cosine-whole": "over all steps, the warm-up in place of its beginning, as the code of RepOptimizers has it",
}
"""Name -> where half a cosine begins."""


def learning_rate(
    step: int,
    steps: int,
    warmup: int,
    base: float,
    *,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """Return the learning rate of one step.

    `step` counts from 0, below `steps`, and the first `warmup` steps are warm-up. It depends on the step alone, so that
    a resumed run has nothing to restore.

    'cosine': the rate rises linearly from `warmup_lr`, which it has before the first step, to reach `base` in the last
    step of the warm-up. Then it falls as half a cosine towards `min_lr` at step `steps` (torch's LinearLR and
    CosineAnnealingLR, stepped per batch).
    'cosine-whole': the first step has `warmup_lr`, the rate would reach `base` in the step after the warm-up, and the
    cosine counts from step 0 (timm's CosineLRScheduler, which the code of RepOptimizers uses).

    Raises:
        ValueError: step outside [0, steps), a warm-up outside [0, steps], or an unknown schedule.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in [0, {steps}), got {step}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie in [0, {steps}], got {warmup}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    whole = schedule == "cosine-whole"
    if step < warmup:
        # In this order the last one is exactly `base` where it starts at 0.
        return warmup_lr + (base - warmup_lr) * ((step + (not whole)) / warmup)
    first = 0 if whole else warmup
    return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))
