"""First pass of spatial gradient scaling: the range of both sides of the pairs, and how many pairs there are.

The rule of pairs and bins is in pair_rule.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype, image_groups, padded, pair_views
from gradrep_kernels.ops.schema import TwoInts, op


def _fake(x, displacements, padding, remove_near):
    channels, pairs = x.shape[1], len(displacements) // 2
    ranges = x.new_empty((channels, pairs, 2, 2), dtype=arithmetic_dtype(x.dtype))
    return ranges, x.new_empty((channels, pairs), dtype=torch.int64)


@op(
    "per channel and displacement: [min, max] of both sides of the pairs, and how many pairs",
    returns=("ranges", "n"),
    fake=_fake,
)
@torch.no_grad()
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
    channels, pairs = x.shape[1], list(zip(displacements[::2], displacements[1::2]))
    lo = x.new_full((2, len(pairs), channels), torch.inf, dtype=arithmetic_dtype(x.dtype))
    hi = -lo
    n = x.new_zeros((len(pairs), channels), dtype=torch.int64)
    if (
        not remove_near and x.numel() > 0
    ):  # which pixels take part depends on their place alone: over the images once and for all
        least, greatest = (padded(extreme, padding) for extreme in (x.amin(0), x.amax(0)))
        for d, (di, dj) in enumerate(pairs):
            for s, (low, high) in enumerate(zip(pair_views(least, di, dj), pair_views(greatest, di, dj))):
                if low.numel() > 0:
                    n[d] = x.shape[0] * low[0].numel()
                    lo[s, d], hi[s, d] = low.amin((1, 2)), high.amax((1, 2))
    for part in image_groups(x) if remove_near else ():
        maps = padded(part, padding)
        for d, (di, dj) in enumerate(pairs):
            p, q = pair_views(maps, di, dj)
            if p.numel() == 0:
                continue
            keep = (p != 0) & (q != 0)
            n[d] += keep.sum((0, 2, 3))
            for s, values in enumerate(
                (p, q)
            ):  # over the images first: 3x faster than over all three dimensions at once
                lo[s, d] = torch.minimum(lo[s, d], torch.where(keep, values, torch.inf).amin(0).amin((1, 2)))
                hi[s, d] = torch.maximum(hi[s, d], torch.where(keep, values, -torch.inf).amax(0).amax((1, 2)))
    ranges = torch.stack((lo, hi)).permute(3, 2, 1, 0) + 0.0  # -0.0 + 0.0 is +0.0
    return ranges.contiguous(), n.t().contiguous()
