"""Planned steps in Triton on CPU tensors, against the reference.

test_triton_rep_sgd_step.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import cases
import pytest
import second_step
import torch
from cases import Problem, assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradrep_kernels as gr
from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.triton import rep_sgd_plan, rep_sgd_plan_free, rep_sgd_plan_step, rep_sgd_step, staging
from gradrep_kernels.ops.triton.launching import LAUNCHES
from gradrep_kernels.ops.triton.planned_step import have_states

SHAPES = [(1030,), (6, 5, 3, 3), (), (7, 6, 1, 1), (0, 3), (12, 4, 3, 3), (37, 29)]
TWO_GROUPS = (cases.HYPERS[6], cases.HYPERS[4])
WITHOUT_MOMENTUM = (cases.HYPERS[6], cases.HYPERS[1])


class Planned:
    """The planned steps of a problem, and a twin that the reference steps."""

    def __init__(self, problem: Problem, without_states: tuple[int, ...] = ()):
        self.ours, self.twin = problem, problem.clone()
        buffers = [None if g in without_states else b for b, g in zip(problem.buffers, problem.groups)]
        self.handle = rep_sgd_plan(problem.params, buffers, problem.scales, problem.identities, problem.groups)

    def step(self, on_device=(), places=(), grad_scale=None, found_inf=None) -> bool:
        """Take a step of ours alone."""
        numbers = self.ours.hyper.flatten().tolist()
        for place in places:
            numbers[place] = 0.0
        return rep_sgd_plan_step(
            self.handle, self.ours.grads, numbers, list(on_device), list(places), grad_scale, found_inf
        )

    def assert_step(self, launches: int = 1, **amp) -> None:
        """A step of both has the same bits, and ours is `launches` launches of the kernel."""
        LAUNCHES.clear()
        assert self.step(**amp)
        assert sum(LAUNCHES.values()) == launches
        for name in ("on_device", "places"):
            amp.pop(name, None)
        self.twin.run(reference.rep_sgd_step, **amp)
        assert_same_bits(self.ours, self.twin)

    def new_gradients(self) -> None:
        for n, g in enumerate(self.twin.grads):
            self.twin.grads[n] = g.clone() * -1.5
        self.ours.grads = self.twin.clone().grads

    def assert_refused(self, **more) -> None:
        before = self.ours.clone()
        LAUNCHES.clear()
        assert not self.step(**more)
        assert not LAUNCHES
        assert_same_bits(self.ours, before)


def test_the_backend_has_it():
    with gr.use_backend("triton"):
        planner = backends.planner("rep_sgd_step", "cpu")
        assert (planner.make, planner.step, planner.free) == (rep_sgd_plan, rep_sgd_plan_step, rep_sgd_plan_free)
        assert not any("plan" in row["op"] for row in backends.report(("cpu",)))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_form_of_multiplier(form, channels_last):
    planned = Planned(Problem(SHAPES, form, hypers=TWO_GROUPS, channels_last=channels_last))
    for _ in range(3):
        planned.new_gradients()
        planned.assert_step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_every_dtype(dtype):
    """float16 has scales of float32. (The interpreter does not round to bfloat16 as a GPU does.)"""
    planned = Planned(Problem(SHAPES, dtype=dtype, hypers=TWO_GROUPS))
    for _ in range(2):
        planned.new_gradients()
        planned.assert_step()


def test_one_launch_for_each_dtype():
    problems = [Problem([(70,), (6, 6, 3, 3)], dtype=dtype) for dtype in (torch.float32, torch.float64)]
    mixed = Problem([], hypers=TWO_GROUPS)
    for name in ("params", "grads", "buffers", "scales", "identities"):
        setattr(mixed, name, [t for p in problems for t in getattr(p, name)])
    mixed.groups, mixed.first = [0, 1, 1, 0], [False] * 4
    Planned(mixed).assert_step(launches=2)


def test_unaligned_gradients_and_others_in_turns():
    planned = Planned(Problem(SHAPES))
    for n in range(4):
        planned.new_gradients()
        planned.ours.grads = [cases.unaligned(g, n) for g in planned.ours.grads]
        planned.assert_step()


def test_unscaling_and_overflow():
    planned = Planned(Problem(SHAPES, hypers=TWO_GROUPS))
    for scale, found_inf in ((3.0, None), (3.0, 0.0), (None, 0.0), (3.0, 1.0), (None, float("nan")), (None, None)):
        planned.new_gradients()
        planned.assert_step(
            grad_scale=scale and torch.tensor(scale), found_inf=None if found_inf is None else torch.tensor([found_inf])
        )


def test_tables_are_made_once_for_each_place(uploads):
    """The allocator takes turns with a few. Hyper-parameters have tables of their own."""
    planned = Planned(Problem(SHAPES, hypers=TWO_GROUPS))
    places = [planned.ours.clone().grads for _ in range(4)]
    for n, planned.ours.grads in enumerate(places):
        assert planned.step()
        assert len(uploads) == 4 + n  # chunks, geometry, pointers, hyper-parameters
    for _ in range(2):
        for planned.ours.grads in places:
            assert planned.step()
    assert len(uploads) == 7
    planned.ours.hyper = planned.ours.hyper * 0.5
    for _ in range(2):
        assert planned.step()
    assert len(uploads) == 8


def test_a_rate_that_changes_with_each_step_waits_for_nothing(uploads, monkeypatch):
    monkeypatch.setattr(staging, "REMEMBERED", 3)
    planned, waits = Planned(Problem(SHAPES, hypers=TWO_GROUPS)), []
    assert planned.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(True))
    for _ in range(8):
        planned.ours.hyper = planned.ours.hyper * 0.9
        assert planned.step()
    assert not waits
    assert len(rep_sgd_step.hyper_tables) <= 3


class Operations(TorchDispatchMode):
    """The operations that are a launch on a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_hyper_parameters_on_the_device(shape, uploads, monkeypatch):
    """lr of both groups and one weight decay: their values are read at each step, without a new table."""
    planned = Planned(Problem(SHAPES, hypers=TWO_GROUPS))
    places = [0, 6, 9]
    numbers = [torch.full(shape, value) for value in (0.3, 0.02, 0.001)]
    completed, counts = rep_sgd_step.completed, []

    def watched(*arguments):
        with Operations() as operations:
            made = completed(*arguments)
        counts.append(len(operations.seen))
        return made

    for step in range(4):
        for number in numbers:
            number.mul_(0.7)
        planned.twin.hyper = planned.ours.hyper.clone()
        planned.twin.hyper.view(-1)[places] = torch.cat([n.double().reshape(1) for n in numbers])
        planned.new_gradients()
        planned.assert_step(on_device=numbers, places=places)
        if step == 0:
            before = len(uploads)
            monkeypatch.setattr(rep_sgd_step, "completed", watched)
    assert len(uploads) == before + 3  # pointers
    assert counts == [3] * 3


