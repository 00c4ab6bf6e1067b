"""Checks of one implementation of an op that its tests on any device and its tests in the interpreter share."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from cases import Problem, assert_same_bits
from cases_sgs import Map

import gradrep_kernels as gr
from gradrep_kernels.ops import reference

SCALING_TOLERANCE = 1e-5  # G has float32 digits; the rest is rounding in Eq. 7


def zeros_infinities_and_nan_pass_through(step: Callable, device: str) -> None:
    for hyper in cases.HYPERS:
        problem = Problem([(64,), (8, 8, 3, 3)], hypers=(hyper,))
        for n, value in enumerate((0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45)):
            for t in (*problem.params, *problem.grads, *problem.buffers):
                t.view(-1)[n::17] = value
        expected = problem.clone().run(reference.rep_sgd_step)
        actual = problem.clone(device).run(step)
        assert_same_bits(actual, expected)
        for a, b in zip(actual.params, expected.params):
            assert torch.equal(a.cpu().signbit() & ~a.cpu().isnan(), b.signbit() & ~b.isnan())  # −0 is not 0


def what_the_kernel_does_not_take_goes_to_the_reference(step: Callable, device: str) -> None:
    """Unlike strides, overlapping gradients, unlike dtypes, complex; beside tensors that the kernel does take."""

    def make():
        p = [
            cases.tensor((8, 6, 3, 3), 1, torch.float32),
            cases.tensor((30, 20), 2, torch.float32),
            cases.tensor((40,), 3, torch.float32),
        ]
        g = [
            cases.tensor((8, 6, 3, 3), 4, torch.float32).to(memory_format=torch.channels_last),
            cases.tensor((20, 30), 5, torch.float32).t(),
        ]
        g.append(torch.tensor([0.5]).expand(40))
        p += [
            cases.tensor((33, 2), 6, torch.float32),
            cases.tensor((11, 2), 7, torch.float32),
            torch.view_as_complex(cases.tensor((9, 2), 8, torch.float32)),
        ]
        g += [
            cases.tensor((33, 2), 9, torch.bfloat16),
            cases.tensor((11, 4), 10, torch.float32)[:, ::2],
            torch.view_as_complex(cases.tensor((9, 2), 11, torch.float32)),
        ]
        problem = Problem([], hypers=(cases.HYPERS[6],))
        problem.params, problem.grads, problem.buffers = p, g, [x.clone() * 0.5 for x in p]
        problem.scales = [torch.rand(8, 1, 3, 3), None, torch.tensor(2.0), torch.rand(33, 1), None, torch.rand(9)]
        problem.identities = [torch.ones(8)] + [None] * 5
        problem.first, problem.groups = [False] * 6, [0] * 6
        return problem

    torch.manual_seed(0)
    one = make()
    other = one.clone()
    other.grads = one.grads
    moved = one.clone(device)
    moved.grads = [
        torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device=device).copy_(g)
        if 0 not in g.stride()
        else g.to(device)
        for g in one.grads
    ]
    moved.run(step)
    other.run(reference.rep_sgd_step)
    for name in ("params", "buffers"):
        for a, b in zip(getattr(moved, name), getattr(other, name)):
            assert torch.equal(a.cpu(), b)


def nothing_to_do(step: Callable) -> None:
    step([], [], [], [], [], [], [], torch.zeros(0, 6, dtype=torch.float64))


def norm_of_what_is_unusual(norm: Callable, device: str) -> None:
    strided = torch.arange(20.0).reshape(4, 5)[:, ::2].to(device)
    assert float(norm([strided], [None], [None])) == pytest.approx(float(strided.norm()), rel=1e-6)
    half = torch.ones(3, dtype=torch.complex64, device=device) * (3 + 4j)
    assert float(norm([half], [None], [None])) == pytest.approx(75**0.5)
    for bad in (float("inf"), float("nan")):
        assert not torch.isfinite(norm([torch.tensor([1.0, bad], device=device)], [None], [None]))


def scaling(x: torch.Tensor, case: Map, remove_near: bool = False) -> torch.Tensor:
    return gr.spatial_gradient_scaling(
        x, case.kernel_size, padding=case.padding, dilation=case.dilation, k=case.k, remove_near=remove_near
    )
