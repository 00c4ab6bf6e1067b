"""Second pass of spatial gradient scaling in Triton: bin numbers and counts in one kernel.

It makes no temporary of the map's size.

A program counts into private tables in registers, GROUP of them, block by block with tl.histogram, and adds them to the
result once. On AMD, and up to Triton 3.7 on NVIDIA, tl.histogram takes a population count per 32 (64) cells and pair,
so a table is not rounded up to a power of two: 23 and 24 bins take 512 + 64 cells. From 3.8 on NVIDIA has shared-memory
atomics.

For (2560, 64, 32, 32), 3x3, 23 bins the machine code for sm_90 issues 188 instructions a pair up to Triton 3.7, 114 of
them integer arithmetic, and 87 from 3.8: at best 5.8 and 2.2 ms on an H200, where reading the map takes 0.16 ms. (Not
measured.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.joint_histogram import check_counts
from gradrep_kernels.ops.triton import pair_walk as rule

GROUP = rule.GROUP

CELLS = {22: 512, 24: 512 + 64, 32: 512 + 512}
"""Most bins -> cells of a private table.

Sturges' rule gives at most 24 bins up to 8.4 million pairs, 32 up to 2 billion.
"""

REGISTERS = 80
"""Of a thread, at most, so that three blocks of 256 fit on a multiprocessor."""

BALLOTS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether tl.histogram takes ballots on NVIDIA too."""

MOST_CELLS = 512 + 64
"""Of a table that is counted by ballots for 4 places a thread: 1024 would spill 104 bytes on sm_80."""

FIRST = tl.constexpr(512)
"""Cells of a table that are counted by themselves. The rest must be a power of two, and divide them."""


@triton.jit
def _counted(tables, g, cell, keep, SIZE: tl.constexpr):
    counts = tl.histogram(cell, SIZE, mask=keep)
    return tables + tl.where(tl.arange(0, GROUP)[:, None] == g, counts[None, :], 0)


@triton.jit
def _add(counts, tables, first_cell, d, pairs, cells):
    cell = first_cell + tl.arange(0, tables.shape[1])[None, :]
    there = (d < pairs) & (cell < cells) & (tables != 0)
    tl.atomic_add(counts + d.to(tl.int64) * cells + cell, tables.to(tl.int64), mask=there, sem="relaxed")


@triton.jit(
    do_not_specialize=[*rule.ARGUMENTS, "max_bins", "remove_near"],
    do_not_specialize_on_alignment=[*rule.ARGUMENTS, "ranges", "bins", "counts"],
)
def joint_histogram_kernel(
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
    ranges,  # [channels, pairs, 2, 2]
    bins,  # [channels, pairs] int32
    counts,  # [channels, pairs, max_bins, max_bins] int64
    max_bins,
    remove_near,  # 0 or 1
    CELLS: tl.constexpr,  # of a private table; 0: none
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = ranges.dtype.element_ty
    REST: tl.constexpr = CELLS - FIRST
    rows, columns = height + 2 * pad_rows, width + 2 * pad_columns
    c, first, _, image, start, places = rule.share(images, channels, pairs, rows * columns, images_each, parts, span)
    x += (
        image.to(tl.int64) * stride_n
        + c.to(tl.int64) * stride_c
        - (pad_rows.to(tl.int64) * stride_h + pad_columns.to(tl.int64) * stride_w)
    )
    cells = max_bins * max_bins
    bins += c.to(tl.int64) * pairs
    ranges += c.to(tl.int64) * pairs * 4
    counts += c.to(tl.int64) * pairs * cells
    if CELLS > 0:
        low = tl.zeros([GROUP, FIRST], tl.int32)
    if REST > 0:
        high = tl.zeros([GROUP, REST], tl.int32)
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
        ).to(COMPUTE)
        g = 0
        while g < tl.minimum(pairs - first, GROUP):
            d = first + g
            di, dj = tl.load(displacements + 2 * d), tl.load(displacements + 2 * d + 1)
            in_map = rule.inside(i + di - pad_rows, height) & rule.inside(j + dj - pad_columns, width)
            q = tl.load(
                x + (di.to(tl.int64) * stride_h + dj.to(tl.int64) * stride_w) + offset, mask=in_map, other=0.0
            ).to(COMPUTE)
            own_bins, ends = tl.load(bins + d), ranges + 4 * d
            lo_p, lo_q = tl.load(ends), tl.load(ends + 2)
            bin_p = rule.bin_number(p, lo_p, rule.inverse_width(lo_p, tl.load(ends + 1), own_bins), own_bins)
            bin_q = rule.bin_number(q, lo_q, rule.inverse_width(lo_q, tl.load(ends + 3), own_bins), own_bins)
            near = (p == 0) | (q == 0) | (bin_p == bin_q)
            keep = rule.inside(i + di, rows) & rule.inside(j + dj, columns) & ((near.to(tl.int32) & remove_near) == 0)
            cell = bin_p * max_bins + bin_q
            if CELLS == 0:
                tl.atomic_add(
                    counts + d.to(tl.int64) * cells + cell, 1, mask=keep & rule.inside(cell, cells), sem="relaxed"
                )
            if REST > 0:  # before the larger part: in the other order sm_80 spills registers with Triton 3.7
                high = _counted(high, g, cell & (REST - 1), keep & (cell >= FIRST), REST)
            if CELLS > 0:
                low = _counted(low, g, cell, keep & (cell < FIRST), FIRST)
            g += 1
        done += BLOCK
    d = first + tl.arange(0, GROUP)[:, None]
    if CELLS > 0:
        _add(counts, low, 0, d, pairs, cells)
    if REST > 0:
        _add(counts, high, FIRST, d, pairs, cells)


