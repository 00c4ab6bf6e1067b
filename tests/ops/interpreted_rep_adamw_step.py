"""The AdamW step of Triton on CPU tensors, against the reference.

test_triton_rep_adamw_step.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import cases
import implementations
import pytest
import torch
from cases_adamw import FOUR, HYPERS, Problem, assert_same

from gradrep_kernels import use_backend
from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.triton import rep_adamw_step
from gradrep_kernels.ops.triton.launching import LAUNCHES

NAMES = ("empty", "scalar", "one", "prime", "conv_5x5", "conv_3x5", "conv_2x2", "grouped", "depthwise")
SHAPES = [*(cases.SHAPES[name] for name in NAMES), (1030,), (37, 29), (11, 11, 3, 3), (33, 34, 1, 1), (1, 130, 3, 3)]


def assert_step(problem: Problem, **more) -> None:
    expected = problem.clone().run(reference.rep_adamw_step, **more)
    LAUNCHES.clear()
    actual = problem.clone().run(rep_adamw_step, **more)
    assert sum(LAUNCHES[key] for key in LAUNCHES if key[0] == "rep_adamw_step") >= 1  # not the reference
    assert_same(actual, expected)


def test_it_is_interpreted():
    assert implementations.get("rep_adamw_step", "triton", "cpu") is rep_adamw_step


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_form_of_factors(form, channels_last):
    for identity, branches in ((False, 1), (True, 2), (True, 4)):
        assert_step(Problem(SHAPES, form, identity, channels_last=channels_last, branches=branches))


@pytest.mark.parametrize("name", HYPERS)
def test_every_hyper_parameter(name):
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert_step(Problem([(257,), (11, 11, 3, 3)], dtype=dtype, hypers=(name,)))


def test_large_kernels():
    assert_step(Problem([(3, 1, 13, 13), (2, 3, 17, 17), (1, 2, 31, 31)], branches=5))


def test_factors_in_another_dtype_or_with_strides_are_read_from_a_copy():
    problem = Problem([(5, 6, 3, 3), (4, 4, 5, 5)])
    problem.factors = [problem.factors[0].double(), problem.factors[1].transpose(-1, -2)]
    assert_step(problem)


def test_factors_without_all_dimensions_go_to_the_reference():
    problem = Problem([(5, 6, 3, 3)])
    problem.factors[0] = torch.rand(3, 6, 3, 3)[:, :1]  # [1 + B, 1, 3, 3]
    expected = problem.clone().run(reference.rep_adamw_step)
    assert_same(problem.clone().run(rep_adamw_step), expected)


def test_unaligned_tensors():
    problem = Problem([(2 * 1024 + 5,), (16, 8, 3, 3)])
    there = problem.clone()
    there.grads = [cases.unaligned(g, 1 + n) for n, g in enumerate(there.grads)]
    assert_same(there.run(rep_adamw_step), problem.run(reference.rep_adamw_step))


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_what_goes_before_and_after_the_update(found_inf):
    shapes = [(257,), (11, 11, 3, 3), (1030,)]
    more = {"grad_scale": torch.tensor(8.0), "clip": torch.tensor(0.3)}
    more["tail"] = torch.tensor([0.9, 0, 0, 4], dtype=torch.float64)
    if found_inf is not None:
        more["found_inf"] = torch.tensor(found_inf)
    problem = Problem(shapes)
    twin = problem.clone()
    averages = [[torch.full(shape, 0.5) for shape in shapes] for _ in range(2)]
    problem.run(rep_adamw_step, **more, averages=averages[0])
    twin.run(reference.rep_adamw_step, **more, averages=averages[1])
    assert_same(problem, twin)
    assert all(torch.equal(a, b) for a, b in zip(*averages))


def test_a_planned_step_and_its_norm():
    with use_backend("triton"):
        planner = backends.planner("rep_adamw_step", "cpu")
    problem = Problem(SHAPES[1:], branches=3)
    states = [getattr(problem, key) for key in Problem.states]
    handle = planner.make(problem.params, *states, problem.factors, problem.identities, problem.groups)
    norm = torch.empty(())
    assert planner.norm(handle, problem.grads, norm)
    squares = [(problem.multiplier(n) * g.double().square()).sum() for n, g in enumerate(problem.grads)]
    torch.testing.assert_close(norm.double(), sum(squares).sqrt(), rtol=1e-6, atol=0)
    for step in range(3):
        problem.hyper[:, -1] = step
        twin = problem.clone().run(reference.rep_adamw_step)
        assert planner.step(handle, problem.grads, problem.hyper.flatten().tolist(), [], [], None, None)
        assert_same(problem, twin)
    planner.free(problem.params[0], handle)


def test_a_count_on_the_device():
    """As capturable=True has it: one number of each row lies there."""
    with use_backend("triton"):
        planner = backends.planner("rep_adamw_step", "cpu")
    problem = Problem(SHAPES[1:4], hypers=FOUR[:2])
    states = [getattr(problem, key) for key in Problem.states]
    handle = planner.make(problem.params, *states, problem.factors, problem.identities, problem.groups)
    count = torch.tensor(4.0)
    for _ in range(2):
        problem.hyper[:, -1] = count
        twin = problem.clone().run(reference.rep_adamw_step)
        numbers = problem.hyper.clone()
        numbers[:, -1] = 0
        places = [7, 15]
        assert planner.step(handle, problem.grads, numbers.flatten().tolist(), [count] * 2, places, None, None)
        assert_same(problem, twin)
        count.add_(1)
    planner.free(problem.params[0], handle)
