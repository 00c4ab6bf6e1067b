"""Second pass of spatial gradient scaling: joint histograms of pixels and their displaced neighbours.

The rule of pairs and bins is in pair_rule.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.pair_rule import bin_numbers, image_groups, inverse_width, padded, pair_views
from gradrep_kernels.ops.schema import TwoInts, op


def _fake(x, displacements, ranges, bins, max_bins, padding, remove_near):
    return x.new_empty((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)


def _fake_in_place(counts, x, displacements, ranges, bins, padding, remove_near):
    return None


@op("per channel and displacement: how often a pixel in bin p has its displaced neighbour in bin q", fake=_fake)
def joint_histogram(
    x: Tensor,
    displacements: list[int],
    ranges: Tensor,
    bins: Tensor,
    max_bins: int,
    padding: TwoInts,
    remove_near: bool,
) -> Tensor:
    """Count how often a pixel in bin p has its displaced neighbour in bin q, per channel and displacement.

    Args:
        x:             [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N = 0 gives zeros
        displacements: (di0, dj0, di1, dj1, ...), D of them
        ranges:        [C, D, 2, 2] = (p | q, lo | hi), float64 for a float64 map, else float32
        bins:          [C, D] int32, from 1 to max_bins
        max_bins:      B of the result
        padding:       [rows, columns] of zeros on each side
        remove_near:   drop pairs with a zero on either side, and pairs whose two bin numbers are equal

    Returns:
        counts [C, D, max_bins, max_bins] int64; cells at and above bins[c, d] are 0
    """
    counts = x.new_zeros((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)
    joint_histogram_(counts, x, displacements, ranges, bins, padding, remove_near)
    return counts


def check_counts(counts: Tensor, x: Tensor, displacements: list[int]) -> None:
    """Raise ValueError unless `counts` is the table of `joint_histogram_`: kernels write into it through a pointer."""
    sizes = (x.shape[1], len(displacements) // 2, *counts.shape[-1:] * 2)
    if (
        tuple(counts.shape) != sizes
        or counts.dtype != torch.int64
        or counts.device != x.device
        or not counts.is_contiguous()
    ):
        raise ValueError(
            f"joint_histogram_: counts must be contiguous int64 [C, D, B, B] = {list(sizes)} on {x.device}, "
            f"got {counts.dtype} {list(counts.shape)}, strides {counts.stride()}, on {counts.device}"
        )


@op(
    "the same, added to counts: a table that many batches share is neither made anew nor added up for each",
    writes=("counts",),
    fake=_fake_in_place,
)
@torch.no_grad()
def joint_histogram_(
    counts: Tensor,
    x: Tensor,
    displacements: list[int],
    ranges: Tensor,
    bins: Tensor,
    padding: TwoInts,
    remove_near: bool,
) -> None:
    """Add the result of `joint_histogram` to `counts`, so that a pass over many batches has one table.

    counts is [C, D, B, B] int64, contiguous, and its B is the max_bins. The others are as in `joint_histogram`.
    Raises ValueError where counts has another shape, dtype, device or layout.
    """
    check_counts(counts, x, displacements)
    channels, max_bins, pairs = x.shape[1], counts.shape[-1], list(zip(displacements[::2], displacements[1::2]))
    if x.numel() == 0 or not pairs:
        return
    table = channels * max_bins * max_bins
    inv = inverse_width(ranges, bins)
    lo = ranges[..., 0]
    cell_dtype = torch.int32 if table < 2**31 - 1 else torch.int64
    first_cell = torch.arange(channels, device=x.device, dtype=cell_dtype).mul_(max_bins**2)
    # With padding of at least the radius, and nothing dropped, a channel has one range, so a pixel has one bin number.
    one_number = bool((lo == lo[:, :1, :1]).all() & (inv == inv[:, :1, :1]).all() & (bins == bins[:, :1]).all())
    for part in image_groups(x):
        maps = padded(part, padding)
        if one_number:
            numbers = bin_numbers(maps, lo[:, 0, 0], inv[:, 0, 0], bins[:, 0])
        for d, (di, dj) in enumerate(pairs):
            p, q = pair_views(maps, di, dj)
            if p.numel() == 0:
                continue
            dropped = (p == 0) | (q == 0) if remove_near else None
            if one_number:
                p, q = pair_views(numbers, di, dj)
            else:
                p, q = (bin_numbers(side, lo[:, d, s], inv[:, d, s], bins[:, d]) for s, side in enumerate((p, q)))
            cells = p * max_bins + q + first_cell.view(-1, 1, 1)
            if dropped is not None:
                cells = cells.masked_fill_(dropped | (p == q), table)
            counts[:, d] += torch.bincount(cells.flatten(), minlength=table + 1)[:table].view(
                channels, max_bins, max_bins
            )
