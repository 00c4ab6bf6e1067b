"""Gradients of every kind: late, strided, of another dtype, sparse, differentiable."""

from __future__ import annotations

import functools

import pytest
import torch
from cases_optim import STEADY, Pair, all_equal, assert_close, oracle_step, set_grads
from torch import nn

from gradrep_kernels import GradMult


@pytest.mark.parametrize("late", [False, True])
def test_gradients_in_another_memory_format(case, late):
    """Gradient strides unlike the parameter's, from the start or after steps in which they agreed."""
    pair = Pair(case, fused=True)
    pair.train(STEADY if late else 0)
    for step in range(3):
        pair.set_grads(step)
        for p in pair.ours.parameters():
            if p.dim() == 4:
                p.grad = p.grad.to(memory_format=torch.channels_last)
            elif p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()
        pair.step()
    pair.assert_equal()


def test_a_gradient_that_first_appears_on_a_later_step(case):
    """Its first step is its own, not the group's."""
    pair = Pair(case, fused=True)
    late = [list(model.parameters())[2] for model in pair.models]
    for step in range(STEADY + 3):
        pair.set_grads(step)
        if step < STEADY:
            late[0].grad = late[1].grad = None
        pair.step()
    pair.assert_equal()


def test_gradients_that_are_expanded_sliced_or_overlapping(case):
    def make():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(6, 4, dtype=torch.float64)) for _ in range(4)]

    def grads(step):
        big = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        return [big[0, :4].expand(6, 4), big[:6, ::10], big.as_strided((6, 4), (1, 1)), big[3:9, 5:9].T.contiguous().T]

    ours, twin = make(), make()
    masks = {q: torch.rand(4, dtype=torch.float64) for q in twin}
    opt = case.make(ours, lr=0.1, **case.hyper, grad_mults={p: masks[q] for p, q in zip(ours, twin)})
    oracle = case.oracle(twin, lr=0.1, **case.hyper)
    for step in range(STEADY):
        for p, q, g, h in zip(ours, twin, grads(step), grads(step)):
            p.grad, q.grad = g, h
        opt.step()
        oracle_step(oracle, masks)
    for p, q in zip(ours, twin):
        assert_close(p, q)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs Tensor.grad_dtype")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "tolerance"),
    [
        (torch.float64, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-1),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
)
def test_gradients_of_another_dtype(case, dtype, grad_dtype, tolerance):
    """Arrays have the wider dtype of weight and gradient: float32 for bf16 weights with float32 gradients.

    torch's SGD keeps the momentum in the gradient's dtype.
    """
    if not case.takes_other_dtypes:
        pytest.skip("its oracle takes none")
    pair = Pair(case, dtype, hyper=case.without_decay)
    for p in pair.ours.parameters():
        p.grad_dtype = grad_dtype
    for step in range(STEADY):
        for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(grad_dtype)
            q.grad, q.grad_dtype = None, grad_dtype
            q.grad = p.grad.clone()
            if q in pair.masks:  # in float64: torch rounds M ⊙ g to the gradient's dtype
                multiplied, q.grad, q.grad_dtype = q.grad * pair.masks[q], None, torch.float64
                q.grad = multiplied
        pair.opt.step()
        pair.oracle.step()
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert p.grad.dtype == grad_dtype
        for key in case.states:
            assert pair.opt.state[p][key].dtype == torch.promote_types(dtype, grad_dtype)
        assert_close(p, q, tolerance)


def test_sparse_gradients_that_cannot_be_applied_are_refused_before_anything_is_changed(case):
    """Those of parameters with a multiplier, and what the rule does not allow."""
    embedding, linear = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)
    params = [linear.weight, linear.bias, embedding.weight]
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in params]
    for options, what in (
        ({**case.without_decay, "grad_mults": {embedding.weight: torch.ones(3)}}, "a Grad Mult"),
        *case.not_with_sparse,
    ):
        opt = case.make(params, lr=0.1, **options)
        with pytest.raises(
            ValueError,
            match=rf"parameter 2 of shape \[10, 3\]: {what} cannot be applied to a gradient of layout torch.sparse_coo",
        ):
            opt.step()
        assert all_equal(before, [p.detach() for p in params])
        assert not opt.state
    with pytest.raises(ValueError, match="a Grad Mult cannot be applied to a gradient of layout"):
        case.make(params, grad_mults={embedding.weight: torch.ones(3)}).clip_grad_norm_(1.0)


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)], ids=["lr", "tensor_lr"]
)
def test_differentiable(case, lr, request):
    """d(loss after two steps) / d(gradients, initial weight, lr), through the multiplier."""
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)  # in which torch's AdamW then counts steps, and forms 1 - β^t
    torch.manual_seed(0)
    start, *grads = (torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mult = GradMult(torch.rand(4, 1, 3, 3).double(), torch.ones(4).double())
    hyper = case.hyper if isinstance(lr, float) else case.plain
    options = {"lr": lr, **hyper, "weight_decay": 0.1, "differentiable": True}

    mask = mult.dense(start.shape)
    # What the gradients of the oracle are multiplied by, and what its weight is of ours.
    by, share = (mask.sqrt(), 1 / mask.sqrt()) if case.scales_gradients else (mask, torch.ones_like(mask))

    def run(multiplied):
        w = start.clone() if multiplied else start * share
        opt = case.make([w], **options, grad_mults={w: mult}) if multiplied else case.oracle([w], **options)
        w.retain_grad()
        for grad in grads:
            w.grad = grad if multiplied else grad * by
            opt.step()
        unknowns = (
            [start, grads[1], lr] if isinstance(lr, torch.Tensor) else [start, grads[1]]
        )  # the first gradient enters v detached, in torch too
        end = w if multiplied else w / share
        return torch.autograd.grad(end.pow(3).sum(), unknowns)

    for ours, theirs in zip(run(True), run(False)):
        assert_close(ours, theirs, 1e-12)


def test_gradients_in_the_same_and_in_new_memory(case):
    pair = Pair(case)
    for step in range(8):
        for model in pair.models:
            kept = [p.grad for p in model.parameters()]
            set_grads(model.parameters(), step)
            for p, grad in zip(model.parameters(), kept):
                if grad is not None and step % 3:
                    p.grad = grad.copy_(p.grad)
        pair.step()
    pair.assert_equal()


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(case, to_none):
    pair = Pair(case)
    for step in range(STEADY):
        pair.train(1, seed=step)
        pair.opt.zero_grad(set_to_none=to_none)
        pair.oracle.zero_grad(set_to_none=to_none)
        pair.step()
    pair.assert_equal()


def test_clipping_sparse_gradients(case):
    """By the norm of what is there; rows that occur twice are added first."""
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(10, 3, sparse=True, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    params = [embedding.weight, *linear.parameters()]
    opt = case.make(params, lr=0.1)
    linear(embedding(torch.tensor([3, 1, 1, 7]))).square().sum().backward()
    full = [p.grad.to_dense().clone() for p in params]
    norm = opt.clip_grad_norm_(1e-3)
    assert float(norm) == pytest.approx(float(torch.stack([g.square().sum() for g in full]).sum().sqrt()))
    for p, g in zip(params, full):
        assert_close(p.grad.to_dense(), g * (1e-3 / (norm + 1e-6)))
