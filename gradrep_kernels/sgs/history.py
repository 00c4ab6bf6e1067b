"""The scalings after each update, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["History", "ScalingUpdate"]

# A training of 300 epochs has 60 updates by default, all of which are kept. For the 13 layers of VGG-16 a full history
# holds 60 kB of numbers.
MOST = 128


class ScalingUpdate(NamedTuple):
    """The scalings after one update."""

    number: int
    """1 for the first update that learned some G, then 2, ..."""
    epoch: int | None
    """The epoch that `update_if_due` was told last, None where it was never called."""
    step: int | None
    """The step of the optimizer, from 1, in which `every_steps` updated. None for an update from drawn batches."""
    scalings: dict[str, Tensor]
    """{module name: G float32 [kh, kw]}, ones where a layer had none yet."""


class History:
    """Keeps the scalings of updates, the first and the last among them.

    Up to 128 updates all stay. Then, and whenever there are 128 again, each second one goes: of 100,000 updates every
    1024th is left, and the last. Tensors of scalings are never written to, so that an entry only refers to them.

    Within entries, scalings stand by the name of their layer.
    """

    def __init__(self):
        self.updates = 0
        self._stride = 1  # updates 1, 1 + stride, 1 + 2 stride, ... stay
        self._kept: list[ScalingUpdate] = []
        self._last: ScalingUpdate | None = None

    def add(self, epoch: int | None, step: int | None, scalings: dict[str, Tensor]) -> None:
        self._last = ScalingUpdate(self.updates + 1, epoch, step, scalings)
        if self.updates % self._stride == 0:
            self._kept.append(self._last)
        self.updates += 1
        if len(self._kept) == MOST:
            del self._kept[1::2]
            self._stride *= 2

    def entries(self) -> list[ScalingUpdate]:
        """Return those that are kept and the last, oldest first."""
        is_kept = not self._kept or self._kept[-1] is self._last
        return [*self._kept, *([] if is_kept else [self._last])]

    def state(self) -> dict[str, Any]:
        """Return it for a checkpoint: one tensor for each layer, which is ones where that had no scaling yet."""
        entries = self.entries()
        shapes = {name: g.shape for entry in entries for name, g in entry.scalings.items()}
        return {
            "updates": self.updates,
            "stride": self._stride,
            "numbers": [entry.number for entry in entries],
            "epochs": [entry.epoch for entry in entries],
            "steps": [entry.step for entry in entries],
            "scalings": {
                name: torch.stack([entry.scalings.get(name, torch.ones(shape)) for entry in entries])
                for name, shape in shapes.items()
            },
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> History:
        """Make the history that `state()` gave. The caller has checked it."""
        new = cls()
        new.updates, new._stride = state["updates"], state["stride"]
        names = list(state["scalings"])
        maps = [g.detach().to("cpu", torch.float32, copy=True).unbind() for g in state["scalings"].values()]
        for number, epoch, step, *gs in zip(state["numbers"], state["epochs"], state["steps"], *maps):
            new._last = ScalingUpdate(number, epoch, step, dict(zip(names, gs)))
            if (number - 1) % new._stride == 0:
                new._kept.append(new._last)
        return new
