"""The CUDA C++ step against the reference, to the bit: on a GPU, and emulated anywhere.

What only a GPU has is not judged by the emulation (emulated_step.py): machine code (test_compile_gate_cuda_step.py) and
streams.
"""

from __future__ import annotations

import itertools

import cases
import checks
import pytest
import torch
from cases import Problem, assert_same_bits
from cuda_steps import CHUNK, DTYPES, OnGpu, Planned
from implementations import on_gpu

from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.dense import share_memory

SHAPES = [
    *cases.SHAPES.values(),
    *((n,) for n in (CHUNK - 1, CHUNK, CHUNK + 1, 8 * CHUNK - 1, 8 * CHUNK, 8 * CHUNK + 1, 7919)),
]
FOUR_GROUPS = [cases.HYPERS[n] for n in (0, 3, 4, 8)]
SCALE, WENT_WELL, OVERFLOW = 3.0, 0.0, float("nan")


def agree(where, problem: Problem, **numbers: float) -> Problem:
    """Take a step there and one by the reference from the same start. Returns what they agree on."""
    numbers = {name: torch.tensor(value) for name, value in numbers.items()}
    there = {name: value.to(where.device) for name, value in numbers.items()}
    expected = problem.clone().run(reference.rep_sgd_step, **numbers)
    assert_same_bits(problem.clone(where.device).run(where.step, **there), expected)
    return expected


