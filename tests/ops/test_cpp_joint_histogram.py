"""The C++ of `pair_ranges` and `joint_histogram`: ranges to the bit, counts to the last, on any layout and threads."""

from __future__ import annotations

import pytest
import torch
from cases_pairs import LAYOUTS, PAIRS, assert_raised, laid_out, make, same_bits

from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.reference.pair_rule import MAX_BINS, sturges

REASON = next(row["cpp"] for row in backends.report(("cpu",)) if row["op"] == "joint_histogram")
pytestmark = pytest.mark.skipif(REASON != "available", reason=REASON)


@pytest.fixture(scope="module", autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cpp(op):
    with backends.use_backend("cpp"):
        return backends.implementation(op, "cpu")


def check(x, displacements, padding, remove_near, *, bins=None, ranges=None, threads=(1, 2)):
    """All ops against the reference, histograms in Sturges' bins and in those given; the last of the threads stay set.

    The reference gets one: on a busy machine, threads that wait for each other take 50 times as long.
    """
    torch.set_num_threads(1)
    x_ranges, n = reference.pair_ranges(x, displacements, padding, remove_near)
    ranges = x_ranges if ranges is None else ranges
    for count in threads:
        torch.set_num_threads(count)
        found, found_n = cpp("pair_ranges")(x, displacements, padding, remove_near)
        assert torch.equal(found_n, n)
        assert same_bits(found, x_ranges), (found, x_ranges)
        assert_raised(cpp("pair_ranges_"), x, displacements, padding, remove_near)
    for numbers in (sturges(n), *([] if bins is None else [bins])):
        most = int(numbers.max())
        torch.set_num_threads(1)
        expected = reference.joint_histogram(x, displacements, ranges, numbers, most, padding, remove_near)
        for count in threads:
            torch.set_num_threads(count)
            assert torch.equal(
                cpp("joint_histogram")(x, displacements, ranges, numbers, most, padding, remove_near), expected
            )
            sevens = torch.full_like(expected, 7)
            cpp("joint_histogram_")(sevens, x, displacements, ranges, numbers, padding, remove_near)
            assert torch.equal(sevens, expected + 7)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(case, layout, remove_near):
    x = laid_out(case.tensor(), layout)
    displacements = case.flat_displacements()
    eight = torch.full((x.shape[1], len(displacements) // 2), 8, dtype=torch.int32)
    check(x, displacements, list(case.padding), remove_near, bins=eight)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, padding, remove_near):
    x = laid_out(make("relu", (5, 70, 7, 9), dtype), layout)
    check(x, [0, 1, 1, -1, 1, 0, 1, 1], list(padding), remove_near)


# 3x3 counts three of its four displacements in a cube of uint16 cells, 5x5 and 7x7 some, one displacement none.
MANY_PIXELS = {
    "one image, more than a cell of a constant map can hold": ((1, 1, 401, 401), 1),
    "as many in many images of an odd number of cells": ((170, 1, 31, 33), 1),
    "5x5": ((30, 3, 40, 40), 2),
    "7x7": ((20, 2, 30, 30), 3),
    "a block of channels": ((90, 70, 8, 8), 1),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["noise", "constant", "zeros", "sparse"])
@pytest.mark.parametrize("case", MANY_PIXELS)
def test_many_pixels(case, kind, layout):
    shape, radius = MANY_PIXELS[case]
    x = laid_out(make(kind, shape, torch.float32), layout)
    displacements = [
        v for i in range(radius + 1) for j in range(-radius, radius + 1) if (i, j) > (0, 0) for v in (i, j)
    ]
    five = torch.full((shape[1], len(displacements) // 2), 5, dtype=torch.int32)
    check(x, displacements, [radius, radius], False, bins=five, threads=(1,))


@pytest.mark.parametrize("seed", range(8))
def test_many_pixels_and_displacements_of_any_direction(seed):
    """Sums of two displacements that point up or left, or are nothing, or equal."""
    generator = torch.Generator().manual_seed(seed)
    displacements = torch.randint(-2, 3, (2 * 9,), generator=generator).tolist()
    x = make("noise", (5, 2, 37, 41), torch.float32, seed)
    check(x, displacements, [2, 2], False, bins=torch.full((2, 9), 3, dtype=torch.int32), threads=(1,))


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize(
    "most", [2, 31, 32, 255, 256, 300]
)  # the last of cubes, uint8 and tables, and the first without
def test_any_number_of_bins(most, remove_near):
    x = make("noise", (12, 5, 40, 41), torch.float32)
    displacements = [0, 1, 1, -1, 1, 0, 1, 1, 2, 0]
    generator = torch.Generator().manual_seed(most)
    unlike = torch.randint(1, most + 1, (5, 5), generator=generator, dtype=torch.int32)
    unlike[3, 2] = most
    for bins in (unlike, torch.full((5, 5), most, dtype=torch.int32)):
        check(x, displacements, [2, 1], remove_near, bins=bins)


def test_the_largest_table():
    x = make("noise", (1, 1, 4, 4), torch.float32)
    ranges, _ = reference.pair_ranges(x, [0, 1], [0, 0], False)
    bins = torch.full((1, 1), MAX_BINS // 8, dtype=torch.int32)
    found = cpp("joint_histogram")(x, [0, 1], ranges, bins, MAX_BINS // 8, [0, 0], False)
    assert torch.equal(
        found.nonzero(), reference.joint_histogram(x, [0, 1], ranges, bins, MAX_BINS // 8, [0, 0], False).nonzero()
    )


@pytest.mark.parametrize("padding", [(1, 0), (1, 2)], ids=["little padding", "enough padding"])
@pytest.mark.parametrize("kind", ["noise", "NaN", "infinities", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_outside_the_ranges(dtype, kind, padding):
    """Ranges of other data, reversed, empty and not finite ones: never a bin out of bounds."""
    x = make(kind, (3, 8, 9, 10), dtype)
    displacements = [0, 1, 1, 0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inf, nan = torch.inf, torch.nan
    ends = [(-0.1, 0.1), (0.5, -0.5), (1.0, 1.0), (inf, -inf), (-inf, inf), (nan, nan), (-1.0, inf), (-3e38, 3e38)]
    ranges = torch.tensor(ends, dtype=wide).view(8, 1, 1, 2).expand(8, 2, 2, 2).clone()
    ranges[:, 1, 1] = ranges[:, 1, 1].roll(1, 0)
    for bins in (1, 7, 300):
        check(x, displacements, list(padding), False, bins=torch.full((8, 2), bins, dtype=torch.int32), ranges=ranges)


def test_one_channel_is_shared_out_by_images():
    x = make("relu", (500, 1, 12, 12), torch.float32)
    check(x, [0, 1, 1, -1, 1, 0, 1, 1], [1, 1], False, threads=(1, 2, 3, 5))
    check(x, [0, 1, -1, 1, -1, 0, -1, -1], [3, 2], False, threads=(1, 3))
    check(x, [0, 1, 1, -1, 1, 0, 1, 1], [0, 0], True, threads=(1, 2, 3, 5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("remove_near", [False, True])
def test_counts_of_parts_add_up(layout, remove_near):
    x = laid_out(make("relu", (11, 37, 9, 9), torch.float32), layout)
    displacements = [0, 1, 1, -1, 1, 0, 1, 1]
    ranges, n = cpp("pair_ranges")(x, displacements, [1, 1], remove_near)
    bins = sturges(n)
    run = lambda part: cpp("joint_histogram")(part, displacements, ranges, bins, int(bins.max()), [1, 1], remove_near)  # noqa: E731
    parts, counts = x.split([1, 7, 3]), torch.zeros_like(run(x))
    assert torch.equal(run(x), sum(map(run, parts)))
    for part in parts:
        cpp("joint_histogram_")(counts, part, displacements, ranges, bins, [1, 1], remove_near)
    assert torch.equal(run(x), counts)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("empty", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_count(empty, remove_near):
    x, displacements, padding = torch.zeros(empty), [0, 1, 1, 0], [1, 1]
    expected, expected_n = reference.pair_ranges(x, displacements, padding, remove_near)
    ranges, n = cpp("pair_ranges")(x, displacements, padding, remove_near)
    assert torch.equal(ranges, expected)
    assert torch.equal(n, expected_n)
    counts = cpp("joint_histogram")(
        x, displacements, ranges, torch.ones(empty[1], 2, dtype=torch.int32), 3, padding, remove_near
    )
    assert counts.shape == (empty[1], 2, 3, 3)
    assert not counts.any()
    cpp("joint_histogram_")(
        counts.fill_(7), x, displacements, ranges, torch.ones(empty[1], 2, dtype=torch.int32), padding, remove_near
    )
    assert (counts == 7).all()


def test_no_displacement():
    x = torch.zeros(2, 3, 4, 4)
    ranges, n = cpp("pair_ranges")(x, [], [1, 1], False)
    assert ranges.shape == (3, 0, 2, 2)
    assert n.shape == (3, 0)
    assert cpp("joint_histogram")(x, [], ranges, n.int(), 3, [1, 1], False).shape == (3, 0, 3, 3)


WRONG = {
    "bins above the most": (dict(bins=[[4, 9]]), "bins must be between 1 and max_bins"),
    "no bin": (dict(bins=[[4, 0]]), "bins must be between 1 and max_bins"),
    "most above the limit": (dict(most=MAX_BINS + 1), f"max_bins must be between 1 and {MAX_BINS}"),
    "ranges of another dtype": (
        dict(ranges=torch.zeros(1, 2, 2, 2, dtype=torch.float64)),
        r"ranges must be \[C, D, 2, 2\]",
    ),
    "ranges of another shape": (dict(ranges=torch.zeros(1, 1, 2, 2)), r"ranges must be \[C, D, 2, 2\]"),
    "three dimensions": (dict(x=torch.zeros(2, 3, 4)), "x must be a map"),
    "integers": (
        dict(x=torch.zeros(2, 1, 4, 4, dtype=torch.int32), ranges=torch.zeros(1, 2, 2, 2)),
        "x must be float32",
    ),
    "half a displacement": (dict(displacements=[0, 1, 1]), "displacements must be pairs"),
    "negative padding": (dict(padding=[-1, 0]), "padding must be two numbers"),
    "a plane past 2^30 pixels": (dict(padding=[1 << 20, 1 << 20]), "fewer than 2.30 pixels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_op_refuses_what_would_write_out_of_bounds(case):
    change, message = WRONG[case]
    arguments = (
        dict(
            x=torch.zeros(2, 1, 4, 4),
            displacements=[0, 1, 1, 0],
            ranges=torch.zeros(1, 2, 2, 2),
            bins=[[4, 4]],
            most=8,
            padding=[0, 0],
        )
        | change
    )
    bins = torch.tensor(arguments["bins"], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        cpp("joint_histogram")(
            arguments["x"],
            arguments["displacements"],
            arguments["ranges"],
            bins,
            arguments["most"],
            arguments["padding"],
            False,
        )


def drawn_case(draw, st):
    most = draw(st.sampled_from([2, 20, 31, 40, 255, 260]))
    channels = 70 if most < 255 else 4  # 70 tables of 260 x 260 for each of nine displacements are 340 MB
    shape = tuple(draw(st.integers(1, size)) for size in (6, channels, 20, 40))
    small = st.integers(-4, 4)
    displacements = draw(st.lists(st.tuples(small, small), min_size=1, max_size=9))
    kind = draw(
        st.sampled_from(
            [
                "noise",
                "relu",
                "sparse",
                "8-bit",
                "constant",
                "zeros",
                "NaN",
                "infinities",
                "denormal",
                "unlike channels",
            ]
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    x = laid_out(make(kind, shape, dtype, seed=draw(st.integers(0, 99))), draw(st.sampled_from(LAYOUTS)))
    bins = torch.randint(
        1, most + 1, (shape[1], len(displacements)), generator=torch.Generator().manual_seed(most), dtype=torch.int32
    )
    padding = [draw(st.integers(0, 4)), draw(st.integers(0, 4))]
    return x, [v for d in displacements for v in d], padding, draw(st.booleans()), bins


def check_drawn(case, threads, cut):
    x, displacements, padding, remove_near, bins = case
    check(x, displacements, padding, remove_near, bins=bins, threads=(threads,))
    ranges, n = cpp("pair_ranges")(x, displacements, padding, remove_near)

    def count(part):
        return cpp("joint_histogram")(part, displacements, ranges, bins, int(bins.max()), padding, remove_near)

    parts = [x[:cut], x[cut:]]
    ends, numbers = zip(*(cpp("pair_ranges")(part, displacements, padding, remove_near) for part in parts))
    assert same_bits(
        torch.stack((torch.minimum(*(e[..., 0] for e in ends)), torch.maximum(*(e[..., 1] for e in ends))), dim=-1),
        ranges,
    )
    assert torch.equal(sum(numbers), n)
    assert torch.equal(sum(map(count, parts)), count(x))


def test_drawn_cases():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    cases = st.composite(lambda draw: drawn_case(draw, st))()
    drawn = hypothesis.given(cases, st.integers(1, 3), st.integers(0, 6))(check_drawn)
    hypothesis.settings(max_examples=100, deadline=None)(drawn)()
