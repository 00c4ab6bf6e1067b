"""The tail of the CUDA C++ step against the reference: clipping, averages and states in bfloat16. To the bit.

On a GPU, and emulated anywhere (emulated_step.py).
"""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from cases import Problem
from cuda_steps import CHUNK, DTYPES, Planned, Tailed, assert_same_tails

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.rounding_rule import random_bits, rounded
from gradrep_kernels.ops.reference.step_tail import COLUMNS

SHAPES = [(0, 3), (), (1,), (257,), (129, 65), (17, 17, 3, 3), (5, 7, 3, 5), (19, 1, 3, 3), (7919,), (8 * CHUNK + 1,)]
SCALE = 3.0
NORM = {torch.float64: 1e-14}  # of the norm, relative
LOW = 7e-7  # csrc/rep_grad_norm_cuda.h


def agree(where, problem: Tailed, **numbers: torch.Tensor) -> Tailed:
    """Take a step there and one by the reference from the same start. Returns what they agree on."""
    there = {name: value.to(where.device) for name, value in numbers.items()}
    expected = problem.clone().run(reference.rep_sgd_step, **numbers)
    assert_same_tails(problem.clone(where.device).run(where.step, **there), expected)
    return expected


def norm_of(problem: Problem, grad_scale: float = 1.0) -> float:
    wide = [g.double() for g in problem.grads]
    return float(reference.rep_grad_norm(wide, problem.scales, problem.identities)) / grad_scale


