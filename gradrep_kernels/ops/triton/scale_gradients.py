"""Gradients scaled in place in Triton: the device decides whether anything is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import plans
from gradrep_kernels.ops.triton.addressing import (  # by name: the key of Triton's cache holds no attributes of modules
    ALIGNED,
    FLAGS,
    GRAD,
    POINTERS,
    TAIL,
    aligned,
    own_chunk,
    unaligned,
)

CHUNK = tl.constexpr(4096)

memory = plans.Plans("scale_gradients_", dict.fromkeys(plans.COMPUTE, CHUNK.value), writes=True)


@triton.jit
def _scale(grad, inside, by):
    tl.store(grad, tl.load(grad, mask=inside).to(by.dtype) * by, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["chunks", "geometry", "pointers", "factor"])
def scale_gradients_kernel(
    chunks,  # [programs] int32
    geometry,  # [pieces, GEOMETRY] int32
    pointers,  # [pieces, POINTERS] int64
    factor,  # [1] in the dtype that is computed in
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    if by == 1:
        return
    _, pointers, start, numel = own_chunk(chunks, geometry, pointers, POINTERS, CHUNK)
    grad = tl.load(pointers + GRAD)  # an integer: see `aligned`
    if (start + CHUNK <= numel) & ((tl.load(pointers + FLAGS) & ALIGNED) != 0):
        inside = tl.full([BLOCK], True, tl.int1)
        for part in range(CHUNK // BLOCK):
            place = start + part * BLOCK + tl.arange(0, BLOCK)
            _scale(aligned(grad, DTYPE) + place, inside, by)
    else:
        end = tl.minimum(start + CHUNK, numel)
        while start < end:
            place = start + tl.arange(0, TAIL)
            _scale(unaligned(grad, DTYPE) + place, place < end, by)
            start += TAIL


@torch.no_grad()
def scale_gradients_(grads: list[Tensor], factor: Tensor) -> None:
    """As `reference.scale_gradients_`, in one launch for each device and dtype. Nothing waits for the factor.

    Gradients that have gaps, and all of a call where they share memory, go to the reference.
    """
    if not grads:
        return
    nothing = [None] * len(grads)
    call = memory.prepare((grads,), nothing, nothing)
    rest = range(len(grads)) if call.pointers is None else call.plan.rest
    if rest:
        reference.scale_gradients_([grads[n] for n in rest], factor)
    for batch, pointers in zip(call.plan.batches, call.pointers or ()):
        by = factor.to(device=batch.device, dtype=plans.COMPUTE[batch.dtype])
        memory.launch(batch, scale_gradients_kernel, pointers, by)
