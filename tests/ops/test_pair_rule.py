"""The rule of binning, number by number (gradrep_kernels/ops/reference/pair_rule.py)."""

import math

import numpy as np
import pytest
import torch

from gradrep_kernels.ops.reference import pair_rule

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 2**24 + 1, 2**31, 2**31 + 1, 2**40, 2**40 + 1, 2**52]
)
def test_sturges_counts_bits_exactly(n):
    expected = 1 + (n - 1).bit_length() if n > 1 else 1
    found = pair_rule.sturges(torch.tensor([[n]]))
    assert found.dtype == torch.int32
    assert found.item() == expected
    if 1 < n < 2**40:
        assert expected == 1 + math.ceil(math.log2(n))


# lo, hi, bins, then values and the bins they go to
BY_HAND = {
    "the top bin is closed": (0.0, 4.0, 4, {0.0: 0, 0.5: 0, 1.0: 1, 1.9999999: 1, 2.0: 2, 3.9999998: 3, 4.0: 3}),
    "outside the range": (0.0, 4.0, 4, {-1e-30: 0, -7.0: 0, -INF: 0, 4.0000005: 3, 1e30: 3, INF: 3}),
    "not a number": (0.0, 4.0, 4, {NAN: 0}),
    "negative zero": (-0.0, 1.0, 2, {-0.0: 0, 0.5: 1}),
    "one bin": (0.0, 4.0, 1, {-1.0: 0, 0.0: 0, 4.0: 0, NAN: 0, INF: 0}),
    "constant": (2.5, 2.5, 5, {2.5: 0, 2.6: 0, -1.0: 0, INF: 0, NAN: 0}),
    "no pair was left": (INF, -INF, 5, {0.0: 0, INF: 0}),
    "width overflows float32: 1 / inf is 0": (-3e38, 3e38, 4, {-3e38: 0, 0.0: 0, 3e38: 0}),
    "width so small that the quotient overflows": (0.0, 1e-45, 4, {0.0: 0, 1e-45: 0}),
    "infinite end": (0.0, INF, 4, {0.0: 0, 5.0: 0, INF: 0}),
    "infinite start": (-INF, 1.0, 4, {-INF: 0, 0.0: 0, 1.0: 0}),
    "NaN range": (NAN, NAN, 4, {0.0: 0, 1.0: 0, NAN: 0}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_bins_by_hand(case):
    lo, hi, count, expected = BY_HAND[case]
    count = torch.tensor([count], dtype=torch.int32)
    inv = pair_rule.inverse_width(torch.tensor([[[[lo, hi], [lo, hi]]]]), count.view(1, 1))[0, 0, 0].view(1)
    values = torch.tensor(list(expected)).view(1, 1, 1, -1)
    found = pair_rule.bin_numbers(values, torch.tensor([lo]), inv, count)
    assert found.dtype == torch.int32
    assert dict(zip(map(str, expected), found.flatten().tolist())) == {str(v): b for v, b in expected.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_operation_is_rounded_on_its_own(dtype):
    """numpy's scalar arithmetic rounds each operation to nearest: the same bins, to the last edge."""
    rng = np.random.default_rng(0)
    lo, hi = np.sort(rng.standard_normal((2, 6)), axis=0).astype(dtype)
    count = rng.integers(1, 40, 6).astype(np.int32)
    steps = rng.integers(0, count[:, None] + 1, (6, 500)) / count[:, None]  # values on and beside the edges of the bins
    values = (lo[:, None] + steps.astype(dtype) * (hi - lo)[:, None]).astype(dtype)
    values = np.nextafter(values, rng.choice([-np.inf, np.inf], values.shape).astype(dtype))
    inv = count.astype(dtype) / (hi - lo)
    expected = np.clip(((values - lo[:, None]) * inv[:, None]).astype(int), 0, count[:, None] - 1)
    ranges = torch.from_numpy(np.stack([lo, hi], -1)).view(6, 1, 1, 2).repeat(1, 1, 2, 1)
    found_inv = pair_rule.inverse_width(ranges, torch.from_numpy(count).view(6, 1))[:, 0, 0]
    assert found_inv.numpy().tobytes() == inv.tobytes()
    found = pair_rule.bin_numbers(
        torch.from_numpy(values).view(1, 6, 1, -1), ranges[:, 0, 0, 0], found_inv, torch.from_numpy(count)
    )
    assert (found[0, :, 0].numpy() == expected).all()
    assert len(np.unique(expected)) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maps_are_widened_before_anything_else(dtype):
    assert pair_rule.arithmetic_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.tensor([[[[1.0, -2.0]]]], dtype=dtype)
    found = pair_rule.padded(x, [1, 2])
    assert found.dtype == pair_rule.arithmetic_dtype(dtype)
    assert found.shape == (1, 1, 3, 6)
    assert found.sum() == -1
    assert found[0, 0, 1, 2:4].tolist() == [1, -2]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (4, 5)])
@pytest.mark.parametrize(
    "d", [(0, 0), (0, 1), (1, 0), (1, -1), (-1, 1), (-2, -2), (2, 3), (3, 0), (0, -5), (100, -100)]
)
def test_pairs_of_a_displacement(size, d):
    rows, columns = size
    maps = torch.arange(rows * columns).view(1, 1, rows, columns)
    p, q = pair_rule.pair_views(maps, *d)
    expected = [
        (i * columns + j, (i + d[0]) * columns + j + d[1])
        for i in range(rows)
        for j in range(columns)
        if 0 <= i + d[0] < rows and 0 <= j + d[1] < columns
    ]
    assert p.shape == q.shape == (1, 1, max(0, rows - abs(d[0])), max(0, columns - abs(d[1])))
    assert list(zip(p.flatten().tolist(), q.flatten().tolist())) == expected


def test_groups_of_images_hold_all_of_them():
    x = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 1, 2, 3)
    groups = pair_rule.image_groups(x, pixels=12)
    assert [len(group) for group in groups] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(groups), x)
    assert [len(group) for group in pair_rule.image_groups(x, pixels=1)] == [1] * 7
    assert pair_rule.image_groups(x[:0]) == ()
