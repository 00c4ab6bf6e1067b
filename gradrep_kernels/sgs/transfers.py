"""Transfers between the host and a device. Many small tensors travel as one."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing

LINE = 128
"""Bytes of the largest cache line. Tensors that share memory begin at multiples of it, which suits every kernel."""


def on_host(parts: list[Tensor]) -> list[Tensor]:
    """Return all parts on the CPU. Those that share a device take one transfer. All elements have the same size."""
    found, by_device = list(parts), {}
    for i, part in enumerate(parts):
        if not part.is_cpu:
            by_device.setdefault(part.device, []).append(i)
    for own in by_device.values():
        flat = torch.cat([parts[i].reshape(-1).view(torch.uint8) for i in own]).cpu()
        for i, piece in zip(own, flat.split([parts[i].nbytes for i in own])):
            found[i] = piece.view(parts[i].dtype).view(parts[i].shape)
    return found


def on_device(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return CPU tensors on `device`. They take one transfer, from pinned memory, for which the host does not wait."""
    if device.type == "cpu" or not parts:
        return parts
    ends = list(itertools.accumulate(-(-part.nbytes // LINE) * LINE for part in parts))
    # A graph would copy from pinned memory at each replay, when it holds something else: torch refuses any other.
    pinned = device.type == "cuda" and not capturing(device)
    flat = torch.empty(ends[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for part, own in zip(parts, _parts(flat, parts, ends)):
        own.copy_(part)
    return _parts(flat.to(device, non_blocking=True), parts, ends)


def _parts(flat: Tensor, like: list[Tensor], ends: list[int]) -> list[Tensor]:
    """View the parts of a transfer as tensors of the dtypes and shapes of `like`."""
    starts = [0, *ends]
    return [flat[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, like)]
