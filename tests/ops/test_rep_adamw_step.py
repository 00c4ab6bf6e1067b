"""rep_adamw_step: the reference against torch.optim.AdamW and explicit branches, every kernel against the reference."""

from __future__ import annotations

import cases
import implementations
import pytest
import torch
from cases_adamw import FOUR, HYPERS, Problem, assert_same

import gradrep_kernels as gr
from gradrep_kernels.ops import reference
from gradrep_kernels.optim.branch_factors import BranchFactors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("empty", "scalar", "prime", "linear", "conv_3x3_square", "grouped", "depthwise")
SHAPES = [cases.SHAPES[name] for name in NAMES]

# Taps of the large kernels of RepLKNet and UniRepLKNet, depthwise and dense, around whole rows of them.
LARGE_KERNELS = [(5, 1, 13, 13), (3, 4, 15, 15), (7, 1, 17, 17), (2, 3, 17, 17), (3, 1, 31, 31), (2, 3, 31, 31)]


def adamw(hyper, params, grads, states):
    """One step of torch.optim.AdamW(foreach=False) from given states. Returns parameters and optimizer."""
    lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, step = hyper
    twins = [torch.nn.Parameter(p.clone()) for p in params]
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(twins, foreach=False, amsgrad=bool(amsgrad), maximize=bool(maximize), **options)
    for p, g, *own in zip(twins, grads, *states):
        p.grad = g.clone()
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": own[0].clone(),
            "exp_avg_sq": own[1].clone(),
        }
        if amsgrad:
            optimizer.state[p]["max_exp_avg_sq"] = own[2].clone()
    optimizer.step()
    return twins, optimizer


# ---- the reference against strangers


@pytest.mark.parametrize("name", HYPERS)
def test_without_factors_it_is_torchs_adamw(name):
    problem = Problem(SHAPES, "none", dtype=torch.float64, hypers=(name,))
    before = problem.clone()
    states = [getattr(before, key) for key in Problem.states]
    twins, optimizer = adamw(HYPERS[name], before.params, before.grads, states)
    problem.run(reference.rep_adamw_step)
    keys = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if HYPERS[name][5] else []))
    for n, q in enumerate(twins):
        torch.testing.assert_close(problem.params[n], q.detach(), rtol=1e-15, atol=1e-15)
        for key in keys:
            ours = getattr(problem, f"{key}s")[n]
            torch.testing.assert_close(ours, optimizer.state[q][key], rtol=4e-16, atol=1e-16)
        if not HYPERS[name][5]:
            assert torch.equal(problem.max_exp_avg_sqs[n], before.max_exp_avg_sqs[n])  # not touched
        assert torch.equal(problem.grads[n], before.grads[n])


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in HYPERS if name != "no_epsilon"]
)  # 0 / 0 of branches that are not there
def test_with_factors_it_is_torchs_adamw_on_every_branch(name, identity):
    """Each branch is a parameter of its own, with the gradient α G ⊙ g, under torch.optim.AdamW. W = Σ α W_b."""
    shape = (6, 4, 3, 5)
    problem = Problem([shape], "repopt", identity, torch.float64, (name,), branches=3)
    factors = problem.factors[0].expand(4, *shape)
    alphas = [factor.clone() for factor in factors[1:]]
    if identity:
        alphas.append(torch.zeros(shape, dtype=torch.float64))
        alphas[-1][torch.arange(6), torch.arange(6) % 4, 1, 2] = 1
    weight, g = problem.params[0].clone(), problem.grads[0] * factors[0]
    m, v, x = (getattr(problem, key)[0].clone() for key in Problem.states)
    start = [torch.zeros_like(weight) for _ in alphas]
    start[0] = weight / alphas[0]
    twins, _ = adamw(
        HYPERS[name],
        start,
        [alpha * g for alpha in alphas],
        [[alpha * m for alpha in alphas], [alpha**2 * v for alpha in alphas], [alpha**2 * x for alpha in alphas]],
    )
    expected = sum(alpha * twin.detach() for alpha, twin in zip(alphas, twins))
    problem.run(reference.rep_adamw_step)
    torch.testing.assert_close(problem.params[0], expected, rtol=1e-14, atol=1e-13)


def test_a_branch_that_is_not_there_adds_nothing_where_epsilon_is_0():
    problem = Problem([(6, 4, 3, 3)], branches=3, hypers=("no_epsilon",))
    assert (problem.factors[0][2:] == 0).any()
    problem.run(reference.rep_adamw_step)
    assert problem.params[0].isfinite().all()