def test_hyper_parameters_on_the_device_of_several_dtypes():
    planned = Planned(Problem(SHAPES, hypers=TWO_GROUPS))
    numbers = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.01, dtype=torch.float64)]
    planned.twin.hyper = planned.ours.hyper.clone()
    planned.twin.hyper.view(-1)[[0, 3]] = torch.tensor([numbers[0].item(), 0.01], dtype=torch.float64)
    planned.assert_step(on_device=numbers, places=[0, 3])
    planned.assert_refused(on_device=[torch.zeros((), device="meta")], places=[0])


def test_hyper_parameters_that_are_tensors_on_the_host():
    planned = Planned(Problem(SHAPES))
    numbers = [torch.tensor(n, dtype=torch.float64) for n in planned.ours.hyper.flatten().tolist()]
    assert rep_sgd_plan_step(planned.handle, planned.ours.grads, numbers, [], [], None, None)
    assert_same_bits(planned.ours, planned.twin.run(reference.rep_sgd_step))


def test_without_momentum_there_are_no_buffers():
    problem = Problem(SHAPES, hypers=WITHOUT_MOMENTUM)
    planned = Planned(problem, without_states=(1,))
    for _ in range(2):
        planned.new_gradients()
        planned.assert_step()
    hyper = planned.ours.hyper
    planned.assert_refused(on_device=[torch.tensor(0.9)], places=[7])  # it may not be 0
    planned.ours.hyper = hyper + torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0.9, 0, 0, 0, 0]])
    planned.assert_refused()
    planned.ours.hyper = hyper
    planned.assert_step()
    planned.twin.hyper = hyper.clone()
    planned.twin.hyper[1, 0] = 0.5
    planned.assert_step(on_device=[torch.tensor(0.5)], places=[6])
    planned.ours.hyper = hyper[:1]
    planned.assert_refused()


def test_momentum_goes_off_and_on():
    planned = Planned(Problem(SHAPES, hypers=TWO_GROUPS))
    hyper = planned.ours.hyper
    for factor in (1, 0, 1):
        planned.ours.hyper = planned.twin.hyper = hyper * torch.tensor([1, factor, 1, 1, factor, 1])
        planned.new_gradients()
        planned.assert_step()


