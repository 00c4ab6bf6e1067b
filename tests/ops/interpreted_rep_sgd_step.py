"""The Triton step on CPU tensors, against the reference.

test_triton_rep_sgd_step.py runs this file with TRITON_INTERPRET=1. A program takes some 10 ms in the interpreter, so
cases are small: a few dozen programs each.
"""

from __future__ import annotations

import cases
import checks
import implementations
import pytest
import torch
from cases import Problem, assert_same_bits

from gradrep_kernels import FusedRepSGD, use_backend
from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import addressing, plans, rep_sgd_step, staging
from gradrep_kernels.ops.triton.launching import LAUNCHES

BLOCK = plans.BLOCK[torch.float32]
SHAPES = {
    **{
        name: cases.SHAPES[name]
        for name in ("empty", "scalar", "one", "prime", "conv_5x5", "conv_3x5", "conv_2x2", "grouped", "depthwise")
    },
    "block": (BLOCK,),
    "block_minus_1": (BLOCK - 1,),
    "block_plus_1": (BLOCK + 1,),
    "linear": (37, 29),
    "conv_3x3": (16, 8, 3, 3),
    "conv_3x3_square": (11, 11, 3, 3),
    "conv_1x1": (33, 34, 1, 1),
    "one_output": (1, 130, 3, 3),
}
FOUR_GROUPS = [cases.HYPERS[n] for n in (0, 3, 4, 8)]  # of them two without momentum, one maximizes with everything on


def run(problem: Problem, **amp) -> Problem:
    return problem.run(rep_sgd_step, **amp)


def expect(problem: Problem, **amp) -> Problem:
    return problem.clone().run(reference.rep_sgd_step, **amp)


def assert_step(problem: Problem, **amp) -> None:
    """One step of a copy has the reference's bits."""
    expected = expect(problem, **amp)
    assert_same_bits(run(problem.clone(), **amp), expected)


@pytest.fixture
def no_plans(monkeypatch):
    """A memory of its own, for tests that change what plans depend on."""
    own = plans.Plans("rep_sgd_step", plans.BLOCK, writes=True)
    monkeypatch.setattr(rep_sgd_step, "plans", own)
    return own


def test_it_is_interpreted():
    assert implementations.get("rep_sgd_step", "triton", "cpu") is rep_sgd_step


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_every_form_of_multiplier(form, channels_last):
    for identity in (False, True):
        assert_step(
            Problem(SHAPES.values(), form, identity, hypers=FOUR_GROUPS, channels_last=channels_last, first=identity)
        )


