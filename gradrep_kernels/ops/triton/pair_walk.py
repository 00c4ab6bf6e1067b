"""The walk over pairs of pixels: which program takes which pixels, and the rule for bins on the device.

The rule is that of reference/pair_rule.py.

The padded images of a channel follow one another: place n * plane + i * columns + j is row i, column j of image n, with
plane = rows * columns. A program takes GROUP displacements of one channel and a run of places: whole images, or a part
of a large one. So a pixel is read once for GROUP displacements, and neighbouring programs take neighbouring channels,
which share cache lines in channels_last. The padding is nowhere in memory: loads outside the map are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops.triton import launching, staging
from gradrep_kernels.ops.triton.division import magic_division, quotient

GROUP = tl.constexpr(4)
"""Displacements of a program: all of 3x3, and a divisor of 5x5's 12 and 7x7's 24."""

PLACES = 2**29
"""Places of a program, and of a plane, at most: their sum stays below 2^31."""

NOWHERE = tl.constexpr(-(2**30))
"""The row of a place that is not the program's: no displacement leads from it into a map."""

OUTSIDE = tl.constexpr(-PLACES)
"""The rows of a displacement that is not there: it leads out of every map.

NOWHERE + OUTSIDE - padding is at least -2^31.
"""

PROGRAMS = 4096
"""Programs of a launch, if there is work for so many: ten waves on an H200."""

LANES = 64 if torch.version.hip else 32

ARGUMENTS = [
    "x", "displacements", "stride_n", "stride_c", "stride_h", "stride_w", "images", "channels", "height", "width",
    "pad_rows", "pad_columns",
    "plane_magic", "plane_shift", "row_magic", "row_shift", "pairs", "images_each", "parts", "span",
]  # fmt: skip
"""The first arguments of every kernel over pairs (see `work`)."""

# ---- on the device


@triton.jit
def share(images, channels, pairs, plane, images_each, parts, span):
    """A program's channel, first displacement, chunk, first image, first place in that, and how many places."""
    c = tl.program_id(0) % channels
    group = tl.program_id(0) // channels
    groups = (pairs + GROUP - 1) // GROUP
    chunk = group // groups
    image = chunk // parts * images_each
    start = chunk % parts * span
    places = tl.minimum(tl.minimum(images - image, images_each) * plane - start, span)
    return c, group % groups * GROUP, chunk, image, start, places


@triton.jit
def inside(n, size):
    """0 <= n < size"""
    return n.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def pixels(
    done,
    places,
    start,
    plane,
    columns,
    plane_magic,
    plane_shift,
    row_magic,
    row_shift,
    stride_n,
    stride_h,
    stride_w,
    BLOCK: tl.constexpr,
):
    """Row, column and offset in memory of the next BLOCK places."""
    n = done + tl.arange(0, BLOCK)
    image = quotient(start + n, plane_magic.to(tl.uint32, bitcast=True), plane_shift)
    in_plane = start + n - image * plane
    i = quotient(in_plane, row_magic.to(tl.uint32, bitcast=True), row_shift)
    j = in_plane - i * columns
    offset = image.to(tl.int64) * stride_n + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    return tl.where(n < places, i, NOWHERE), j, offset


@triton.jit
def inverse_width(lo, hi, bins):
    if lo.dtype == tl.float32:
        inv = tl.div_rn(bins.to(tl.float32), hi - lo)
    else:
        inv = bins.to(tl.float64) / (hi - lo)
    return tl.where(tl.abs(inv) < float("inf"), inv, 0.0)


@triton.jit
def bin_number(values, lo, inv, bins):
    t = (values - lo) * inv
    t = tl.where(t >= 0, t, 0.0)  # NaN becomes 0; from tl.maximum it comes out as NaN in the interpreter of Triton 3.6
    return tl.minimum(t, (bins - 1).to(t.dtype)).to(tl.int32)


# ---- on the host

displacement_tables: dict[tuple, Tensor] = {}


def options(lanes: int = LANES) -> dict[str, Any]:
    """Return the compile options of a kernel of pairs. `lanes` is the size of a warp."""
    # A contracted (v - lo) * inv would fall into other bins.
    return {"num_warps": 256 // lanes, "enable_fp_fusion": False}


def displacement_table(displacements: tuple[int, ...], device: torch.device) -> Tensor:
    """[D, 2] int32 on the device. Farther ones than a plane can be long have no pairs either."""
    in_capture = staging.capturing(device)  # where a table that another stream uploaded may not have arrived
    key = (displacements, device, staging.stream(device))
    if key in displacement_tables and not in_capture:
        staging.room.reserve()
        return displacement_tables[key]
    table = staging.upload(
        torch.tensor(displacements, device="cpu").clamp(-PLACES, PLACES).to(torch.int32).view(-1, 2), device
    )
    if not in_capture:
        staging.remember(displacement_tables, key, table)
    return table


class Work(NamedTuple):
    """How a call is dealt to programs."""

    programs: int
    chunks: int  # of the places of a channel
    arguments: dict[str, Any]  # ARGUMENTS


def work(x: Tensor, displacements: Sequence[int], padding: Sequence[int], block: int) -> Work | None:
    """Deal a call to programs, which take some `block` places at a time.

    None if the reference must serve: there is no pair at all, or a plane has more than PLACES.
    """
    (images, channels, height, width), pairs = x.shape, len(displacements) // 2
    columns = width + 2 * padding[1]
    plane = (height + 2 * padding[0]) * columns
    if x.numel() == 0 or pairs == 0 or plane > PLACES:
        return None
    groups = triton.cdiv(pairs, GROUP.value)
    share = min(max(images * plane * channels * groups // PROGRAMS, block), PLACES)
    images_each = min(max(share // plane, 1), images)
    span = min(images_each * plane, triton.cdiv(share, block) * block)
    parts = triton.cdiv(images_each * plane, span)
    chunks = triton.cdiv(images, images_each) * parts
    magic = [number for size in (plane, columns) for number in magic_division(size)]
    values = (
        x, displacement_table(tuple(displacements), x.device), *x.stride(), images, channels, height, width, *padding,
        *(number - 2**32 if number >= 2**31 else number for number in magic), pairs, images_each, parts, span,
    )  # fmt: skip
    return Work(chunks * groups * channels, chunks, dict(zip(ARGUMENTS, values, strict=True)))


def launch(op: str, kernel: Any, work: Work, compiled_with: dict[str, Any], **arguments: Any) -> None:
    x = work.arguments["x"]
    launching.launch(op, x.device, x.dtype, kernel, work.programs, **work.arguments, **arguments, **compiled_with)
