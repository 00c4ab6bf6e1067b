"""First pass of spatial gradient scaling in Triton: ranges of both sides and number of pairs.

It makes no copy of the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype
from gradrep_kernels.ops.triton import pair_walk as rule

GROUP, OUTSIDE = rule.GROUP, rule.OUTSIDE

BLOCK = 256
"""Places that a program takes at a time, each for GROUP displacements.

One a thread, so that 32 warps fit on a multiprocessor.
"""

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _widened(lo, hi, values, keep):
    lo = tl.minimum(lo, tl.where(keep, values, float("inf")), propagate_nan=ALL)
    return lo, tl.maximum(hi, tl.where(keep, values, float("-inf")), propagate_nan=ALL)


@triton.jit
def _pooled(lo, hi):
    """The range of each row. NaN is looked for: tl.min and tl.max pass over it."""
    nan = tl.max((lo != lo).to(tl.int32), axis=1) != 0
    return tl.where(nan, float("nan"), tl.min(lo, axis=1)), tl.where(nan, float("nan"), tl.max(hi, axis=1))


@triton.jit(
    do_not_specialize=[*rule.ARGUMENTS, "remove_near"],
    do_not_specialize_on_alignment=[*rule.ARGUMENTS, "ends", "n"],
)
def pair_ranges_kernel(
    x,  # [images, channels, height, width]
    displacements,  # [pairs, 2] int32
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    images,
    channels,
    height,
    width,
    pad_rows,
    pad_columns,
    plane_magic,
    plane_shift,
    row_magic,
    row_shift,
    pairs,
    images_each,
    parts,
    span,
    ends,  # [chunks, channels, pairs, 2, 2]: the ranges of each chunk
    n,  # [channels, pairs] int64
    remove_near,  # 0 or 1
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = ends.dtype.element_ty
    rows, columns = height + 2 * pad_rows, width + 2 * pad_columns
    c, first, chunk, image, start, places = rule.share(
        images, channels, pairs, rows * columns, images_each, parts, span
    )
    x += (
        image.to(tl.int64) * stride_n
        + c.to(tl.int64) * stride_c
        - (pad_rows.to(tl.int64) * stride_h + pad_columns.to(tl.int64) * stride_w)
    )
    d = first + tl.arange(0, GROUP)
    di = tl.load(displacements + 2 * d, mask=d < pairs, other=OUTSIDE)[:, None]
    dj = tl.load(displacements + 2 * d + 1, mask=d < pairs, other=0)[:, None]
    to_q = di.to(tl.int64) * stride_h + dj.to(tl.int64) * stride_w
    p_lo = tl.full([GROUP, BLOCK], float("inf"), COMPUTE)
    p_hi, q_lo, q_hi = -p_lo, p_lo, -p_lo
    left = tl.zeros([GROUP, BLOCK], tl.int32)
    done = 0
    while done < places:
        i, j, offset = rule.pixels(
            done,
            places,
            start,
            rows * columns,
            columns,
            plane_magic,
            plane_shift,
            row_magic,
            row_shift,
            stride_n,
            stride_h,
            stride_w,
            BLOCK,
        )
        p = tl.load(
            x + offset, mask=rule.inside(i - pad_rows, height) & rule.inside(j - pad_columns, width), other=0.0
        ).to(COMPUTE)[None, :]
        q_i, q_j = i[None, :] + di, j[None, :] + dj
        in_map = rule.inside(q_i - pad_rows, height) & rule.inside(q_j - pad_columns, width)
        q = tl.load(x + offset[None, :] + to_q, mask=in_map, other=0.0).to(COMPUTE)
        near = (p == 0) | (q == 0)
        keep = rule.inside(q_i, rows) & rule.inside(q_j, columns) & ((near.to(tl.int32) & remove_near) == 0)
        p_lo, p_hi = _widened(p_lo, p_hi, p, keep)
        q_lo, q_hi = _widened(q_lo, q_hi, q, keep)
        left += keep.to(tl.int32)
        done += BLOCK
    row = c.to(tl.int64) * pairs + d
    tl.atomic_add(n + row, tl.sum(left, axis=1).to(tl.int64), mask=d < pairs, sem="relaxed")
    ends += (chunk.to(tl.int64) * channels * pairs + row) * 4
    p_lo, p_hi = _pooled(p_lo, p_hi)
    tl.store(ends, p_lo, mask=d < pairs)
    tl.store(ends + 1, p_hi, mask=d < pairs)
    q_lo, q_hi = _pooled(q_lo, q_hi)
    tl.store(ends + 2, q_lo, mask=d < pairs)
    tl.store(ends + 3, q_hi, mask=d < pairs)


@torch.no_grad()
def pair_ranges(x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> tuple[Tensor, Tensor]:
    """As `reference.pair_ranges`, to the bit. The host waits for nothing, and a CUDA graph can record it.

    A padded image of more than 2^29 pixels goes to the reference.
    """
    maps = x
    if (
        not remove_near and x.shape[0] > 2
    ):  # which pixels take part depends on their place alone: over the images once and for all
        maps = torch.stack(torch.aminmax(x, dim=0))
    work = rule.work(maps, displacements, padding, BLOCK)
    if work is None:
        return reference.pair_ranges(x, displacements, padding, remove_near)
    n = x.new_zeros((x.shape[1], len(displacements) // 2), dtype=torch.int64)
    ends = x.new_empty((work.chunks, *n.shape, 2, 2), dtype=arithmetic_dtype(x.dtype))
    rule.launch(
        "pair_ranges", pair_ranges_kernel, work, rule.options(),
        ends=ends, n=n, remove_near=int(remove_near), BLOCK=BLOCK,
    )  # fmt: skip
    ranges = torch.stack((ends[..., 0].amin(0), ends[..., 1].amax(0)), dim=-1) + 0.0  # -0.0 + 0.0 is +0.0
    return ranges, n * x.shape[0] // maps.shape[0]
