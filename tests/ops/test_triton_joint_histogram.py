"""joint_histogram in Triton: in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases_pairs import DTYPES, LAYOUTS, MANY, PAIRS, Pairs, laid_out, make

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
from implementations import on_gpu
from triton_pairs import BINS, RANGES, SMALL, assert_counts, in_two_batches, next_to_edges

from gradrep_kernels.ops.triton import joint_histogram
from gradrep_kernels.ops.triton.launching import LAUNCHES


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