def factor_of(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """As torch.nn.utils.clip_grad_norm_ has it."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


# ---- the op


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(where, dtype, narrow):
    clips = [{}, {"clip": torch.tensor(0.37)}, {"clip": torch.tensor(1 / 3, dtype=torch.float64)}]
    scales = [{}, {"grad_scale": torch.tensor(SCALE)}]
    columns = itertools.product(clips, scales, (False, True), (False, True))
    for n, (clip, scale, averages, first) in enumerate(columns):
        hypers = cases.HYPERS[n % 2 :] + cases.HYPERS[: n % 2]
        form = ("repopt", "dense", "number")[n % 3]
        problem = Tailed(
            SHAPES, form, dtype=dtype, hypers=hypers, first=first, averages=averages, narrow=narrow, channels_last=n % 2
        )
        changed = agree(where, problem, **clip, **scale)
        assert not torch.equal(changed.buffers[5], problem.buffers[5])
        assert not averages or not torch.equal(changed.averages[4], problem.averages[4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["params", "grads", "buffers", "averages"])
def test_unaligned_tensors(where, what, dtype):
    """One kind of them, by one to eight elements: a state in bfloat16 is aligned where four elements are."""
    problem = Tailed(SHAPES, dtype=dtype, hypers=cases.HYPERS[2:6])
    there = problem.clone(where.device)
    for n, t in enumerate(getattr(there, what)):
        if t is not None:
            getattr(there, what)[n] = cases.unaligned(t, 1 + n % 8)
    clip = torch.tensor(0.25)
    expected = problem.run(reference.rep_sgd_step, clip=clip)
    assert_same_tails(there.run(where.step, clip=clip.to(where.device)), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("most", [16, 150, 1000])
def test_pieces(emulated, most, channels_last):
    """The random bits of a piece begin at its own place, and so does its average."""
    emulated.told.most_of_piece = most
    shapes = [(257,), (40, 30), (3, 1100), (17, 17, 3, 3), (40, 3, 3, 3), (6, 7, 5, 5)]
    for form, dtype in (("repopt", torch.float32), ("dense", torch.bfloat16), ("none", torch.float64)):
        problem = Tailed(shapes, form, dtype=dtype, channels_last=channels_last)
        problem.elements = [torch.tensor([n]) for n in range(len(shapes))]
        agree(emulated, problem, clip=torch.tensor(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [*range(1, 9), 2**32 - 5, 2**35 - 3, 2**40 + 6])
def test_a_run_of_a_parameter(where, first, dtype):
    """Its elements have the numbers that they have in the whole, of which 35 bits count."""
    problem = Tailed([(257,), (40, 3, 3, 3), (1,)], dtype=dtype)
    problem.elements = [torch.tensor([first]), torch.tensor([first + 1]), torch.tensor([first + 2])]
    agree(where, problem)


def test_shards_have_the_bits_of_the_whole(where):
    whole = Tailed([(5000,)], "none", averages=False)
    stepped = whole.clone(where.device).run(where.step)
    for begin, end in ((0, 1), (1, 1030), (1030, 5000)):
        part = whole.clone(where.device)
        for name in ("params", "grads", "buffers"):
            setattr(part, name, [getattr(part, name)[0][begin:end].clone()])
        part.elements = [torch.tensor([begin])]
        part.run(where.step)
        assert torch.equal(part.buffers[0], stepped.buffers[0][begin:end])
    other = whole.clone(where.device)
    other.numbers = None  # then they are 0, 1, ...
    assert not torch.equal(other.run(where.step).buffers[0], stepped.buffers[0])
    other = whole.clone()
    other.numbers = None
    agree(where, other)


def test_every_float_is_rounded_as_the_rule_says(where):
    """The upper 16 bits are all there are, the lower ones some: infinities, NaN, denormals, the greatest."""
    upper = torch.arange(2**16, dtype=torch.int64).repeat_interleave(4) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0xFFFF]).repeat(2**16)
    values = (upper | lower).to(torch.int32).view(torch.float32)
    problem = Tailed([(len(values),)], "none", hypers=(cases.HYPERS[2],), first=True)
    problem.grads = [values]
    agree(where, problem)


def test_two_states_have_other_random_bits(emulated):
    """Each state has its number, and all are bfloat16 (second_update.h)."""
    second_step = pytest.importorskip("second_step", reason="Triton is not installed")
    problem = Tailed([(257,), (40, 3, 3, 3)], hypers=(cases.HYPERS[0],), averages=False)
    hyper = torch.tensor([[0.1, 0.9, 0.99]], dtype=torch.float64)
    slow = [b.flip(0) for b in problem.buffers]
    twin, own = problem.clone(), [t.clone() for t in slow]
    params, grads, fast, *rest = twin.lists()
    emulated.second_step(params, grads, fast, own, *rest, hyper, None, None, problem.tail)
    for k, wide in enumerate(zip(problem.buffers, slow)):
        wide = [t.float() for t in wide]
        lists = [[t] for t in (problem.params[k], problem.grads[k], *wide, problem.scales[k], problem.identities[k])]
        second_step.reference(*lists, [False], [0], hyper)
        for which, (value, actual) in enumerate(zip(wide, (fast[k], own[k]))):
            elements = torch.arange(value.numel()).reshape(value.shape)
            bits = random_bits(elements, int(problem.tail[2]), int(problem.tail[3]), k, which)
            assert torch.equal(actual, rounded(value, bits))
        assert torch.equal(params[k], problem.params[k])
    mixed = [params[:1], grads[:1], fast[:1], [own[0].float()], *(column[:1] for column in rest)]
    with pytest.raises(RuntimeError, match="must be alike"):
        emulated.second_step(*mixed, hyper, tail=problem.tail)


# ---- launches and plans


def test_several_launches_of_several_dtypes(emulated):
    """Some parameters of float32 have states in bfloat16, some not. Those are two launches."""
    count = 260
    problem = Tailed([(n % 7 + 1, 2, 3, 3) for n in range(count)], hypers=cases.HYPERS[2:6])
    for n in range(count):
        if n % 20 == 1:
            problem.buffers[n] = problem.buffers[n].float()
        if n % 20 == 2:
            for name in ("params", "grads", "buffers"):
                tensors = getattr(problem, name)
                tensors[n] = tensors[n].to(torch.float16)
    problem.averages = [None if p.dtype == torch.float16 else e for p, e in zip(problem.params, problem.averages)]
    agree(emulated, problem, clip=torch.tensor(0.5))
    narrow = sum(b.dtype == torch.bfloat16 for b in problem.buffers)
    assert emulated.told.launches == -(-narrow // emulated.rows_of_a_launch()) + 2 == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", DTYPES, ids=str)
def test_numbers_of_the_tail_on_the_device(where, number, dtype):
    problem = Tailed([(257,), (40, 3, 3, 3), (1,)], dtype=dtype, seed=96, hypers=cases.HYPERS[2:4])
    there = problem.clone(where.device)
    plan, hyper = Planned(where, there), problem.hyper.numel()
    tail = {name: problem.tail[n].to(where.device, number) for n, name in enumerate(COLUMNS)}
    lr = torch.tensor(0.125, dtype=number, device=where.device)
    for names, with_lr in ((COLUMNS[:1], False), (COLUMNS[2:], True), (COLUMNS, False), (COLUMNS, True)):
        on_device = {hyper + COLUMNS.index(name): tail[name] for name in names}
        if with_lr:
            on_device[0], problem.hyper[0, 0] = lr, 0.125
        tail["step"].add_(1)
        for n, name in enumerate(COLUMNS):
            problem.tail[n] = tail[name].double().cpu()
        given = problem.tail.clone()
        for name in names:
            given[COLUMNS.index(name)] = 0.0  # as the caller has it
        assert plan.step(problem.hyper, on_device, tail=given.tolist())
        assert_same_tails(there, problem.run(reference.rep_sgd_step))
    # Whether bits are random is on the device, too.
    tail["stochastic"].fill_(0)
    problem.tail[1] = 0
    assert plan.step(problem.hyper, on_device)
    assert_same_tails(there, problem.run(reference.rep_sgd_step))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planned_step_clips_by_its_own_norm(where, dtype, narrow):
    problem = Tailed(SHAPES, dtype=dtype, narrow=narrow, hypers=cases.HYPERS[2:6])
    there = problem.clone(where.device)
    plan = Planned(where, there)
    norm = torch.empty((), dtype=dtype if dtype == torch.float64 else torch.float32, device=where.device)
    for n, (share, amp) in enumerate(itertools.product((0.5, 2.0), (False, True))):
        numbers = {}
        if amp:
            numbers = {"grad_scale": torch.tensor(SCALE), "found_inf": torch.tensor(0.0)}
        for twin in (problem, there):
            twin.grads = [cases.tensor(g.shape, 50 + n, g.dtype).to(g.device) for g in twin.grads]
        true = norm_of(problem, SCALE if amp else 1.0)
        assert plan.norm(norm)
        assert float(norm) == pytest.approx(norm_of(problem), rel=NORM.get(dtype, LOW))
        whole = norm.cpu().clone()
        norm.zero_()
        on_device = {name: number.to(where.device) for name, number in numbers.items()}
        assert plan.step(**on_device, max_norm=share * true, norm=norm)
        assert float(norm) == pytest.approx(true, rel=NORM.get(dtype, LOW))
        assert norm.cpu() == (whole / torch.tensor(SCALE, dtype=whole.dtype) if amp else whole)
        factor = factor_of(norm.cpu(), share * true)
        assert (factor < 1) == (share < 1)
        assert_same_tails(there, problem.run(reference.rep_sgd_step, clip=factor, **numbers))


def test_a_norm_that_is_no_number(where):
    """NaN stays NaN, and a step that is skipped has a norm."""
    problem = Tailed([(40,), (8, 6, 3, 3)])
    problem.grads[0][3] = torch.inf
    there = problem.clone(where.device)
    plan, norm = Planned(where, there), torch.zeros((), device=where.device)
    amp = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(1.0)}
    before = problem.clone()
    assert plan.step(max_norm=1.0, norm=norm, **{name: number.to(where.device) for name, number in amp.items()})
    assert torch.isinf(norm)
    assert_same_tails(there, before)
    assert plan.step(max_norm=1.0, norm=norm)
    assert_same_tails(there, problem.run(reference.rep_sgd_step, clip=torch.tensor(0.0)))
    for twin in (problem, there):
        twin.grads[0][4] = torch.nan
    assert plan.step(max_norm=1.0, norm=norm)
    assert torch.isnan(norm)
    assert_same_tails(there, problem.run(reference.rep_sgd_step, clip=torch.tensor(torch.nan)))


def test_one_norm_for_several_dtypes(emulated):
    """It is float64 then, the factor is rounded for float32, and the launches are those of both and one more."""
    problem = Tailed([(300,), (40, 20), (7, 5, 3, 3), (33,)], "number", narrow=False)
    for n, dtype in enumerate(DTYPES):
        for tensors in (problem.params, problem.grads, problem.buffers):
            tensors[n] = tensors[n].to(dtype)
        if problem.averages[n] is not None:
            problem.averages[n] = problem.averages[n].to(torch.float64 if dtype == torch.float64 else torch.float32)
        if problem.scales[n] is not None and dtype == torch.float64:
            problem.scales[n] = problem.scales[n].double()
    there = problem.clone()
    plan, norm = Planned(emulated, there), torch.zeros((), dtype=torch.float64)
    emulated.told.launches = 0
    assert plan.step(max_norm=1.0, norm=norm)
    assert emulated.told.launches == 2 * len(DTYPES) + 1
    assert float(norm) == pytest.approx(norm_of(problem), rel=LOW)
    assert_same_tails(there, problem.run(reference.rep_sgd_step, clip=factor_of(norm, 1.0)))
    for wrong in (torch.zeros(()), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="norm must be one number"):
            plan.step(max_norm=1.0, norm=wrong)
        with pytest.raises(RuntimeError, match="norm must be one number"):
            plan.norm(wrong)
    assert_same_tails(there, problem)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_captured_step_reads_its_numbers_at_the_replay(where, narrow):
    """The count of steps, the factor of the norm, whether the step is skipped."""
    problem = Tailed(SHAPES, narrow=narrow, hypers=cases.HYPERS[2:6])
    there = problem.clone(where.device)
    plan, count = Planned(where, there), torch.tensor(9.0, device=where.device)
    norm, amp = torch.zeros((), device=where.device), torch.ones(2, device=where.device)
    place = problem.hyper.numel() + COLUMNS.index("step")
    with where.capture() as replay:
        numbers = {"grad_scale": amp[0], "found_inf": amp[1]}
        assert plan.step(on_device={place: count}, max_norm=20.0, norm=norm, **numbers)
    assert_same_tails(there, problem)
    for n, overflow in enumerate((0.0, 1.0, 0.0)):
        for twin in (problem, there):
            for k, g in enumerate(twin.grads):
                g.copy_(cases.tensor(g.shape, 77 + n + k) * 2**n)
        amp[0], amp[1] = 1.5**n, overflow
        count.add_(1)
        problem.tail[3] = float(count)
        true = norm_of(problem, 1.5**n)
        replay()
        assert float(norm) == pytest.approx(true, rel=LOW)
        on_cpu = {"grad_scale": amp[0].cpu(), "found_inf": amp[1].cpu()}
        problem.run(reference.rep_sgd_step, clip=factor_of(norm.cpu(), 20.0), **on_cpu)
        assert_same_tails(there, problem)


def set_to(name: str, n: int, make):
    """A change: the tensor n of a list, which the plan knows, becomes another."""
    return lambda problem: getattr(problem, name)[n].set_(make(problem))


CHANGES = {
    "states to the nearest": lambda p: p.tail.mul_(torch.tensor([1, 0, 1, 1])),
    "strides of an average": set_to(
        "averages", 1, lambda p: p.averages[1].contiguous(memory_format=torch.channels_last)
    ),
    "an average in a parameter": set_to("averages", 0, lambda p: p.params[1].view(-1)[:40]),
    "a state in an average": lambda p: p.buffers[0].set_(p.averages[1].view(torch.bfloat16).view(-1)[:40]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_refuses_what_is_not_as_it_was(where, change):
    """It does nothing then. The norm is refused for the gradients alone."""
    problem = Tailed([(40,), (8, 6, 3, 3)]).clone(where.device)
    plan = Planned(where, problem)
    norm = torch.zeros((), device=where.device)
    assert plan.step(max_norm=1.0, norm=norm)
    CHANGES[change](problem)
    norm.fill_(-1)
    before = problem.clone("cpu")
    assert not plan.step(max_norm=1.0, norm=norm)
    assert float(norm) == -1
    assert_same_tails(problem, before)
    assert plan.norm(norm)
    assert float(norm) == pytest.approx(norm_of(problem.clone("cpu")), rel=LOW)
    problem.grads[0] = problem.grads[0].double()
    assert not plan.norm(norm)


def test_tensors_that_no_kernel_takes_go_to_the_reference(where):
    """Their results are the same: states and averages of other dtypes, elements in any order."""
    problem = Tailed([(40,), (8, 6, 3, 3), (33,), (5,)], averages=True)
    problem.elements = [torch.randperm(40), None, torch.tensor([3]), torch.tensor([4])]
    problem.averages[1] = problem.averages[1].double()
    problem.buffers[2] = problem.buffers[2].half()
    agree(where, problem, clip=torch.tensor(0.5))
    problem.tail[1] = 0  # states in bfloat16 are rounded to the nearest
    agree(where, problem)


# ---- gradients scaled by one number


@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_are_scaled(where, aligned):
    for number in DTYPES:
        factor = torch.tensor(0.37).to(number)
        expected = [g.to(dtype) for g, dtype in itertools.product(Problem(SHAPES).grads, DTYPES)]
        actual = [g.to(where.device, copy=True) for g in expected]
        if not aligned:
            actual = [cases.unaligned(g, 1 + n % 7) for n, g in enumerate(actual)]
        reference.scale_gradients_(expected, factor)
        where.scale(actual, factor.to(where.device))
        for a, b in zip(actual, expected):
            assert torch.equal(a.cpu(), b)


def test_nothing_is_written_where_the_factor_is_1(where):
    """A NaN of bfloat16 that is computed with loses its payload."""
    bits = torch.full((8 * CHUNK,), 0x7F81, dtype=torch.int16, device=where.device)
    grads = [bits.view(torch.bfloat16), torch.ones(5, device=where.device)]
    where.scale(grads, torch.ones((), device=where.device))
    assert (bits == 0x7F81).all()
    where.scale(grads, torch.full((), 2.0, device=where.device))
    assert (bits != 0x7F81).all()
    assert (grads[1] == 2).all()


def test_gradients_that_share_memory_are_scaled_one_after_another(where):
    whole = torch.ones(3000, device=where.device)
    where.scale([whole, whole[1000:], whole], torch.full((), 2.0, device=where.device))
    assert whole.unique_consecutive().tolist() == [4.0, 8.0]


def test_launches_of_scaling(emulated):
    grads = [torch.ones(n % 7, dtype=dtype) for n, dtype in enumerate(DTYPES * 100)]
    emulated.scale(grads, torch.tensor(2.0))
    assert emulated.told.launches == len(DTYPES)
    emulated.told.most_of_piece = 100
    emulated.scale([torch.ones(1001)], torch.tensor(2.0))
    assert emulated.told.blocks > 10
    emulated.scale([], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="factor must be one number"):
        emulated.scale(grads, torch.ones(2))
    with pytest.raises(RuntimeError, match="dense"):
        emulated.scale([torch.ones(10)[::2]], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="float32, float64"):
        emulated.scale([torch.ones(2, dtype=torch.int32)], torch.tensor(2.0))


def test_a_captured_scaling_reads_its_factor_at_the_replay(where):
    grad, factor = torch.ones(3000, device=where.device), torch.ones((), device=where.device)
    with where.capture() as replay:
        where.scale([grad], factor)
    for factor_now, expected in ((1.0, 1.0), (0.5, 0.5), (1.0, 0.5)):
        factor.fill_(factor_now)
        replay()
        assert (grad == expected).all()
