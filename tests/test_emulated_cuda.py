"""The CUDA kernels of `pair_ranges` and `joint_histogram` without a GPU: their blocks, compiled for the CPU, against the reference.

What only a GPU has is left to the tests that need one: atomic operations, synchronisation, and the machine code.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases_pairs import LAYOUTS, PAIRS, laid_out, make, same_bits

from gradrep_kernels import reference
from gradrep_kernels.reference.bins import MAX_BINS, compute_dtype, sturges

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
H100, SMALL = 227 << 10, 48 << 10  # bytes of shared memory that a block can have

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

Four = ctypes.c_int64 * 4


class Arguments(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64), ("x", ctypes.c_void_p), ("sizes", Four), ("strides", Four), ("displacements", ctypes.c_void_p), ("count", ctypes.c_int64),
        ("pad_rows", ctypes.c_int64), ("pad_columns", ctypes.c_int64), ("remove_near", ctypes.c_int64), ("ranges", ctypes.c_void_p), ("bins", ctypes.c_void_p),
        ("max_bins", ctypes.c_int64), ("result", ctypes.c_void_p),
    )  # fmt: skip


class Facts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("most_shared", "blocks_at_once", "launches", "blocks", "shared", "tiled", "private_tables", "wild_writes")
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("emulated") / "emulated_cuda.so"
    # As nvcc rounds: every product and sum on its own.
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([COMPILER, *flags, ROOT / "tests" / "emulated_cuda.cpp", "-o", built], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


@pytest.fixture
def emulate(library):
    def run(x, displacements, padding, remove_near, ranges, bins, max_bins, result, shared, blocks_at_once) -> Facts:
        flat = torch.tensor(displacements, dtype=torch.int64)
        facts = Facts(most_shared=shared, blocks_at_once=blocks_at_once)
        arguments = Arguments(
            DTYPES.index(x.dtype), x.data_ptr(), Four(*x.shape), Four(*x.stride()), flat.data_ptr(), len(displacements) // 2, *padding, remove_near,
            ranges.data_ptr(), None if bins is None else bins.data_ptr(), max_bins, result.data_ptr(),
        )  # fmt: skip
        library.emulate(ctypes.byref(arguments), ctypes.byref(facts))
        assert facts.wild_writes == 0
        return facts

    def pair_ranges(x, displacements, padding, remove_near, blocks_at_once=5):
        pairs = len(displacements) // 2
        ranges, n = x.new_zeros((x.shape[1], pairs, 2, 2), dtype=compute_dtype(x.dtype)), x.new_zeros((x.shape[1], pairs), dtype=torch.int64)
        facts = run(x, displacements, padding, remove_near, ranges, None, 0, n, 0, blocks_at_once)
        return ranges, n, facts

    def joint_histogram(x, displacements, ranges, bins, max_bins, padding, remove_near, shared=H100, blocks_at_once=5):
        counts = x.new_zeros((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)
        facts = run(x, displacements, padding, remove_near, ranges.contiguous(), bins.contiguous(), max_bins, counts, shared, blocks_at_once)
        assert facts.shared <= shared
        return counts, facts

    def check(x, displacements, padding, remove_near, *, bins=None, ranges=None, **options) -> Facts:
        """Both ops against the reference; the histogram's facts."""
        expected, expected_n = reference.pair_ranges(x, displacements, padding, remove_near)
        found, found_n, _ = pair_ranges(x, displacements, padding, remove_near, options.get("blocks_at_once", 5))
        assert torch.equal(found_n, expected_n)
        assert same_bits(found, expected), (found, expected)
        ranges, bins = expected if ranges is None else ranges, sturges(expected_n) if bins is None else bins
        most = int(bins.max())
        counts, facts = joint_histogram(x, displacements, ranges, bins, most, padding, remove_near, **options)
        assert torch.equal(counts, reference.joint_histogram(x, displacements, ranges, bins, most, padding, remove_near))
        return facts

    check.pair_ranges, check.joint_histogram = pair_ranges, joint_histogram
    return check


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(emulate, case, layout, remove_near):
    x = laid_out(case.tensor(), layout)
    displacements, padding = case.flat_displacements(), list(case.padding)
    emulate(x, displacements, padding, remove_near)
    eight = torch.full((x.shape[1], len(displacements) // 2), 8, dtype=torch.int32)
    emulate(x, displacements, padding, remove_near, bins=eight, shared=SMALL, blocks_at_once=300)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulate, layout, dtype, remove_near):
    x = laid_out(make("relu", (9, 21, 7, 9), dtype), layout)
    emulate(x, [0, 1, 1, -1, 1, 0, 1, 1], [1, 1], remove_near)


HALF_3X3 = [0, 1, 1, -1, 1, 0, 1, 1]
HALF_7X7 = [v for i in range(4) for j in range(-3, 4) if (i, j) > (0, 0) for v in (i, j)]

WAYS = {
    # shape, layout, displacements, padding, bins: (whether tiles of bin numbers are used, whether tables are private, blocks if 8 run at once)
    "3x3": ((32, 2, 32, 32), "contiguous", HALF_3X3, (1, 1), 23, (True, True, 2 * 4)),
    "7x7: all displacements at once": ((32, 2, 32, 32), "contiguous", HALF_7X7, (3, 3), 24, (True, True, 2 * 4)),
    "channels_last: eight channels at once": ((20, 19, 16, 16), "channels_last", HALF_3X3, (1, 1), 20, (True, True, 3 * 2)),
    "7x7, channels_last: displacements in groups": ((3, 9, 16, 16), "channels_last", HALF_7X7, (3, 3), 20, (True, True, 2 * 5)),
    "bands of an image": ((1, 1, 400, 300), "contiguous", HALF_7X7, (3, 3), 20, (True, True, 8)),
    "a band in more shared memory": ((2, 1, 3, 20000), "contiguous", HALF_3X3, (1, 1), 20, (True, True, 6)),
    "rows too long for a tile": ((1, 1, 3, 130000), "contiguous", HALF_3X3, (1, 1), 20, (False, True, 5)),
    "pairs too far for a tile": ((1, 1, 150, 2500), "contiguous", [120, 3], (120, 3), 20, (False, True, 8)),
    "padding below the radius": ((9, 2, 6, 6), "contiguous", HALF_3X3, (0, 0), 20, (False, True, 2)),
    "the largest private table": ((2, 2, 9, 9), "contiguous", HALF_3X3, (1, 1), 240, (True, True, 2 * 4)),
    "tables too large": ((2, 2, 9, 9), "contiguous", HALF_3X3, (1, 1), 250, (False, False, 2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(emulate, way):
    """That the cheap ways are taken where they can be, and how the work is dealt."""
    shape, layout, displacements, padding, bins, (tiled, private_tables, blocks) = WAYS[way]
    x = laid_out(make("noise", shape, torch.float32), layout)
    bins = torch.full((shape[1], len(displacements) // 2), bins, dtype=torch.int32)
    facts = emulate(x, displacements, list(padding), False, bins=bins, blocks_at_once=8)
    assert facts.blocks == blocks
    assert facts.tiled == (blocks if tiled else 0)
    assert facts.private_tables == (blocks if private_tables else 0)


def test_one_unlike_channel_of_a_block(emulate):
    """Channels of a block may have pixels of one bin number, or of many."""
    x = laid_out(make("noise", (5, 20, 8, 8), torch.float32), "channels_last")
    ranges, n = reference.pair_ranges(x, HALF_3X3, [1, 1], False)
    ranges[11, 2, 1, 0] -= 1
    facts = emulate(x, HALF_3X3, [1, 1], False, ranges=ranges, blocks_at_once=1)
    assert (facts.blocks, facts.tiled) == (3, 2)
    bins = sturges(n)
    bins[3, 1] = 2
    facts = emulate(x, HALF_3X3, [1, 1], False, bins=bins, blocks_at_once=1)
    assert (facts.blocks, facts.tiled) == (3, 2)


@pytest.mark.parametrize("kind", ["NaN", "constant"])
def test_ranges_without_a_width_are_alike(emulate, kind):
    """NaN is unlike itself, but all such pixels are in bin 0."""
    x = make(kind, (9, 2, 12, 12), torch.float32)
    x[:, :, 5, 5] = x[0, 0, 5, 5] if kind == "constant" else torch.nan
    facts = emulate(x, HALF_3X3, [1, 1], False)
    assert facts.tiled == facts.blocks > 0


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_displacements_than_a_launch_takes(emulate, layout, remove_near):
    x = laid_out(make("relu", (2, 3, 12, 13), torch.float32), layout)
    displacements = [v for i in range(-7, 8) for j in range(-7, 14) for v in (i, j)]  # 315, some without a pair
    assert emulate(x, displacements, [0, 0], remove_near).launches == 3
    assert emulate(x, [0, 50] * 200, [0, 0], remove_near, bins=torch.full((3, 200), 4, dtype=torch.int32)).launches == 0


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (2, 2)])
@pytest.mark.parametrize("most", [2, 31, 230, 300])
def test_any_number_of_bins(emulate, most, padding, remove_near):
    x = make("noise", (5, 5, 20, 21), torch.float32)
    generator = torch.Generator().manual_seed(most)
    unlike = torch.randint(1, most + 1, (5, 5), generator=generator, dtype=torch.int32)
    unlike[3, 2] = most
    for bins in (unlike, torch.full((5, 5), most, dtype=torch.int32)):
        for shared in (H100, SMALL):
            emulate(x, [*HALF_3X3, 2, 0], list(padding), remove_near, bins=bins, shared=shared)


@pytest.mark.parametrize("bins", [0, -1, -(2**31), 9, 2**31 - 1])
def test_bins_out_of_range_are_no_wild_writes(emulate, bins):
    """On a GPU they lie where the host does not look, so the kernel has to."""
    x = make("noise", (2, 3, 8, 8), torch.float32)
    ranges, _ = reference.pair_ranges(x, HALF_3X3, [1, 1], False)
    given = torch.full((3, 4), bins, dtype=torch.int32)
    counts, _ = emulate.joint_histogram(x, HALF_3X3, ranges, given, 8, [1, 1], False)
    assert torch.equal(counts, reference.joint_histogram(x, HALF_3X3, ranges, given.clamp(1, 8), 8, [1, 1], False))


@pytest.mark.parametrize("kind", ["noise", "NaN", "infinities", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_outside_the_ranges(emulate, dtype, kind):
    """Ranges of other data, reversed, empty and not finite ones: never a bin out of bounds."""
    x = make(kind, (3, 8, 9, 10), dtype)
    inf, nan = torch.inf, torch.nan
    ends = [(-0.1, 0.1), (0.5, -0.5), (1.0, 1.0), (inf, -inf), (-inf, inf), (nan, nan), (-1.0, inf), (-3e38, 3e38)]
    ranges = torch.tensor(ends, dtype=compute_dtype(dtype)).view(8, 1, 1, 2).expand(8, 2, 2, 2).clone()
    for given in (ranges, torch.cat((ranges[:, :1], ranges[:, 1:].roll(1, 0)), 1)):
        for bins in (1, 7, 300):
            emulate(x, [0, 1, 1, 0], [1, 0], False, bins=torch.full((8, 2), bins, dtype=torch.int32), ranges=given)


def test_the_largest_table(emulate):
    x = make("noise", (1, 1, 4, 4), torch.float32)
    ranges, _ = reference.pair_ranges(x, [0, 1], [0, 0], False)
    bins = torch.full((1, 1), MAX_BINS // 8, dtype=torch.int32)
    counts, _ = emulate.joint_histogram(x, [0, 1], ranges, bins, MAX_BINS // 8, [0, 0], False)
    assert torch.equal(counts.nonzero(), reference.joint_histogram(x, [0, 1], ranges, bins, MAX_BINS // 8, [0, 0], False).nonzero())


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("empty", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_count(emulate, empty, remove_near):
    x, ranges = torch.zeros(empty), torch.zeros(empty[1], 2, 2, 2)
    found, found_n, _ = emulate.pair_ranges(x, [0, 1, 1, 0], [1, 1], remove_near)
    expected, expected_n = reference.pair_ranges(x, [0, 1, 1, 0], [1, 1], remove_near)
    assert torch.equal(found, expected)
    assert torch.equal(found_n, expected_n)
    counts, facts = emulate.joint_histogram(x, [0, 1, 1, 0], ranges, torch.ones(empty[1], 2, dtype=torch.int32), 3, [1, 1], remove_near)
    assert not counts.any()
    assert facts.launches == 0
    x = torch.zeros(2, 3, 4, 4)
    assert emulate.pair_ranges(x, [], [1, 1], remove_near)[0].shape == (3, 0, 2, 2)
    assert emulate.joint_histogram(x, [], torch.zeros(3, 0, 2, 2), torch.ones(3, 0, dtype=torch.int32), 3, [1, 1], remove_near)[1].launches == 0


@pytest.mark.parametrize("blocks_at_once", [1, 7, 1000])
@pytest.mark.parametrize("remove_near", [False, True])
def test_one_channel_is_shared_out_by_images(emulate, remove_near, blocks_at_once):
    x = make("relu", (700, 1, 12, 12), torch.float32)
    emulate(x, HALF_3X3, [1, 1], remove_near, blocks_at_once=blocks_at_once)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 34, 641, 1000, 2**16, 2**16 + 1, 2**30 - 1, 2**30, 2**31 - 1])
def test_division(library, divisor):
    assert library.quotients_that_differ(ctypes.c_int64(divisor)) == 0
