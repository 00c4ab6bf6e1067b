"""The Triton gradient norm on CPU tensors, against the reference.

test_triton_rep_grad_norm.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from collections import Counter

import cases
import checks
import implementations
import pytest
import torch

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import addressing, plans, rep_grad_norm
from gradrep_kernels.ops.triton.launching import LAUNCHES

module = sys.modules["gradrep_kernels.ops.triton.rep_grad_norm"]
CHUNK = module.CHUNK.value
SMALL = ("empty", "scalar", "one", "prime", "conv_5x5", "conv_3x5", "conv_2x2", "grouped", "depthwise")
SHAPES = [*(cases.SHAPES[name] for name in SMALL), (11, 11, 3, 3), (1, 130, 3, 3)]

# Relative, against the reference, which sums in float64. float32: a product takes 3 roundings, a lane adds 16 of them
# in a row, 10 additions follow in a tree: 29 · 2⁻²⁴ of Σ at most, half of that after the root. 16-bit gradients are
# exact in float32.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
    torch.float64: 1e-14,
    torch.complex64: 1e-6,
}


def problem(form, identity, dtype, channels_last=False, shapes=SHAPES):
    grads, scales, identities = [], [], []
    for n, shape in enumerate(shapes):
        g = cases.tensor(shape, n, dtype)
        grads.append(g.to(memory_format=torch.channels_last) if channels_last and g.dim() == 4 else g)
        there = form if form in cases.scale_shapes(shape) else "none"
        mult = cases.multiplier(shape, there, identity and cases.takes_identity(shape), plans.COMPUTE[dtype], seed=n)
        scales.append(None if mult is None else mult.scale)
        identities.append(None if mult is None else mult.identity)
    return grads, scales, identities


def assert_norm(grads, scales, identities):
    expected, actual = reference.rep_grad_norm(grads, scales, identities), rep_grad_norm(grads, scales, identities)
    assert actual.dtype == expected.dtype
    assert actual.shape == ()
    assert float(actual) == pytest.approx(float(expected), rel=max(TOLERANCE[g.dtype] for g in grads))
    return actual


def test_it_is_interpreted():
    assert implementations.get("rep_grad_norm", "triton", "cpu") is rep_grad_norm


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_form_of_multiplier(form, channels_last):
    for identity in (False, True):
        grads, scales, identities = problem(form, identity, torch.float32, channels_last)
        for one in zip(grads, scales, identities):  # one at a time: a large one would hide an error in a small one
            assert_norm(*([part] for part in one))


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_around_the_chunk(size):
    columns = problem("dense", False, torch.float32, shapes=[(size,)])
    assert torch.equal(assert_norm(*columns), rep_grad_norm(*columns))  # the same bits each time
    infinite = torch.tensor([torch.inf])
    for before in (4, 1):  # at a multiple of 16 bytes, and not; what lies beside it is not read
        beside = torch.cat((infinite.expand(before), columns[0][0], infinite))
        assert_norm([beside[before:-1]], *columns[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    assert_norm(*problem("repopt", True, dtype))


def test_one_launch_per_dtype_and_the_wider_result():
    problems = [problem("spatial", False, dtype) for dtype in plans.COMPUTE]
    columns = [[t for p in problems for t in p[n]] for n in range(3)]
    LAUNCHES.clear()
    norm = rep_grad_norm(*columns)
    expected = Counter(("rep_grad_norm", "cpu", dtype) for dtype in (*plans.COMPUTE, torch.float64))
    assert expected == LAUNCHES  # one more to finish
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(float(reference.rep_grad_norm(*columns)), rel=TOLERANCE[torch.bfloat16])


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    checks.norm_of_what_is_unusual(rep_grad_norm, "cpu")
    columns = (
        [torch.randn(6, 8)[:, ::2], torch.randn(30), torch.randn(5, dtype=torch.complex64)],
        [torch.rand(6, 1), None, torch.rand(5)],
        [None] * 3,
    )
    assert_norm(*columns)


def test_gradients_may_share_memory():
    g = torch.randn(100)
    assert_norm([g, g[:50], g], [None, torch.rand(50), None], [None] * 3)


def test_the_gradients_stay_as_they_are():
    grads, scales, identities = problem("dense", True, torch.float32)
    before, versions = [g.clone() for g in grads], [g._version for g in grads]
    rep_grad_norm(grads, scales, identities)
    assert all(torch.equal(a, b) for a, b in zip(grads, before))
    assert [g._version for g in grads] == versions


def test_parts_of_large_tensors(monkeypatch):
    monkeypatch.setattr(addressing, "PIECE", 50)
    monkeypatch.setattr(module, "memory", plans.Plans("rep_grad_norm", module.memory.chunk, writes=False))
    grads, scales, identities = (
        [cases.tensor((6, 5, 3, 3), 1, torch.float32), cases.tensor((120,), 2, torch.float32)],
        [torch.rand(6, 1, 3, 3), torch.rand(120)],
        [torch.rand(6), None],
    )
    assert_norm(grads, scales, identities)


def test_no_gradients():
    assert float(rep_grad_norm([], [], [])) == 0