@pytest.mark.parametrize("hyper", cases.HYPERS, ids=lambda hyper: hyper.name)
def test_every_hyper_parameter(hyper):
    for dtype in (torch.float32, torch.float64):
        for first in (False, True):
            assert_step(Problem([(257,), (11, 11, 3, 3)], dtype=dtype, hypers=(hyper,), first=first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_unaligned_tensors_take_the_loop_of_small_blocks(dtype):
    """A whole block of them is not left out, and what lies beside them is not touched."""
    problem = Problem([(2 * BLOCK + 5,), (BLOCK,), (16, 8, 3, 3)], dtype=dtype)
    there = problem.clone()
    there.grads = [cases.unaligned(g, 1 + n) for n, g in enumerate(there.grads)]
    assert_same_bits(run(there), expect(problem))


def test_first_steps_are_per_parameter():
    problem = Problem([(40,), (5, 5, 3, 3)] * 3, hypers=(cases.HYPERS[4], cases.HYPERS[6]))
    problem.first = [True, False, False, True, True, False]
    for n, first in enumerate(problem.first):
        if first:
            problem.buffers[n].fill_(float("nan"))  # not yet initialised
    assert_step(problem)


def test_without_momentum_the_buffer_is_not_touched():
    problem = Problem([(300,), (5, 5, 3, 3)], hypers=(cases.HYPERS[1], cases.HYPERS[3]))
    problem.buffers[0] = torch.empty(0)  # any tensor
    assert_step(problem)
    problem.buffers[0] = problem.params[0]  # what the optimizer passes
    expected = expect(problem)
    assert torch.equal(run(problem).params[0], expected.params[0])


@pytest.mark.parametrize("form", ["repopt", "dense"])
def test_float16_has_the_references_bits(form):
    assert_step(Problem(SHAPES.values(), form, dtype=torch.float16, hypers=FOUR_GROUPS))


def test_bfloat16_is_rounded_once():
    """The interpreter cuts float32 off where a GPU rounds it to bfloat16. (test_rep_sgd_step.py tests a GPU's bits.)"""
    problem = Problem(SHAPES.values(), dtype=torch.bfloat16, hypers=FOUR_GROUPS)
    wide = problem.clone()
    for name in ("params", "grads", "buffers"):
        setattr(wide, name, [t.float() for t in getattr(wide, name)])
    actual, wide = run(problem.clone()), expect(wide)
    for n, (a, b) in enumerate(zip(actual.params + actual.buffers, wide.params + wide.buffers)):
        cut = (b.view(torch.int32) & -0x10000).view(torch.float32)
        assert bool(((a == cut.bfloat16()) | (a == b.bfloat16())).all()), n


def test_unscaling_and_overflow():
    for dtype in (torch.float32, torch.float64, torch.float16):
        problem = Problem(SHAPES.values(), dtype=dtype, hypers=FOUR_GROUPS)
        for scale, found_inf in ((3.0, None), (3.0, 0.0), (None, 0.0)):
            amp = {
                "grad_scale": scale and torch.tensor(scale),
                "found_inf": None if found_inf is None else torch.tensor([found_inf]),
            }
            assert_step(problem, **amp)
    for overflow in (1.0, 2, -1.0, float("nan"), torch.tensor(1e-300, dtype=torch.float64), torch.tensor(True)):
        assert_same_bits(
            run(problem.clone(), grad_scale=torch.tensor(3.0), found_inf=torch.as_tensor(overflow)), problem
        )


def test_zeros_infinities_and_nan_pass_through():
    checks.zeros_infinities_and_nan_pass_through(rep_sgd_step, "cpu")


def test_the_sign_of_zero():
    values = torch.tensor([0.0, -0.0, 1.0, -1.0])
    for hyper in cases.HYPERS:
        for first in (False, True):
            problem = Problem([(64,)], "number", hypers=(hyper,), first=first)
            problem.params, problem.grads, problem.buffers = (
                [t.flatten().clone()] for t in torch.meshgrid(values, values, values, indexing="ij")
            )
            expected, actual = expect(problem), run(problem)
            for a, b in zip(actual.params + actual.buffers, expected.params + expected.buffers):
                assert torch.equal(a.signbit(), b.signbit())


def test_an_identity_without_a_scale_is_not_read():
    problem = Problem([(5, 5, 3, 3)])
    problem.scales = [None]
    assert_step(problem)


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    checks.what_the_kernel_does_not_take_goes_to_the_reference(rep_sgd_step, "cpu")


SCALES = {
    "rows of the kernel": ((6, 5, 3, 3), lambda: torch.rand(6, 1, 3, 1)),
    "columns of the kernel": ((6, 5, 3, 3), lambda: torch.rand(6, 1, 1, 3)),
    "inputs and columns": ((6, 5, 3, 5), lambda: torch.rand(1, 5, 1, 5)),
    "inputs and rows": ((6, 5, 3, 5), lambda: torch.rand(5, 3, 1)),
    "float64 scale of a float32 weight": ((6, 5, 3, 3), lambda: torch.rand(6, 1, 3, 3, dtype=torch.float64)),
    "integers": ((6, 5, 3, 3), lambda: torch.arange(9).reshape(3, 3)),
    "transposed": ((6, 5, 3, 3), lambda: torch.rand(3, 3, 1, 6).permute(3, 2, 1, 0)),
    "expanded": ((6, 5, 3, 3), lambda: torch.rand(6, 1, 1, 1).expand(6, 5, 3, 3)),
    "every second": ((6, 5, 3, 3), lambda: torch.rand(12, 1, 3, 3)[::2]),
    "conv3d": ((4, 3, 2, 3, 3), lambda: torch.rand(4, 1, 2, 3, 3)),
    "conv3d, one depth": ((4, 3, 2, 3, 3), lambda: torch.rand(4, 1, 1, 3, 3)),
    "conv1d": ((7, 3, 5), lambda: torch.rand(7, 1, 5)),
    "1-D": ((130,), lambda: torch.rand(1)),
}


@pytest.mark.parametrize("name", SCALES)
def test_unusual_scales_are_read_too(name):
    shape, scale = SCALES[name]
    torch.manual_seed(0)
    for channels_last in (False, True):
        for identity in [None, torch.rand(12, dtype=torch.float64)[::2]] if len(shape) == 4 else [None]:
            problem = Problem([shape], "none", channels_last=channels_last)
            problem.scales, problem.identities = [scale()], [identity]
            LAUNCHES.clear()
            assert_step(problem)
            assert LAUNCHES["rep_sgd_step", "cpu", torch.float32] == 1  # not the reference


def test_any_dense_layout_is_taken():
    """A transposed linear layer, channels_last_3d, and a 1x1 convolution with other strides of dimensions of size 1."""
    for shape, order in (((9, 14), (1, 0)), ((4, 3, 2, 3, 3), (0, 2, 3, 4, 1)), ((5, 4, 3), (2, 0, 1))):
        problem = Problem([shape], "dense")
        for name in ("params", "grads", "buffers"):
            t = getattr(problem, name)[0]
            setattr(problem, name, [t.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])])
        LAUNCHES.clear()
        assert_step(problem)
        assert sum(LAUNCHES.values()) == 1
    problem = Problem([(6, 5, 1, 1)])
    problem.grads = [problem.grads[0].as_strided((6, 5, 1, 1), (5, 1, 5, 5))]
    LAUNCHES.clear()
    expected = expect(problem)
    assert torch.equal(run(problem).params[0], expected.params[0])
    assert sum(LAUNCHES.values()) == 1


