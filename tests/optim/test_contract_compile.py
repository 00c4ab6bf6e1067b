"""Under torch.compile the step is traced as torch's functional optimizer on M ⊙ g, and follows every change.

Without multipliers the graph is torch's own, so one optimizer shows it.
"""

from __future__ import annotations

import pytest
import torch
from cases_optim import (
    CASES,
    SGD,
    Pair,
    all_equal,
    amp_steps,
    batch,
    clip_twin,
    named,
    overflow,
    scaled_step,
)
from torch import nn

from gradrep_kernels import FusedRepSGD

MULTIPLIED = [(SGD, False), *((case, True) for case in CASES)]
BOTH = {"argvalues": MULTIPLIED, "ids": [f"{case.name}-{multiplied}" for case, multiplied in MULTIPLIED]}


@pytest.fixture(**named(CASES))
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "multiplied"), **BOTH)
@pytest.mark.parametrize(
    ("groups", "lr"), [(2, 0.05), (1, torch.tensor(0.05, dtype=torch.float64))], ids=["groups", "tensor_lr"]
)
def test_the_step_is_one_graph(case, multiplied, groups, lr):
    """Both at once is too much for dynamo: torch 2.13 raises SpeculationLogDivergence for its own SGD too."""
    pair = Pair(case, multiplied=multiplied, groups=groups, lr=lr)
    step = torch.compile(lambda: pair.opt.step(), backend="aot_eager", fullgraph=True)
    for seed in range(3):
        pair.set_grads(seed)
        step()
        pair.oracle_step()
    pair.assert_equal()


@pytest.mark.parametrize(("case", "multiplied"), **BOTH)
def test_the_whole_training_step(case, multiplied):
    pair = Pair(case, multiplied=multiplied)
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
        pair.oracle.zero_grad()
        pair.twin(x).square().mean().backward()
        clip_twin(pair, 0.3)
        pair.oracle_step()
    pair.assert_equal()


def test_multipliers_that_change_between_compiled_steps(case):
    pair = Pair(case)
    step = torch.compile(pair.opt.step, backend="aot_eager")
    for seed in range(4):
        pair.set_scaling(2, torch.full((3, 3), 0.5 + seed))
        pair.set_grads(seed)
        step()
        pair.oracle_step()
    pair.assert_equal(1e-6)


def test_grad_scaler_and_a_compiled_step(case):
    """Unscaling and overflow fall out of the graph rather than being ignored."""
    pair = Pair(case, torch.float32, fused=True)
    pair.opt.step = torch.compile(pair.opt.step, backend="aot_eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pair.set_grads(0)
    overflow(pair)
    before = pair.weights()
    scaled_step(scaler, pair.opt)
    assert all_equal(before, pair.weights())
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


def test_the_end_of_a_compiled_step(case):
    """Clipping, averages and random bits fall out of the graph rather than being ignored."""
    compiled, eager = Pair(case), Pair(case)
    narrow = {"momentum_dtype": torch.bfloat16} if case is SGD else {}
    for pair in (compiled, eager):
        options = {"max_grad_norm": 0.3, "ema_decay": 0.9, **narrow}
        pair.opt = case.make(pair.ours.parameters(), **{"lr": 0.05, **case.hyper}, **options)
    step = torch.compile(compiled.opt.step, backend="aot_eager")
    for seed in range(4):
        compiled.set_grads(seed)
        eager.set_grads(seed)
        step()
        eager.opt.step()
    assert all_equal(compiled.weights(), eager.weights())
    assert all_equal(compiled.arrays(), eager.arrays())
    pairs = zip(compiled.ours.parameters(), eager.ours.parameters())
    assert all(torch.equal(compiled.opt.ema(p), eager.opt.ema(q)) for p, q in pairs)


def test_small_multipliers_do_not_underflow_in_fp16():
    """9e-12, the smallest published one, is 0 in fp16; its gradient can be large."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    opt = FusedRepSGD([p], lr=1e4, grad_mults={p: torch.tensor(1e-9)})
    p.grad = torch.full((4,), 5e4, dtype=torch.float16)
    torch.compile(opt.step, backend="aot_eager")()
    assert p.tolist() == pytest.approx([-0.5] * 4, rel=1e-2)
