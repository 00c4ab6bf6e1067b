"""First pass of spatial gradient scaling in Triton: ranges of both sides and number of pairs.

It makes no copy of the map. `pair_ranges_` takes one launch. It takes two where pixels take part by their place, the
padding is less than a displacement, and there are many images: the first one finds the extrema over the images.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_ranges import check_ends, new_ends
from gradrep_kernels.ops.reference.pair_rule import ranges_of
from gradrep_kernels.ops.triton import pair_walk as rule

GROUP, OUTSIDE = rule.GROUP, rule.OUTSIDE

BLOCK = 256
"""Places that a program takes at a time, each for GROUP displacements or for some channels.

One a thread, so that 32 warps fit on a multiprocessor.
"""

TOGETHER = 32
"""Channels of a program where they are closest in memory: a warp then reads whole cache lines."""

PLACES = 1024
"""Numbers that a program reads at a time where there are no pairs to look at, four a thread."""

CELLS = tl.constexpr(16)
"""Ends of a channel that rise at a time: all of 3x3."""

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _widened(lo, hi, values, keep):
    lo = tl.minimum(lo, tl.where(keep, values, float("inf")), propagate_nan=ALL)
    return lo, tl.maximum(hi, tl.where(keep, values, float("-inf")), propagate_nan=ALL)


@triton.jit
def _pooled(lo, hi, axis: tl.constexpr):
    """The range along an axis. NaN is looked for: tl.min and tl.max pass over it."""
    nan = tl.max((lo != lo).to(tl.int32), axis=axis) != 0
    return tl.where(nan, float("nan"), tl.min(lo, axis=axis)), tl.where(nan, float("nan"), tl.max(hi, axis=axis))


@triton.jit
def _raise(ends, v, mask):
    """Raise ends to v, by atomic operations on the words of the numbers.

    Words of one sign are in the order of their numbers: a maximum of signed ones raises to v >= 0, a minimum of
    unsigned ones to v < 0. A NaN with a positive sign is the last of the signed ones, and stays.
    """
    so_far = tl.load(ends, mask=mask, other=float("inf"))
    mask = mask & (so_far == so_far) & ((v > so_far) | (v != v))  # most programs find it raised already
    v += 0.0  # -0.0 + 0.0 is +0.0
    if ends.dtype.element_ty == tl.float64:
        word = tl.where(v != v, 0x7FF8000000000000, v.to(tl.int64, bitcast=True))
        signed = ends.to(tl.pointer_type(tl.int64), bitcast=True)
        unsigned = ends.to(tl.pointer_type(tl.uint64), bitcast=True)
        unsigned_word = word.to(tl.uint64, bitcast=True)
    else:
        word = tl.where(v != v, 0x7FC00000, v.to(tl.int32, bitcast=True))
        signed = ends.to(tl.pointer_type(tl.int32), bitcast=True)
        unsigned = ends.to(tl.pointer_type(tl.uint32), bitcast=True)
        unsigned_word = word.to(tl.uint32, bitcast=True)
    tl.atomic_max(signed, word, mask=mask & (word >= 0), sem="relaxed")
    tl.atomic_min(unsigned, unsigned_word, mask=mask & (word < 0), sem="relaxed")


@triton.jit(
    do_not_specialize=[*rule.ARGUMENTS, "all_images", "remove_near"],
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
    ends,  # [channels, pairs, 2, 2]
    n,  # [channels, pairs] int64, or None
    all_images,  # of the op's map, of which this one may hold the extrema
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
    if n is not None:
        # Without remove_near their number follows from the shapes, and the map may be one of extrema.
        count = tl.sum(left, axis=1).to(tl.int64)
        if remove_near == 0:
            high = tl.maximum(rows - tl.abs(tl.reshape(di, [GROUP])), 0)
            wide = tl.maximum(columns - tl.abs(tl.reshape(dj, [GROUP])), 0)
            count = high.to(tl.int64) * wide * tl.where(chunk == 0, all_images, 0)
        tl.atomic_add(n + row, count, mask=d < pairs, sem="relaxed")
    ends += row * 4
    p_lo, p_hi = _pooled(p_lo, p_hi, axis=1)
    _raise(ends, -p_lo, d < pairs)
    _raise(ends + 1, p_hi, d < pairs)
    q_lo, q_hi = _pooled(q_lo, q_hi, axis=1)
    _raise(ends + 2, -q_lo, d < pairs)
    _raise(ends + 3, q_hi, d < pairs)


@triton.jit(
    do_not_specialize=[*rule.ARGUMENTS, "all_channels", "stride_of_one", "cells", "zeros"],
    do_not_specialize_on_alignment=[*rule.ARGUMENTS, "ends"],
)
def channel_ranges_kernel(
    x,  # [images, channels, height, width], the first of each TOGETHER channels
    displacements,
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
    ends,  # [all_channels, cells]: all ends of a channel rise alike
    all_channels,
    stride_of_one,  # between channels
    cells,
    zeros,  # 0 or 1: whether those of the padding are on both sides too
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = ends.dtype.element_ty
    plane = height * width
    block, _group, _chunk, image, start, places = rule.share(images, channels, pairs, plane, images_each, parts, span)
    c = tl.arange(0, TOGETHER)
    x += image.to(tl.int64) * stride_n + block.to(tl.int64) * stride_c
    here = block * TOGETHER + c < all_channels
    lo = tl.full([BLOCK, TOGETHER], float("inf"), COMPUTE)
    hi = -lo
    done = 0
    while done < places:
        i, _j, offset = rule.pixels(
            done,
            places,
            start,
            plane,
            width,
            plane_magic,
            plane_shift,
            row_magic,
            row_shift,
            stride_n,
            stride_h,
            stride_w,
            BLOCK,
        )
        keep = rule.inside(i, height)[:, None] & here[None, :]
        v = tl.load(x + offset[:, None] + c.to(tl.int64)[None, :] * stride_of_one, mask=keep, other=0.0).to(COMPUTE)
        lo, hi = _widened(lo, hi, v, keep)
        done += BLOCK
    lo, hi = _pooled(lo, hi, axis=0)
    if zeros != 0:
        lo = tl.minimum(lo, 0.0, propagate_nan=ALL)
        hi = tl.maximum(hi, 0.0, propagate_nan=ALL)
    ends += (block * TOGETHER + c).to(tl.int64)[:, None] * cells
    cell = tl.arange(0, CELLS)[None, :]
    first = 0
    while first < cells:
        v = tl.where(cell % 2 == 0, -lo[:, None], hi[:, None])
        _raise(ends + first + cell, v, here[:, None] & (first + cell < cells))
        first += CELLS


def _one_range(displacements: list[int], padding: list[int]) -> bool:
    """Whether the padding covers every displacement, so that each pixel of a channel is on both sides of them all."""
    return all(abs(d) <= pad for start, pad in enumerate(padding) for d in displacements[start::2])


def _channel_ranges(ends: Tensor, x: Tensor, padding: list[int]) -> bool:
    """Raise the ends of each channel to the range of its pixels and of the padding.

    False: there is no pixel, no end, or a plane is too large.
    """
    together = TOGETHER if x.stride(1) == 1 else 1
    block = PLACES // together
    work = rule.work(x[:, ::together], (0, 0), (0, 0), block)
    if work is None or ends.numel() == 0:
        return False
    rule.launch(
        "pair_ranges",
        channel_ranges_kernel,
        work,
        rule.options(),
        ends=ends,
        all_channels=x.shape[1],
        stride_of_one=x.stride(1),
        cells=ends[0].numel(),
        zeros=int(max(padding) > 0),
        TOGETHER=together,
        BLOCK=block,
    )
    return True


@torch.no_grad()
def pair_ranges_(
    ends: Tensor, n: Tensor | None, x: Tensor, displacements: list[int], padding: list[int], remove_near: bool
) -> None:
    """As `reference.pair_ranges_`, to the bit. The host waits for nothing, and a CUDA graph can record it.

    A padded image of more than 2^29 pixels goes to the reference.
    """
    check_ends(ends, n, x, displacements)
    if n is None and not remove_near and _one_range(displacements, padding) and _channel_ranges(ends, x, padding):
        return
    maps = x
    if not remove_near and x.shape[0] > 2:  # which pixels take part depends on their place alone
        maps = x.new_empty((2, *x.shape[1:]))
        torch.aminmax(x, dim=0, out=tuple(maps))
    work = rule.work(maps, displacements, padding, BLOCK)
    if work is None:
        return reference.pair_ranges_(ends, n, x, displacements, padding, remove_near)
    rule.launch(
        "pair_ranges",
        pair_ranges_kernel,
        work,
        rule.options(),
        ends=ends,
        n=n,
        all_images=x.shape[0],
        remove_near=int(remove_near),
        BLOCK=BLOCK,
    )


def pair_ranges(x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> tuple[Tensor, Tensor]:
    """As `reference.pair_ranges`, to the bit, from `pair_ranges_`."""
    ends, n = new_ends(x, displacements)
    pair_ranges_(ends, n, x, displacements, padding, remove_near)
    return ranges_of(ends), n
