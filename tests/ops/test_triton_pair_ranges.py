"""pair_ranges in Triton: in the interpreter, how maps too large to have are dealt to programs, and on a GPU."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases_pairs import DTYPES, LAYOUTS, MANY, PAIRS, Pairs, laid_out, make

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
from implementations import on_gpu
from triton_pairs import assert_ranges

from gradrep_kernels.ops.triton import pair_ranges
from gradrep_kernels.ops.triton import pair_walk as rule
from gradrep_kernels.ops.triton.launching import LAUNCHES


def test_in_the_interpreter():
    interpreter.run("interpreted_pair_ranges.py")


# ---- how work is dealt


def quotient(n: int, magic: int, shift: int) -> int:
    """division.quotient with the widths of a GPU."""
    assert 0 <= n < 2**31
    return (2 * n * (magic % 2**32) >> 32) >> shift


MAPS = {  # shape, padding, D, block
    "CIFAR": ((2560, 64, 32, 32), (1, 1), 4, 1024),
    "ImageNet, 7 x 7": ((512, 3, 224, 224), (3, 3), 24, 1024),
    "4 x 4": ((2560, 512, 4, 4), (1, 1), 4, 1024),
    "one value": ((1, 1, 1, 1), (0, 0), 1, 256),
    "few and small": ((3, 2, 7, 5), (1, 0), 60, 256),
    "513 channels": ((7, 513, 3, 3), (1, 1), 4, 256),
    "more than 2^31 elements": ((2**20, 64, 8, 8), (1, 1), 4, 1024),
    "more than 2^31 places in a channel": ((2**22, 1, 32, 32), (1, 1), 4, 1024),
    "many images of a pixel": ((2**31 - 1, 1, 1, 1), (1, 1), 4, 1024),
    "large planes": ((3, 2, 20_000, 20_000), (5, 0), 4, 1024),
    "the largest plane": ((2, 3, 2**14 - 2, 2**15 - 2), (1, 1), 4, 1024),
    "one long row": ((2, 1, 1, 2**29), (0, 0), 1, 1024),
}


@pytest.mark.parametrize("name", MAPS)
def test_every_place_belongs_to_one_program(name):
    """On meta tensors, so without memory; with the arithmetic of rule.share and rule.pixels."""
    shape, padding, pairs, block = MAPS[name]
    (images, channels, *_), chance = shape, random.Random(0)
    rows, columns = (size + 2 * pad for size, pad in zip(shape[2:], padding))
    plane = rows * columns
    work = rule.work(torch.empty(shape, device="meta"), [0, 1] * pairs, padding, block)
    took = {key: value for key, value in work.arguments.items() if isinstance(value, int)}
    assert took["span"] <= 2**29
    assert work.programs == channels * -(-pairs // 4) * work.chunks < 2**31
    assert work.programs <= 2 * rule.PROGRAMS or took["images_each"] == 1 or took["span"] <= block
    chunks = np.arange(work.chunks, dtype=np.int64)
    first_image, start = chunks // took["parts"] * took["images_each"], chunks % took["parts"] * took["span"]
    places = np.minimum(np.minimum(images - first_image, took["images_each"]) * plane - start, took["span"])
    begins = first_image * plane + start
    assert places.min() > 0
    assert begins[0] == 0
    assert np.array_equal(begins[1:], begins[:-1] + places[:-1])
    assert begins[-1] + places[-1] == images * plane
    for chunk in (0, work.chunks - 1, *(chance.randrange(work.chunks) for _ in range(20))):
        for n in (0, int(places[chunk]) - 1, *(chance.randrange(int(places[chunk])) for _ in range(20))):
            place = int(start[chunk]) + n
            image = quotient(place, took["plane_magic"], took["plane_shift"])
            i = quotient(place - image * plane, took["row_magic"], took["row_shift"])
            j = place - image * plane - i * columns
            assert (int(first_image[chunk]) + image, i, j) == np.unravel_index(
                int(begins[chunk]) + n, (images, rows, columns)
            )


def test_what_goes_to_the_reference():
    for shape, displacements in (((0, 1, 4, 4), [0, 1]), ((2, 1, 4, 4), []), ((1, 1, 1, 2**29 + 1), [0, 1])):
        assert rule.work(torch.empty(shape, device="meta"), displacements, (0, 0), 256) is None


# ---- on a GPU


@on_gpu
@pytest.mark.parametrize("case", PAIRS + MANY, ids=lambda case: case.desc)
def test_equals_the_reference(case):
    assert_ranges(case.tensor().cuda(), case)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    for case in MANY:
        for kind in ("relu", "NaN", "infinities"):
            assert_ranges(laid_out(make(kind, case.shape, dtype).cuda(), layout), case)


@on_gpu
def test_strides_beyond_32_bits():
    x = torch.zeros(2**31 + 200, dtype=torch.float16, device="cuda").as_strided((2, 1, 9, 9), (2**31 + 1, 1, 9, 1))
    assert_ranges(x.copy_(make("relu", (2, 1, 9, 9), torch.float16)), MANY[0])


@on_gpu
def test_a_cuda_graph_reads_the_map_at_replay():
    x, arguments = make("relu", (5, 3, 8, 8), torch.float32).cuda(), ([0, 1, 1, 0], [1, 1])
    found = {}
    graph = torch.cuda.CUDAGraph()
    for remove_near in (False, True):
        pair_ranges(x, *arguments, remove_near)  # a module cannot be loaded inside a capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for remove_near in (False, True):
            found[remove_near] = pair_ranges(x, *arguments, remove_near)
    case = Pairs("", x.shape, displacements=((0, 1), (1, 0)))
    for seed in (1, 2):
        x.copy_(make("relu", (5, 3, 8, 8), torch.float32, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_ranges(x, case, lambda *given: found[given[-1]])


@on_gpu
def test_the_host_waits_for_nothing():
    x = make("relu", (5, 3, 8, 8), torch.float32).cuda()
    for remove_near in (False, True):
        pair_ranges(x, [0, 1], [1, 1], remove_near)
    before = torch.cuda.get_sync_debug_mode()
    LAUNCHES.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for remove_near in (False, True):
            pair_ranges(x, [0, 1, 1, 1], [1, 1], remove_near)  # new displacements, so a new table
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert dict(LAUNCHES) == {("pair_ranges", str(x.device), torch.float32): 2}
