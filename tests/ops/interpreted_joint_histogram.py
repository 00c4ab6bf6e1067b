"""The Triton joint histogram on CPU tensors, against the reference.

test_triton_joint_histogram.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys

import implementations
import numpy as np
import pytest
import torch
from cases_pairs import DTYPES, LAYOUTS, PAIRS, Pairs, laid_out, make
from cases_sgs import MAPS, oracle_scaling
from checks import SCALING_TOLERANCE, scaling
from triton_pairs import BINS, RANGES, SMALL, assert_counts, few_channels, in_two_batches, next_to_edges

import gradrep_kernels as gr
from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import joint_histogram, joint_histogram_
from gradrep_kernels.ops.triton import pair_walk as rule
from gradrep_kernels.ops.triton.launching import LAUNCHES

module = sys.modules["gradrep_kernels.ops.triton.joint_histogram"]


def assert_interpreted(x: torch.Tensor, case: Pairs, **more) -> None:
    LAUNCHES.clear()
    assert_counts(x, case, **more)
    assert LAUNCHES["joint_histogram", "cpu", x.dtype] == len(more.get("modes", (False, True)))  # not the reference


def test_it_is_interpreted():
    assert implementations.get("joint_histogram", "triton", "cpu") is joint_histogram


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.desc)
def test_equals_the_reference(case):
    assert_interpreted(few_channels(case.tensor(), case), case)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("desc", ["3x5 kernel", "dead channel", "bf16"])
def test_a_scaling_against_the_oracle(desc, remove_near):
    case = next(case for case in MAPS if case.desc == desc)
    with gr.use_backend("triton"):
        g = scaling(case.tensor(), case, remove_near)
    assert (
        np.abs(g.numpy() - oracle_scaling(case.tensor().double().numpy(), case, remove_near)).max() < SCALING_TOLERANCE
    )


def test_many_channels():
    """All of them, at 14 ms a program: in the least of their forms."""
    case = Pairs("", (2, 131, 3, 3), displacements=((0, 1),))
    assert_interpreted(case.tensor(), case, modes=[False])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    assert_interpreted(laid_out(make("infinities", SMALL.shape, dtype), layout), SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", BINS)
def test_numbers_of_bins(bins, dtype):
    assert_interpreted(
        make("8-bit" if bins % 2 == 0 else "noise", SMALL.shape, dtype), SMALL, bins=bins, modes=[bins % 3 == 0]
    )


@pytest.mark.parametrize("bins", [8, 24, 33])
def test_batches_add_up_in_place(bins):
    assert_counts(SMALL.tensor(), SMALL, bins=bins, op=in_two_batches)


@pytest.mark.parametrize("most", [20, 24, 30, 40])
def test_bins_of_each_channel_and_displacement(most):
    bins = torch.randint(1, most + 1, (2, 4), generator=torch.Generator().manual_seed(0))
    bins[1, 2] = most
    assert_interpreted(SMALL.tensor(), SMALL, bins=bins)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_other_data(name):
    for kind, dtype in (("noise", torch.float32), ("infinities", torch.float64), ("NaN", torch.float32)):
        ranges = torch.tensor(RANGES[name], dtype=dtype).expand(2, 4, 2, 2)
        assert_interpreted(make(kind, SMALL.shape, dtype), SMALL, ranges=ranges, bins=9, modes=[False])


def test_every_displacement_has_its_own_ranges():
    ranges = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=-1).values
    assert_interpreted(SMALL.tensor(), SMALL, ranges=ranges, bins=11)


def test_values_next_to_the_edges():
    for bins in (3, 10, 23):
        x, ranges = next_to_edges(bins)
        assert_interpreted(x, Pairs("", x.shape, padding=(0, 0), displacements=((0, 1),)), ranges=ranges, bins=bins)


@pytest.mark.parametrize("programs", [1, 3, 10**9])
def test_any_split_gives_the_same(monkeypatch, programs):
    """Whole images or parts of one, one block or many, with a last one that is shorter."""
    monkeypatch.setattr(rule, "PROGRAMS", programs)
    monkeypatch.setattr(module, "block", lambda *variant: 64)
    for shape in ((5, 1, 7, 5), (2, 1, 17, 9), (7, 1, 2, 3)):
        assert_interpreted(make("relu", shape, torch.float32), SMALL, modes=[True])


@pytest.mark.parametrize("most", [8, 23, 33])
@pytest.mark.parametrize("bins", [0, 40])
def test_bins_beyond_the_most_write_nowhere_else(most, bins):
    """The caller checks them; what is counted then is undefined, but not where."""
    around = torch.zeros(3, 4, most, most, dtype=torch.int64)
    x = torch.linspace(0, 1, 90).view(3, 1, 5, 6)
    ranges, _ = reference.pair_ranges(x, SMALL.flat_displacements(), [1, 1], False)
    joint_histogram_(
        around[1:2], x, SMALL.flat_displacements(), ranges, torch.full((1, 4), bins, dtype=torch.int32), [1, 1], False
    )
    assert not around[0].any()
    assert not around[2].any()


def test_a_plane_beyond_32_bits_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(rule, "PLACES", 55)
    LAUNCHES.clear()
    for op in (joint_histogram, in_two_batches):
        assert_counts(SMALL.tensor(), SMALL, op=op)
    assert not LAUNCHES


@pytest.mark.parametrize("empty", [(0, 3, 4, 4), (3, 0, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0)])
def test_no_pixel(empty):
    ranges, bins = torch.zeros(empty[1], 2, 2, 2), torch.ones(empty[1], 2, dtype=torch.int32)
    counts = joint_histogram(torch.zeros(empty), [0, 1, 1, 0], ranges, bins, 3, [1, 1], False)
    assert counts.shape == (empty[1], 2, 3, 3)
    assert not counts.any()


def test_no_displacement():
    ranges, bins = torch.zeros(2, 0, 2, 2), torch.ones(2, 0, dtype=torch.int32)
    assert joint_histogram(torch.zeros(3, 2, 4, 4), [], ranges, bins, 3, [1, 1], False).shape == (2, 0, 3, 3)
