"""The Triton pair ranges on CPU tensors, against the reference.

test_triton_pair_ranges.py runs this file with TRITON_INTERPRET=1. A program takes some 10 ms in the interpreter, so a
case is cut to a few channels.
"""

from __future__ import annotations

import sys

import implementations
import pytest
import torch
from cases_pairs import DTYPES, LAYOUTS, PAIRS, Pairs, laid_out, make
from triton_pairs import assert_ranges, few_channels

from gradrep_kernels.ops.triton import pair_ranges
from gradrep_kernels.ops.triton import pair_walk as rule
from gradrep_kernels.ops.triton.launching import LAUNCHES

module = sys.modules["gradrep_kernels.ops.triton.pair_ranges"]
SMALL = Pairs("small", (3, 2, 5, 6))


def assert_interpreted(x: torch.Tensor, case: Pairs) -> None:
    LAUNCHES.clear()
    assert_ranges(x, case)
    assert dict(LAUNCHES) == {("pair_ranges", "cpu", x.dtype): 2}  # not the reference


def test_it_is_interpreted():
    assert implementations.get("pair_ranges", "triton", "cpu") is pair_ranges


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(case):
    assert_interpreted(few_channels(case.tensor(), case), case)


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
    for shape in ((5, 1, 7, 5), (2, 1, 17, 9), (7, 1, 2, 3)):
        assert_interpreted(make("relu", shape, torch.float32), SMALL)


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
