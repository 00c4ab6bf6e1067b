"""DTensors without importing torch.distributed.tensor: is a tensor one, which part does this rank hold."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["PLAIN", "is_dtensor", "local", "replicated_like"]

PLAIN = (Tensor, torch.nn.Parameter)  # not a subclass, which may hold other tensors inside


def is_dtensor(t: Tensor) -> bool:
    if type(t) in PLAIN:
        return False
    # Importing it takes 0.5 s. Where nobody has imported it, there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, which shares its memory, and any other tensor itself."""
    if not is_dtensor(t):
        return t
    shard = t.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # the AsyncCollectiveTensor of a gradient still on its way


def replicated_like(value: Tensor, like: Tensor) -> Tensor:
    """Bring `value`, the same on every rank, to where `like` can be combined with it.

    That is the device of `like`, and for a DTensor its mesh. Nothing is sent between ranks.
    """
    if not is_dtensor(like):
        return value.to(like.device)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(value.to(local(like).device), mesh, [Replicate()] * mesh.ndim, run_check=False)
