"""How `joint_histogram` in CUDA C++ counts from tiles in shared memory, emulated anywhere: against the reference."""

from __future__ import annotations

import pytest
import torch
from cases_pairs import make
from cuda_pairs import H100, HALF_3X3, HALF_7X7, OPS, SMALL, Emulated, check

both = pytest.mark.parametrize("remove_near", [False, True])
everywhere = pytest.mark.parametrize("ops", OPS)

# Displacements of a group: four of them are counted at a time, the others one by one.
GROUPS = {
    "3x3": HALF_3X3,
    "3x3 backwards": [-v for v in HALF_3X3],
    "3x3 in another order": [1, -1, 0, 1, 1, 0, 1, 1],
    "3x3 without the last": HALF_3X3[:6],
    "3x3 and one more": [*HALF_3X3, 0, 2],
    "3x3, dilation 2": [2 * v for v in HALF_3X3],
    "along rows: no gap between images": [0, 1, 0, 3],
    "along columns: no gap between rows": [1, 0, 2, 0, 3, 0],
    "up and down": [-2, 1, 3, -2, 0, 1, -1, -1, 1, 0],
    "7x7": HALF_7X7,
}


@everywhere
@both
@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_displacements(ops, group, remove_near):
    """At every width modulo 4: rows begin anywhere in a word, and images too."""
    for width in (1, 2, 3, 4, 5, 8, 14):
        reach = max(map(abs, GROUPS[group]))
        x = make("relu", (7, 2, 5, width), torch.float32)
        check(ops, x, GROUPS[group], [reach, reach], remove_near, blocks_at_once=3)


@everywhere
@both
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("group", ["3x3", "3x3 backwards", "up and down", "7x7"])
def test_bands(ops, group, layout, remove_near):
    """Images larger than a tile: what lies around a band differs from what lies around the next."""
    reach = max(map(abs, GROUPS[group]))
    for shape in ((3, 2, 131, 150), (2, 1, 40, 1001)):
        x = make("relu", shape, torch.float32)
        for padding in ([reach, reach], [reach + 2, reach]):
            check(ops, x, GROUPS[group], padding, remove_near, layout=layout, shared=[H100, SMALL])


