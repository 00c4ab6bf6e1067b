"""The Triton pair ranges on CPU tensors, against the reference.

test_triton_pair_ranges.py runs this file with TRITON_INTERPRET=1. A program takes some 10 ms in the interpreter, so a
case is cut to a few channels.
"""

from __future__ import annotations

import sys

import implementations
import pytest
import torch
from cases_pairs import DTYPES, LAYOUTS, PAIRS, Pairs, assert_raised, ends_of_before, laid_out, make, same_bits
from triton_pairs import assert_ranges, few_channels

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import pair_ranges, pair_ranges_
from gradrep_kernels.ops.triton import pair_walk as rule
from gradrep_kernels.ops.triton.launching import LAUNCHES

module = sys.modules["gradrep_kernels.ops.triton.pair_ranges"]
SMALL = Pairs("small", (3, 2, 5, 6))


def assert_interpreted(x: torch.Tensor, case: Pairs) -> None:
    LAUNCHES.clear()
    assert_ranges(x, case)
    assert dict(LAUNCHES) == {("pair_ranges", "cpu", x.dtype): 2}  # not the reference


def assert_ends_interpreted(x: torch.Tensor, case: Pairs, modes=(False, True)) -> None:
    """One launch for each call: two batches, with n and without."""
    for remove_near in modes:
        LAUNCHES.clear()
        assert_raised(pair_ranges_, x, case.flat_displacements(), list(case.padding), remove_near)
        assert dict(LAUNCHES) == {("pair_ranges", "cpu", x.dtype): 4}


def test_it_is_interpreted():
    assert implementations.get("pair_ranges", "triton", "cpu") is pair_ranges


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(case):
    assert_interpreted(few_channels(case.tensor(), case), case)


RAISED = ("primes", "zeros of both signs", "NaN", "infinities", "no padding", "padding is the largest value", "7x7")
"""Cases of which some have one range per channel, and one has more ends than rise at a time."""


@pytest.mark.parametrize("case", [case for case in PAIRS if case.desc in RAISED], ids=lambda case: case.desc)
def test_ends_of_batches(case):
    assert_ends_interpreted(case.tensor()[:3, :2], case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ends_of_layouts(layout, dtype):
    """33 channels: two programs of 32 where channels are closest in memory."""
    channels = 33 if layout == "channels_last" else 2
    x = laid_out(make("NaN", (3, channels, 3, 2), dtype), layout)
    expected, _ = ends_of_before(channels, 1, dtype)
    found = expected.clone()
    LAUNCHES.clear()
    pair_ranges_(found, None, x, [1, -1], [1, 1], False)
    assert dict(LAUNCHES) == {("pair_ranges", "cpu", dtype): 1}
    reference.pair_ranges_(expected, None, x, [1, -1], [1, 1], False)
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    for kind in ("NaN", "infinities"):
        assert_interpreted(laid_out(make(kind, SMALL.shape, dtype), layout), SMALL)


@pytest.mark.parametrize("programs", [1, 3, 10**9])
def test_any_split_gives_the_same(monkeypatch, programs):
    """Whole images or parts of one, one block or many, with a last one that is shorter."""
    monkeypatch.setattr(rule, "PROGRAMS", programs)
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "PLACES", 64)
    for shape in ((5, 1, 7, 5), (2, 1, 17, 9), (7, 1, 2, 3)):
        assert_interpreted(make("relu", shape, torch.float32), SMALL)
        assert_ends_interpreted(make("relu", shape, torch.float32), SMALL, modes=(False,))


def test_a_plane_beyond_32_bits_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(rule, "PLACES", 55)
    LAUNCHES.clear()
    assert_ranges(SMALL.tensor(), SMALL)
    assert not LAUNCHES


@pytest.mark.parametrize("empty", [(0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0)])
def test_no_pixel(empty):
    assert_ranges(torch.zeros(empty), SMALL)


def test_no_displacement():
    ranges, n = pair_ranges(torch.zeros(3, 2, 4, 4), [], [1, 1], False)
    assert ranges.shape == (2, 0, 2, 2)
    assert n.shape == (2, 0)
