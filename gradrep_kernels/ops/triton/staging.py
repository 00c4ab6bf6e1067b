"""Tables on their way to the device: pinned memory, uploads, and what CUDA graphs need of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing

ROOM = 2**20
"""Bytes that are pinned for captures, at least. A table of pointers takes 56 per parameter, 3 KB for RepOpt-VGG-B1."""

REMEMBERED = 1024
"""Entries of a memory (`remember`) at most. Step-in-backward has an optimizer, and so a plan, per parameter."""

captured: list[Any] = []
"""All that CUDA graphs read at a replay. It is never freed."""


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if on_gpu(device) else 0


def pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def send(table: Tensor, device: torch.device, wait: bool) -> Tensor:
    return table.to(device, non_blocking=not wait)


def keep(*objects: Any) -> None:
    """Keep objects alive for the CUDA graph that is being captured."""
    captured.append(objects)


def _written(table: Tensor, memory: Tensor) -> Tensor:
    return memory[: table.nbytes].view(table.dtype).view(table.shape).copy_(table)


class PinnedRoom:
    """Pinned memory for the tables that are new in a capture.

    A graph copies them from the host at each replay, so every table has a part of its own, which is never written
    again. Nothing can be pinned inside a capture: that is an allocation, and an error in the default mode. From torch
    2.11 on, a copy from memory that is not pinned is an error too (github.com/pytorch/pytorch/pull/172156).
    """

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._left = self._wanted = 0

    def reserve(self, nbytes: int = 0) -> None:
        """Pin room for several tables of the largest size so far, once there was one. Called outside captures."""
        if nbytes:
            self._wanted = max(self._wanted, ROOM, 16 * nbytes)
        if 2 * self._left < self._wanted:
            self._memory, self._left = pinned(self._wanted), self._wanted

    def take(self, table: Tensor) -> Tensor:
        """Copy `table` into pinned memory. Called inside a capture."""
        nbytes = -(-table.nbytes // 64) * 64
        if nbytes > self._left:
            raise RuntimeError(
                f"a table of {table.nbytes} bytes is new in this CUDA graph capture, and memory for it can be pinned "
                "only outside: take one step before the capture"
            )
        part = _written(table, self._memory[len(self._memory) - self._left :])
        self._left -= nbytes
        keep(part)
        return part


room = PinnedRoom()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that one launch writes for the next."""
    return torch.empty(shape, dtype=dtype, device=device)


def upload(table: Tensor, device: torch.device, wait: bool = False) -> Tensor:
    """Copy `table` to the device, in stream order.

    With wait=True, outside captures, it has arrived on return, and any stream can read it. A CUDA graph repeats the
    copy at each replay.
    """
    if not on_gpu(device):
        return table
    if capturing(device):
        return send(room.take(table), device, wait=False)
    if wait:
        return send(table, device, wait=True)
    room.reserve(table.nbytes)
    return send(_written(table, pinned(table.nbytes)), device, wait=False)


def remember(memory: dict, key: Any, value: Any, wait: bool = True) -> None:
    """Add an entry to a memory of at most REMEMBERED entries. A full one is emptied first.

    wait=False is for tables that no stream reads but the one that they were made on.
    """
    if len(memory) >= REMEMBERED:
        if wait and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels on any stream may still read the tables that are dropped here
        memory.clear()
    memory[key] = value
