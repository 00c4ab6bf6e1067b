"""The tail of a step: clipping, averages and states in bfloat16. Its rules against strangers, kernels against them."""

from __future__ import annotations

import random
from itertools import pairwise

import cases
import implementations
import numpy as np
import pytest
import torch
from cases import Problem, assert_same_bits

from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.reference import rounding_rule
from gradrep_kernels.ops.reference.multiply import compute_dtype

STEP = implementations.of("rep_sgd_step")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- the rule of rounding, against strangers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_has_the_known_answers(counter, key, words):
    """Those of kat_vectors in Random123, of the generator's authors. tests/support/instruction_sets.cpp has the C++."""
    assert tuple(map(int, rounding_rule.philox(counter, key))) == words


def test_bits_of_elements_are_halves_of_philoxs_words():
    elements = torch.tensor([0, 1, 2, 7, 8, 2**35 + 5])
    seed, step, parameter, state = 2**40 + 3, 2**33 + 9, 11, 1
    expected = []
    for element in elements.tolist():
        words = rounding_rule.philox(((element // 8) % 2**32, parameter, step % 2**32, state), (3, 2**8))
        expected.append(int(words[element % 8 // 2]) >> 16 * (element % 2) & 0xFFFF)
    assert rounding_rule.random_bits(elements, seed, step, parameter, state).tolist() == expected


def test_rounding_is_unbiased():
    """Each value becomes one of its two neighbours, and the mean of many roundings is the value."""
    values = torch.tensor([1.0, 1.001, 1.0039, -1.0077, 3.14159, -2.7e-3, 1e-40, 6.5e37, -0.7, 1.00390625])
    times = 100_000
    bits = rounding_rule.random_bits(torch.arange(times * len(values)), seed=1, step=2, parameter=3)
    rounded = rounding_rule.rounded(values.expand(times, -1), bits.reshape(times, -1)).double()
    lower = torch.tensor(values.numpy().view(np.uint32) >> 16 << 16).view(torch.float32).double()  # towards zero
    upper = torch.tensor((values.numpy().view(np.uint32) >> 16) + 1 << 16).view(torch.float32).double()
    assert bool(((rounded == lower) | (rounded == upper)).all())
    share = (values.double() - lower) / (upper - lower)  # of the roundings that go up
    # The standard deviation of a mean of so many. Five of it: once in 10⁵ runs, if the seed were not fixed.
    deviation = (upper - lower).abs() * (share * (1 - share) / times).sqrt()
    assert bool(((rounded.mean(0) - values.double()).abs() <= 5 * deviation).all())


def test_rounding_at_the_ends_of_the_range():
    def rounded(value: int, bits: int) -> int:
        value = torch.tensor([value], dtype=torch.uint32).view(torch.float32)
        return int(rounding_rule.rounded(value, torch.tensor([bits])).view(torch.uint16))

    for bits in (0, 1, 0x8000, 0xFFFF):
        assert rounded(0x7F800000, bits) == 0x7F80  # inf
        assert rounded(0xFF800000, bits) == 0xFF80
        for nan in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF):  # a carry would make inf or -0 of it
            assert rounded(nan, bits) == 0x7FC0
        assert rounded(0x80000000, bits) == 0x8000  # −0
    assert rounded(0x7F7FFFFF, 0) == 0x7F7F  # the greatest float32: the greatest bfloat16, or infinite
    assert rounded(0x7F7FFFFF, 1) == 0x7F80
    assert rounded(0x00000001, 0xFFFE) == 0x0000  # the least denormal
    assert rounded(0x00000001, 0xFFFF) == 0x0001


# ---- steps with a tail


class Tailed(Problem):
    """A problem with options of the tail, drawn by `draw`: a random.Random, so that all runs draw the same."""

    def __init__(self, draw: random.Random, dtype, form, shapes=None, stochastic=None, **more):
        shapes = list(cases.SHAPES.values()) if shapes is None else shapes
        more.setdefault("channels_last", draw.random() < 0.5)
        more.setdefault("first", draw.random() < 0.3)
        hypers = draw.sample(cases.HYPERS, 4)
        super().__init__(shapes, form, draw.random() < 0.6, dtype, hypers, **more)
        stochastic = draw.random() < 0.7 if stochastic is None else stochastic
        if stochastic:
            self.buffers = [b.to(torch.bfloat16) for b in self.buffers]

        def average(n, p):
            there = cases.tensor(p.shape, 700 + n, compute_dtype(dtype))
            return torch.empty_like(p, dtype=there.dtype).copy_(there)

        kept = draw.choice([0.0, 0.8, 0.8, 1.0])
        self.averages = [average(n, p) if draw.random() < kept else None for n, p in enumerate(self.params)]
        large = [0, 1, 7, 2**31, 2**33 + 5]
        self.numbers = [draw.choice(large) for _ in shapes] if draw.random() < 0.7 else None
        begin = [None, torch.tensor([0]), torch.tensor([3]), torch.tensor([2**20 + 5]), torch.tensor([2**35 - 3])]
        self.elements = [draw.choice(begin) for _ in shapes] if draw.random() < 0.7 else None
        tail = [0.99, float(stochastic), draw.choice([0, 5, 2**40 + 3]), draw.choice([1, 2, 2**33 + 1])]
        self.tail = torch.tensor(tail, dtype=torch.float64)
        self.clip = draw.choice([None, torch.tensor(0.37), torch.tensor([0.37], dtype=torch.float64)])
        self.grad_scale = draw.choice([None, torch.tensor(3.0)])

    def clone(self, device=None):
        twin = super().clone(device)
        twin.__class__ = Tailed
        twin.averages = [
            None if a is None else a.clone(memory_format=torch.preserve_format).to(device or a.device)
            for a in self.averages
        ]
        for name in ("clip", "grad_scale"):
            number = getattr(self, name)
            setattr(twin, name, None if number is None else number.to(device or number.device))
        return twin

    def run(self, step, **more):
        names = ("averages", "numbers", "elements", "tail", "clip", "grad_scale")
        return super().run(step, **{name: getattr(self, name) for name in names}, **more)


def assert_same_results(actual: Tailed, expected: Tailed):
    assert_same_bits(actual, expected)
    for a, b in zip(actual.averages, expected.averages):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.cpu().nan_to_num(1.0), b.nan_to_num(1.0))
    for a, b in zip(actual.buffers, expected.buffers):
        assert a.dtype == b.dtype


def test_reference_is_torchs_clipping_step_and_average():
    """torch.nn.utils.clip_grad_norm_, torch.optim.SGD, torch.optim.swa_utils: three calls for one, in float64."""
    hyper = cases.HYPERS[6]
    problem = Problem([(257,), (17, 17, 3, 3)], "none", dtype=torch.float64, hypers=(hyper,), first=True)
    twins = [torch.nn.Parameter(p.clone()) for p in problem.params]
    for twin, g in zip(twins, problem.grads):
        twin.grad = g.clone()
    averages = [cases.tensor(p.shape, 5) for p in twins]
    expected = [a.clone() for a in averages]
    norm = torch.nn.utils.clip_grad_norm_(twins, 0.5)
    torch.optim.SGD(twins, foreach=False, **hyper.options).step()
    torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)(expected, [t.detach() for t in twins], 1)
    before = [g.clone() for g in problem.grads]
    factor = 0.5 / (norm + 1e-6)
    tail = torch.tensor([0.9, 0, 0, 1], dtype=torch.float64)
    problem.run(reference.rep_sgd_step, clip=factor, averages=averages, tail=tail)
    for actual, wanted in zip([*problem.params, *averages], [*twins, *expected]):
        assert torch.allclose(actual, wanted.detach(), rtol=1e-14, atol=1e-15)
    assert all(torch.equal(g, b) for g, b in zip(problem.grads, before))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_has_the_references_bits(backend, device, dtype, form):
    """All options at once, each present or not: three draws of them for each dtype and form of M."""
    step = implementations.get("rep_sgd_step", backend, device)
    draw = random.Random(f"{dtype} {form}")
    for _ in range(3):
        problem = Tailed(draw, dtype, form)
        assert_same_results(problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("hyper", cases.HYPERS, ids=[h.name for h in cases.HYPERS])
def test_kernel_follows_every_hyper_parameter(backend, device, hyper):
    step = implementations.get("rep_sgd_step", backend, device)
    for dtype, first in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        problem = Tailed(random.Random(1), dtype, "repopt", stochastic=True, first=first)
        problem.hyper = Problem([], hypers=(hyper,)).hyper.expand(4, -1).contiguous()
        assert_same_results(problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_passes_through(backend, device, dtype):
    step = implementations.get("rep_sgd_step", backend, device)
    problem = Tailed(random.Random(2), dtype, "repopt", [(640,), (16, 16, 3, 3)], True)
    problem.hyper = Problem([], hypers=(cases.HYPERS[6],)).hyper.expand(4, -1).contiguous()
    for n, value in enumerate((0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38)):
        for t in (*problem.params, *problem.grads, *problem.buffers, *(a for a in problem.averages if a is not None)):
            t.view(-1)[n::17] = value
    for clip in (0.37, 0.0, float("nan"), float("inf")):
        problem.clip = torch.tensor(clip)
        actual, expected = problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step)
        assert_same_results(actual, expected)
        for a, b in zip(actual.buffers, expected.buffers):
            assert torch.equal(a.cpu().view(torch.int16), b.view(torch.int16))  # and NaN is 0x7fc0


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unaligned_tensors(backend, device, dtype):
    step = implementations.get("rep_sgd_step", backend, device)
    problem = Tailed(random.Random(3), dtype, "repopt", [(257,), (cases.CHUNK + 1,), (67, 61, 3, 3)], True)
    there = problem.clone(device)
    for name in ("params", "grads", "buffers", "averages"):
        moved = [None if t is None else cases.unaligned(t, 1 + n % 3) for n, t in enumerate(getattr(there, name))]
        setattr(there, name, moved)
    assert_same_results(there.run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_a_skipped_step_leaves_everything(backend, device):
    step = implementations.get("rep_sgd_step", backend, device)
    problem = Tailed(random.Random(4), torch.float32, "repopt", stochastic=True)
    after = problem.clone(device).run(step, found_inf=torch.tensor(1.0, device=device))
    assert_same_results(after, problem)


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_parts_of_a_parameter_have_the_bits_of_the_whole(backend, device):
    """As shards have them, wherever they are cut: `elements` says where each begins."""
    step = implementations.get("rep_sgd_step", backend, device)
    whole = Tailed(random.Random(5), torch.float32, "none", [(5000,)], True, first=False)
    whole.elements, whole.numbers = None, [7]
    cuts = [0, 1, 64, 71, 1096, 5000]
    parts = whole.clone(device)
    for name in ("params", "grads", "buffers", "averages"):
        t = getattr(parts, name)[0]
        setattr(parts, name, [None if t is None else t[a:b] for a, b in pairwise(cuts)])
    n = len(cuts) - 1
    parts.scales, parts.identities, parts.first, parts.groups = [None] * n, [None] * n, [False] * n, [0] * n
    parts.numbers, parts.elements = [7] * n, [torch.tensor([a]) for a in cuts[:-1]]
    parts.run(step)
    whole.run(reference.rep_sgd_step)
    for name in ("params", "buffers", "averages"):
        joined = [t for t in getattr(parts, name) if t is not None]
        assert not joined or torch.equal(torch.cat(joined).cpu(), getattr(whole, name)[0])


@pytest.mark.parametrize(("backend", "device"), STEP)
def test_what_the_kernel_does_not_take_goes_to_the_reference(backend, device):
    """Explicit numbers of elements, averages of other dtypes or strides, bfloat16 states rounded to the nearest."""
    step = implementations.get("rep_sgd_step", backend, device)
    shapes = [(40,), (30, 20), (8, 6, 3, 3), (50,)]
    problem = Tailed(random.Random(6), torch.float32, "repopt", shapes, True, channels_last=False)
    problem.averages = [cases.tensor(p.shape, n, torch.float32) for n, p in enumerate(problem.params)]
    problem.averages[1] = problem.averages[1].double()
    problem.averages[3] = cases.tensor((100,), 3, torch.float32)[::2]
    problem.elements = [torch.arange(40).flip(0), None, torch.tensor([5]), torch.tensor([5], dtype=torch.int32)]
    for stochastic in (1.0, 0.0):
        problem.tail[1] = stochastic
        assert_same_results(problem.clone(device).run(step), problem.clone().run(reference.rep_sgd_step))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_threads_do_not_change_the_result(threads, shared):
    """Nor where parameters share an average, so that their steps must come one after the other."""
    if STEP[0].marks:
        pytest.skip(STEP[0].marks[0].kwargs["reason"])
    step = implementations.get("rep_sgd_step", *STEP[0].values)
    shapes = [(90_000,)] * 3 if shared else list(cases.SHAPES.values()) * 2
    problem = Tailed(random.Random(7), torch.float32, "repopt", shapes, True)

    def run(step):
        twin = problem.clone()
        if shared:
            twin.averages = [twin.params[0] * 2] * 3
        return twin.run(step)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_results(run(step), run(reference.rep_sgd_step))
    finally:
        torch.set_num_threads(before)


# ---- planned steps


def planner():
    found = None if STEP[0].marks else backends.planner("rep_sgd_step", "cpu")
    return found or pytest.skip("no kernels that plan here")


class Planned:
    """A plan of a problem none of whose parameters is in its first step."""

    def __init__(self, problem: Tailed):
        self.planner, self.problem = planner(), problem
        p = problem
        columns = (p.params, p.buffers, p.scales, p.identities, p.groups, p.averages, p.numbers, p.elements)
        self.plan = self.planner.make(*columns)
        assert self.plan != 0

    def step(self, found_inf=None, max_norm=0.0, norm=None, tail=None):
        p = self.problem
        hyper, tail = p.hyper.flatten().tolist(), p.tail.tolist() if tail is None else tail
        return self.planner.step(self.plan, p.grads, hyper, [], [], p.grad_scale, found_inf, tail, max_norm, norm)

    def norm(self, norm):
        return self.planner.norm(self.plan, self.problem.grads, norm)

    def __del__(self):
        if hasattr(self, "plan"):
            self.planner.free(self.problem.params[0], self.plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planned_steps_clip_by_their_own_norm(dtype):
    """The norm is that of rep_grad_norm, and the step that of the reference with the factor that follows from it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    clipped = []
    for seed, form in enumerate(("repopt", "none", "dense", "per_output", "per_input")):
        problem = Tailed(random.Random(seed), dtype, form, first=False)
        exact = reference.rep_grad_norm(problem.grads, problem.scales, problem.identities)
        exact = exact if problem.grad_scale is None else exact / problem.grad_scale
        plan = Planned(problem.clone())
        for max_norm in (float(exact) * 0.6, float(exact) * 2):
            twin, norm = plan.problem.clone(), torch.zeros((), dtype=wide)
            assert plan.step(max_norm=max_norm, norm=norm)
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            twin.clip = factor
            if len(clipped) % 2 == 0:
                assert float(norm) == pytest.approx(float(exact), rel=1e-14 if wide == torch.float64 else 1e-7)
            clipped.append(bool(factor < 1))
            assert_same_results(plan.problem, twin.run(reference.rep_sgd_step))
    assert True in clipped
    assert False in clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norm_of_a_plan_is_the_ops(dtype):
    problem = Tailed(random.Random(8), dtype, "repopt", first=False)
    norm = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    plan = Planned(problem.clone())
    assert plan.norm(norm)
    op = implementations.get("rep_grad_norm", *STEP[0].values)
    wanted = op(problem.grads, problem.scales, problem.identities)
    assert norm == wanted
    assert_same_results(plan.problem, problem)
    for scale in range(3, 30):  # a step divides it, in its dtype
        plan.problem.grad_scale = torch.tensor(float(scale))
        assert plan.step(max_norm=1.0, norm=norm, found_inf=torch.tensor(1.0))
        assert norm == wanted / scale


def test_a_skipped_planned_step_still_writes_the_norm():
    problem = Tailed(random.Random(9), torch.float32, "repopt", first=False)
    for value in (1.0, float("nan"), float("inf")):
        problem.grads[3].view(-1)[5] = value
        problem.grad_scale = torch.tensor(8.0)
        plan, norm = Planned(problem.clone()), torch.zeros(())
        assert plan.step(found_inf=torch.tensor(1.0), max_norm=1.0, norm=norm)
        exact = reference.rep_grad_norm(problem.grads, problem.scales, problem.identities) / 8
        assert float(norm) == pytest.approx(float(exact), rel=1e-6, nan_ok=True)
        assert_same_results(plan.problem, problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_clips_as_torch_does(value):
    problem = Tailed(random.Random(10), torch.float32, "none", [(300,), (70,)], False, first=False)
    problem.grad_scale = None
    problem.grads[0][7] = value
    plan, twin, norm = Planned(problem.clone()), problem.clone(), torch.zeros(())
    leaves = [torch.nn.Parameter(p.clone()) for p in problem.params]
    for leaf, g in zip(leaves, problem.grads):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    assert plan.step(max_norm=1.0, norm=norm)
    twin.clip = None
    kept, twin.grads = twin.grads, [leaf.grad for leaf in leaves]
    twin.run(reference.rep_sgd_step)
    twin.grads = kept
    assert_same_results(plan.problem, twin)


def test_a_planned_step_refuses_what_is_not_as_it_was():
    """And has then done nothing."""
    problem = Tailed(random.Random(11), torch.float32, "repopt", [(300,), (16, 8, 3, 3)], True, first=False)
    problem.hyper = Problem([], hypers=(cases.HYPERS[3],)).hyper.expand(4, -1).contiguous()
    problem.averages = [torch.zeros_like(p) for p in problem.params]
    plan = Planned(problem.clone())
    nearest = [0.9, 0.0, 1.0, 1.0]  # bfloat16 states, but not by random bits
    assert not plan.step(tail=nearest)
    assert not plan.step(tail=[])
    for norm in (torch.zeros((), dtype=torch.float64), torch.zeros(2), torch.zeros((), dtype=torch.int64)):
        assert not plan.step(max_norm=1.0, norm=norm)
        assert not plan.norm(norm)
    assert_same_results(plan.problem, problem)
    plan.problem.averages[1].resize_(3)
    assert not plan.step()
    plan.problem.averages[1] = problem.averages[1]
    assert_same_results(plan.problem, problem)


# ---- gradients scaled in place


@pytest.mark.parametrize(("backend", "device"), implementations.of("scale_gradients_"))
@pytest.mark.parametrize("factor", [0.37, 1.0, 0.0, 1e-9, 70_000.0, float("nan")])
def test_scaled_gradients_have_the_references_bits(backend, device, factor):
    scale = implementations.get("scale_gradients_", backend, device)

    def gradients():
        made = [cases.tensor(shape, n, dtype) for n, shape in enumerate(cases.SHAPES.values()) for dtype in DTYPES]
        odd = cases.tensor((300,), 1, torch.float32)
        for n, value in enumerate((0.0, -0.0, float("inf"), float("nan"), 1e-45)):
            odd[n::17] = value
        strided = cases.tensor((40, 30), 2, torch.float32).t()[::2]
        return [*made, odd, cases.unaligned(made[12], 3), strided, cases.tensor((7,), 3, torch.complex64)]

    dtype = torch.float64 if factor == 0.37 else torch.float32
    expected, actual = gradients(), [g.to(device) for g in gradients()]
    reference.scale_gradients_(expected, torch.tensor(factor, dtype=dtype))
    scale(actual, torch.tensor([factor], dtype=dtype, device=device))
    for a, b in zip(actual, expected):
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.cpu(), b))
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(1.0, 2.0, 3.0), b.nan_to_num(1.0, 2.0, 3.0))


def test_scaling_on_the_cpu_writes_nothing_by_one_and_twice_what_is_given_twice():
    scale = implementations.get("scale_gradients_", *STEP[0].values)
    g = torch.ones(100_000)
    copy = torch._lazy_clone(g)
    scale([copy], torch.tensor(1.0))
    assert torch._C._is_cow_tensor(copy)  # a write would have made it a tensor of its own
    scale([copy, copy], torch.tensor(0.5))
    assert torch.equal(copy, g / 4)
