"""The life of an optimizer: hooks, checkpoints, averages, steps in the backward pass, the end."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases_optim import STEADY, Pair, assert_close, batch, dense, mults, net, oracle_step
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn


def test_a_default_device_is_none_of_the_steps_business(case):
    pair = Pair(case)
    for step in range(STEADY):
        pair.set_grads(step)
        with torch.device("meta"):
            pair.opt.step()
            assert pair.opt.clip_grad_norm_(1e9).device.type == "cpu"
        pair.oracle_step()
    pair.assert_equal()


def test_an_optimizer_is_freed_with_its_parameters(case):
    pair = Pair(case)
    pair.train(STEADY)
    seen = weakref.ref(pair.opt), weakref.ref(next(pair.ours.parameters()))
    gc.disable()
    try:
        del pair
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_hooks_before_and_after_the_step(case):
    pair = Pair(case)
    calls = []

    def before(opt, args, kwargs):
        calls.append("before")
        for p in pair.ours.parameters():
            p.grad.mul_(0.5)

    handles = [
        pair.opt.register_step_pre_hook(before),
        pair.opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("after")),
    ]
    for step in range(STEADY):
        pair.set_grads(step)
        pair.opt.step()
        for p in pair.twin.parameters():
            p.grad.mul_(0.5)
        pair.oracle_step()
    assert calls == ["before", "after"] * STEADY
    for handle in handles:
        handle.remove()
    pair.train(1)
    assert len(calls) == 2 * STEADY
    pair.assert_equal()


def test_hooks_of_all_optimizers_and_the_profiler_hear_of_a_step(case):
    pair = Pair(case).train(STEADY)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        pair.opt.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["before", "after"]
    with torch.profiler.profile() as seen:
        pair.opt.step()
    assert f"Optimizer.step#{case.make.__name__}.step" in {event.name for event in seen.events()}


def test_state_dict_hooks(case):
    opt = Pair(case).opt
    seen = []
    opt.register_state_dict_post_hook(lambda opt, state: state.update(mine=1))
    opt.register_load_state_dict_pre_hook(lambda opt, state: seen.append(sorted(state)))
    state = opt.state_dict()
    assert state["mine"] == 1
    opt.load_state_dict(state)
    assert seen == [["grad_mults", "mine", "param_groups", "state"]]


def test_torchs_optimizer_ignores_our_extra_key_and_we_ignore_others(case):
    pair = Pair(case)
    pair.train(1)
    state = pair.opt.state_dict()
    pair.oracle.load_state_dict(copy.deepcopy(state))
    pair.opt.load_state_dict({**state, "something": 1})
    pair.train(2).assert_equal()


def test_the_state_is_the_arrays_only_and_lazy(case):
    pair = Pair(case)
    assert not pair.opt.state
    pair.set_grads(0)
    first = next(pair.ours.parameters())
    first.grad = None
    pair.opt.step()
    assert first not in pair.opt.state
    assert all(set(state) == set(case.entries) for state in pair.opt.state.values())


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_model_and_swa_lr(case, average):
    pair = Pair(case)
    averages = [AveragedModel(model, multi_avg_fn=average) for model in pair.models]
    schedulers = [SWALR(opt, swa_lr=0.01, anneal_epochs=3) for opt in pair.optimizers]
    for step in range(6):
        pair.train(1, seed=step)
        for averaged, model in zip(averages, pair.models):
            averaged.update_parameters(model)
        for scheduler in schedulers:
            scheduler.step()
    pair.assert_equal()
    for p, q in zip(*(averaged.parameters() for averaged in averages)):
        assert_close(p, q)


def test_one_optimizer_per_parameter_stepped_in_the_backward_pass(case):
    ours, twin = net(torch.float64), net(torch.float64)
    found = mults(ours)
    masks = {q: dense(found[p], p.shape) for p, q in zip(ours.parameters(), twin.parameters()) if p in found}
    opts = {
        p: case.make([p], lr=0.05, **case.hyper, grad_mults={p: found[p]} if p in found else None)
        for p in ours.parameters()
    }
    oracle = case.oracle(twin.parameters(), lr=0.05, **case.hyper)

    def step(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(STEADY):
        ours(batch(torch.float64, seed)).square().mean().backward()
        oracle.zero_grad()
        twin(batch(torch.float64, seed)).square().mean().backward()
        oracle_step(oracle, masks)
    assert all(p.grad is None for p in ours.parameters())
    for p, q in zip(ours.parameters(), twin.parameters()):
        assert_close(p, q)
