"""√(Σ M ⊙ g²) in Triton: one pass over the gradients, no temporary of their size, the same bits each time."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import launching, plans, staging
from gradrep_kernels.ops.triton.addressing import (  # by name: the key of Triton's cache holds no attributes of modules
    ALIGNED,
    FLAGS,
    GRAD,
    POINTERS,
    TAIL,
    aligned,
    multiplier,
    multiplier_row,
    own_chunk,
    unaligned,
)
from gradrep_kernels.ops.triton.step_tail import from_bits, quotient, to_bits

CHUNK = tl.constexpr(4096)
SUMS = 4096  # partial sums that the finishing kernel adds at a time

memory = plans.Plans("rep_grad_norm", dict.fromkeys(plans.COMPUTE, CHUNK.value), writes=False)


@triton.jit
def _squares(place, inside, grad, row_of_piece, FACTOR: tl.constexpr, COMPUTE: tl.constexpr):
    g = tl.load(grad + place, mask=inside, other=0.0).to(COMPUTE)
    return FACTOR(place, inside, row_of_piece) * (g * g)


@triton.jit(do_not_specialize_on_alignment=["chunks", "geometry", "pointers", "partial"])
def rep_grad_norm_kernel(
    chunks,  # [programs] int32
    geometry,  # [pieces, GEOMETRY] int32
    pointers,  # [pieces, WIDTH] int64
    partial,  # [programs] in the dtype that is computed in: the sum of each chunk
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,  # a device function as that of step_frame
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = partial.dtype.element_ty
    piece, pointers, start, numel = own_chunk(chunks, geometry, pointers, WIDTH, CHUNK)
    grad = tl.load(pointers + GRAD)  # an integer: see `aligned`
    row_of_piece = multiplier_row(piece, pointers, COMPUTE)
    if (start + CHUNK <= numel) & ((tl.load(pointers + FLAGS) & ALIGNED) != 0):
        inside = tl.full([BLOCK], True, tl.int1)
        total = tl.zeros([BLOCK], COMPUTE)
        for part in range(CHUNK // BLOCK):
            total += _squares(
                start + part * BLOCK + tl.arange(0, BLOCK), inside, aligned(grad, DTYPE), row_of_piece, FACTOR, COMPUTE
            )
        tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))
    else:
        end = tl.minimum(start + CHUNK, numel)
        rest = tl.zeros([TAIL], COMPUTE)
        while start < end:
            place = start + tl.arange(0, TAIL)
            rest += _squares(place, place < numel, unaligned(grad, DTYPE), row_of_piece, FACTOR, COMPUTE)
            start += TAIL
        tl.store(partial + tl.program_id(0), tl.sum(rest, axis=0))


@triton.jit(
    do_not_specialize_on_alignment=["partial", "grad_scale", "norm", "factor"], do_not_specialize=["count", "most"]
)
def finish_kernel(
    partial,  # [count]
    count,
    grad_scale,  # [1], or None
    norm,  # [1]: √Σ / grad_scale
    factor,  # [1] in the same dtype: min(1, most / (norm + 1e-6)), or None
    most: tl.int64,  # the bits of a float64
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partial + place, mask=place < count, other=0.0).to(tl.float64)
        start += BLOCK
    dtype: tl.constexpr = norm.dtype.element_ty
    root = tl.sqrt(tl.sum(total, axis=0)).to(dtype)
    if grad_scale is not None:
        root = quotient(root, tl.load(grad_scale).to(dtype))
    tl.store(norm, root)
    if factor is not None:
        below = root + tl.full((), 1e-6, tl.float64).to(dtype)
        # As torch has a number over a tensor: the reciprocal, and a product.
        by = quotient(tl.full((), 1.0, dtype), below) * from_bits(most, tl.float64).to(dtype)
        tl.store(factor, tl.where(by > 1, 1.0, by))  # NaN stays, as in torch.clamp


def write_norm(
    of: plans.Plans,
    batches: list[plans.Batch],
    pointers: list[Tensor],
    width: int,
    norm: Tensor,
    grad_scale: Tensor | None = None,
    max_norm: float | None = None,
    rest: Tensor | None = None,
    factor: Any = multiplier,
) -> Tensor | None:
    """Write √(Σ M ⊙ g²) / grad_scale to `norm`, in a launch for each batch and one more.

    Args:
        of:       whose batches they are, for chunks of CHUNK elements
        pointers: the tables of pointers, `width` columns wide
        rest:     the norm of what no batch has
        factor:   M, a device function as FACTOR of step_frame

    Returns min(1, max_norm / (norm + 1e-6)) in the dtype of `norm`, where a max_norm is given.
    """
    sums = []
    for batch, table in zip(batches, pointers):
        partial = staging.scratch((len(batch.chunks),), plans.COMPUTE[batch.dtype], batch.device)
        of.launch(batch, rep_grad_norm_kernel, table, partial, width, factor)
        sums.append(partial)
    if rest is not None:
        sums.append(rest.double().square().reshape(1))
    if len(sums) != 1:
        sums = [torch.cat([norm.new_zeros(1), *(partial.to(norm.device) for partial in sums)])]
    clip = None if max_norm is None else staging.scratch((), norm.dtype, norm.device)
    scale = None if grad_scale is None else grad_scale.to(norm.device)
    launching.launch(
        of.op, norm.device, norm.dtype, finish_kernel, 1, sums[0], len(sums[0]), scale, norm, clip,
        0 if max_norm is None else to_bits(max_norm, torch.float64), BLOCK=SUMS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return clip


@torch.no_grad()
def rep_grad_norm(grads: list[Tensor], scales: list[Tensor | None], identities: list[Tensor | None]) -> Tensor:
    """As `reference.rep_grad_norm`, with sums in another order.

    Chunks of 4096 elements are summed in the dtype of the step, and those sums in float64. Relative error against the
    reference: 1e-6 for float32, float16 and bfloat16, and 1e-14 for float64. In float32 a lane adds at most 16 products
    of 3 roundings each, and 10 additions follow in a tree: 29 · 2^-24 of Σ, and half of that after the root. Squares
    below 1e-38 or above 3e38 leave float32's range, as in torch.nn.utils.clip_grad_norm_ on a GPU.
    """
    if not grads:
        return reference.rep_grad_norm(grads, scales, identities)
    call = memory.prepare((grads,), scales, identities)
    rest = None
    if call.plan.rest:
        rest = reference.rep_grad_norm(*([column[n] for n in call.plan.rest] for column in (grads, scales, identities)))
    double = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    norm = staging.scratch((), torch.float64 if double else torch.float32, grads[0].device)
    write_norm(memory, call.plan.batches, call.pointers, POINTERS.value, norm, rest=rest)
    return norm
