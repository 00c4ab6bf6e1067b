"""Parameters of every kind, and groups that change in mid-run."""

from __future__ import annotations

import pytest
import torch
from cases_optim import CASES, STEADY, Pair, assert_close, dense, net, oracle_step, served, set_grads
from implementations import INTERPRETED
from torch import nn

from gradrep_kernels import GradMult

COMPLEX = served([case for case in CASES if case.takes_complex])


def test_add_param_group_in_mid_run(case):
    pair = Pair(case)
    pair.train(STEADY)
    extra = [nn.Conv2d(3, 4, 3).double() for _ in range(2)]
    extra[1].load_state_dict(extra[0].state_dict())
    for opt, module in ((pair.opt, extra[0]), (pair.oracle, extra[1])):
        opt.add_param_group({"params": module.parameters(), "lr": 0.3, "maximize": True})
    mult = GradMult(torch.rand(3, 3))
    pair.opt.set_grad_mult(extra[0].weight, mult)
    pair.masks[extra[1].weight] = dense(mult, extra[1].weight.shape)
    for step in range(STEADY):
        for module, other in zip(extra, pair.models):
            set_grads([*other.parameters(), *module.parameters()], step)
        pair.step()
    pair.assert_equal()
    assert_close(extra[0].weight, extra[1].weight)


def test_tied_frozen_absent_empty_and_0_dim_parameters(case):
    def make():
        torch.manual_seed(0)
        shared = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        others = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((), (0, 3), (5,), (7,), (0,))]
        others[2].requires_grad_(False)
        return [shared, *others]

    ours, twin = make(), make()
    masks = {twin[1]: torch.tensor(2.0, dtype=torch.float64), twin[4]: torch.rand(7, dtype=torch.float64)}
    opt = case.make(
        ours, lr=0.1, **case.hyper, grad_mults={ours[n]: masks[twin[n]] for n in (1, 4)} | {ours[2]: torch.rand(3)}
    )
    oracle = case.oracle(twin, lr=0.1, **case.hyper)
    for step in range(STEADY + 2):
        for params in (ours, twin):
            shared, scalar, empty, frozen, sometimes, _ = params  # the last never has a gradient
            for p in params:
                p.grad = None
            loss = (
                (shared @ shared).square().mean()
                + scalar * 3
                + empty.sum()
                + frozen.sum()
                + (sometimes.square().sum() if step % 2 else 0)
            )
            loss.backward()
        opt.step()
        oracle_step(oracle, masks)
    for p, q in zip(ours, twin):
        assert_close(p, q)
        assert (p in opt.state) == (q in oracle.state and case.states[0] in oracle.state[q])


def test_freezing_and_thawing_in_mid_run(case):
    pair = Pair(case)
    for step in range(12):
        pair.set_grads(step)
        for model in pair.models:
            for n, p in enumerate(model.parameters()):
                if n % 2 and 4 <= step < 8:
                    p.grad = None
        pair.step()
    pair.assert_equal()


def test_1500_parameters(case):
    count = 1500 if case.kernels and not INTERPRETED else 100  # a kernel's tables grow with it

    def make():
        g = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(n % 7, generator=g, dtype=torch.float64)) for n in range(count)]

    ours, twin = make(), make()
    masks = {q: torch.full(q.shape, 0.5, dtype=torch.float64) for q in twin[::3]}
    opt = case.make(ours, lr=0.1, **case.hyper, grad_mults={p: torch.tensor(0.5) for p in ours[::3]})
    oracle = case.oracle(twin, lr=0.1, **case.hyper)
    for step in range(STEADY):
        set_grads(ours, step)
        for p, q in zip(ours, twin):
            q.grad = p.grad
        opt.step()
        oracle_step(oracle, masks)
    for p, q in zip(ours, twin):
        assert_close(p, q)


def test_a_parameter_listed_twice_is_stepped_twice(case):
    """torch warns and does so; kernels whose threads share out all parameters must not race."""
    torch.set_num_threads(2)

    def make():
        return nn.Parameter(torch.linspace(1, 2, 3_000 if INTERPRETED else 300_000, dtype=torch.float64))

    p, q = make(), make()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt, oracle = case.make([p, p], lr=0.1, **case.hyper), case.oracle([q, q], lr=0.1, **case.hyper)
    for step in range(STEADY):
        set_grads([p], step)
        q.grad = p.grad.clone()
        assert float(opt.clip_grad_norm_(2.0)) == pytest.approx(float(nn.utils.clip_grad_norm_([q], 2.0)))
        opt.step()
        oracle.step()
    assert_close(p, q, 1e-7)  # the gradient was clipped once