def test_complex_weights_are_pairs_of_real_ones():
    g = torch.Generator().manual_seed(0)
    p, grad, m = (torch.randn(5, 3, generator=g, dtype=torch.complex128) for _ in range(3))
    v = torch.complex(*(torch.rand(5, 3, generator=g, dtype=torch.float64) for _ in range(2)))
    twins, optimizer = adamw(HYPERS["default"], [p], [grad], [[m], [v], [v]])
    ours = [t.clone() for t in (p, m, v)]
    factor = torch.tensor([1.0, 1.0]).reshape(2, 1, 1)
    hyper = torch.tensor([HYPERS["default"]], dtype=torch.float64)
    reference.rep_adamw_step([ours[0]], [grad], [ours[1]], [ours[2]], [ours[0]], [factor], [None], [False], [0], hyper)
    torch.testing.assert_close(ours[0], twins[0].detach(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(ours[2], optimizer.state[twins[0]]["exp_avg_sq"], rtol=1e-15, atol=1e-15)


def test_nan_and_infinities_pass_through():
    for value in (float("nan"), float("inf")):
        problem = Problem([(5, 4, 3, 3), (7,)], hypers=("amsgrad",))
        for grad in problem.grads:
            grad.view(-1)[1] = value
        twin = problem.clone().run(reference.rep_adamw_step)
        assert all(p.isnan().sum() == 1 for p in twin.params)
        for backend, device in (parameter.values for parameter in STEP if not parameter.marks):
            assert_same(problem.clone(device).run(implementations.get("rep_adamw_step", backend, device)), twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_twice_eager_torch(dtype):
    problem = Problem([(257,), (16, 8, 3, 3)], "none", dtype=dtype, hypers=("default",))
    states = [getattr(problem, key) for key in Problem.states]
    eager, _ = adamw(HYPERS["default"], problem.params, problem.grads, states)
    exact = problem.clone(dtype=torch.float64).run(reference.rep_adamw_step)
    problem.run(reference.rep_adamw_step)
    ours, theirs = (
        max(float((p.double() - e).abs().max()) for p, e in zip(params, exact.params))
        for params in (problem.params, eager)
    )
    assert ours <= 2 * theirs


def test_float32_is_within_4_ulp_of_float64():
    """Of max(|W|, |W - W'|) and of what its change is a difference of: m may cancel, and is divided by √v."""
    for name in FOUR:
        problem = Problem([(257,), (17, 17, 3, 3), (12, 4, 3, 3)], hypers=(name,), branches=3)
        problem.hyper = problem.hyper.float().double()
        exact = problem.clone(dtype=torch.float64)
        exact.factors = [None if f is None else f.double() for f in exact.factors]
        before = [p.clone() for p in exact.params]
        problem.run(reference.rep_adamw_step)
        exact.run(reference.rep_adamw_step)
        lr, beta1, beta2, eps, _, amsgrad, _, step = problem.hyper[0].tolist()
        for n, (p, wanted, old) in enumerate(zip(problem.params, exact.params, before)):
            v = (exact.max_exp_avg_sqs if amsgrad else exact.exp_avg_sqs)[n]
            root = v.sqrt() / (1 - beta2 ** (step + 1)) ** 0.5
            terms = (exact.grads[n].abs() * 2 + exact.exp_avgs[n].abs()) * lr / (1 - beta1 ** (step + 1))
            factors = torch.ones(2, *(1,) * p.dim()) if exact.factors[n] is None else exact.factors[n]
            largest = sum(a * a * terms * factors[0].clamp(min=1) / (a * root + eps) for a in factors[1:])
            if exact.identities[n] is not None:
                largest = largest + terms * 2 / (root + eps)
            largest = torch.maximum(largest, torch.maximum(wanted.abs(), old.abs()))
            assert bool(((p.double() - wanted).abs() <= cases.FLOAT32_TOLERANCE * largest).all()), name


# ---- every kernel against the reference

STEP = implementations.of("rep_adamw_step")


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", list(cases.scale_shapes((2, 2, 3, 3))))
def test_kernel_has_the_references_bits(backend, device, form, dtype, channels_last):
    """All shapes at once, with and without identity, one to four branches, in four groups."""
    step = implementations.get("rep_adamw_step", backend, device)
    for identity in (False, True):
        for branches in (1, 2, 4):
            problem = Problem(
                cases.SHAPES.values(),
                form,
                identity,
                dtype,
                channels_last=channels_last,
                device=device,
                branches=branches,
            )
            expected = problem.clone("cpu").run(reference.rep_adamw_step)
            assert_same(problem.run(step), expected)


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("name", HYPERS)
def test_every_hyper_parameter(backend, device, name):
    step = implementations.get("rep_adamw_step", backend, device)
    for dtype in DTYPES:
        problem = Problem([(257,), (17, 17, 3, 3)], dtype=dtype, hypers=(name,), device=device)
        expected = problem.clone("cpu").run(reference.rep_adamw_step)
        assert_same(problem.run(step), expected)


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_kernels(backend, device, dtype):
    step = implementations.get("rep_adamw_step", backend, device)
    for channels_last in (False, True):
        for branches in (1, 6):
            problem = Problem(LARGE_KERNELS, dtype=dtype, channels_last=channels_last, device=device, branches=branches)
            expected = problem.clone("cpu").run(reference.rep_adamw_step)
            assert_same(problem.run(step), expected)


@pytest.mark.parametrize(("backend", "device"), STEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_goes_before_and_after_the_update(backend, device, dtype):
    """Unscaling in place, clipping, overflow, averages."""
    step = implementations.get("rep_adamw_step", backend, device)
    shapes = [cases.SHAPES[name] for name in ("prime", "conv_3x3_square", "depthwise", "chunk_plus_1", "linear")]
    more = {"grad_scale": torch.tensor(8.0), "clip": torch.tensor(0.3)}
    tail = torch.tensor([0.9, 0, 0, 4], dtype=torch.float64)
    for found_inf in (None, torch.zeros(()), torch.ones(())):
        problem = Problem(shapes, dtype=dtype, device=device)
        twin = problem.clone("cpu")
        averages = [[torch.full(shape, 0.5) for shape in shapes] for _ in range(2)]
        twin.run(reference.rep_adamw_step, **more, found_inf=found_inf, averages=averages[0], tail=tail)
        there = {key: value.to(device) for key, value in more.items()}
        found = None if found_inf is None else found_inf.to(device)
        own = [average.to(device) for average in averages[1]]
        problem.run(step, **there, found_inf=found, averages=own, tail=tail)
        assert_same(problem, twin)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(own, averages[0]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    step = implementations.get("rep_adamw_step", "auto", "cpu")
    before = torch.get_num_threads()
    problem = Problem([(67, 61, 3, 3), (300_000,), (300, 1, 31, 31)], branches=3)
    expected = problem.clone().run(reference.rep_adamw_step)
    try:
        torch.set_num_threads(threads)
        assert_same(problem.run(step), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_norm_of_a_planned_step_is_that_of_the_branches(dtype, channels_last):
    """√(Σ M ⊙ g²) with M = Σ α², in which G is no factor."""
    from gradrep_kernels.ops import backends

    planner = backends.planner("rep_adamw_step", "cpu")
    if planner is None:
        pytest.skip("the reference makes no plan")
    problem = Problem([*SHAPES, *LARGE_KERNELS[:3]], dtype=dtype, channels_last=channels_last, branches=3)
    states = [getattr(problem, key) for key in Problem.states]
    handle = planner.make(problem.params, *states, problem.factors, problem.identities, problem.groups)
    norm = torch.empty((), dtype=dtype)
    assert planner.norm(handle, problem.grads, norm)
    squares = [(problem.multiplier(n) * g.double().square()).sum() for n, g in enumerate(problem.grads)]
    torch.testing.assert_close(
        norm.double(), sum(squares).sqrt(), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0
    )
    twin = problem.clone().run(reference.rep_adamw_step)
    assert planner.step(handle, problem.grads, problem.hyper.flatten().tolist(), [], [], None, None)
    assert_same(problem, twin)
    planner.free(problem.params[0], handle)


# ---- from branch scales to factors


def test_slots_hold_the_branches_that_reach_a_tap():
    """ACB: row and column share a slot outside of the centre, where three branches meet."""
    k, row, column = (torch.tensor([value, -value], dtype=torch.float64) for value in (2.0, 3.0, 5.0))
    scales = gr.BranchScales(k, others=[gr.Branch(row, (1, 3)), gr.Branch(column, (3, 1))])
    factors = BranchFactors.of(scales, torch.Size((2, 4, 3, 3)))
    stack, identity = factors.parts()
    assert identity is None
    assert stack.shape == (4, 2, 1, 3, 3)
    assert (stack[0] == 1).all()
    expected = torch.tensor([[[2.0, 2, 2]] * 3, [[0, 5, 0], [3, 3, 3], [0, 5, 0]], [[0, 0, 0], [0, 5, 0], [0, 0, 0]]])
    assert torch.equal(stack[1:, 0, 0], expected.double())
    assert torch.equal(stack[:, 0], stack[:, 1])  # |α|
    assert torch.equal(factors.mult.scale, scales.grad_mult(3).scale)


def test_factors_of_a_linear_layer():
    scales = gr.BranchScales(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    stack, identity = BranchFactors.of(scales, torch.Size((2, 7))).parts()
    assert identity is None
    assert torch.equal(stack[:, :, 0], torch.tensor([[1.0, 1], [2, 1], [0.5, 3]]))
    with pytest.raises(ValueError, match=r"an identity branch needs a convolution's weight"):
        BranchFactors.of(gr.BranchScales(torch.ones(2), identity=True), torch.Size((2, 7)))
    with pytest.raises(ValueError, match=r"branch scales need a weight \[O, I, kh, kw\] or \[O, I\], got \[2\]"):
        BranchFactors.of(gr.BranchScales(torch.ones(2)), torch.Size((2,)))
    with pytest.raises(ValueError, match="the scales have 3 channels, the weight has 2 output channels"):
        BranchFactors.of(gr.BranchScales(torch.ones(3)), torch.Size((2, 7)))