def block(cells: int, dtype: torch.dtype, lanes: int = rule.LANES) -> int:
    """Places that a program takes at a time: 4 a thread, or 2 where they do not fit into the registers.

    On AMD it is the scalar registers that do not hold the ballots of 4. `dtype` is the one that is computed in.
    """
    two = lanes == 64 or dtype == torch.float64 or (BALLOTS and cells > MOST_CELLS)
    return 512 if two else 1024


def options(cells: int, dtype: torch.dtype, lanes: int = rule.LANES) -> dict[str, Any]:
    """Compile options. `lanes` is the size of a warp."""
    # ptxas begins the ballots of all 4 places at once, and takes 125 registers. With 80 a multiprocessor holds three
    # blocks, not two, and a pair takes 188 instructions, not 185. Where there are no ballots the cap takes more
    # registers (64 -> 75 on sm_80).
    capped = BALLOTS and 0 < cells <= MOST_CELLS and block(cells, dtype, lanes) == 1024
    return {**rule.options(lanes), **({"maxnreg": REGISTERS} if capped else {})}


def private_cells(max_bins: int) -> int:
    """Cells of a private table for so many bins, 0 if they are too many."""
    return next((cells for most, cells in CELLS.items() if max_bins <= most), 0)


def joint_histogram(
    x: Tensor,
    displacements: list[int],
    ranges: Tensor,
    bins: Tensor,
    max_bins: int,
    padding: list[int],
    remove_near: bool,
) -> Tensor:
    """As `reference.joint_histogram`, to the last count.

    The host waits for nothing, and a CUDA graph can record it.

    With more than 32 bins every pair is an atomic addition to the result itself: the time is that of its most frequent
    cell. A padded image of more than 2^29 pixels goes to the reference.
    """
    counts = x.new_zeros((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)
    joint_histogram_(counts, x, displacements, ranges, bins, padding, remove_near)
    return counts


@torch.no_grad()
def joint_histogram_(
    counts: Tensor,
    x: Tensor,
    displacements: list[int],
    ranges: Tensor,
    bins: Tensor,
    padding: list[int],
    remove_near: bool,
) -> None:
    """As `reference.joint_histogram_`."""
    check_counts(counts, x, displacements)
    max_bins = counts.shape[-1]
    variant = private_cells(max_bins), ranges.dtype
    work = rule.work(x, displacements, padding, block(*variant))
    if work is None:
        return reference.joint_histogram_(counts, x, displacements, ranges, bins, padding, remove_near)
    rule.launch(
        "joint_histogram",
        joint_histogram_kernel,
        work,
        options(*variant),
        ranges=ranges.contiguous(),
        bins=bins.contiguous(),
        counts=counts,
        max_bins=max_bins,
        remove_near=int(remove_near),
        CELLS=variant[0],
        BLOCK=block(*variant),
    )
