"""The rule of pairs and bins: which pairs of pixels there are, how many bins, and the bin of a value.

Every implementation of `pair_ranges` and `joint_histogram` follows this page to the letter. That is why counts are
equal to the last one on every device, for every batch split and thread count. T is the type of all arithmetic: float64
for float64 maps, else float32. bfloat16 and float16 maps are widened first, which is exact. Every operation below is
rounded to nearest in T on its own, and denormals are kept.

Pairs. x [N, C, H, W] is surrounded by zeros, padding[0] rows above and below, padding[1] columns left and right, to
Hp x Wp. For a displacement (di, dj), of any sign, P and Q are all pixels p and q = p + (di, dj) with both inside the
padded map: max(0, Hp - |di|) * max(0, Wp - |dj|) pairs an image. With remove_near, pairs with p == 0 or q == 0 are
dropped. -0.0 is 0 there, NaN is not. n counts the pairs that are left, pooled over the images.

Ranges. lo and hi of a side are the least and the greatest of its values that are left. One NaN among them makes both
NaN. A zero end is +0.0. Where no pair is left, lo = +inf, hi = -inf and n = 0, so that ranges of several batches merge
by minimum and maximum.

Bins. B per channel and displacement, 1 <= B <= MAX_BINS, the same for P and Q. For a side with range [lo, hi]:
    inv = B / (hi - lo)          one subtraction, one IEEE division (no approximate reciprocal); not finite: inv = 0
    t   = (v - lo) * inv         one subtraction, one multiplication; nothing here contracts to an FMA
    bin = 0       where t is NaN or t < 1
          B - 1   where t >= B - 1
          int(t)  otherwise (towards zero)
So the top bin is closed. A constant side, an infinite or NaN range and a NaN pixel go to bin 0. Values outside the
range go to the nearer end bin, since ranges may come from other data; +inf goes to the top one where inv > 0.

Counts. counts[c, d, bin(p), bin(q)] += 1 for each pair that is left. With remove_near, counts whose two bin numbers are
equal are 0 in the result, so then the counts need not sum to n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_BINS = 32767  # a cell number p * B + q then fits an int32


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return T, the type of the ranges and of all arithmetic on a map of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sturges(n: Tensor) -> Tensor:
    """Choose the bins per side for n pairs, B = 1 + ceil(log2 n) = 1 + bit_length(n - 1)  # int32, the shape of n

    It is exact below 2^53, and 1 where n <= 1.
    """
    return 1 + torch.frexp((n - 1).clamp(min=0).double()).exponent


def number_of_pairs(shape: Sequence[int], displacements: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Count the pairs of each displacement in a map [N, C, H, W], per channel, if none is dropped: it takes no data."""
    images, _, *size = shape
    if 0 in shape:
        return [0] * (len(displacements) // 2)
    rows, columns = (length + 2 * pad for length, pad in zip(size, padding))
    return [
        images * max(0, rows - abs(di)) * max(0, columns - abs(dj))
        for di, dj in zip(displacements[::2], displacements[1::2])
    ]


def ranges_of(ends: Tensor) -> Tensor:
    """Return [..., (lo, hi)] of the ends [..., (greatest of -v, greatest of v)] of `pair_ranges_`."""
    return torch.stack((-ends[..., 0], ends[..., 1]), dim=-1) + 0.0  # -0.0 + 0.0 is +0.0


def inverse_width(ranges: Tensor, bins: Tensor) -> Tensor:
    """inv of both sides  # ranges [C, D, 2, 2] in T, bins [C, D] -> [C, D, 2] in T"""
    inv = bins.unsqueeze(-1).to(ranges.dtype) / (ranges[..., 1] - ranges[..., 0])
    return torch.where(torch.isfinite(inv), inv, torch.zeros_like(inv))


def bin_numbers(values: Tensor, lo: Tensor, inv: Tensor, bins: Tensor) -> Tensor:
    """Find the bin of each value  # [N, C, h, w] in T, with lo, inv in T and bins, all [C] -> int32 [N, C, h, w]"""
    lo, inv, top = lo.view(-1, 1, 1), inv.view(-1, 1, 1), (bins.to(values.dtype) - 1).view(-1, 1, 1)
    t = (values - lo).mul_(inv)
    torch.fmax(t, torch.zeros_like(lo), out=t)  # fmax takes the number where the other is NaN
    return torch.minimum(t, top, out=t).to(torch.int32)


def image_groups(x: Tensor, pixels: int = 1 << 18) -> tuple[Tensor, ...]:
    """The map in groups of images, some `pixels` at a time: temporaries stay in cache, 2x faster than whole batches."""
    return x.split(max(1, pixels // x[0].numel())) if x.numel() > 0 else ()


def padded(x: Tensor, padding: list[int]) -> Tensor:
    """The map in T with its zeros around  # [N, C, H + 2 padding[0], W + 2 padding[1]]"""
    rows, columns = padding
    return torch.nn.functional.pad(x.to(arithmetic_dtype(x.dtype)), (columns, columns, rows, rows))


def pair_views(maps: Tensor, di: int, dj: int) -> tuple[Tensor, Tensor]:
    """View P and Q of one displacement  # [..., Hp, Wp] -> twice [..., max(0, Hp - |di|), max(0, Wp - |dj|)]"""
    p = q = maps
    for dim, d in ((-2, di), (-1, dj)):
        size = maps.shape[dim]
        length = max(0, size - abs(d))
        p = p.narrow(dim, min(max(-d, 0), size), length)
        q = q.narrow(dim, min(max(d, 0), size), length)
    return p, q