@everywhere
@pytest.mark.parametrize("most", [1, 2, 23, 24, 25, 33, 34, 35, 61, 64, 99, 255, 256])
def test_pitches_of_tables(ops, most):
    """Those that the compiler knows serve up to 24 and up to 34 bins."""
    x = make("noise", (6, 2, 9, 10), torch.float32)
    for displacements in (HALF_3X3, [*HALF_3X3, 0, 2]):
        for remove_near in (False, True):
            bins = torch.full((2, len(displacements) // 2), most, dtype=torch.int32)
            check(ops, x, displacements, [2, 2], remove_near, bins=bins, shared=[H100, SMALL])


@both
def test_rows_of_a_table_begin_on_unlike_banks(remove_near):
    """And its columns: at a pitch of 1 or -1 modulo 32 banks, cells of a diagonal share one."""
    x = torch.empty((9, 2, 8, 8), device="meta")
    for bins in range(1, 240):
        pitch = Emulated().plan(x, HALF_3X3, bins, [1, 1], remove_near, blocks_at_once=8).table_pitch
        assert pitch > bins
        assert pitch % 2 == 1
        assert pitch % 32 not in (1, 31)


@everywhere
@pytest.mark.parametrize("images", [1, 2, 9, 10, 11, 150])
@both
def test_the_last_tile_has_fewer_images(ops, images, remove_near):
    for blocks_at_once in (1, 3):
        x = make("relu", (images, 2, 12, 13), torch.float32)
        check(ops, x, HALF_3X3, [1, 1], remove_near, blocks_at_once=blocks_at_once)


@everywhere
@both
def test_images_that_are_left_from_another_tile(ops, remove_near):
    """The last word of a tile ends in one of them, unless there is a gap."""
    x = make("noise", (1001, 1, 5, 6), torch.float32)
    check(ops, x, [0, 1], [0, 1], remove_near, blocks_at_once=1)


@everywhere
@pytest.mark.parametrize("kind", ["NaN", "infinities", "zeros", "constant", "dead channels", "denormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_values_near_zero_and_without_an_order(ops, kind, dtype):
    """In a tile of pixels the gaps are zeros, and zeros of both signs drop."""
    x = make(kind, (4, 5, 9, 11), dtype)
    for layout in ("contiguous", "channels_last"):
        check(ops, x, HALF_3X3, [1, 1], True, layout=layout)


REMOVE_NEAR_WAYS = {  # shape, displacements, bins: (whether tiles are used, whether tables are private)
    "3x3": ((32, 2, 32, 32), HALF_3X3, 23, (True, True)),
    "7x7": ((32, 2, 32, 32), HALF_7X7, 24, (True, True)),
    "more bins than a byte has": ((2, 2, 9, 9), HALF_3X3, 220, (True, True)),
    "rows too long for a tile": ((1, 1, 3, 40000), HALF_3X3, 20, (False, True)),
    "tables too large": ((2, 2, 9, 9), HALF_3X3, 250, (False, False)),
}


@pytest.mark.parametrize("way", REMOVE_NEAR_WAYS)
def test_ways_of_remove_near(way):
    shape, displacements, bins, (tiled, private_tables) = REMOVE_NEAR_WAYS[way]
    emulated = Emulated()
    bins = torch.full((shape[1], len(displacements) // 2), bins, dtype=torch.int32)
    check(emulated, make("relu", shape, torch.float32), displacements, [1, 1], True, bins=bins)
    facts = emulated.facts
    assert (facts.tiled, facts.private_tables) == (facts.blocks * tiled, facts.blocks * private_tables)


# ---- how the work is dealt

# Convolutions of 3x3: channels and rows of the input map. (The first has three channels: nothing to deal.)
VGG_16 = [(64, 32), (64, 16), (128, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2)]
RESNET_18 = [(64, 56), (128, 28), (256, 14), (512, 7)]
MULTIPROCESSORS, MULTIPROCESSOR, RESERVED = 132, 228 << 10, 1 << 10  # of an H100; their shared memory; a block's
BLOCKS = 4  # of 256 threads with 64 registers fit a multiprocessor
LEAST_BLOCKS = {4: 4, 24: 3}  # that shared memory leaves, by displacements: 7x7 has 60 KB of tables
LEAST_AT_WORK = {128: 0.7, 2560: 0.9}  # by images: 128 of 4 x 4 pixels take some microseconds


def at_work(shape: tuple[int, ...], layout: torch.memory_format, displacements: list[int], remove_near: bool) -> float:
    """The share of the processors' time in which they count, where the longest block sets the pace."""
    x = torch.empty(shape, device="meta").to(memory_format=layout)
    emulated, padding = Emulated(), [max(displacements)] * 2
    emulated.plan(x, displacements, 23, padding, remove_near, blocks_at_once=1)
    fit = min(BLOCKS, MULTIPROCESSOR // (emulated.facts.shared + RESERVED))
    facts = emulated.plan(x, displacements, 23, padding, remove_near, blocks_at_once=fit * MULTIPROCESSORS)
    assert facts.launches == 1
    assert fit >= LEAST_BLOCKS[len(displacements) // 2]
    waves = -(-facts.blocks // (fit * MULTIPROCESSORS))
    return facts.tiles / (waves * fit * MULTIPROCESSORS * facts.most_tiles)


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("displacements", [HALF_3X3, HALF_7X7], ids=["3x3", "7x7"])
@pytest.mark.parametrize("images", [128, 2560])
@pytest.mark.parametrize(("channels", "rows"), [*VGG_16, *RESNET_18])
def test_all_blocks_end_together(channels, rows, images, displacements, layout, remove_near):
    share = at_work((images, channels, rows, rows), layout, displacements, remove_near)
    assert share >= LEAST_AT_WORK[images], share
