"""FusedRepSGD alone: where it is right and torch's fused SGD is not, momentum that comes and goes, sparse gradients."""

from __future__ import annotations

import pytest
import torch
from cases_optim import SGD, STEADY, Pair, assert_close, scaled_step, served, set_grads
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import FusedRepSGD


@pytest.fixture(**served([SGD]))
def case(request):
    optimizer, backend = request.param
    with gr.use_backend(backend):
        yield optimizer


# ---- right where torch's fused SGD is not: computed by hand


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_updated_on_the_cpu(case, dtype):
    """SGD(fused=True) misreads them up to 2.13; a step of 0.1 from 1.0 can be told by hand."""
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    opt = FusedRepSGD([p], lr=0.125, momentum=0.5, fused=True)
    for expected in (0.875, 0.6875, 0.46875):  # v = 1, 1.5, 1.75: exact in bf16
        p.grad = torch.ones(40, dtype=dtype)
        opt.step()
        assert torch.equal(p.detach(), torch.full((40,), expected, dtype=dtype))


# ---- the first step of a buffer, which is the gradient as it is; dampening comes after


def test_a_gradient_that_first_appears_on_a_later_step_is_not_dampened(case):
    """Its first step is its own, not the group's."""
    pair = Pair(case, fused=True, hyper={"momentum": 0.9, "dampening": 0.5})
    late = [list(model.parameters())[2] for model in pair.models]
    for step in range(STEADY + 3):
        pair.set_grads(step)
        if step < STEADY:
            late[0].grad = late[1].grad = None
        pair.step()
    pair.assert_equal()


def test_momentum_from_0_to_09(case):
    """Buffers appear on the way, and wait while it is 0."""
    pair = Pair(case, hyper={})
    for momentum in (0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.5, 0.0, 0.9):
        for opt in pair.optimizers:
            opt.param_groups[0]["momentum"] = momentum
        pair.train(1, seed=int(momentum * 10))
    pair.assert_equal()


def test_nesterov_in_a_group_that_is_added_in_mid_run(case):
    pair = Pair(case, hyper={"momentum": 0.9}).train(STEADY)
    extra = [nn.Linear(3, 4).double() for _ in range(2)]
    extra[1].load_state_dict(extra[0].state_dict())
    for opt, module in zip(pair.optimizers, extra):
        opt.add_param_group({"params": module.parameters(), "lr": 0.3, "nesterov": True})
    for step in range(STEADY):
        for module, other in zip(extra, pair.models):
            set_grads([*other.parameters(), *module.parameters()], step)
        pair.step()
    pair.assert_equal()
    assert_close(extra[0].weight, extra[1].weight)


def test_without_momentum_nothing_is_kept(case):
    assert not Pair(case, hyper={}).train(2).opt.state_dict()["state"]


def test_an_address_that_is_used_again_with_another_size(case):
    p, q = (nn.Parameter(torch.linspace(0, 1, 64, dtype=torch.float64)) for _ in range(2))
    opt, sgd = case.make([p], lr=0.1), case.oracle([q], lr=0.1)
    for size in (64, 64, 64, 64, 10, 10):
        for w, optimizer in ((p, opt), (q, sgd)):
            w.grad = None
            w.data = w.data[:size]
            w.grad = torch.ones(size, dtype=torch.float64)
            optimizer.step()
    assert_close(p, q)
    assert p.data.untyped_storage()[:].nbytes() == 512


# ---- sparse gradients, which SGD applies


def test_sparse_gradients(case):
    def make():
        torch.manual_seed(0)
        return nn.Embedding(10, 3, sparse=True, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

    for momentum in (0.0, 0.9):
        models = make(), make()
        params = [[p for module in model for p in module.parameters()] for model in models]
        opt, sgd = (
            FusedRepSGD(params[0], lr=0.1, momentum=momentum),
            torch.optim.SGD(params[1], lr=0.1, momentum=momentum, foreach=False),
        )
        for step in range(STEADY):
            for (embedding, linear), optimizer in zip(models, (opt, sgd)):
                optimizer.zero_grad()
                linear(embedding(torch.tensor([step, 1, 1, 7]))).square().sum().backward()
                optimizer.step()
        for p, q in zip(*params):
            assert_close(p, q)
    full = [p.grad.to_dense().clone() for p in params[0]]
    norm = opt.clip_grad_norm_(1e-3)
    assert float(norm) == pytest.approx(float(torch.stack([g.square().sum() for g in full]).sum().sqrt()))
    for p, g in zip(params[0], full):
        assert_close(p.grad.to_dense(), g * (1e-3 / (norm + 1e-6)))


def test_sparse_gradients_under_a_fused_grad_scaler(case):
    embedding = nn.Embedding(10, 3, sparse=True)
    opt = FusedRepSGD(embedding.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = embedding.weight.detach().clone()
    scaler.scale(embedding(torch.tensor([1, 1, 2])).sum()).backward()
    scaler.step(opt)
    scaler.update()
    before[1] -= 0.2
    before[2] -= 0.1
    assert torch.allclose(embedding.weight, before)
    embedding.weight.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 3), float("inf")), (10, 3))
    scaled_step(scaler, opt)
    assert torch.allclose(embedding.weight, before)


def test_a_gradient_becomes_sparse(case):
    """nn.Embedding(sparse=True), switched on after some steps."""
    ours, twin = (
        nn.Embedding(6, 3, dtype=torch.float64, _weight=torch.linspace(0, 1, 18, dtype=torch.float64).view(6, 3))
        for _ in range(2)
    )
    opt, sgd = (
        FusedRepSGD(ours.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9),
    )
    for step in range(2 * STEADY):
        for model, optimizer in ((ours, opt), (twin, sgd)):
            model.sparse = step >= STEADY
            optimizer.zero_grad()
            model(torch.tensor([1, 4, 1])).pow(2).sum().backward()
            optimizer.step()
    assert_close(ours.weight, twin.weight)