def test_one_launch_per_dtype_for_all_groups():
    problems = [Problem([(70,), (6, 6, 3, 3), (300,)], dtype=dtype) for dtype in plans.COMPUTE]
    mixed = Problem([], hypers=cases.HYPERS)
    for name in ("params", "grads", "buffers", "scales", "identities"):
        setattr(mixed, name, [t for p in problems for t in getattr(p, name)])
    mixed.groups, mixed.first = [n % len(cases.HYPERS) for n in range(12)], [False] * 12
    LAUNCHES.clear()
    run(mixed)
    assert dict(LAUNCHES) == {("rep_sgd_step", "cpu", dtype): 1 for dtype in plans.COMPUTE}


def test_tensors_that_overlap_are_updated_one_after_another():
    flat, grads = cases.tensor((100,), 1, torch.float32), cases.tensor((100,), 2, torch.float32)
    expected = flat.clone()
    for step, base in ((reference.rep_sgd_step, expected), (rep_sgd_step, flat)):
        problem = Problem([], hypers=(cases.HYPERS[2],))
        problem.params, problem.grads = [base[:60], base[40:]], [grads[:60], grads[40:]]
        problem.buffers = [torch.ones(60), torch.ones(60)]
        problem.scales = problem.identities = [None, None]
        problem.groups, problem.first = [0, 0], [False, False]
        LAUNCHES.clear()
        problem.run(step)
    assert torch.equal(flat, expected)
    assert not LAUNCHES  # the interpreter's programs run one after another: only a GPU would show the race


def test_parts_of_large_tensors(monkeypatch, no_plans):
    """Every tensor in parts of at most 50 elements, as tensors beyond 2^30 elements are."""
    monkeypatch.setattr(addressing, "PIECE", 50)
    for form, identity in (("repopt", False), ("dense", False), ("per_input", False), ("repopt", True)):
        for channels_last in (False, True):
            assert_step(Problem([(6, 5, 3, 3), (7, 2, 3, 3), (120,)], form, identity, channels_last=channels_last))
    for form in ("dense", "last", "rows"):
        assert_step(Problem([(3, 120), (130,)], form))


