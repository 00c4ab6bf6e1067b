"""Which tensors a kernel may walk flat: against the addresses of all elements, and against torch's own notion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradrep_kernels.ops.dense import alike, is_dense, memory_order


def places(shape, strides) -> list[int]:
    """Where the elements lie, in the order of their indices."""
    return [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, shape))]


def torch_calls_it_dense(t: torch.Tensor) -> bool:
    """torch.preserve_format keeps the strides of a tensor that is "non-overlapping and dense", and of no other."""
    kept = torch.empty_like(t, memory_format=torch.preserve_format)
    return all(a == b for size, a, b in zip(t.shape, t.stride(), kept.stride()) if size != 1)


def view(shape, strides) -> torch.Tensor:
    most = sum((size - 1) * stride for size, stride in zip(shape, strides)) if 0 not in shape else 0
    return torch.empty(most + 1).as_strided(shape, strides)


CASES = {  # shape, strides, whether it is dense
    "scalar": ((), (), True),
    "one element, any stride": ((1,), (7,), True),
    "vector": ((5,), (1,), True),
    "every second element": ((5,), (2,), False),
    "one element for all": ((5,), (0,), False),
    "matrix": ((3, 4), (4, 1), True),
    "transposed": ((4, 3), (1, 4), True),
    "rows of a wider matrix": ((3, 4), (5, 1), False),
    "columns of a wider matrix": ((3, 2), (4, 2), False),
    "overlapping windows": ((3, 4), (1, 1), False),
    "windows that overlap by one": ((3, 4), (3, 1), False),
    "as many places as elements, two of them shared": ((2, 2, 2), (4, 1, 1), False),
    "expanded rows": ((3, 4), (0, 1), False),
    "contiguous kernels": ((4, 3, 3, 5), (45, 15, 5, 1), True),
    "channels_last": ((4, 3, 3, 5), (45, 1, 15, 3), True),
    "channels_last of one channel": ((4, 1, 3, 5), (15, 99, 5, 1), True),
    "1 x 1, strides of both layouts": ((4, 3, 1, 1), (3, 1, 3, 3), True),
    "channels_last cut out": ((4, 3, 3, 5), (60, 1, 20, 4), False),
    "channels_last_3d": ((2, 3, 2, 3, 4), (72, 1, 36, 12, 3), True),
    "outputs innermost": ((4, 3, 3, 5), (1, 60, 20, 4), True),
    "no rows": ((0, 3), (3, 1), True),
    "no columns, strides of nothing": ((3, 0), (17, 5), True),
    "no elements and expanded": ((3, 0, 2), (0, 0, 0), True),
}


@pytest.mark.parametrize("name", CASES)
def test_dense(name):
    shape, strides, dense = CASES[name]
    assert is_dense(view(shape, strides)) == dense
    assert (memory_order(shape, strides) is not None) == dense


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_every_small_tensor_against_its_addresses(dims):
    """All sizes up to 3 with all strides from a few: each is dense if its elements fill as many places as there are."""
    sizes, strides = ((0, 1, 2, 3), range(10)) if dims < 4 else ((1, 2), (0, 1, 2, 4, 8))
    dense = 0
    for shape in itertools.product(sizes, repeat=dims):
        for steps in itertools.product(strides, repeat=dims) if dims < 3 else itertools.permutations(strides, dims):
            order = memory_order(shape, steps)
            expected = 0 in shape or sorted(places(shape, steps)) == list(range(math.prod(shape)))
            assert (order is not None) == expected, (shape, steps)
            dense += expected
            if dims < 3:
                assert is_dense(view(shape, steps)) == expected, (shape, steps)
            if expected and 0 not in shape:  # outermost first: each step is that over all dimensions within
                assert set(order) == {d for d, size in enumerate(shape) if size != 1}
                for n, d in enumerate(order):
                    assert steps[d] == math.prod(shape[e] for e in order[n + 1 :])
    assert dense > 5


@pytest.mark.parametrize(
    "shape", [(5,), (4, 3), (1, 4), (4, 3, 2), (4, 3, 3, 5), (1, 3, 3, 3), (4, 1, 3, 3), (2, 3, 2, 3, 2)]
)
def test_agrees_with_torch_on_permutations_and_slices(shape):
    for order in itertools.permutations(range(len(shape))):
        plain = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
        for t in (plain, plain[::2], plain[..., :1], plain[..., 1:], plain.unsqueeze(1), plain.expand(2, *plain.shape)):
            assert is_dense(t) == torch_calls_it_dense(t), (t.shape, t.stride())


def test_alike():
    """One offset in memory means the same element in both."""
    for shape in itertools.product((1, 2, 3), repeat=3):
        for a, b in itertools.product(itertools.permutations((1, 2, 4, 6), 3), repeat=2):
            assert alike(shape, a, b) == (places(shape, a) == places(shape, b))


def test_alike_takes_what_torch_gives():
    a, b = torch.empty(6, 5, 1, 1), torch.empty(6, 5, 1, 1).contiguous(memory_format=torch.channels_last)
    assert a.stride() != b.as_strided(a.shape, (5, 1, 5, 5)).stride()
    assert alike(a.shape, a.stride(), b.as_strided(a.shape, (5, 1, 5, 5)).stride())
    assert not alike((3, 4), torch.empty(3, 4).stride(), torch.empty(4, 3).t().stride())
    assert alike((), (), ())
