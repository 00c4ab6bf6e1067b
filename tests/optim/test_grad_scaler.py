"""gr.GradScaler: what torch's does, with one read of the gradients fewer."""

from __future__ import annotations

import copy

import pytest
import torch
from cases_optim import CASES, STEADY, Pair, all_equal, amp_steps, named, overflow, scaled_step
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import gradrep_kernels as gr

TAILS = ({}, {"max_grad_norm": 0.4}, {"max_grad_norm": 0.4, "ema_decay": 0.9})
CHECK = "_amp_foreach_non_finite_check_and_unscale_"


@pytest.fixture(**named(CASES))
def case(request):
    return request.param


class Checks(TorchDispatchMode):
    """Counts the passes of torch's own check."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == CHECK
        return func(*args, **(kwargs or {}))


def pair_with(case, tail: dict, fused: bool | None = True) -> Pair:
    pair = Pair(case, torch.float32, fused=fused, groups=2)
    for name, value in tail.items():
        setattr(pair.opt, name, value)
    return pair


def state_of(pair: Pair) -> list[torch.Tensor]:
    averages = [pair.opt.state[p]["ema"] for p in pair.ours.parameters() if "ema" in pair.opt.state.get(p, {})]
    return [*pair.weights(), *pair.arrays(), *averages, *(p.grad for p in pair.ours.parameters())]


def step_with(pair: Pair, scaler: torch.amp.GradScaler, seed: int, overflows: bool) -> None:
    pair.set_grads(seed)
    scaler.scale(torch.zeros(()))
    for p in pair.ours.parameters():
        p.grad.mul_(scaler.get_scale())
    if overflows:
        overflow(pair)
    scaled_step(scaler, pair.opt)


@pytest.mark.parametrize("tail", TAILS, ids=["plain", "clipping", "averaging"])
def test_it_does_what_torchs_does(case, tail):
    """Overflows on the first step, the second and in the steady state; the scale grows between them."""
    options = {"init_scale": 16.0, "growth_interval": 3}
    ours, theirs = pair_with(case, tail), pair_with(case, tail)
    scaler, torchs = gr.GradScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)
    scales = []
    for step in range(12):
        with Checks() as checks:
            step_with(ours, scaler, step, overflows=step in (0, 2, 8))
        assert checks.count == 0
        step_with(theirs, torchs, step, overflows=step in (0, 2, 8))
        scales.append(scaler.get_scale())
        assert scales[-1] == torchs.get_scale()
        for a, b in zip(state_of(ours), state_of(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
        if tail:
            torch.testing.assert_close(ours.opt.last_grad_norm, theirs.opt.last_grad_norm, equal_nan=True)
    assert set(scales) == {4.0, 8.0}


@pytest.mark.parametrize("fused", [None, True])
def test_gradients_that_were_unscaled_before(case, fused):
    pair = pair_with(case, {}, fused)
    amp_steps(pair, gr.GradScaler("cpu", init_scale=16.0), clip=0.5)
    pair.assert_equal(1e-6)


def test_other_optimizers_are_torchs_business():
    weight = nn.Parameter(torch.ones(3))
    opt, scaler = torch.optim.SGD([weight], lr=0.5, fused=True), gr.GradScaler("cpu", init_scale=4.0)
    weight.grad = torch.full_like(weight, 4.0)
    with Checks() as checks:
        scaled_step(scaler, opt)
    assert checks.count == 1
    assert torch.equal(weight.detach(), torch.full((3,), 0.5))


def test_a_norm_is_of_one_step_alone(case):
    """A step that raises does not leave its norm to the next one."""
    pair = pair_with(case, {"max_grad_norm": 0.4})
    amp_steps(pair, gr.GradScaler("cpu", init_scale=2.0), steps=STEADY)
    norm, broken = pair.opt.norm_before_step(), next(pair.ours.parameters())
    whole, broken.grad = broken.grad, broken.grad.to_sparse()
    with pytest.raises(ValueError, match="cannot be applied to a gradient of layout"):
        pair.opt.step()
    broken.grad = whole.mul_(1000)
    pair.opt.step()
    assert float(pair.opt.last_grad_norm) > 10 * float(norm)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_that_changes_gradients_changes_their_norm(case, everywhere):
    pair = pair_with(case, {"max_grad_norm": 0.4})
    register = register_optimizer_step_pre_hook if everywhere else pair.opt.register_step_pre_hook
    scaler = gr.GradScaler("cpu", init_scale=2.0)
    for step in range(STEADY):
        step_with(pair, scaler, step, overflows=False)
    norm = float(pair.opt.last_grad_norm)

    def hook(*_) -> None:
        for p in pair.ours.parameters():
            p.grad.mul_(100)

    handle = register(hook)
    try:
        step_with(pair, scaler, STEADY - 1, overflows=False)
    finally:
        handle.remove()
    assert float(pair.opt.last_grad_norm) == pytest.approx(100 * norm, rel=1e-5)


def test_a_step_that_was_not_taken_leaves_no_norm(case):
    pair = pair_with(case, {"max_grad_norm": 0.4, "ema_decay": 0.5})
    scaler = gr.GradScaler("cpu", init_scale=2.0)
    for step in range(STEADY):
        step_with(pair, scaler, step, overflows=False)
    with pair.opt.swap_ema(), pytest.raises(RuntimeError, match="a step inside swap_ema"):
        step_with(pair, scaler, 9, overflows=False)
    pair.opt.grad_scale = pair.opt.found_inf = None
    for p in pair.ours.parameters():
        p.grad.mul_(100)
    expected = float(pair.opt.clip_grad_norm_(float("inf")))
    pair.opt.step()
    assert float(pair.opt.last_grad_norm) == pytest.approx(expected, rel=1e-6)


def test_without_gradients(case):
    opt, scaler = case.make([nn.Parameter(torch.ones(2))], lr=0.1, fused=True, max_grad_norm=1.0), gr.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(opt)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


def test_its_checkpoint_is_torchs(case):
    pair, scaler = pair_with(case, {}), gr.GradScaler("cpu", init_scale=64.0)
    step_with(pair, scaler, 0, overflows=True)
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(copy.deepcopy(scaler.state_dict()))
    assert other.get_scale() == 32.0
    before = pair.weights()
    step_with(pair, scaler, 1, overflows=False)
    assert not all_equal(before, pair.weights())