def replace(problem: Problem, n: int, change) -> None:
    for name in ("params", "grads", "buffers"):
        getattr(problem, name)[n] = change(getattr(problem, name)[n])


def channels_last_in_place(t):
    return t.as_strided(t.shape, torch.empty(t.shape).contiguous(memory_format=torch.channels_last).stride())


CHANGES = {
    "nothing": lambda p: None,
    "new gradients": lambda p: setattr(p, "grads", [g.clone() * 2 for g in p.grads]),
    "a parameter moved": lambda p: p.params[0].set_(p.params[0].clone()),
    "a buffer moved": lambda p: p.buffers[0].set_(p.buffers[0].clone()),
    "one gradient with other strides": lambda p: p.grads.__setitem__(
        0, p.grads[0].contiguous(memory_format=torch.channels_last)
    ),
    "and all of that parameter": lambda p: replace(p, 0, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "other strides at the same addresses": lambda p: replace(p, 1, channels_last_in_place),
    "another shape at the same addresses": lambda p: replace(p, 2, lambda t: t.view(14, 5)),
    "a shorter one": lambda p: replace(p, 2, lambda t: t[:7]),
    "another dtype at the same addresses": lambda p: replace(p, 2, lambda t: t.view(-1)[:34].view(torch.float64)),
    "learning rate": lambda p: setattr(p, "hyper", p.hyper * torch.tensor([0.5, 1, 1, 1, 1, 1])),
    "momentum off": lambda p: setattr(p, "hyper", p.hyper * torch.tensor([1, 0, 1, 1, 1, 1])),
    "groups": lambda p: setattr(p, "groups", [1, 1, 0]),
    "first step of one": lambda p: setattr(p, "first", [True, False, False]),
    "new scale": lambda p: p.scales.__setitem__(1, p.scales[1] * 2),
    "scale of another dtype": lambda p: p.scales.__setitem__(0, p.scales[0].double()),
    "that scale written in place": lambda p: p.scales[0].mul_(3),
    "no identity": lambda p: setattr(p, "identities", [None] * 3),
    "fewer parameters": lambda p: [
        getattr(p, name).pop() for name in ("params", "grads", "buffers", "scales", "identities", "first", "groups")
    ],
}


def test_a_plan_is_checked_at_every_step(no_plans):
    problem = Problem([(6, 5, 3, 3), (4, 6, 3, 3), (70,)], hypers=(cases.HYPERS[6], cases.HYPERS[1]))
    twin = problem.clone()
    twin.scales = [None if s is None else s.clone() for s in problem.scales]
    for name, change in CHANGES.items():
        for _ in range(2):
            run(problem)
            twin.run(reference.rep_sgd_step)
        assert_same_bits(problem, twin)
        change(problem)
        change(twin)
        if name == "nothing":
            assert len(no_plans.plans) == len(no_plans.calls) == 1
    assert_same_bits(run(problem), twin.run(reference.rep_sgd_step))


def test_it_forgets(monkeypatch, no_plans):
    monkeypatch.setattr(staging, "REMEMBERED", 3)
    for n in range(1, 9):
        assert_step(Problem([(n,)]))
    assert len(no_plans.plans) <= 3
    assert len(no_plans.calls) <= 3


def test_a_step_of_the_optimizer_moves_the_version_counters():
    """The kernels do not, so the optimizer must; the gradients' only where they are unscaled."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((20,), (5, 5, 3, 3))]
    opt = FusedRepSGD(params, lr=0.1, momentum=0.9, fused=True)

    def versions():
        return [[t._version for t in (p, opt.state[p]["momentum_buffer"], p.grad)] for p in params]

    for p in params:
        p.grad = torch.ones_like(p)
    with use_backend("triton"):
        opt.step()
        for unscale in (False, True):
            before = versions()
            if unscale:
                opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            opt.step()
            assert [[b > a for a, b in zip(*pair)] for pair in zip(before, versions())] == [[True, True, unscale]] * 2


def test_nothing_to_do():
    checks.nothing_to_do(rep_sgd_step)
