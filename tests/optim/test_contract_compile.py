"""Under torch.compile the step is traced as torch's functional SGD on M ⊙ g, in one graph, and follows every change."""

from __future__ import annotations

import pytest
import torch
from cases_optim import (
    MOMENTUM,
    Pair,
    all_equal,
    amp_steps,
    batch,
    clip_twin,
    oracle_step,
    overflow,
    scaled_step,
    weights,
)
from torch import nn

from gradrep_kernels import FusedRepSGD


class TestCompile:
    """Under torch.compile the step is traced as torch's functional SGD on M ⊙ g, in one graph, and follows every change."""

    @pytest.fixture(autouse=True)
    def backend(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("multiplied", [False, True])
    @pytest.mark.parametrize(
        ("groups", "lr"), [(2, 0.05), (1, torch.tensor(0.05, dtype=torch.float64))], ids=["groups", "tensor_lr"]
    )
    def test_the_step_is_one_graph(self, multiplied, groups, lr):
        """Both at once is too much for dynamo: torch 2.13 raises SpeculationLogDivergence for its own SGD too."""
        pair = Pair(multiplied=multiplied, groups=groups, lr=lr, **MOMENTUM)
        step = torch.compile(lambda: pair.opt.step(), backend="aot_eager", fullgraph=True)
        for seed in range(3):
            pair.set_grads(seed)
            step()
            oracle_step(pair.sgd, pair.masks)
        pair.assert_equal()

    @pytest.mark.parametrize("multiplied", [False, True])
    def test_the_whole_training_step(self, multiplied):
        pair = Pair(multiplied=multiplied, **MOMENTUM)
        x = batch(torch.float64)

        @torch.compile(backend="aot_eager")
        def train():
            pair.opt.zero_grad()
            loss = pair.ours(x).square().mean()
            loss.backward()
            pair.opt.clip_grad_norm_(0.3)
            pair.opt.step()
            return loss

        for _ in range(3):
            train()
            pair.sgd.zero_grad()
            pair.twin(x).square().mean().backward()
            clip_twin(pair, 0.3)
            oracle_step(pair.sgd, pair.masks)
        pair.assert_equal()

    def test_multipliers_that_change_between_compiled_steps(self):
        pair = Pair(momentum=0.9)
        step = torch.compile(pair.opt.step, backend="aot_eager")
        weight, twin = list(pair.ours.parameters())[2], list(pair.twin.parameters())[2]
        caller = pair.masks.get(twin, torch.ones((), dtype=torch.float64))
        for seed in range(4):
            scaling = torch.full((3, 3), 0.5 + seed)
            pair.opt.set_spatial_scaling(weight, scaling)
            pair.masks[twin] = caller * scaling
            pair.set_grads(seed)
            step()
            oracle_step(pair.sgd, pair.masks)
        pair.assert_equal(1e-6)

    def test_grad_scaler_and_a_compiled_step(self):
        """Unscaling and overflow fall out of the graph rather than being ignored."""
        pair = Pair(torch.float32, fused=True, **MOMENTUM)
        pair.opt.step = torch.compile(pair.opt.step, backend="aot_eager")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        pair.set_grads(0)
        overflow(pair)
        before = weights(pair.ours)
        scaled_step(scaler, pair.opt)
        assert all_equal(before, weights(pair.ours))
        amp_steps(pair, scaler)
        pair.assert_equal(1e-6)

    def test_small_multipliers_do_not_underflow_in_fp16(self):
        """9e-12, the smallest published one, is 0 in fp16; its gradient can be large."""
        p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        opt = FusedRepSGD([p], lr=1e4, grad_mults={p: torch.tensor(1e-9)})
        p.grad = torch.full((4,), 5e4, dtype=torch.float16)
        torch.compile(opt.step, backend="aot_eager")()
        assert p.tolist() == pytest.approx([-0.5] * 4, rel=1e-2)