@pytest.mark.parametrize("plain", [True, False])
def test_several_dtypes_in_one_group(case, plain):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    dtypes += [torch.complex64, torch.complex128] if case.takes_complex else []
    options = {**(case.plain if plain else case.hyper), "weight_decay": 0.1}

    def make():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(33, dtype=dtype)) for dtype in dtypes]

    ours, twin = make(), make()
    opt = case.make(ours, lr=0.1, **options, grad_mults={p: torch.tensor(0.5) for p in ours[::2]})
    oracle = case.oracle(twin, lr=0.1, **options)
    tolerance = {
        torch.float32: 1e-6,
        torch.float64: 1e-14,
        torch.bfloat16: 2e-2,
        torch.float16: 2e-3,
        torch.complex64: 1e-6,
        torch.complex128: 1e-14,
    }
    for step in range(STEADY):
        for n, (p, q) in enumerate(zip(ours, twin)):
            p.grad = torch.randn(33, dtype=dtypes[n], generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        opt.step()
        oracle_step(oracle, {q: torch.full_like(q.real, 0.5, requires_grad=False) for q in twin[::2]})
    for p, q in zip(ours, twin):
        assert torch.allclose(p, q, rtol=tolerance[p.dtype], atol=tolerance[p.dtype])


def test_parameters_that_left_their_group_are_not_forgotten_silently(case):
    """Accelerate under FSDP2 puts new parameters into param_groups; training on without multipliers would be wrong."""
    pair = Pair(case)
    pair.train(STEADY)
    old = pair.opt.param_groups[0]["params"]
    new = [nn.Parameter(p.detach().clone()) for p in old]
    pair.opt.param_groups[0]["params"] = new
    set_grads(new, 0)
    with pytest.raises(
        RuntimeError, match=r"parameters with Grad Mults are no longer in param_groups: 5, one of shape"
    ):
        pair.opt.step()
    for p, q in zip(old, new):
        if p in pair.mults:
            pair.opt.set_grad_mult(q, pair.mults[p])
    pair.opt.step()
    pair.opt.param_groups[0]["params"] = new[1:]
    with pytest.raises(RuntimeError, match=r"param_groups: 1, one of shape \[6, 3, 3, 3\]"):
        pair.opt.step()
    pair.opt.set_grad_mult(new[0], None)
    pair.opt.step()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", COMPLEX["params"], ids=COMPLEX["ids"], indirect=True)
def test_complex_parameters(case, plain):
    options = case.plain if plain else {**case.hyper, "weight_decay": 0.1}
    p, q = (
        nn.Parameter(torch.complex(torch.linspace(0, 1, 9).double(), torch.linspace(2, 1, 9).double()))
        for _ in range(2)
    )
    mask = torch.rand(9, dtype=torch.float64)
    opt, oracle = case.make([p], lr=0.1, **options, grad_mults={p: mask}), case.oracle([q], lr=0.1, **options)
    for step in range(STEADY):
        p.grad = torch.randn(9, dtype=torch.complex128, generator=torch.Generator().manual_seed(step))
        q.grad = p.grad.clone()
        opt.step()
        oracle_step(oracle, {q: mask})
    assert torch.allclose(p, q, rtol=1e-14, atol=1e-14)
    assert float(opt.clip_grad_norm_(1e9)) == pytest.approx(
        float((mask * p.grad.abs().square()).sum().sqrt()), rel=1e-14
    )


def to_the_group_before(opt):
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))


def an_empty_group_in_front(opt):
    opt.param_groups.insert(0, {**opt.param_groups[0], "params": [], "lr": 10.0})


@pytest.mark.parametrize("regroup", [to_the_group_before, an_empty_group_in_front])
def test_after_a_parameter_has_changed_its_group(case, regroup):
    """The same parameters in the same order, with the hyper-parameters of another group."""
    models = net(torch.float64), net(torch.float64)
    groups = [
        [{"params": params[:3], "lr": 0.05}, {"params": params[3:], "lr": 0.2}]
        for params in (list(model.parameters()) for model in models)
    ]
    opt, oracle = case.make(groups[0], **case.hyper), case.oracle(groups[1], **case.hyper)
    for step in range(2 * STEADY):
        if step == STEADY:
            regroup(opt)
            regroup(oracle)
        for model, optimizer in zip(models, (opt, oracle)):
            set_grads(model.parameters(), step)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models)):
        assert_close(p, q)


def test_two_optimizers_on_two_halves_of_a_model(case):
    """Interleaved, so that nothing cached by one may serve the other."""
    pair = Pair(case, hyper=case.plain)
    params = list(pair.ours.parameters())
    halves = [
        case.make(half, lr=0.05, **case.plain, grad_mults={p: pair.mults[p] for p in half if p in pair.mults})
        for half in (params[:4], params[4:])
    ]
    for step in range(STEADY):
        pair.set_grads(step)
        for half in halves:
            half.step()
        pair.oracle_step()
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p, q)
