"""When the next update falls due, and the line that tells how far a controller is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gradrep_kernels.messages import counted
from gradrep_kernels.sgs.layers import Layer

__all__ = ["described", "next_due", "when_next"]


def next_due(epoch: int | None, every: int, warmup: int) -> int:
    """Return the first epoch after `epoch` that begins with an update. None stands for before the training."""
    return warmup if epoch is None or epoch < warmup else (epoch // every + 1) * every


def when_next(
    epoch: int | None, every: int, warmup: int, steps: int | None, every_steps: int | None, updates: int
) -> str:
    """Say when the next update falls due, and nothing if only the caller knows.

    Args:
        steps: that were taken, or None if updates are not those of steps, or pause
    """
    if every_steps is None:
        by_a_plan_of_the_callers = epoch is None and updates > 0
        return "" if by_a_plan_of_the_callers else f"next at epoch {next_due(epoch, every, warmup)}"
    return (
        f"paused up to epoch {warmup}" if steps is None else f"next at step {(steps // every_steps + 1) * every_steps}"
    )


def described(layers: Sequence[Layer], skipped: Collection[str], updates: int, when: str) -> str:
    """Return counts and the range of G in one line. G lies on the CPU, so that no GPU is waited for."""
    maps = [layer.g for layer in layers if layer.g is not None]
    parts = [counted(len(layers), "layer"), f"{len(skipped)} skipped"]
    if updates:
        parts.append(counted(updates, "update"))
    if maps:
        parts.append(f"G from {min(float(g.min()) for g in maps):.3g} to {max(float(g.max()) for g in maps):.3g}")
    elif not updates:
        parts.append("no update yet")
    return ", ".join([*parts, *([when] if when else [])])
