"""Hyper-parameters that change between steps, by hand and by schedulers."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases_optim import STEADY, Pair
from torch.optim import lr_scheduler

SCHEDULERS = {
    "one_cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=12, base_momentum=0.0, max_momentum=0.9
    ),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3, base_momentum=0.0, max_momentum=0.9),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=12),
    "warm_up": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.StepLR(opt, 2)], milestones=[3]
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_and_momentum_schedulers(case, name):
    """OneCycle takes the momentum to 0 and back: buffers appear on the way, and wait while it is 0."""
    pair = Pair(case, groups=2)
    ours, theirs = SCHEDULERS[name](pair.opt), SCHEDULERS[name](pair.oracle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns where it thinks that step() was not called
        for step in range(12):
            pair.train(1, seed=step)
            for scheduler in (ours, theirs):
                scheduler.step(*([1.0] if name == "plateau" else []))
            assert [g["lr"] for g in pair.opt.param_groups] == [g["lr"] for g in pair.oracle.param_groups]
    pair.assert_equal()


def test_every_hyper_parameter_is_read_at_every_step(case):
    for key, values in case.changes.items():
        pair = Pair(case, hyper=case.without_decay)
        for value in values:
            for opt in pair.optimizers:
                opt.param_groups[0][key] = value
            pair.train(STEADY)
        pair.assert_equal()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_and_weight_decay(case, shape):
    """Changed in place, as schedulers do with tensors."""
    pair = Pair(case, lr=torch.tensor(0.05).reshape(shape), hyper={**case.hyper, "weight_decay": torch.tensor(0.01)})
    pair.train(STEADY)
    for opt in pair.optimizers:
        opt.param_groups[0]["lr"].fill_(0.2)
        opt.param_groups[0]["weight_decay"].fill_(0.0)
    pair.train(STEADY).assert_equal(1e-7)  # torch reads them as float32 in places: AdamW's lr · wd is rounded to 6e-8


def test_a_scheduler_on_a_tensor_lr(case):
    pair = Pair(case, lr=torch.tensor(0.05, dtype=torch.float64), hyper=case.without_decay)
    schedulers = [lr_scheduler.ExponentialLR(opt, 0.5) for opt in pair.optimizers]
    for step in range(5):
        pair.train(1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(pair.opt.param_groups[0]["lr"], torch.Tensor)
    pair.assert_equal()
