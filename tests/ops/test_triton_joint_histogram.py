"""joint_histogram in Triton: in the interpreter, and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases_pairs import LAYOUTS, PAIRS, Pairs, laid_out, make, same_bits

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
from implementations import on_gpu
from test_triton_pair_ranges import DTYPES, MANY

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import sturges
from gradrep_kernels.ops.triton import joint_histogram, joint_histogram_
from gradrep_kernels.ops.triton.launching import LAUNCHES

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


def test_in_the_interpreter():
    interpreter.run("interpreted_joint_histogram.py")


# ---- on a GPU


@on_gpu
@pytest.mark.parametrize("case", PAIRS + MANY, ids=lambda case: case.desc)
def test_equals_the_reference(case):
    assert_counts(case.tensor().cuda(), case)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    for case in MANY:
        for kind in ("relu", "NaN", "infinities", "constant"):
            assert_counts(laid_out(make(kind, case.shape, dtype).cuda(), layout), case)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", BINS)
def test_numbers_of_bins(bins, dtype):
    for kind in ("8-bit", "noise", "constant"):
        for op in (joint_histogram, in_two_batches):
            assert_counts(make(kind, (20, 3, 17, 13), dtype).cuda(), SMALL, bins=bins, op=op)


@on_gpu
@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_other_data(name):
    for dtype in (torch.float32, torch.float64):
        for kind in ("noise", "infinities", "NaN"):
            assert_counts(
                make(kind, SMALL.shape, dtype).cuda(),
                SMALL,
                ranges=torch.tensor(RANGES[name], dtype=dtype).expand(2, 4, 2, 2),
                bins=9,
            )


@on_gpu
@pytest.mark.parametrize("bins", range(2, 33))
def test_values_next_to_the_edges(bins):
    x, ranges = next_to_edges(bins)
    assert_counts(x.cuda(), Pairs("", x.shape, padding=(0, 0), displacements=((0, 1),)), ranges=ranges, bins=bins)


@on_gpu
def test_divisions_round_as_on_the_cpu():
    ranges = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=-1).values
    assert_counts(make("noise", (50, 64, 16, 16), torch.float32).cuda(), SMALL, ranges=ranges, bins=24)


@on_gpu
def test_strides_beyond_32_bits():
    x = torch.zeros(2**31 + 200, dtype=torch.float16, device="cuda").as_strided((2, 1, 9, 9), (2**31 + 1, 1, 9, 1))
    assert_counts(x.copy_(make("relu", (2, 1, 9, 9), torch.float16)), SMALL)


def arguments_on_gpu(displacements: list[int], remove_near: bool = False) -> tuple:
    ends, bins = torch.tensor([0.0, 3.0], device="cuda"), torch.full((3, 2), 8, dtype=torch.int32, device="cuda")
    return displacements, ends.expand(3, 2, 2, 2), bins, 8, [1, 1], remove_near


@on_gpu
def test_a_cuda_graph_reads_the_map_at_replay():
    x, case = make("relu", (5, 3, 8, 8), torch.float32).cuda(), Pairs("", (5, 3, 8, 8), displacements=((0, 1), (1, 0)))
    arguments = arguments_on_gpu(case.flat_displacements())
    joint_histogram(x, *arguments)  # a module cannot be loaded inside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = joint_histogram(x, *arguments)
    for seed in (1, 2):
        x.copy_(make("relu", (5, 3, 8, 8), torch.float32, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_counts(x, case, ranges=arguments[1].cpu(), bins=8, modes=[False], op=lambda *_: counts)


@on_gpu
def test_the_host_waits_for_nothing():
    x = make("relu", (5, 3, 8, 8), torch.float32).cuda()
    joint_histogram(x, *arguments_on_gpu([0, 1, 1, 0]))
    arguments = arguments_on_gpu([1, 2, 1, 0], True)  # new displacements, so a new table
    LAUNCHES.clear()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        joint_histogram(x, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert dict(LAUNCHES) == {("joint_histogram", str(x.device), torch.float32): 1}
