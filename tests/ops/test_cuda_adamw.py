"""The CUDA C++ step of AdamW over branches against the reference: on a GPU, and emulated anywhere."""

from __future__ import annotations

import weakref

import cases
import pytest
import torch
from cases_adamw import FOUR, HYPERS, Problem, assert_same
from cuda_steps import CHUNK, DTYPES

from gradrep_kernels.ops import reference

SHAPES = [*cases.SHAPES.values(), *((n,) for n in (CHUNK - 1, CHUNK, CHUNK + 1, 8 * CHUNK + 1, 7919))]
LARGE_KERNELS = [(5, 1, 13, 13), (3, 4, 15, 15), (7, 1, 17, 17), (2, 3, 31, 31)]


def agree(where, problem: Problem, **numbers: float) -> None:
    """A step there and one by the reference, from the same start."""
    numbers = {name: torch.tensor(value) for name, value in numbers.items()}
    there = {name: value.to(where.device) for name, value in numbers.items()}
    expected = problem.clone().run(reference.rep_adamw_step, **numbers)
    assert_same(problem.clone(where.device).run(where.adamw_step, **there), expected)


class Planned:
    """A plan of the steps of a problem that is where the kernels are."""

    def __init__(self, where, problem: Problem):
        self.planner, self.problem = where.adamw_planner, problem
        states = [getattr(problem, key) for key in Problem.states]
        self.handle = self.planner.make(problem.params, *states, problem.factors, problem.identities, problem.groups)
        weakref.finalize(self, self.planner.free, problem.params[0], self.handle)

    def step(self, on_device: dict[int, torch.Tensor] | None = None, **more) -> bool:
        on_device = on_device or {}
        numbers = self.problem.hyper.flatten().tolist(), list(on_device.values()), list(on_device)
        return self.planner.step(self.handle, self.problem.grads, *numbers, None, None, **more)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_form_of_factors_has_the_references_bits(where, form, dtype, channels_last):
    for identity, branches in ((False, 1), (True, 2), (True, 4)):
        agree(where, Problem(SHAPES, form, identity, dtype, channels_last=channels_last, branches=branches))


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_hyper_parameter(where, dtype, name):
    for form in ("none", "number", "repopt"):
        agree(where, Problem([(257,), (17, 17, 3, 3), (5, 7, 3, 5)], form, True, dtype, (name,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_kernels(where, dtype):
    for channels_last in (False, True):
        agree(where, Problem(LARGE_KERNELS, dtype=dtype, channels_last=channels_last, branches=6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscaling_clipping_and_overflow(where, dtype):
    problem = Problem(SHAPES, dtype=dtype)
    agree(where, problem, grad_scale=3.0, found_inf=0.0, clip=0.4)
    agree(where, problem, grad_scale=3.0, found_inf=1.0)


def test_factors_in_another_dtype_or_with_strides_are_read_from_a_copy(where):
    problem = Problem([(5, 6, 3, 3), (4, 4, 5, 5), (6, 4, 3, 1)], hypers=("default",))
    problem.factors = [
        problem.factors[0].double(),
        problem.factors[1].transpose(-1, -2),
        problem.factors[2].expand(-1, 6, 4, 3, 1),
    ]
    agree(where, problem)


@pytest.mark.parametrize("most", [64, 1024])
def test_parts_of_large_parameters(emulated, most):
    """Parts that 32-bit indices reach find their factors, each layer of them."""
    emulated.told.most_of_piece = most
    for identity in (False, True):
        shapes = [(6, 7, 3, 3), (40, 9), (5, 1, 5, 5)]
        if identity and most < 63:
            continue
        agree(emulated, Problem(shapes, "repopt", identity, branches=3))
        agree(emulated, Problem(shapes, "dense", False, branches=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_planned_step_and_its_norm(where, dtype):
    problem = Problem([*SHAPES, *LARGE_KERNELS], dtype=dtype, branches=3)
    expected, there = problem.clone(), problem.clone(where.device)
    planned = Planned(where, there)
    norm = torch.empty((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=where.device)
    assert planned.planner.norm(planned.handle, there.grads, norm)
    squares = [(expected.multiplier(n) * g.double().square()).sum() for n, g in enumerate(expected.grads)]
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norm.double().cpu(), sum(squares).sqrt(), rtol=tolerance, atol=0)
    for step in range(3):
        there.hyper[:, -1] = expected.hyper[:, -1] = step
        expected.run(reference.rep_adamw_step)
        assert planned.step()
        assert_same(there, expected)


def test_a_planned_step_clips_by_the_norm_over_branches(where):
    problem = Problem(SHAPES, branches=3)
    expected, there = problem.clone(), problem.clone(where.device)
    norm = torch.empty((), device=where.device)
    assert Planned(where, there).step(max_norm=2.0, norm=norm)
    factor = torch.clamp(2.0 / (norm.cpu() + 1e-6), max=1.0)
    expected.run(reference.rep_adamw_step, clip=1 / (norm.cpu() + 1e-6) * 2.0)
    assert float(factor) < 1
    assert_same(there, expected)


def test_counts_on_the_device(where):
    """As capturable=True has them: the host never reads them, and a graph's replay goes on."""
    problem = Problem(SHAPES, hypers=FOUR[:2], branches=2)
    expected, there = problem.clone(), problem.clone(where.device)
    planned = Planned(where, there)
    count = torch.tensor(4.0, device=where.device)
    there.hyper[:, -1] = 0
    assert planned.step({7: count, 15: count})
    expected.hyper[:, -1] = 4
    assert_same(there, expected.run(reference.rep_adamw_step))
    with where.capture() as replay:
        assert planned.step({7: count, 15: count})
    for _ in range(2):
        count.add_(1)
        expected.hyper[:, -1] += 1
        expected.run(reference.rep_adamw_step)
        replay()
        assert_same(there, expected)
