"""First pass of spatial gradient scaling: the range of both sides of the pairs, and how many pairs there are.

The rule of pairs and bins is in pair_rule.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.pair_rule import (
    arithmetic_dtype,
    image_groups,
    number_of_pairs,
    padded,
    pair_views,
    ranges_of,
)
from gradrep_kernels.ops.schema import TwoInts, op


def _fake(x, displacements, padding, remove_near):
    channels, pairs = x.shape[1], len(displacements) // 2
    ranges = x.new_empty((channels, pairs, 2, 2), dtype=arithmetic_dtype(x.dtype))
    return ranges, x.new_empty((channels, pairs), dtype=torch.int64)


def _fake_in_place(ends, n, x, displacements, padding, remove_near):
    return None


def new_ends(x: Tensor, displacements: list[int]) -> tuple[Tensor, Tensor]:
    """Return the ends and n that `pair_ranges_` starts from: -inf and 0, where x is."""
    shape = (x.shape[1], len(displacements) // 2)
    ends = x.new_full((*shape, 2, 2), -torch.inf, dtype=arithmetic_dtype(x.dtype))
    return ends, x.new_zeros(shape, dtype=torch.int64)


@op(
    "per channel and displacement: [min, max] of both sides of the pairs, and how many pairs",
    returns=("ranges", "n"),
    fake=_fake,
)
def pair_ranges(x: Tensor, displacements: list[int], padding: TwoInts, remove_near: bool) -> tuple[Tensor, Tensor]:
    """Find [min, max] of both sides of the pairs, and how many pairs there are, per channel and displacement.

    Args:
        x:             [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N = 0 gives the empty result
        displacements: (di0, dj0, di1, dj1, ...), D of them
        padding:       [rows, columns] of zeros on each side
        remove_near:   drop pairs with a zero on either side

    Returns:
        ranges [C, D, 2, 2] = (p | q, lo | hi), float64 for a float64 map, else float32;
               (+inf, -inf) where no pair is left
        n      [C, D] int64, pooled over the images
    """
    ends, n = new_ends(x, displacements)
    pair_ranges_(ends, n, x, displacements, padding, remove_near)
    return ranges_of(ends), n


def check_ends(ends: Tensor, n: Tensor | None, x: Tensor, displacements: list[int]) -> None:
    """Raise ValueError unless `pair_ranges_` can write into `ends` and `n`: kernels do so through a pointer."""
    channels, pairs = x.shape[1], len(displacements) // 2
    for name, found, sizes, dtype in (
        ("ends", ends, (channels, pairs, 2, 2), arithmetic_dtype(x.dtype)),
        ("n", n, (channels, pairs), torch.int64),
    ):
        if found is not None and (
            tuple(found.shape) != sizes or found.dtype != dtype or found.device != x.device or not found.is_contiguous()
        ):
            raise ValueError(
                f"pair_ranges_: {name} must be contiguous {dtype} {list(sizes)} on {x.device}, "
                f"got {found.dtype} {list(found.shape)}, strides {found.stride()}, on {found.device}"
            )


@op(
    "the same, kept between batches as the greatest of -v and of v",
    writes=("ends", "n"),
    fake=_fake_in_place,
)
@torch.no_grad()
def pair_ranges_(
    ends: Tensor,
    n: Tensor | None,
    x: Tensor,
    displacements: list[int],
    padding: TwoInts,
    remove_near: bool,
) -> None:
    """Raise `ends` to those of the pairs of `x`, and add the number of pairs to `n`.

    The lesser end is kept negated, so both are running maxima: batches, calls and ranks merge by torch.maximum. A NaN
    stays. The ranges are (-ends[..., 0], ends[..., 1]), see `pair_rule.ranges_of`.

    Args:
        ends:   [C, D, 2, 2] = (p | q, greatest of -v | greatest of v), contiguous, in the dtype of the ranges; -inf
                where nothing was met yet
        n:      [C, D] int64, contiguous. None: pairs are not counted. Without remove_near their number follows from
                the shapes (`pair_rule.number_of_pairs`)
        others: as in `pair_ranges`

    Raises:
        ValueError: ends or n of another shape, dtype, device or layout.
    """
    check_ends(ends, n, x, displacements)
    if x.numel() == 0:
        return
    pairs = list(zip(displacements[::2], displacements[1::2]))
    if not remove_near:  # which pixels take part depends on their place alone: over the images once and for all
        least, greatest = (padded(extreme, padding) for extreme in (x.amin(0), x.amax(0)))
        for d, (di, dj) in enumerate(pairs):
            for s, (low, high) in enumerate(zip(pair_views(least, di, dj), pair_views(greatest, di, dj))):
                if low.numel() > 0:
                    _raise(ends[:, d, s], low.amin((1, 2)), high.amax((1, 2)))
        for d, number in enumerate(number_of_pairs(x.shape, displacements, padding) if n is not None else ()):
            n[:, d] += number
        return
    for part in image_groups(x):
        maps = padded(part, padding)
        for d, (di, dj) in enumerate(pairs):
            p, q = pair_views(maps, di, dj)
            if p.numel() == 0:
                continue
            keep = (p != 0) & (q != 0)
            if n is not None:
                n[:, d] += keep.sum((0, 2, 3))
            for s, values in enumerate((p, q)):  # over the images first: 3x faster than over all three at once
                low = torch.where(keep, values, torch.inf).amin(0).amin((1, 2))
                _raise(ends[:, d, s], low, torch.where(keep, values, -torch.inf).amax(0).amax((1, 2)))


def _raise(ends: Tensor, lo: Tensor, hi: Tensor) -> None:
    """Raise ends [C, 2] to those of the range lo, hi [C]. A zero is kept as +0.0, which -0.0 + 0.0 is."""
    ends.copy_(torch.maximum(ends, torch.stack((-lo, hi), dim=-1) + 0.0))
