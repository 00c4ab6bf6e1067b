"""The CUDA C++ gradient norm against the reference, emulated (emulated_step.py).

On a GPU test_rep_grad_norm.py compares it, among all kernels.
"""

from __future__ import annotations

import cases
import checks
import pytest
import torch
from cases import Problem
from emulated_step import Emulated

from gradrep_kernels.ops import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [*cases.SHAPES.values(), (1023,), (1024,), (1025,), (8191,), (8193,)]
TOLERANCE = {torch.float64: 1e-14}
LOW = 7e-7  # csrc/rep_grad_norm_cuda.h


def agree(emulated: Emulated, problem: Problem) -> torch.Tensor:
    arguments = problem.grads, problem.scales, problem.identities
    actual, expected = emulated.norm(*arguments), reference.rep_grad_norm(*arguments)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    tolerance = max(TOLERANCE.get(g.dtype, LOW) for g in problem.grads)
    assert float(actual) == pytest.approx(float(expected), rel=tolerance)
    return actual


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_multiplier(emulated, form, dtype, channels_last):
    for identity in (False, True):
        agree(emulated, Problem(SHAPES, form, identity, dtype, channels_last=channels_last))
        for shape in SHAPES:  # one at a time: a large one would hide an error in a small one
            agree(emulated, Problem([shape], form, identity, dtype, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_gradients(emulated, dtype):
    problem = Problem(SHAPES, dtype=dtype)
    problem.grads = [cases.unaligned(g, 1 + n % 3) for n, g in enumerate(problem.grads)]
    agree(emulated, problem)
    for shape in SHAPES:
        problem = Problem([shape], dtype=dtype)
        problem.grads = [cases.unaligned(g) for g in problem.grads]
        agree(emulated, problem)


@pytest.mark.parametrize("most", [16, 150, 1000])
def test_pieces(emulated, most):
    emulated.told.most_of_piece = most
    for form in cases.scale_shapes((2, 2, 3, 3)):
        for channels_last in (False, True):
            agree(
                emulated,
                Problem(
                    [(257,), (2, 3, 25, 25), (17, 17, 3, 3), (19, 1, 3, 3)], form, True, channels_last=channels_last
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_gradient_is_summed_in_one_order(emulated, dtype):
    problem = Problem([(1 << 21,), (1 << 20,)], "number", dtype=dtype)
    problem.grads = [g.abs() for g in problem.grads]  # in a sum of equal signs no error cancels another
    assert len({float(agree(emulated, problem)) for _ in range(2)}) == 1


def test_launches(emulated):
    """One for each dtype, and one for the root; more where a launch has no room."""
    problem = Problem([(300,), (40, 20), (7, 5, 3, 3), (33,)], "dense")
    problem.grads = [g.to(dtype) for g, dtype in zip(problem.grads, DTYPES)]
    agree(emulated, problem)
    assert emulated.told.launches == len(DTYPES) + 1
    agree(emulated, Problem([(n % 7 + 1, 2, 3, 3) for n in range(450)]))
    assert emulated.told.launches == len(DTYPES) + 1 + 2 + 1


def test_multipliers_that_are_read_from_copies(emulated):
    problem = Problem([(6, 5, 3, 5), (40,), (6, 5, 3, 3)], "none")
    problem.grads[2] = problem.grads[2].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # outputs innermost
    problem.scales = [
        cases.tensor((6, 1, 3, 1), 1).abs(),
        torch.tensor(2.0, dtype=torch.float64),
        torch.rand(6, 1, 3, 3),
    ]
    problem.identities = [cases.tensor((6,), 2).abs(), None, torch.rand(6)]
    agree(emulated, problem)


def test_a_captured_norm_reads_what_is_there_at_the_replay(emulated):
    problem = Problem(SHAPES)
    with emulated.capture() as replay:
        norm = emulated.norm(problem.grads, problem.scales, problem.identities)
    for factor in (1.0, 3.0, 0.25):
        for g in problem.grads:
            g.mul_(factor)
        replay()
        expected = reference.rep_grad_norm(problem.grads, problem.scales, problem.identities)
        assert float(norm) == pytest.approx(float(expected), rel=LOW)


def test_what_is_unusual(emulated):
    checks.norm_of_what_is_unusual(emulated.norm, "cpu")
    assert float(emulated.norm([torch.zeros(0)], [None], [None])) == 0
    assert float(emulated.norm([], [], [])) == 0
    with pytest.raises(RuntimeError, match="broadcast"):
        emulated.norm([torch.ones(5)], [torch.ones(6)], [None])
