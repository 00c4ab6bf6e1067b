"""The CUDA C++ of `pair_ranges` and `joint_histogram` against the reference: on a GPU, and emulated anywhere.

Emulated: the blocks of the kernels, compiled for the CPU. What only a GPU has is not judged by that: atomic operations,
synchronisation, machine code (see test_compile_gate_cuda.py).
"""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from cases_pairs import LAYOUTS, PAIRS, assert_raised, ends_of_before, laid_out, make
from cuda_pairs import DTYPES, H100, HALF_3X3, HALF_7X7, OPS, SMALL, Emulated, check, library, on_gpu

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import MAX_BINS, arithmetic_dtype, sturges


@pytest.fixture
def emulated() -> Emulated:
    return Emulated()


@pytest.fixture(params=OPS)
def ops(request):
    return request.param


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(ops, case, layout, remove_near):
    x, displacements, padding = case.tensor(), case.flat_displacements(), list(case.padding)
    check(ops, x, displacements, padding, remove_near, layout=layout)
    eight = torch.full((x.shape[1], len(displacements) // 2), 8, dtype=torch.int32)
    check(ops, x, displacements, padding, remove_near, layout=layout, bins=eight, shared=[SMALL], blocks_at_once=300)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ops, layout, dtype, remove_near):
    for shape in ((9, 21, 7, 9), (10, 3, 8, 8)):  # the second: four pixels of a row lie together
        check(ops, make("relu", shape, dtype), HALF_3X3, [1, 1], remove_near, layout=layout)


def test_rows_that_can_be_read_four_pixels_at_a_time(ops):
    """And those that cannot, by one thing each: address, width, strides."""
    x = make("noise", (3, 3, 9, 20), torch.float32).to(ops.device)
    shifted = torch.nn.functional.pad(x, (1, 0))[..., 1:]
    narrow = x.flatten(2)[..., :126].view(3, 3, 7, 18)
    odd = [x.as_strided((3, 3, 8, 8), strides) for strides in ((126, 60, 8, 1), (124, 62, 8, 1))]
    for part in (
        x,
        x[..., 4:],
        x[..., 4:12],
        x[:, 1:, 2:],
        x[..., 3:15],
        x[..., :7],
        x[:, :, :, ::2],
        shifted,
        narrow[..., :8],
        x.transpose(0, 1),
        *odd,
    ):
        ranges, _ = reference.pair_ranges(part.cpu(), HALF_3X3, [1, 1], False)
        bins = torch.full((part.shape[1], 4), 9, dtype=torch.int32)
        counts = ops.joint_histogram(part, HALF_3X3, ranges.to(ops.device), bins.to(ops.device), 9, [1, 1], False)
        assert torch.equal(
            counts.cpu(), reference.joint_histogram(part.cpu(), HALF_3X3, ranges, bins, 9, [1, 1], False)
        )
        assert ops.device == "cuda" or ops.facts.tiled == ops.facts.blocks


WAYS = {
    # shape, layout, displacements, padding, bins:
    # (whether tiles of bin numbers are used, whether tables are private, blocks if 8 run at once)
    "3x3": ((32, 2, 32, 32), "contiguous", HALF_3X3, (1, 1), 23, (True, True, 2 * 4)),
    "7x7: all displacements at once": ((32, 2, 32, 32), "contiguous", HALF_7X7, (3, 3), 24, (True, True, 2 * 4)),
    "channels_last: four channels at once": (
        (20, 19, 16, 16),
        "channels_last",
        HALF_3X3,
        (1, 1),
        20,
        (True, True, 5),
    ),
    "7x7, channels_last: displacements in groups": (
        (3, 9, 16, 16),
        "channels_last",
        HALF_7X7,
        (3, 3),
        20,
        (True, True, 5 * 3),
    ),
    "bands of an image": ((1, 1, 400, 300), "contiguous", HALF_7X7, (3, 3), 20, (True, True, 6)),
    "a band in more shared memory": ((2, 1, 3, 20000), "contiguous", HALF_3X3, (1, 1), 20, (True, True, 6)),
    "rows too long for a tile": ((1, 1, 3, 130000), "contiguous", HALF_3X3, (1, 1), 20, (False, True, 5)),
    "pairs too far for a tile": ((1, 1, 150, 2500), "contiguous", [120, 3], (120, 3), 20, (False, True, 8)),
    "padding below the radius": ((9, 2, 6, 6), "contiguous", HALF_3X3, (0, 0), 20, (False, True, 2 * 2)),
    "the largest private table": ((2, 2, 9, 9), "contiguous", HALF_3X3, (1, 1), 239, (True, True, 2 * 4)),
    "tables too large": ((2, 2, 9, 9), "contiguous", HALF_3X3, (1, 1), 250, (False, False, 2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(emulated, way):
    """That the cheap ways are taken where they can be, and how the work is dealt."""
    shape, layout, displacements, padding, bins, (tiled, private_tables, blocks) = WAYS[way]
    bins = torch.full((shape[1], len(displacements) // 2), bins, dtype=torch.int32)
    check(
        emulated,
        make("noise", shape, torch.float32),
        displacements,
        list(padding),
        False,
        layout=layout,
        bins=bins,
        blocks_at_once=8,
    )
    assert emulated.facts.blocks == blocks
    assert emulated.facts.tiled == (blocks if tiled else 0)
    assert emulated.facts.private_tables == (blocks if private_tables else 0)


@pytest.mark.parametrize(
    ("ends", "number"), [((0.0, 4.0), 8), ((1.0, 3.0), 4), ((0.0, 3.0), 4)]
)  # other bins, starts, steps; the other two equal
def test_one_unlike_channel_of_a_block(emulated, ends, number):
    """Channels of a block may have pixels of one bin number, or of many."""
    x = make("noise", (5, 20, 8, 8), torch.float32)
    ranges, bins = torch.tensor([0.0, 2.0]).repeat(20, 4, 2, 1), torch.full((20, 4), 4, dtype=torch.int32)
    ranges[11, 2], bins[11, 2] = torch.tensor(ends), number
    check(emulated, x, HALF_3X3, [1, 1], False, layout="channels_last", ranges=ranges, bins=bins, blocks_at_once=1)
    assert (emulated.facts.blocks, emulated.facts.tiled) == (5, 4)


@pytest.mark.parametrize("kind", ["NaN", "constant"])
def test_ranges_without_a_width_are_alike(emulated, kind):
    """NaN is unlike itself, but all such pixels are in bin 0."""
    x = make("noise", (9, 2, 12, 12), torch.float32)
    x[:, :, 5, 5] = torch.nan
    check(emulated, x if kind == "NaN" else torch.ones_like(x), HALF_3X3, [1, 1], False)
    assert emulated.facts.tiled == emulated.facts.blocks > 0


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_displacements_than_a_launch_takes(ops, layout, remove_near):
    x = make("relu", (2, 3, 12, 13), torch.float32)
    displacements = [v for i in range(-7, 8) for j in range(-7, 14) for v in (i, j)]  # 315, some without a pair
    check(ops, x, displacements, [0, 0], remove_near, layout=layout)
    check(ops, x, [0, 50] * 200, [0, 0], remove_near, bins=torch.full((3, 200), 4, dtype=torch.int32))


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (2, 2)])
@pytest.mark.parametrize("most", [1, 2, 31, 230, 239, 255, 256, 300])
def test_any_number_of_bins(ops, most, padding, remove_near):
    x = make("noise", (5, 5, 20, 21), torch.float32)
    generator = torch.Generator().manual_seed(most)
    unlike = torch.randint(1, most + 1, (5, 5), generator=generator, dtype=torch.int32)
    unlike[3, 2] = most
    for bins in (unlike, torch.full((5, 5), most, dtype=torch.int32)):
        check(ops, x, [*HALF_3X3, 2, 0], list(padding), remove_near, bins=bins, shared=[H100, SMALL, 1 << 30])


@pytest.mark.parametrize("bins", [0, -1, -(2**31), 9, 2**31 - 1])
def test_bins_out_of_range_are_no_wild_writes(ops, bins):
    """On a GPU they lie where the host does not look, so the kernel has to."""
    x = make("noise", (2, 3, 8, 8), torch.float32)
    ranges, _ = reference.pair_ranges(x, HALF_3X3, [1, 1], False)
    given = torch.full((3, 4), bins, dtype=torch.int32)
    counts = ops.joint_histogram(
        x.to(ops.device), HALF_3X3, ranges.to(ops.device), given.to(ops.device), 8, [1, 1], False
    )
    assert torch.equal(
        counts.cpu(), reference.joint_histogram(x, HALF_3X3, ranges, given.clamp(1, 8), 8, [1, 1], False)
    )


@pytest.mark.parametrize("kind", ["noise", "NaN", "infinities", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_outside_the_ranges(ops, dtype, kind):
    """Ranges of other data, reversed, empty and not finite ones: never a bin out of bounds."""
    x = make(kind, (3, 8, 9, 10), dtype)
    inf, nan = torch.inf, torch.nan
    ends = [(-0.1, 0.1), (0.5, -0.5), (1.0, 1.0), (inf, -inf), (-inf, inf), (nan, nan), (-1.0, inf), (-3e38, 3e38)]
    ranges = torch.tensor(ends, dtype=arithmetic_dtype(dtype)).view(8, 1, 1, 2).expand(8, 2, 2, 2).clone()
    for given in (ranges, torch.cat((ranges[:, :1], ranges[:, 1:].roll(1, 0)), 1)):
        for bins in (1, 7, 300):
            check(ops, x, [0, 1, 1, 0], [1, 0], False, bins=torch.full((8, 2), bins, dtype=torch.int32), ranges=given)


@pytest.mark.parametrize("bins", range(2, 33))
def test_values_next_to_the_edges(ops, bins):
    """Another rounding of one operation shows."""
    lo, hi = torch.tensor(1 / 3), torch.tensor(10 / 3)
    edges = lo + torch.arange(bins + 1) / (bins / (hi - lo))
    x = torch.cat([edges] + [torch.nextafter(edges, torch.tensor(to)) for to in (torch.inf, -torch.inf)]).view(
        1, 1, 3, -1
    )
    ranges = torch.stack((lo, hi)).expand(1, 1, 2, 2)
    check(ops, x, [0, 1], [0, 0], False, ranges=ranges, bins=torch.full((1, 1), bins, dtype=torch.int32))


def test_the_largest_table(ops):
    x = make("noise", (1, 1, 4, 4), torch.float32)
    ranges, _ = reference.pair_ranges(x, [0, 1], [0, 0], False)
    most, bins = MAX_BINS // 8, torch.full((1, 1), MAX_BINS // 8, dtype=torch.int32)
    counts = ops.joint_histogram(
        x.to(ops.device), [0, 1], ranges.to(ops.device), bins.to(ops.device), most, [0, 0], False
    )
    assert torch.equal(
        counts.nonzero().cpu(), reference.joint_histogram(x, [0, 1], ranges, bins, most, [0, 0], False).nonzero()
    )


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_count(ops, shape, remove_near):
    for displacements in ([0, 1, 1, 0], []):
        x, pairs = torch.zeros(shape, device=ops.device), len(displacements) // 2
        found, n = ops.pair_ranges(x, displacements, [1, 1], remove_near)
        expected, expected_n = reference.pair_ranges(x.cpu(), displacements, [1, 1], remove_near)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(n.cpu(), expected_n)
        bins = torch.ones(shape[1], pairs, dtype=torch.int32, device=ops.device)
        counts = ops.joint_histogram(
            x, displacements, torch.zeros(shape[1], pairs, 2, 2, device=ops.device), bins, 3, [1, 1], remove_near
        )
        assert counts.shape == (shape[1], pairs, 3, 3)
        assert not counts.any()


@pytest.mark.parametrize("blocks_at_once", [1, 7, 1000])
@pytest.mark.parametrize("remove_near", [False, True])
def test_one_channel_is_shared_out_by_images(ops, remove_near, blocks_at_once):
    check(
        ops, make("relu", (700, 1, 12, 12), torch.float32), HALF_3X3, [1, 1], remove_near, blocks_at_once=blocks_at_once
    )


@pytest.mark.parametrize("remove_near", [False, True])
def test_the_first_slab_has_no_pair(ops, remove_near):
    check(ops, make("noise", (1, 1, 400, 300), torch.float32), [-120, 0], [0, 0], remove_near, blocks_at_once=100)


LAUNCHES = {  # shape, displacements, padding, remove_near: launches without n, with n
    "padding covers all": ((9, 3, 8, 8), HALF_3X3, (1, 1), False, (1, 2)),
    "no displacement, no padding": ((9, 3, 8, 8), [0, 0], (0, 0), False, (1, 2)),
    "480 displacements": ((2, 2, 3, 4), [0, 1] * 480, (1, 1), False, (1, 5)),
    "less padding, many images": ((9, 3, 8, 8), HALF_3X3, (0, 1), False, (2, 3)),
    "less padding, few images": ((7, 3, 8, 8), HALF_3X3, (0, 1), False, (1, 2)),
    "remove_near": ((9, 3, 8, 8), HALF_3X3, (1, 1), True, (1, 1)),
    "no pixel": ((0, 3, 8, 8), HALF_3X3, (1, 1), False, (0, 1)),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_of_ends(emulated, case):
    shape, displacements, padding, remove_near, launches = LAUNCHES[case]
    for with_n, expected in zip((False, True), launches):
        x, (ends, n) = (
            make("noise", shape, torch.float32),
            ends_of_before(shape[1], len(displacements) // 2, torch.float32),
        )
        emulated.pair_ranges_(ends, n if with_n else None, x, displacements, list(padding), remove_near)
        assert emulated.facts.launches == expected


@pytest.mark.parametrize(
    "shape", [(9, 1, 1, 1), (5, 300, 1, 1), (3, 255, 2, 1), (2, 257, 1, 3), (1, 40, 5, 7), (9, 2, 33, 31)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_range_per_channel(ops, layout, shape):
    """Blocks that begin in the midst of a channel, have many channels, or meet their first one again."""
    for kind in ("noise", "negative", "NaN"):
        x = laid_out(make(kind, shape, torch.float32).to(ops.device), layout)
        for blocks_at_once in (1, 300):
            raise_ends = partial(ops.pair_ranges_, blocks_at_once=blocks_at_once)
            assert_raised(raise_ends, x, [1, -1, 0, 1, 0, 0], [1, 1], False)
            assert_raised(raise_ends, x, [0, 0], [0, 0], False)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 34, 641, 1000, 2**16, 2**16 + 1, 2**30 - 1, 2**30, 2**31 - 1])
def test_division(divisor):
    assert library().quotients_that_differ(ctypes.c_int64(divisor)) == 0


# ---- on a GPU alone


@on_gpu
@pytest.mark.parametrize("kind", ["relu", "sparse", "constant", "zeros"])
def test_many_pixels(ops, kind):
    """Cells that many threads want at once."""
    for shape, layout in (
        ((300, 3, 32, 32), "contiguous"),
        ((50, 9, 32, 32), "channels_last"),
        ((1000, 3, 7, 7), "contiguous"),
        ((2, 1, 300, 301), "contiguous"),
    ):
        for remove_near in (False, True):
            check(ops, make(kind, shape, torch.float32), HALF_3X3, [1, 1], remove_near, layout=layout)


@on_gpu
def test_strides_beyond_32_bits(ops):
    x = make("relu", (2, 1, 9, 9), torch.float16)
    far = (
        torch.zeros(2**31 + 200, dtype=torch.float16, device="cuda")
        .as_strided((2, 1, 9, 9), (2**31 + 1, 1, 9, 1))
        .copy_(x)
    )
    for remove_near in (False, True):
        expected, n = reference.pair_ranges(x, HALF_3X3, [1, 1], remove_near)
        ranges, found_n = ops.pair_ranges(far, HALF_3X3, [1, 1], remove_near)
        assert torch.equal(ranges.cpu(), expected)
        assert torch.equal(found_n.cpu(), n)
        counts = ops.joint_histogram(
            far, HALF_3X3, ranges, sturges(n).cuda(), int(sturges(n).max()), [1, 1], remove_near
        )
        assert torch.equal(
            counts.cpu(),
            reference.joint_histogram(x, HALF_3X3, expected, sturges(n), counts.shape[-1], [1, 1], remove_near),
        )


@on_gpu
@pytest.mark.parametrize("remove_near", [False, True])
def test_a_cuda_graph_on_another_stream_reads_the_map_at_replay(ops, remove_near):
    """And recording one proves that the host waits for nothing."""
    x = make("relu", (20, 3, 8, 8), torch.float32).cuda()
    bins = torch.full((3, 4), 8, dtype=torch.int32, device="cuda")

    def both():
        ranges, n = ops.pair_ranges(x, HALF_3X3, [1, 1], remove_near)
        return ranges, n, ops.joint_histogram(x, HALF_3X3, ranges, bins, 8, [1, 1], remove_near)

    both()  # a module cannot be loaded inside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranges, n, counts = both()
    for seed in (1, 2):
        y = make("relu", (20, 3, 8, 8), torch.float32, seed)
        x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_n = reference.pair_ranges(y, HALF_3X3, [1, 1], remove_near)
        assert torch.equal(ranges.cpu(), expected)
        assert torch.equal(n.cpu(), expected_n)
        assert torch.equal(
            counts.cpu(), reference.joint_histogram(y, HALF_3X3, expected, bins.cpu(), 8, [1, 1], remove_near)
        )


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_tensors_device_and_not_the_current_one(ops):
    x = make("relu", (9, 3, 8, 8), torch.float32)
    ranges, _ = ops.pair_ranges(x.to("cuda:1"), HALF_3X3, [1, 1], False)
    assert torch.equal(ranges.cpu(), reference.pair_ranges(x, HALF_3X3, [1, 1], False)[0])
    assert torch.cuda.current_device() == 0


@on_gpu
def test_wrong_arguments(ops):
    x, bins = torch.zeros(2, 1, 4, 4, device="cuda"), torch.full((1, 1), 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="must be on one device"):
        ops.joint_histogram(x, [0, 1], torch.zeros(1, 1, 2, 2, device="cuda"), bins, 4, [0, 0], False)
    with pytest.raises(RuntimeError, match="counts must be contiguous int64"):
        ops.joint_histogram_(
            torch.zeros(1, 1, 4, 4, dtype=torch.int64),
            x,
            [0, 1],
            torch.zeros(1, 1, 2, 2, device="cuda"),
            bins.cuda(),
            [0, 0],
            False,
        )
    with pytest.raises(RuntimeError, match="displacements must be pairs"):
        ops.pair_ranges(x, [0, 1, 1], [0, 0], False)
