"""Public faces of the ops `pair_ranges` and `joint_histogram`: they check arguments and give defaults."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import MAX_BINS, arithmetic_dtype, number_of_pairs, sturges
from gradrep_kernels.sgs.taps import two_ints
from gradrep_kernels.sgs.transfers import on_device

_MAP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_map(x: Tensor) -> Tensor:
    """Return a feature map [N, C, H, W] without its history, or raise TypeError or ValueError if it is none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor [N, C, H, W], got {type(x).__name__}")
    if x.dtype not in _MAP_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be a non-empty map [N, C, H, W], got {list(x.shape)}")
    return x.detach()


def _flat(displacements: Iterable[Sequence[int]]) -> list[int]:
    try:
        pairs = [tuple(operator.index(v) for v in displacement) for displacement in displacements]
    except TypeError:
        raise TypeError(f"displacements must be pairs of ints (rows, columns), got {displacements!r}") from None
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"displacements must be one or more pairs of ints (rows, columns), got {displacements!r}")
    return [v for pair in pairs for v in pair]


def pair_ranges(
    x: Tensor, displacements: Iterable[Sequence[int]], *, padding: int | Sequence[int] = 0, remove_near: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the range of both sides of all pairs (p, q = p + displacement) of each channel, over all images.

    Args:
        x:             [N, C, H, W], float32, float64, bfloat16 or float16, any strides; not changed
        displacements: D pairs (rows, columns), any sign; see `half_displacements`
        padding:       zeros around each image, a number or (rows, columns)
        remove_near:   drop pairs with a zero on either side

    Returns:
        ranges [C, D, 2, 2] = (p | q, lo | hi), float64 for a float64 map, else float32. (+inf, -inf) where no pair is
               left, NaN where a NaN is among the values
        n      [C, D] int64, how many pairs

    Raises:
        TypeError, ValueError: another dtype, an empty map, no displacement, negative padding.
    """
    x, flat, rows_columns = check_map(x), _flat(displacements), list(two_ints("padding", padding, 0))
    return implementation("pair_ranges", x.device.type)(x, flat, rows_columns, bool(remove_near))


def _check_bins(bins: int | str | Tensor, channels: int, pairs: int) -> Tensor | None:
    """Return bins as [C, D] int32 where they lie, an int on the CPU. None for 'sturges'."""
    if isinstance(bins, str):
        if bins != "sturges":
            raise ValueError(f"bins must be an int, 'sturges' or an integer Tensor [D] or [C, D], got {bins!r}")
        return None
    if not isinstance(bins, Tensor):
        try:
            bins = torch.tensor([operator.index(bins)], device="cpu")
        except TypeError:
            raise TypeError(
                f"bins must be an int, 'sturges' or an integer Tensor [D] or [C, D], got {type(bins).__name__}"
            ) from None
    elif bins.dtype == torch.bool or bins.is_floating_point() or bins.is_complex():
        raise TypeError(f"bins must be integers, got {bins.dtype}")
    elif tuple(bins.shape) not in ((pairs,), (channels, pairs)):
        raise ValueError(f"bins must have shape [{pairs}] or [{channels}, {pairs}], got {list(bins.shape)}")
    if not 1 <= int(bins.min()) <= int(bins.max()) <= MAX_BINS:
        raise ValueError(f"bins must be between 1 and {MAX_BINS}, got {int(bins.min())} to {int(bins.max())}")
    return bins.to(torch.int32).expand(channels, pairs).contiguous()


def sturges_bins(x: Tensor, displacements: list[int], padding: list[int], n: Tensor | None) -> Tensor:
    """Return Sturges' bins of a map  # [C, D] int32

    Args:
        n: the pairs that are left, where some drop. None: their number follows from the shapes, and the bins are on the
           CPU, so that nobody waits for a device
    """
    if n is not None:
        return sturges(n)
    return sturges(torch.tensor(number_of_pairs(x.shape, displacements, padding), device="cpu")).repeat(x.shape[1], 1)


def joint_histogram(
    x: Tensor,
    displacements: Iterable[Sequence[int]],
    bins: int | str | Tensor,
    *,
    padding: int | Sequence[int] = 0,
    remove_near: bool = False,
    ranges: Tensor | None = None,
) -> Tensor:
    """Count how often a pixel in bin p has its displaced neighbour in bin q, per channel and displacement.

    Args:
        x, displacements, padding: as in `pair_ranges`
        bins:        per side: an int, an integer Tensor [D] or [C, D], or 'sturges' for 1 + ceil(log2 n) of n pairs
        remove_near: drop pairs with a zero on either side, and pairs that fall into bins of the same number
        ranges:      [C, D, 2, 2] as `pair_ranges` gives them, if the bins are to span other data than `x`. Values
                     outside fall into the end bins

    Returns:
        counts [C, D, B, B] int64 with B the largest number of bins. Unused cells are 0. The top bin is closed, as in
        numpy.histogram2d. A NaN falls into bin 0. The rule in full: gradrep_kernels/ops/reference/pair_rule.py.

    Raises:
        TypeError, ValueError: as `pair_ranges`; bins below 1 or of another shape; ranges of another shape.
    """
    x, flat, rows_columns = check_map(x), _flat(displacements), list(two_ints("padding", padding, 0))
    channels, pairs = x.shape[1], len(flat) // 2
    bins = _check_bins(bins, channels, pairs)
    if ranges is not None:
        if not isinstance(ranges, Tensor):
            raise TypeError(f"ranges must be a Tensor [C, D, 2, 2], got {type(ranges).__name__}")
        if tuple(ranges.shape) != (channels, pairs, 2, 2) or not ranges.is_floating_point():
            raise ValueError(
                f"ranges must be floating [{channels}, {pairs}, 2, 2], got {ranges.dtype} {list(ranges.shape)}"
            )
    if ranges is None or (bins is None and remove_near):
        own_ranges, n = implementation("pair_ranges", x.device.type)(x, flat, rows_columns, bool(remove_near))
        ranges = own_ranges if ranges is None else ranges
    if bins is None:
        bins = sturges_bins(x, flat, rows_columns, n if remove_near else None)
    ranges = ranges.detach().to(device=x.device, dtype=arithmetic_dtype(x.dtype)).contiguous()
    return count_pairs(x, flat, ranges, bins, rows_columns, bool(remove_near))


def count_pairs(
    x: Tensor, displacements: list[int], ranges: Tensor, bins: Tensor, padding: list[int], remove_near: bool
) -> Tensor:
    """Return the counts within `ranges`, which are where x is. Bins on the CPU are sent there, and nobody waits."""
    max_bins = int(bins.max())
    bins = on_device([bins], x.device)[0] if bins.is_cpu else bins.to(x.device)
    count = implementation("joint_histogram", x.device.type)
    return count(x, displacements, ranges, bins, max_bins, padding, remove_near)