def strided_otherwise(t: torch.Tensor) -> torch.Tensor:
    return t.as_strided(t.shape, t.to(memory_format=torch.channels_last).stride())


CHANGES = {  # of the parameter of shape [6, 5, 3, 3], and of another
    "a gradient of another dtype": lambda p: p.grads.__setitem__(1, p.grads[1].view(torch.int32)),
    "of half the size": lambda p: p.grads.__setitem__(1, p.grads[1].view(torch.float16).view(6, 5, 3, 6)[..., ::2]),
    "of another shape": lambda p: p.grads.__setitem__(1, p.grads[1].view(6, 5, 9)),
    "of other strides": lambda p: p.grads.__setitem__(1, strided_otherwise(p.grads[1])),
    "on another device": lambda p: p.grads.__setitem__(1, torch.empty_like(p.grads[1], device="meta")),
    "of another type": lambda p: p.grads.__setitem__(1, nn.Parameter(p.grads[1])),
    "no gradient": lambda p: p.grads.__setitem__(1, None),
    "fewer gradients": lambda p: p.grads.pop(),
    "gradients that share memory": lambda p: p.grads.__setitem__(5, p.grads[6].view(-1)[:432].view(12, 4, 3, 3)),
    "a gradient that is the parameter": lambda p: p.grads.__setitem__(1, p.params[1]),
    "a parameter of another dtype": lambda p: setattr(p.params[1], "data", p.params[1].data.double()),
    "at the same address": lambda p: setattr(p.params[1], "data", p.params[1].data.view(torch.int32)),
    "a parameter of another shape": lambda p: setattr(p.params[1], "data", p.params[1].data.view(6, 5, 9)),
    "a parameter of other strides": lambda p: setattr(p.params[1], "data", strided_otherwise(p.params[1].data)),
    "parameters that share memory": lambda p: setattr(
        p.params[1], "data", p.params[5].data.view(-1)[:270].view(6, 5, 3, 3)
    ),
    "a buffer of another dtype": lambda p: setattr(p.buffers[1], "data", p.buffers[1].data.double()),
    "a buffer of another shape": lambda p: setattr(p.buffers[1], "data", p.buffers[1].data.view(6, 5, 9)),
}


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_refused_and_nothing_is_done(name, warm):
    planned = Planned(Problem(SHAPES))
    if warm:
        planned.assert_step()
    everything = [*planned.ours.params, *planned.ours.buffers]
    CHANGES[name](planned.ours)
    before = [t.clone() for t in everything if not t.is_meta]
    LAUNCHES.clear()
    assert not planned.step()
    assert not LAUNCHES
    assert all(torch.equal(a, b) for a, b in zip(before, (t for t in everything if not t.is_meta)))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_a_gradient_of_another_layout(layout):
    """It is refused, or torch's error says that it has no strides or no address. The optimizer takes both for a no."""
    planned = Planned(Problem([(37, 29)]))
    before = planned.ours.params[0].clone()
    planned.ours.grads[0] = getattr(planned.ours.grads[0], layout)()
    with contextlib.suppress(RuntimeError):
        assert not planned.step()
    assert torch.equal(planned.ours.params[0], before)


MOVES = {
    "a parameter": lambda p: setattr(p.params[1], "data", p.params[1].data.clone()),
    "a parameter to where it is not aligned": lambda p: setattr(p.params[0], "data", cases.unaligned(p.params[0].data)),
    "a buffer": lambda p: setattr(p.buffers[1], "data", p.buffers[1].data.clone()),
    "a gradient whose sizes of one have other strides": lambda p: p.grads.__setitem__(
        3, p.grads[3].as_strided((7, 6, 1, 1), (6, 1, 6, 6))
    ),
    "a scale": lambda p: setattr(p.scales[1], "data", p.scales[1].data.clone()),
    "a scale written in place": lambda p: p.scales[1].mul_(2),
    "an identity written in place": lambda p: p.identities[1].mul_(2),
}


