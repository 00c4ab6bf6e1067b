"""Gradients scaled in place by one number, as clipping does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.ops.schema import op


@op("multiplies gradients by one number in place; where it is 1, nothing is written", writes=("grads",))
@torch.no_grad()
def scale_gradients_(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by `factor`, one element, in a few launches for each device and dtype.

    bf16 and fp16 are computed in float32 and rounded once: a factor below 6e-8 is 0 in float16, one of 65536 is inf.
    Gradients stay unwritten where a factor on the CPU is 1. One on another device is not read here, since that would
    wait for the device.
    """
    if factor.is_cpu and factor.item() == 1:
        return
    kinds = [(g.device, g.dtype) for g in grads]
    for device, dtype in dict.fromkeys(kinds):
        alike = [g for g, kind in zip(grads, kinds) if kind == (device, dtype)]
        wide = compute_dtype(dtype)
        by = factor.reshape(()).to(device, wide.to_real())
        if wide == dtype:
            torch._foreach_mul_(alike, by)
            continue
        for some in _runs(alike):
            values = [torch.empty_like(g, dtype=wide) for g in some]
            torch._foreach_copy_(values, some)
            torch._foreach_mul_(values, by)
            torch._foreach_copy_(some, values)


def _runs(tensors: Sequence[Tensor], elements: int = 2**24) -> Iterator[list[Tensor]]:
    """Split a list into runs of about so many elements, which bounds the memory of temporary copies."""
    run: list[Tensor] = []
    left = elements
    for t in tensors:
        if run and t.numel() > left:
            yield run
            run, left = [], elements
        run.append(t)
        left -= t.numel()
    if run:
        yield run
