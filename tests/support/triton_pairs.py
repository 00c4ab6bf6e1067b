"""Checks of the Triton ops over pairs of pixels that their tests on a GPU and in the interpreter share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from cases_pairs import Pairs, same_bits

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import sturges
from gradrep_kernels.ops.triton import joint_histogram, joint_histogram_, pair_ranges
from gradrep_kernels.ops.triton import pair_walk as rule

SMALL = Pairs("small", (3, 2, 5, 6), kind="noise")
BINS = (1, 2, 16, 22, 23, 24, 25, 32, 33, 300)
"""Around the largest number for each size of private table; above 32 there is none."""

RANGES = {  # of p, of q; as if found in other data
    "narrower": [[-0.5, 0.5], [0.0, 1.0]],
    "wider": [[-50.0, 60.0], [-70.0, 1.0]],
    "beside": [[1000.0, 2000.0], [-2000.0, -1000.0]],
    "turned round": [[1.0, -1.0], [2.0, 0.0]],
    "empty": [[0.5, 0.5], [math.inf, -math.inf]],
    "infinite": [[-math.inf, math.inf], [0.0, math.inf]],
    "NaN": [[math.nan, math.nan], [0.0, 1.0]],
    "the width overflows": [[-3e38, 3e38], [0.0, 1.0]],
    "its inverse overflows, and a denormal end": [[0.0, 1e-44], [0.0, 1e-38]],
}


def next_to_edges(bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A map of the edges of all bins and the numbers next to them, and its ranges: another rounding shows."""
    lo, hi = torch.tensor(1 / 3), torch.tensor(10 / 3)
    edges = lo + torch.arange(bins + 1) / (bins / (hi - lo))
    x = torch.cat([edges] + [torch.nextafter(edges, torch.tensor(to)) for to in (math.inf, -math.inf)])
    return x.view(1, 1, 3, -1), torch.stack((lo, hi)).expand(1, 1, 2, 2)


def few_channels(x: torch.Tensor, case: Pairs) -> torch.Tensor:
    """The first channels, at least one."""
    n, _, h, w = x.shape
    places, groups = (
        n * (h + 2 * case.padding[0]) * (w + 2 * case.padding[1]),
        -(-len(case.flat_displacements()) // (2 * rule.GROUP.value)),
    )
    return x[:, : max(1, 8 // (groups * -(-places // 1024)))]


def assert_ranges(x: torch.Tensor, case: Pairs, op: Callable = pair_ranges) -> None:
    """Both modes against the reference on the CPU; the map stays as it is."""
    for remove_near in (False, True):
        arguments = (case.flat_displacements(), list(case.padding), remove_near)
        expected, expected_n = reference.pair_ranges(x.cpu(), *arguments)
        before, version = x.clone(), x._version
        ranges, n = op(x, *arguments)
        assert torch.equal(n.cpu(), expected_n)
        assert same_bits(ranges.cpu(), expected)
        assert ranges.is_contiguous()
        assert n.is_contiguous()
        assert same_bits(x.double(), before.double())
        assert x._version == version


def assert_counts(
    x: torch.Tensor, case: Pairs, *, ranges=None, bins=None, modes=(False, True), op: Callable = joint_histogram
) -> None:
    """Against the reference on the CPU, in the ranges of `x` and Sturges' bins unless others are given.

    The map stays as it is.
    """
    for remove_near in modes:
        displacements, padding = case.flat_displacements(), list(case.padding)
        own_ranges, n = reference.pair_ranges(x.cpu(), displacements, padding, remove_near)
        ends = own_ranges if ranges is None else ranges
        numbers = sturges(n) if bins is None else torch.as_tensor(bins, dtype=torch.int32).expand(n.shape)
        most = int(numbers.max())
        expected = reference.joint_histogram(x.cpu(), displacements, ends, numbers, most, padding, remove_near)
        before, version = x.clone(), x._version
        counts = op(x, displacements, ends.to(x.device), numbers.to(x.device), most, padding, remove_near)
        assert counts.dtype == torch.int64
        assert counts.is_contiguous()
        assert torch.equal(counts.cpu(), expected)
        assert same_bits(x.double(), before.double())
        assert x._version == version


def in_two_batches(x, displacements, ranges, bins, max_bins, padding, remove_near) -> torch.Tensor:
    """joint_histogram by joint_histogram_, from a table that is not empty."""
    counts = torch.full((x.shape[1], len(displacements) // 2, max_bins, max_bins), 7, device=x.device)
    for part in (x[:1], x[1:]):
        joint_histogram_(counts, part, displacements, ranges, bins, padding, remove_near)
    return counts - 7
