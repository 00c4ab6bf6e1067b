"""Reductions over the ranks that pool their statistics. Many small tensors travel as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gradrep_kernels.sgs.transfers import on_device


class Ranks:
    """The ranks of a process group (None: the default group, if there is one). A single rank reduces nothing."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.bytes = 0  # that this rank brought to reductions; the caller sets it back to 0

    def __deepcopy__(self, memo: dict) -> Ranks:
        return Ranks(self.group)  # a group cannot be copied, and the copy runs in this process too

    @property
    def many(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def reduce(self, parts: list[Tensor], how: str, device: torch.device, largest: int | None = None) -> list[Tensor]:
        """Reduce each part over the ranks, element by element, by 'sum' or 'max'.

        All parts have one dtype and travel as one tensor. Integers of which no sum exceeds `largest` travel as int32
        where that is enough.
        """
        if not self.many:
            return parts
        place = torch.device("cpu") if dist.get_backend(self.group) == "gloo" else device
        own = iter(on_device([part for part in parts if part.is_cpu], place))
        flat = torch.cat([(next(own) if part.is_cpu else part.to(place)).reshape(-1) for part in parts])
        if flat.dtype == torch.int64 and largest is not None and largest < 2**31:
            flat = flat.to(torch.int32)
        dist.all_reduce(flat, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=self.group)
        self.bytes += flat.numel() * flat.element_size()
        return _split(flat, parts)

    def calls_of_each(self, drawn: int, failure: Exception | None, device: torch.device) -> int:
        """Return the most batches that a rank has drawn, for a model whose forward all ranks must call equally often.

        Raises:
            ValueError:   a rank has none, on every rank.
            RuntimeError: another rank failed to draw.
        """
        (failures,) = self.reduce([torch.tensor([failure is not None]).long()], "sum", device)
        raise_together(failure, int(failures))
        (ends,) = self.reduce([torch.tensor([-drawn, drawn])], "max", device)
        least, most = -int(ends[0]), int(ends[1])
        if least == 0:
            raise ValueError(
                "batches is empty" + (" on a rank" if most else "") + ": an update needs at least one"
                " on every rank, because the forward of a sharded model gathers its parameters from all of them"
            )
        return most


def _split(flat: Tensor, parts: list[Tensor]) -> list[Tensor]:
    return [piece.view(part.shape) for piece, part in zip(flat.split([part.numel() for part in parts]), parts)]


def attempt(action: Callable[[], None]) -> Exception | None:
    """Return what `action` raises, or None.

    The other ranks wait in the next reduction, and must hear of the failure there.
    """
    try:
        action()
    except Exception as failure:
        return failure
    return None


def raise_together(failure: Exception | None, failures: int) -> None:
    """Raise on every rank if an update failed on one: its own failure there, a RuntimeError elsewhere."""
    if failure is not None:
        raise failure
    if failures:
        raise RuntimeError(f"the update of the spatial gradient scalings failed on {failures} other rank(s)")
