"""rep_grad_norm: the reference against explicit branches and numpy, every kernel against the reference."""

from __future__ import annotations

import cases
import checks
import implementations
import numpy as np
import pytest
import torch

from gradrep_kernels import BranchScales, FusedRepSGD
from gradrep_kernels.ops import reference

NORM = implementations.of("rep_grad_norm")
SHAPES = list(cases.SHAPES.values())
# Kernels sum in another order: in double on the CPU, on a GPU in float32 by trees of at most 2¹⁰ terms, then in double.
TOLERANCE = {"cpu": 1e-7, "cuda": 1e-6}


def problem(form: str, identity: bool, dtype, channels_last: bool = False):
    grads, scales, identities = [], [], []
    for n, shape in enumerate(SHAPES):
        g = cases.tensor(shape, n, dtype)
        grads.append(g.to(memory_format=torch.channels_last) if channels_last and g.dim() == 4 else g)
        there = form if form in cases.scale_shapes(shape) else "none"
        mult = cases.multiplier(shape, there, identity and cases.takes_identity(shape), seed=n)
        scales.append(None if mult is None else mult.scale)
        identities.append(None if mult is None else mult.identity)
    return grads, scales, identities


def test_reference_is_the_norm_of_the_branches():
    """A branch with scale α has the gradient α ⊙ g: the norm over all branches' gradients, by autograd."""
    torch.manual_seed(0)
    s, t = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    conv, point, ident = (
        torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((6, 6, 3, 3), (6, 6, 1, 1), (6,))
    )
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)

    def kernel():
        w = s[:, None, None, None] * conv + torch.nn.functional.pad(t[:, None, None, None] * point, [1] * 4)
        return w + torch.nn.functional.pad(torch.diag(ident)[:, :, None, None], [1] * 4)

    merged = kernel().detach().requires_grad_()
    torch.nn.functional.conv2d(x, merged, padding=1).square().sum().backward()
    torch.nn.functional.conv2d(x, kernel(), padding=1).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in (conv, point, ident)]).norm()
    mult = BranchScales(s, t, identity=True).grad_mult(3)
    assert float(reference.rep_grad_norm([merged.grad], [mult.scale], [mult.identity])) == pytest.approx(
        float(expected), rel=1e-14
    )


@pytest.mark.parametrize("form", ["none", "repopt", "dense"])
def test_reference_is_numpys(form):
    grads, scales, identities = problem(form, False, torch.float32)
    total = sum(
        float((np.broadcast_to(1.0 if s is None else s.double().numpy(), g.shape) * g.double().numpy() ** 2).sum())
        for g, s in zip(grads, scales)
    )
    assert float(reference.rep_grad_norm(grads, scales, identities)) == pytest.approx(total**0.5, rel=1e-7)


@pytest.mark.parametrize(("backend", "device"), NORM)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_kernel_agrees_with_the_reference(backend, device, form, dtype, channels_last):
    norm = implementations.get("rep_grad_norm", backend, device)
    for identity in (False, True):
        grads, scales, identities = problem(form, identity, dtype, channels_last)
        expected = reference.rep_grad_norm(grads, scales, identities)
        actual = norm(
            *([None if t is None else t.to(device) for t in column] for column in (grads, scales, identities))
        )
        assert actual.dtype == expected.dtype
        assert actual.shape == ()
        tolerance = 1e-14 if dtype == torch.float64 else TOLERANCE[device]
        assert float(actual) == pytest.approx(float(expected), rel=tolerance)
        for n in range(len(grads)):  # one at a time: a large one would hide an error in a small one
            one = [[column[n]] for column in (grads, scales, identities)]
            there = [[None if t is None else t.to(device) for t in column] for column in one]
            assert float(norm(*there)) == pytest.approx(float(reference.rep_grad_norm(*one)), rel=tolerance)


@pytest.mark.parametrize(("backend", "device"), NORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unaligned_gradients_of_a_chunk_and_more(backend, device, dtype):
    norm = implementations.get("rep_grad_norm", backend, device)
    grads, scales, identities = problem("repopt", True, dtype)
    expected = reference.rep_grad_norm(grads, scales, identities)
    there = [[None if t is None else t.to(device) for t in column] for column in (grads, scales, identities)]
    there[0] = [cases.unaligned(g, 1 + n % 3) for n, g in enumerate(there[0])]
    assert float(norm(*there)) == pytest.approx(
        float(expected), rel=1e-14 if dtype == torch.float64 else TOLERANCE[device]
    )


@pytest.mark.parametrize(("backend", "device"), NORM)
def test_kernel_on_what_is_unusual(backend, device):
    checks.norm_of_what_is_unusual(implementations.get("rep_grad_norm", backend, device), device)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_sum_does_not_depend_on_the_threads(threads):
    g = cases.tensor((400_000,), 5, torch.float32)
    parameter = torch.nn.Parameter(g.clone())
    parameter.grad = g
    optimizer = FusedRepSGD([parameter])
    before = torch.get_num_threads()
    results = set()
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            results.add(float(optimizer.clip_grad_norm_(1e9)))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1