# ---- the ops


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_multiplier_has_the_references_bits(where, form, dtype, channels_last):
    for identity, first in ((False, True), (True, False)):
        agree(where, Problem(SHAPES, form, identity, dtype, FOUR_GROUPS, channels_last, first))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("hyper", cases.HYPERS, ids=[h.name for h in cases.HYPERS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_hyper_parameter(where, dtype, hyper, first):
    for form in ("none", "number", "repopt"):
        agree(where, Problem([(257,), (17, 17, 3, 3), (5, 7, 3, 5)], form, True, dtype, (hyper,), first=first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscaling_and_overflow(where, dtype):
    problem = Problem(SHAPES, dtype=dtype, hypers=FOUR_GROUPS)
    agree(where, problem, grad_scale=SCALE)
    changed = agree(where, problem, grad_scale=SCALE, found_inf=WENT_WELL)
    assert not torch.equal(changed.grads[3], problem.grads[3])
    for overflow in (1.0, -1.0, OVERFLOW):
        assert_same_bits(agree(where, problem, grad_scale=SCALE, found_inf=overflow), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [("grads",), ("params",), ("buffers",), ("grads", "params", "buffers")], ids="-".join)
def test_unaligned_tensors(where, what, dtype):
    problem = Problem(SHAPES, "repopt", dtype=dtype)
    there = problem.clone(where.device)
    for name in what:
        setattr(there, name, [cases.unaligned(t, 1 + n % 3) for n, t in enumerate(getattr(there, name))])
    scale = {"grad_scale": torch.tensor(SCALE)}
    on_device = {"grad_scale": scale["grad_scale"].to(where.device)}
    assert_same_bits(there.run(where.step, **on_device), problem.clone().run(reference.rep_sgd_step, **scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(where, dtype):
    """As a weight and a gradient: rounding, denormals, infinities, NaN. A float64 sum of two is rounded once, too."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    problem = Problem([(2**16,)], "none", dtype=dtype, hypers=(cases.HYPERS[6],))
    problem.params, problem.grads, problem.buffers = [every], [shuffled], [shuffled.roll(1)]
    agree(where, problem)


def test_zeros_infinities_and_nan_pass_through(where):
    checks.zeros_infinities_and_nan_pass_through(where.step, where.device)


def test_what_the_kernel_does_not_take_goes_to_the_reference(where):
    checks.what_the_kernel_does_not_take_goes_to_the_reference(where.step, where.device)


def test_nothing_to_do(where):
    checks.nothing_to_do(where.step)


# ---- multipliers that are read from copies, or in unusual ways

UNUSUAL = {  # weight, its order in memory, scale, identity
    "[O, 1, kh, 1]": ((6, 5, 3, 5), (0, 1, 2, 3), (6, 1, 3, 1), True),
    "[O, 1, 1, kw]": ((6, 5, 3, 5), (0, 2, 3, 1), (6, 1, 1, 5), True),
    "[1, I, kh, 1]": ((6, 5, 3, 5), (0, 1, 2, 3), (1, 5, 3, 1), False),
    "[O, 1, kd, 1, kw]": ((4, 3, 3, 2, 5), (0, 1, 2, 3, 4), (4, 1, 3, 1, 5), False),
    "[O, 1, kd, 1, kw], channels last": ((4, 3, 3, 2, 5), (0, 2, 3, 4, 1), (4, 1, 3, 1, 5), False),
    "outputs innermost": ((6, 5, 3, 3), (2, 3, 1, 0), (6, 1, 3, 3), True),
    "outputs innermost, a number": ((6, 5, 3, 3), (1, 3, 2, 0), (), True),
    "inputs outermost": ((6, 5, 3, 3), (1, 0, 3, 2), (6, 5, 1, 1), True),
    "one output": ((1, 5, 3, 3), (1, 0, 3, 2), (1, 5, 3, 3), True),
    "one input": ((7, 1, 3, 3), (0, 1, 2, 3), (7, 1, 3, 3), True),
    "more outputs than inputs": ((13, 3, 3, 3), (0, 2, 3, 1), (13, 3, 3, 3), True),
}


def laid_out(t: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same numbers, with the dimensions in this order in memory."""
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_multipliers(where, name, dtype, wide, strided):
    """`wide`: a multiplier of float64, whatever is computed in. `strided`: with gaps between its numbers."""
    shape, order, scale_shape, identity = UNUSUAL[name]
    problem = Problem([shape], "none", dtype=dtype)
    for list_name in ("params", "grads", "buffers"):
        setattr(problem, list_name, [laid_out(t, order) for t in getattr(problem, list_name)])
    parts = [cases.tensor(scale_shape, 7).abs(), cases.tensor(shape[:1], 8).abs() if identity else None]
    parts = [part if part is None or wide else part.float() for part in parts]
    if strided:
        parts = [part if part is None else torch.stack((part, -part), dim=-1)[..., 0] for part in parts]
    problem.scales, problem.identities = ([part] for part in parts)
    assert not problem.params[0].is_contiguous() or order == tuple(range(len(order))) or 1 in shape
    agree(where, problem)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("most", [16, 150, 1000])
def test_pieces(emulated, most, channels_last):
    """As tensors beyond 2³⁰ elements are cut, here at small ones."""
    emulated.told.most_of_piece = most
    shapes = [(257,), (40, 30), (3, 1100), (2, 3, 25, 25), (17, 17, 3, 3), (40, 3, 3, 3), (19, 1, 3, 3), (6, 7, 5, 5)]
    for form, identity in itertools.product(cases.scale_shapes(shapes[-1]), (False, True)):
        agree(emulated, Problem(shapes, form, identity, channels_last=channels_last))
    assert emulated.told.blocks > len(shapes)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_update_with_two_states(emulated, dtype, first):
    """What another optimizer adds is its rule and its op's arguments (second_update.h)."""
    second_step = pytest.importorskip("second_step", reason="Triton is not installed")
    problem = Problem(SHAPES, dtype=dtype, first=first)
    slow = [cases.tensor(p.shape, 500 + n, dtype) for n, p in enumerate(problem.params)]
    hyper = torch.tensor([[0.1, 0.9, 0.99]], dtype=torch.float64)
    ends = []
    for step in (emulated.second_step, second_step.reference):
        twin, own = problem.clone(), [t.clone() for t in slow]
        params, grads, fast, *rest = twin.lists()
        step(params, grads, fast, own, *rest, hyper)
        ends.append(twin)
        ends.append(own)
    assert_same_bits(ends[0], ends[2])
    assert all(torch.equal(a, b) for a, b in zip(ends[1], ends[3]))


# ---- launches


def test_one_launch_for_all_parameters_of_a_dtype(emulated):
    problem = Problem(SHAPES)
    for n, dtype in enumerate(itertools.cycle(DTYPES)):
        if n == len(SHAPES):
            break
        for t in (problem.params, problem.grads, problem.buffers):
            t[n] = t[n].to(dtype)
    agree(emulated, problem)
    assert emulated.told.launches == len(DTYPES)


def test_more_parameters_than_a_launch_has_room_for(emulated):
    agree(emulated, Problem([(n % 7 + 1, 2, 3, 3) for n in range(600)], hypers=FOUR_GROUPS))
    assert emulated.told.launches == -(-600 // emulated.rows_of_a_launch()) > 1


def test_chunks(emulated):
    """A small network has a block for each 1024 elements, a large one for each 8192."""
    for elements, chunk in ((20 * CHUNK, CHUNK), (1024 * 8 * CHUNK, 8 * CHUNK)):
        emulated.told.blocks = 0
        problem = Problem([(elements,)], "none")
        problem.clone().run(emulated.step)
        assert emulated.told.blocks == elements // chunk


@pytest.mark.parametrize("amp", [False, True])
def test_a_captured_launch_reads_what_is_there_at_the_replay(where, amp):
    """A CUDA graph keeps a launch's parameters and no more; the geometry may be new in the capture."""
    problem = Problem(SHAPES, hypers=FOUR_GROUPS).clone(where.device)
    problem.scales[-1] = torch.tensor(0.5, dtype=torch.float64, device=where.device)  # read from a copy
    numbers = {}
    if amp:
        numbers = {name: torch.ones((), device=where.device) for name in ("grad_scale", "found_inf")}
    before = problem.clone("cpu")
    with where.capture() as replay:
        problem.run(where.step, **numbers)
    assert_same_bits(problem, before)
    for overflow in (0.0, 1.0, 0.0):
        for n, g in enumerate(problem.grads):
            g.copy_(cases.tensor(g.shape, 77 + n, g.dtype))
        if amp:
            numbers["grad_scale"].mul_(1.5)
            numbers["found_inf"].fill_(overflow)
        on_cpu = {name: number.cpu() for name, number in numbers.items()}
        expected = problem.clone("cpu").run(reference.rep_sgd_step, **on_cpu)
        replay()
        assert_same_bits(problem, expected)


# ---- plans


def test_a_plan_follows_new_values_and_places(where):
    problem = Problem(SHAPES, hypers=FOUR_GROUPS, dtype=torch.float32)
    there = problem.clone(where.device)
    plan = Planned(where, there)
    for n in range(4):
        problem.hyper[:, 0] *= 0.7
        for twin in (problem, there):
            twin.grads = [cases.tensor(g.shape, 50 + n, g.dtype).to(g.device) for g in twin.grads]
        if n == 2:  # no longer aligned
            there.grads = [cases.unaligned(g) for g in there.grads]
        assert plan.step(problem.hyper)
        assert_same_bits(there, problem.run(reference.rep_sgd_step))


def test_a_plan_keeps_the_copies_that_it_reads(where):
    problem = Problem([(6, 5, 3, 5), (40,)], "none")
    problem.scales = [cases.tensor((6, 1, 3, 1), 7).abs(), torch.tensor(2.0, dtype=torch.float64)]
    there = problem.clone(where.device)
    plan = Planned(where, there)
    there.scales = None
    for _ in range(3):
        [torch.full((90,), torch.nan, device=where.device) for _ in range(20)]  # would take over memory that was let go
        assert plan.step()
        assert_same_bits(there, problem.run(reference.rep_sgd_step))


@pytest.mark.parametrize("number", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "columns", [("lr",), ("lr", "weight_decay"), ("momentum",), reference.rep_sgd_step.op.step.hyper]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_on_the_device(where, dtype, columns, number):
    """Of three groups in forty. A plan packs them there, and the host reads none."""
    hypers = [cases.HYPERS[n % len(cases.HYPERS)] for n in range(40)]
    problem = Problem([(33,)] * 40, "number", dtype=dtype, hypers=hypers)
    there = problem.clone(where.device)
    plan, names = Planned(where, there), reference.rep_sgd_step.op.step.hyper
    on_device = {}
    for group, column in itertools.product((2, 8, 36), columns):
        place = group * len(names) + names.index(column)
        on_device[place] = problem.hyper.view(-1)[place].to(where.device, number, copy=True)
    for n in range(2):
        given = problem.hyper.clone()
        for place, value in on_device.items():
            value.mul_(1 - 0.25 * n)
            problem.hyper.view(-1)[place] = value.double().cpu()
            given.view(-1)[place] = 0.0  # as the caller has it
        assert plan.step(given, on_device)
        assert_same_bits(there, problem.run(reference.rep_sgd_step))


def test_a_captured_number_on_the_device(where):
    problem = Problem([(33,), (8, 8, 3, 3)])
    there = problem.clone(where.device)
    lr, plan = torch.tensor(0.1, device=where.device), Planned(where, there)
    with where.capture() as replay:
        assert plan.step(on_device={0: lr})
    for _ in range(3):
        lr.mul_(0.5)
        problem.hyper[0, 0] = lr.double().cpu()
        replay()
        assert_same_bits(there, problem.run(reference.rep_sgd_step))


def replaced(name: str, n: int, make):
    """A change: the tensor n of a list becomes another."""

    def change(problem: Problem) -> None:
        tensors = getattr(problem, name)
        tensors[n] = make(problem)

    return change


def moved(name: str, n: int, make):
    """A change: the tensor n of a list, which the plan knows, has other memory."""
    return lambda problem: getattr(problem, name)[n].set_(make(problem))


CHANGES = {
    "dtype": replaced("grads", 0, lambda p: p.grads[0].double()),
    "shape": replaced("grads", 0, lambda p: p.grads[0][:-1]),
    "strides": replaced("grads", 1, lambda p: p.grads[1].to(memory_format=torch.channels_last)),
    "strides of the parameter": moved("params", 1, lambda p: p.params[1].to(memory_format=torch.channels_last)),
    "strides of the buffer": moved("buffers", 1, lambda p: p.buffers[1].to(memory_format=torch.channels_last)),
    "parameters that share memory": moved("params", 2, lambda p: p.params[0][1:]),
    "a buffer in a parameter": moved("buffers", 2, lambda p: p.params[1].view(-1)[:39]),
    "a gradient in a parameter": replaced("grads", 2, lambda p: p.params[1].view(-1)[:39]),
    "a gradient too few": lambda p: p.grads.pop(),
    "a group too few": lambda p: setattr(p, "hyper", p.hyper[:1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_refuses_what_is_not_as_it_was(where, change):
    """It does nothing then."""
    problem = Problem([(40,), (8, 6, 3, 3), (39,)], hypers=FOUR_GROUPS[1:3]).clone(where.device)
    plan = Planned(where, problem)
    grads = problem.grads[:]
    assert plan.step()
    CHANGES[change](problem)
    before = problem.clone("cpu")
    assert not plan.step()
    assert_same_bits(problem, before)
    problem.grads = grads
    assert plan.step() == (change in ("dtype", "shape", "strides", "a gradient in a parameter", "a gradient too few"))


def test_a_plan_takes_one_gradient_for_two_parameters(where):
    """It is only read. Where gradients are divided, it would be divided twice."""
    problem = Problem([(40,), (40,)], "none")
    there = problem.clone(where.device)
    plan = Planned(where, there)
    problem.grads[1], there.grads[1] = problem.grads[0], there.grads[0]
    assert plan.step()
    assert_same_bits(there, problem.run(reference.rep_sgd_step))
    assert not plan.step(grad_scale=torch.tensor(2.0, device=where.device))


def test_a_plan_without_momentum_has_no_buffers(where):
    problem = Problem([(40,), (8, 6, 3, 3)], hypers=(cases.HYPERS[1],))
    there = problem.clone(where.device)
    there.buffers = [None, None]
    plan = Planned(where, there)
    assert plan.step()
    there.buffers = [b.clone() for b in problem.buffers]
    assert_same_bits(there, problem.run(reference.rep_sgd_step))
    with_momentum = there.hyper.clone()
    with_momentum[0, 1] = 0.9
    assert not plan.step(with_momentum)
    assert not plan.step(on_device={1: torch.tensor(0.9, device=where.device)})
    assert plan.step(on_device={0: torch.tensor(0.9, device=where.device)})


@pytest.mark.parametrize(
    "scale", [torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)], ids=["as it is", "a copy"]
)
def test_copies_serve_the_stream_that_they_were_made_on(emulated, scale):
    """Later work of that stream may take their memory over while another stream reads them."""
    problem = Problem([(40,)], "none")
    problem.scales = [scale]
    plan = Planned(emulated, problem)
    assert plan.step()
    emulated.told.stream = 2
    assert plan.step() == (scale.dtype == torch.float32)


def test_a_plan_whose_parameters_moved_to_another_device_is_refused_there(emulated):
    """Torch then gives its handle to the kernels of that device, here: the handle of one module to the other."""
    if backends.planner("rep_sgd_step", "cpu") is None:
        pytest.skip("no C++ kernels")
    problem = Problem([(40,)])
    plan = Planned(emulated, problem)
    before = problem.clone()
    step = torch.ops.gradrep_kernels.rep_sgd_plan_step
    hyper = problem.hyper.flatten().tolist()
    assert step(plan.handle, [problem.grads[0].double()], hyper, [], [], None, None) is False
    assert_same_bits(problem, before)
    assert step(plan.handle, problem.grads, hyper, [], [], None, None) is True
    assert_same_bits(problem, before.run(reference.rep_sgd_step))


def test_wrong_arguments(where):
    problem = Problem([(8, 6, 3, 3)], "none").clone(where.device)
    for scale, identity, message in (
        (torch.ones(7, 1, 1, 1), None, "broadcast"),
        (torch.ones(1, 1, 1, 3, 3), None, "broadcast"),
        (torch.ones(8, 1, 3, 3), torch.ones(7), "one number per output channel"),
    ):
        problem.scales, problem.identities = ([t if t is None else t.to(where.device)] for t in (scale, identity))
        before = problem.clone("cpu")
        with pytest.raises(RuntimeError, match=message):
            problem.run(where.step)
        assert_same_bits(problem, before)
    problem.scales = problem.identities = [None]
    with pytest.raises(RuntimeError, match="one float32 number"):
        Planned(where, problem).step(grad_scale=torch.ones(2, device=where.device))


def test_share_memory():
    whole = torch.zeros(100)
    assert not share_memory([(whole[:50],), (whole[50:],)])
    assert share_memory([(whole[:51],), (whole[50:],)])
    assert share_memory([(whole,), (whole,)])
    assert share_memory([(whole[:60], whole[40:])])
    assert not share_memory([(whole, whole), (torch.zeros(100),), (whole[:0],), (whole[:0],)])
    assert share_memory([(whole,), (torch.zeros(5), whole[3:4])])


# ---- what only a GPU shows


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_kernel_of_a_planned_step(dtype):
    problem = Problem(SHAPES, dtype=dtype, device="cuda", hypers=FOUR_GROUPS)
    plan = Planned(OnGpu(), problem)
    assert plan.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert plan.step()
        torch.cuda.synchronize()
    (kernel,) = (e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    assert "step_kernel" in kernel


@on_gpu
def test_the_host_waits_for_nothing():
    problem = Problem(SHAPES, device="cuda", hypers=FOUR_GROUPS)
    where, lr = OnGpu(), torch.tensor(0.1, device="cuda")
    amp = {"grad_scale": torch.tensor(2.0, device="cuda"), "found_inf": torch.zeros((), device="cuda")}
    plan = Planned(where, problem)
    table = problem.hyper.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(where.step, **amp)
        assert plan.step(on_device={0: lr}, **amp)
        problem.hyper = table
        problem.run(where.step, **amp)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
def test_parameters_on_several_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = Problem(SHAPES, hypers=FOUR_GROUPS)
    there = problem.clone()
    for name in ("params", "grads", "buffers", "scales", "identities"):
        column = getattr(there, name)
        setattr(there, name, [t if t is None else t.to(f"cuda:{n % 2}") for n, t in enumerate(column)])
    assert_same_bits(there.run(OnGpu().step), problem.run(reference.rep_sgd_step))