@pytest.mark.parametrize("copied", [False, True], ids=["read as they are", "read from copies"])
@pytest.mark.parametrize("name", MOVES)
def test_what_has_moved_is_found(name, copied):
    """Scales of float64 are read from copies."""
    problem = Problem(SHAPES)
    parts = [
        [None if part is None else part.to(torch.float64 if copied else part.dtype, copy=True) for part in column]
        for column in (problem.scales, problem.identities)
    ]
    problem.scales, problem.identities = parts
    planned = Planned(problem)
    for _ in range(2):
        planned.new_gradients()
        planned.assert_step()
    MOVES[name](planned.ours)
    planned.twin.params, planned.twin.grads = planned.ours.clone().params, planned.ours.clone().grads
    planned.twin.scales, planned.twin.identities = planned.ours.scales, planned.ours.identities
    for _ in range(2):
        planned.assert_step()


def test_inference_tensors_as_scales():
    """They have no version. float64: they are read from copies."""
    problem = Problem([(6, 5, 3, 3)])
    with torch.inference_mode():
        problem.scales = [torch.rand(6, 1, 3, 3, dtype=torch.float64)]
    planned = Planned(problem)
    for _ in range(2):
        planned.assert_step()


NO_PLANS = {
    "complex": lambda p: p.params.__setitem__(0, torch.zeros(1030, dtype=torch.complex64)),
    "gaps": lambda p: p.params.__setitem__(0, torch.zeros(2060)[::2]),
    "unlike strides": lambda p: p.buffers.__setitem__(1, p.buffers[1].to(memory_format=torch.channels_last)),
    "unlike dtypes": lambda p: p.buffers.__setitem__(1, p.buffers[1].double()),
    "shared memory": lambda p: p.params.__setitem__(0, p.buffers[0][:]),
    "a negative group": lambda p: p.groups.__setitem__(0, -1),
}


@pytest.mark.parametrize("name", NO_PLANS)
def test_no_plan_is_made(name):
    problem = Problem(SHAPES)
    NO_PLANS[name](problem)
    assert Planned(problem).handle == 0


def test_a_freed_plan_keeps_nothing_alive():
    planned = Planned(Problem([(40,), (6, 5, 3, 3)]))
    planned.assert_step()
    seen = [weakref.ref(t) for t in (*planned.ours.params, *planned.ours.buffers)]
    handle = planned.handle
    rep_sgd_plan_free(planned.ours.params[0], handle)
    del planned
    gc.collect()
    assert all(ref() is None for ref in seen)
    with pytest.raises(KeyError):
        rep_sgd_plan_step(handle, [], [], [], [], None, None)


def test_a_second_step_has_plans_too():
    """With two states, and none of its hyper-parameters switches them off."""
    arrays = [[cases.tensor(shape, 10 * n + k, torch.float32) for k, shape in enumerate(SHAPES)] for n in range(4)]
    twins = [[t.clone() for t in column] for column in arrays]
    mults = [cases.multiplier(shape, "dense", len(shape) == 4 and shape[2] == 3, torch.float32) for shape in SHAPES]
    parts, groups = ([m.scale for m in mults], [m.identity for m in mults]), [n % 2 for n in range(len(SHAPES))]
    hyper = torch.tensor([[0.1, 0.5, 0.9], [0.01, 0.0, 1.0]], dtype=torch.float64)
    step = second_step.second_step
    params, grads, *states = arrays
    handle = step.plan(params, *states, *parts, groups)
    for _ in range(2):
        assert step.plan_step(handle, grads, hyper.flatten().tolist(), [], [], None, None)
        second_step.reference(*twins, *parts, [False] * len(SHAPES), groups, hyper)
        assert all(torch.equal(a, b) for ours, theirs in zip(arrays, twins) for a, b in zip(ours, theirs))
    assert step.plan(params, states[0], [None, *states[1][1:]], *parts, groups)
    step.plan_free(params[0], handle)


def test_a_parameter_in_the_place_of_its_state_is_no_overlap():
    """As without momentum, where lr is on the device and the host does not look which groups keep states."""
    problem = Problem(SHAPES, hypers=WITHOUT_MOMENTUM)
    problem.buffers = [p if g else b for p, b, g in zip(problem.params, problem.buffers, problem.groups)]
    have = have_states(problem.params, [problem.buffers], problem.groups, 2)
    assert have == [True, False]
    expected = problem.clone()
    expected.buffers = [p if g else b for p, b, g in zip(expected.params, expected.buffers, expected.groups)]
    expected.run(reference.rep_sgd_step)
    columns = problem.grads, problem.params, problem.buffers
    used = [2 + has for has in have]
    call = rep_sgd_step.plans.prepare(columns, problem.scales, problem.identities, groups=problem.groups, used=used)
    rep_sgd_step.launch(call, problem.hyper)
    assert_same_bits(problem, expected)
