"""torch.amp.GradScaler: unscaling outside of the step and inside it, and what an overflow leaves alone."""

from __future__ import annotations

import pytest
import torch
from cases_optim import STEADY, Pair, all_equal, amp_steps, assert_close, net, overflow, scaled_step


def test_overflow_on_the_first_amp_step_leaves_no_state(case):
    pair = Pair(case, torch.float32, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pair.set_grads(0)
    overflow(pair)
    before, grads = pair.weights(), [p.grad.clone() for p in pair.ours.parameters()]
    scaled_step(scaler, pair.opt)
    assert all_equal(before, pair.weights())
    assert all_equal(grads, [p.grad for p in pair.ours.parameters()])
    assert not pair.opt.state
    assert scaler.get_scale() == 4.0
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


@pytest.mark.parametrize("steps", [0, 1, STEADY])
@pytest.mark.parametrize("found", [2.0, 8.0, 0.5, float("nan")])
def test_any_found_inf_that_is_not_zero_skips_the_step(case, found, steps):
    """GradScaler adds up one flag per device: 2 with two devices."""
    pair = Pair(case, torch.float32, fused=True)
    pair.train(steps)
    pair.set_grads(0)
    before = pair.weights(), pair.arrays(), [p.grad.clone() for p in pair.ours.parameters()]
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(found)
    pair.opt.step()
    assert all_equal(before[0], pair.weights())
    assert all_equal(before[1], pair.arrays())
    assert all_equal(before[2], [p.grad for p in pair.ours.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
def test_the_scalers_numbers_in_other_dtypes(case, dtype):
    pair = Pair(case, fused=True)
    for step in range(2 * STEADY):
        pair.opt.found_inf = torch.tensor(step == STEADY).to(dtype)
        pair.opt.grad_scale = torch.tensor(1).to(dtype)
        if step == STEADY:
            pair.set_grads(0)
            pair.opt.step()
        else:
            pair.train(1, seed=step)
    pair.assert_equal()


@pytest.mark.parametrize("steps", [0, STEADY])
def test_unscaling_bumps_the_version_counters_of_gradients(case, steps):
    pair = Pair(case, fused=True)
    pair.train(steps)
    pair.set_grads(0)
    grads = [p.grad for p in pair.ours.parameters()]
    before = [grad._version for grad in grads]
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    pair.opt.step()
    assert all(grad._version > version for grad, version in zip(grads, before))


@pytest.mark.parametrize("steps", [0, STEADY])
def test_unscaling_leaves_the_origin_of_a_lazy_clone_alone(case, steps):
    pair = Pair(case, fused=True)
    pair.train(steps)
    pair.set_grads(0)
    p = next(pair.ours.parameters())
    origin = p.grad.clone()
    p.grad, expected = torch._lazy_clone(origin), origin.clone()
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    pair.opt.step()
    assert torch.equal(origin, expected)
    assert torch.equal(p.grad, expected / 2)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(case, fused, clip):
    """Without fused the scaler unscales, with it the step; unscale_ and clipping before the step work with both."""
    pair = Pair(case, torch.float32, fused=fused, groups=2)
    amp_steps(pair, torch.amp.GradScaler("cpu", init_scale=16.0), clip=clip)
    pair.assert_equal(1e-6)
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.grad, q.grad, 1e-6)  # unscaled, as torch's fused optimizers leave them


@pytest.mark.parametrize("fused", [None, True])
def test_overflow_on_a_later_step_changes_nothing(case, fused):
    pair = Pair(case, torch.float32, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp_steps(pair, scaler)
    pair.set_grads(0)
    overflow(pair)
    before = pair.weights(), pair.arrays()
    scaled_step(scaler, pair.opt)
    assert all_equal(before[0], pair.weights())
    assert all_equal(before[1], pair.arrays())
    assert scaler.get_scale() == 4.0
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


def test_overflow_when_a_late_parameter_would_get_its_arrays(case):
    pair = Pair(case, torch.float32, fused=True)
    late = next(pair.ours.parameters())
    for step in range(STEADY):
        pair.set_grads(step)
        late.grad = None
        pair.opt.step()
    pair.set_grads(9)
    before = pair.weights()
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    pair.opt.step()
    assert late not in pair.opt.state
    assert all_equal(before, pair.weights())


def test_in_kernel_unscaling_is_only_there_when_asked_for(case):
    """Lightning refuses gradient clipping for optimizers that have the attribute."""
    params = list(net().parameters())
    assert not hasattr(case.make(params), "_step_supports_amp_scaling")
    assert case.make(params, fused=True)._step_supports_amp_scaling
    assert case.make([{"params": params, "fused": True}]).state_dict()["param_groups"][0]["fused"] is None
