"""What real training scripts do to an optimizer beyond calling step(): one named test for each. The judge is torch.optim.SGD(foreach=False).

Every test runs on the kernels that are there and on the reference.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from cases_optim import Pair, assert_close, batch, dense, mults, net, oracle_step, set_grads
from implementations import on_gpu
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import gradrep_kernels as gr
from gradrep_kernels import FusedRepSGD, GradMult
from gradrep_kernels.ops import backends

MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}
STEADY = 4  # steps after which a cached plan, where there is one, is in use

needs_plan = pytest.mark.skipif(backends.report(("cpu",))[0]["serves"] != "cpp", reason="only the C++ step has a plan")


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with gr.use_backend(request.param):
        yield request.param
    torch.set_num_threads(threads)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def buffers(opt) -> list[torch.Tensor]:
    return [state["momentum_buffer"].clone() for state in opt.state.values()]


def all_equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ---- right where torch's fused SGD is not


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_updated_on_the_cpu(dtype):
    """SGD(fused=True) misreads them up to 2.13; a step of 0.1 from 1.0 can be told by hand."""
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    opt = FusedRepSGD([p], lr=0.125, momentum=0.5, fused=True)
    for expected in (0.875, 0.6875, 0.46875):  # v = 1, 1.5, 1.75: exact in bf16
        p.grad = torch.ones(40, dtype=dtype)
        opt.step()
        assert torch.equal(p.detach(), torch.full((40,), expected, dtype=dtype))


@pytest.mark.parametrize("late", [False, True])
def test_gradients_in_another_memory_format(late):
    """Gradient strides unlike the parameter's, from the start or after steps in which they agreed."""
    pair = Pair(fused=True, **MOMENTUM)
    pair.train(STEADY if late else 0)
    for step in range(3):
        pair.set_grads(step)
        for p in pair.ours.parameters():
            if p.dim() == 4:
                p.grad = p.grad.to(memory_format=torch.channels_last)
            elif p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


def test_a_gradient_that_first_appears_on_a_later_step():
    """Its first step is its own, not the group's."""
    pair = Pair(fused=True, momentum=0.9, dampening=0.5)
    late = [list(model.parameters())[2] for model in (pair.ours, pair.twin)]
    for step in range(STEADY + 3):
        pair.set_grads(step)
        if step < STEADY:
            late[0].grad = late[1].grad = None
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


def overflow(pair) -> None:
    next(pair.ours.parameters()).grad.view(-1)[1] = float("inf")


def test_overflow_on_the_first_amp_step_leaves_no_state():
    pair = Pair(torch.float32, fused=True, **MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pair.set_grads(0)
    overflow(pair)
    before, grads = weights(pair.ours), [p.grad.clone() for p in pair.ours.parameters()]
    scaled_step(scaler, pair.opt)
    assert all_equal(before, weights(pair.ours))
    assert all_equal(grads, [p.grad for p in pair.ours.parameters()])
    assert not pair.opt.state
    assert scaler.get_scale() == 4.0
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


@pytest.mark.parametrize("steps", [0, 1, STEADY])
@pytest.mark.parametrize("found", [2.0, 8.0, 0.5, float("nan")])
def test_any_found_inf_that_is_not_zero_skips_the_step(found, steps):
    """GradScaler adds up one flag per device: 2 with two devices."""
    pair = Pair(torch.float32, fused=True, **MOMENTUM)
    pair.train(steps)
    pair.set_grads(0)
    before = weights(pair.ours), buffers(pair.opt), [p.grad.clone() for p in pair.ours.parameters()]
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(found)
    pair.opt.step()
    assert all_equal(before[0], weights(pair.ours))
    assert all_equal(before[1], buffers(pair.opt))
    assert all_equal(before[2], [p.grad for p in pair.ours.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
def test_the_scalers_numbers_in_other_dtypes(dtype):
    pair = Pair(fused=True, **MOMENTUM)
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
def test_unscaling_bumps_the_version_counters_of_gradients(steps):
    pair = Pair(fused=True, **MOMENTUM)
    pair.train(steps)
    pair.set_grads(0)
    grads = [p.grad for p in pair.ours.parameters()]
    before = [grad._version for grad in grads]
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    pair.opt.step()
    assert all(grad._version > version for grad, version in zip(grads, before))


@pytest.mark.parametrize("steps", [0, STEADY])
def test_unscaling_leaves_the_origin_of_a_lazy_clone_alone(steps):
    pair = Pair(fused=True, **MOMENTUM)
    pair.train(steps)
    pair.set_grads(0)
    p = next(pair.ours.parameters())
    origin = p.grad.clone()
    p.grad, expected = torch._lazy_clone(origin), origin.clone()
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    pair.opt.step()
    assert torch.equal(origin, expected)
    assert torch.equal(p.grad, expected / 2)


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_step_bumps_the_version_counters(steps):
    """Autograd must notice that a saved weight has changed, as it does after SGD(foreach=False)."""
    pair = Pair(**MOMENTUM)
    pair.train(steps)
    loss = pair.ours(batch(torch.float64)).sum()
    pair.set_grads(0)
    before = [p._version for p in pair.ours.parameters()]
    counts = [state["momentum_buffer"]._version for state in pair.opt.state.values()]
    pair.opt.step()
    assert all(p._version > version for p, version in zip(pair.ours.parameters(), before))
    assert all(state["momentum_buffer"]._version > version for state, version in zip(pair.opt.state.values(), counts))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- GradScaler


def scaled_step(scaler, opt) -> None:
    scaler.scale(torch.zeros(()))  # makes the scale; gradients are set by hand
    scaler.step(opt)
    scaler.update()


def clip_twin(pair: Pair, max_norm: float) -> None:
    norm = (
        sum(float((q.grad.double().square() * pair.masks.get(q, torch.ones(()))).sum()) for q in pair.twin.parameters())
        ** 0.5
    )
    for q in pair.twin.parameters():
        q.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))


def amp_steps(pair: Pair, scaler, steps: int = STEADY, clip: float | None = None) -> None:
    """Gradients times the scale for ours, as they are for the twin."""
    for step in range(steps):
        pair.set_grads(30 + step)
        scaler.scale(torch.zeros(()))
        for p in pair.ours.parameters():
            p.grad.mul_(scaler.get_scale())
        if clip is not None:
            scaler.unscale_(pair.opt)
            pair.opt.clip_grad_norm_(clip)
            clip_twin(pair, clip)
        scaled_step(scaler, pair.opt)
        oracle_step(pair.sgd, pair.masks)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(fused, clip):
    """Without fused the scaler unscales; with it the step does; unscale_ and clipping before the step work with both."""
    pair = Pair(torch.float32, fused=fused, groups=2, **MOMENTUM)
    amp_steps(pair, torch.amp.GradScaler("cpu", init_scale=16.0), clip=clip)
    pair.assert_equal(1e-6)
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.grad, q.grad, 1e-6)  # unscaled, as torch's fused optimizers leave them


@pytest.mark.parametrize("fused", [None, True])
def test_overflow_on_a_later_step_changes_nothing(fused):
    pair = Pair(torch.float32, fused=fused, **MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp_steps(pair, scaler)
    pair.set_grads(0)
    overflow(pair)
    before = weights(pair.ours), buffers(pair.opt)
    scaled_step(scaler, pair.opt)
    assert all_equal(before[0], weights(pair.ours))
    assert all_equal(before[1], buffers(pair.opt))
    assert scaler.get_scale() == 4.0
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


def test_overflow_when_a_late_parameter_would_get_its_buffer():
    pair = Pair(torch.float32, fused=True, **MOMENTUM)
    late = next(pair.ours.parameters())
    for step in range(STEADY):
        pair.set_grads(step)
        late.grad = None
        pair.opt.step()
    pair.set_grads(9)
    before = weights(pair.ours)
    pair.opt.grad_scale, pair.opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    pair.opt.step()
    assert late not in pair.opt.state
    assert all_equal(before, weights(pair.ours))


def test_in_kernel_unscaling_is_only_there_when_asked_for():
    """Lightning refuses gradient clipping for optimizers that have the attribute."""
    params = list(net().parameters())
    assert not hasattr(FusedRepSGD(params), "_step_supports_amp_scaling")
    assert FusedRepSGD(params, fused=True)._step_supports_amp_scaling
    assert FusedRepSGD([{"params": params, "fused": True}]).state_dict()["param_groups"][0]["fused"] is None


# ---- hyper-parameters


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
def test_lr_and_momentum_schedulers(name):
    """OneCycle takes the momentum to 0 and back: buffers appear on the way, and wait while it is 0."""
    pair = Pair(groups=2, momentum=0.9)
    ours, theirs = SCHEDULERS[name](pair.opt), SCHEDULERS[name](pair.sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns where it thinks that step() was not called
        for step in range(12):
            pair.train(1, seed=step)
            for scheduler in (ours, theirs):
                scheduler.step(*([1.0] if name == "plateau" else []))
            assert [g["lr"] for g in pair.opt.param_groups] == [g["lr"] for g in pair.sgd.param_groups]
    pair.assert_equal()


def test_momentum_from_0_to_09():
    pair = Pair(momentum=0.0)
    for momentum in (0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.5, 0.0, 0.9):
        for opt in (pair.opt, pair.sgd):
            opt.param_groups[0]["momentum"] = momentum
        pair.train(1, seed=int(momentum * 10))
    pair.assert_equal()


@pytest.mark.parametrize(
    ("key", "values"),
    {"weight_decay": (0.0, 0.1), "dampening": (0.5, 0.0), "nesterov": (True, False), "maximize": (True, False)}.items(),
)
def test_every_hyper_parameter_is_read_at_every_step(key, values):
    pair = Pair(momentum=0.9)
    for value in values:
        for opt in (pair.opt, pair.sgd):
            opt.param_groups[0][key] = value
        pair.train(STEADY)
    pair.assert_equal()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_and_weight_decay(shape):
    """Changed in place, as schedulers do with tensors."""
    pair = Pair(lr=torch.tensor(0.05).reshape(shape), momentum=0.9, weight_decay=torch.tensor(0.01))
    pair.train(STEADY)
    for opt in (pair.opt, pair.sgd):
        opt.param_groups[0]["lr"].fill_(0.2)
        opt.param_groups[0]["weight_decay"].fill_(0.0)
    pair.train(STEADY).assert_equal(1e-8)  # torch reads them as float32 in places


def test_a_scheduler_on_a_tensor_lr():
    pair = Pair(lr=torch.tensor(0.05, dtype=torch.float64), momentum=0.9)
    schedulers = [lr_scheduler.ExponentialLR(opt, 0.5) for opt in (pair.opt, pair.sgd)]
    for step in range(5):
        pair.train(1, seed=step)
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(pair.opt.param_groups[0]["lr"], torch.Tensor)
    pair.assert_equal()


# ---- parameters


def test_add_param_group_in_mid_run():
    pair = Pair(momentum=0.9)
    pair.train(STEADY)
    extra = [nn.Conv2d(3, 4, 3).double() for _ in range(2)]
    extra[1].load_state_dict(extra[0].state_dict())
    for opt, module in ((pair.opt, extra[0]), (pair.sgd, extra[1])):
        opt.add_param_group({"params": module.parameters(), "lr": 0.3, "nesterov": True})
    mult = GradMult(torch.rand(3, 3))
    pair.opt.set_grad_mult(extra[0].weight, mult)
    pair.masks[extra[1].weight] = dense(mult, extra[1].weight.shape)
    for step in range(STEADY):
        for module, other in zip(extra, (pair.ours, pair.twin)):
            set_grads([*other.parameters(), *module.parameters()], step)
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()
    assert_close(extra[0].weight, extra[1].weight)


def test_tied_frozen_absent_empty_and_0_dim_parameters():
    def make():
        torch.manual_seed(0)
        shared = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        others = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((), (0, 3), (5,), (7,), (0,))]
        others[2].requires_grad_(False)
        return [shared, *others]

    ours, twin = make(), make()
    masks = {twin[1]: torch.tensor(2.0, dtype=torch.float64), twin[4]: torch.rand(7, dtype=torch.float64)}
    opt = FusedRepSGD(
        ours, lr=0.1, **MOMENTUM, grad_mults={ours[n]: masks[twin[n]] for n in (1, 4)} | {ours[2]: torch.rand(3)}
    )
    sgd = torch.optim.SGD(twin, lr=0.1, **MOMENTUM, foreach=False)
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
        oracle_step(sgd, masks)
    for p, q in zip(ours, twin):
        assert_close(p, q)
        assert (p in opt.state) == (q in sgd.state and "momentum_buffer" in sgd.state[q])


def test_freezing_and_thawing_in_mid_run():
    pair = Pair(**MOMENTUM)
    for step in range(12):
        pair.set_grads(step)
        for model in (pair.ours, pair.twin):
            for n, p in enumerate(model.parameters()):
                if n % 2 and 4 <= step < 8:
                    p.grad = None
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


def test_1500_parameters():
    def make():
        g = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(n % 7, generator=g, dtype=torch.float64)) for n in range(1500)]

    ours, twin = make(), make()
    masks = {q: torch.full(q.shape, 0.5, dtype=torch.float64) for q in twin[::3]}
    opt = FusedRepSGD(ours, lr=0.1, **MOMENTUM, grad_mults={p: torch.tensor(0.5) for p in ours[::3]})
    sgd = torch.optim.SGD(twin, lr=0.1, **MOMENTUM, foreach=False)
    for step in range(STEADY):
        set_grads(ours, step)
        set_grads(twin, step)
        opt.step()
        oracle_step(sgd, masks)
    for p, q in zip(ours, twin):
        assert_close(p, q)


def test_a_parameter_listed_twice_is_stepped_twice():
    """torch warns and does so; kernels whose threads share out all parameters must not race."""
    torch.set_num_threads(2)

    def make():
        return nn.Parameter(torch.linspace(1, 2, 300_000, dtype=torch.float64))

    p, q = make(), make()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt, sgd = (
            FusedRepSGD([p, p], lr=0.1, momentum=0.9),
            torch.optim.SGD([q, q], lr=0.1, momentum=0.9, foreach=False),
        )
    for step in range(STEADY):
        set_grads([p], step)
        set_grads([q], step)
        assert float(opt.clip_grad_norm_(2.0)) == pytest.approx(float(nn.utils.clip_grad_norm_([q], 2.0)))
        opt.step()
        sgd.step()
    assert_close(p, q, 1e-7)  # the gradient was clipped once


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_dtypes_in_one_group(momentum):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]

    def make():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(33, dtype=dtype)) for dtype in dtypes]

    ours, twin = make(), make()
    opt = FusedRepSGD(
        ours, lr=0.1, momentum=momentum, weight_decay=0.1, grad_mults={p: torch.tensor(0.5) for p in ours[::2]}
    )
    sgd = torch.optim.SGD(twin, lr=0.1, momentum=momentum, weight_decay=0.1, foreach=False)
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
            q.grad = p.grad * 0.5 if n % 2 == 0 else p.grad.clone()
        opt.step()
        sgd.step()
    for p, q in zip(ours, twin):
        assert torch.allclose(p, q, rtol=tolerance[p.dtype], atol=tolerance[p.dtype])


def test_parameters_that_left_their_group_are_not_forgotten_silently():
    """Accelerate under FSDP2 puts new parameters into param_groups; training on without multipliers would be wrong."""
    pair = Pair(momentum=0.9)
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


# ---- gradients of every kind


def test_gradients_that_are_expanded_sliced_or_overlapping():
    def make():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(6, 4, dtype=torch.float64)) for _ in range(4)]

    def grads(step):
        big = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        return [big[0, :4].expand(6, 4), big[:6, ::10], big.as_strided((6, 4), (1, 1)), big[3:9, 5:9].T.contiguous().T]

    ours, twin = make(), make()
    masks = {q: torch.rand(4, dtype=torch.float64) for q in twin}
    opt = FusedRepSGD(ours, lr=0.1, **MOMENTUM, grad_mults={p: masks[q] for p, q in zip(ours, twin)})
    sgd = torch.optim.SGD(twin, lr=0.1, **MOMENTUM, foreach=False)
    for step in range(STEADY):
        for p, q, g, h in zip(ours, twin, grads(step), grads(step)):
            p.grad, q.grad = g, h
        opt.step()
        oracle_step(sgd, masks)
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
def test_gradients_of_another_dtype(dtype, grad_dtype, tolerance):
    """torch keeps the momentum in the gradient's dtype, we in the wider one: float32 momentum for bf16 weights with float32 gradients."""
    pair = Pair(dtype, momentum=0.9)
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
        pair.sgd.step()
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert p.grad.dtype == grad_dtype
        assert pair.opt.state[p]["momentum_buffer"].dtype == torch.promote_types(dtype, grad_dtype)
        assert_close(p, q, tolerance)


def test_buffers_of_another_dtype():
    """model.double() in mid-run leaves float32 buffers behind."""
    pair = Pair(torch.float32, momentum=0.9)
    pair.train(STEADY)
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            p.grad = None
        model.double()
    pair.train(STEADY).assert_equal(1e-6)  # they stay float32, in torch as in ours


def test_sparse_gradients():
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


def test_sparse_gradients_with_a_multiplier_or_weight_decay_are_refused_before_anything_is_changed():
    embedding, linear = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)
    params = [linear.weight, linear.bias, embedding.weight]
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in params]
    for options, what in (
        ({"grad_mults": {embedding.weight: torch.ones(3)}}, "a Grad Mult"),
        ({"weight_decay": 0.1}, "weight decay"),
    ):
        opt = FusedRepSGD(params, lr=0.1, momentum=0.9, **options)
        with pytest.raises(
            ValueError,
            match=rf"parameter 2 of shape \[10, 3\]: {what} cannot be applied to a gradient of layout torch.sparse_coo",
        ):
            opt.step()
        assert all_equal(before, [p.detach() for p in params])
        assert not opt.state
    with pytest.raises(ValueError, match="a Grad Mult cannot be applied to a gradient of layout"):
        FusedRepSGD(params, grad_mults={embedding.weight: torch.ones(3)}).clip_grad_norm_(1.0)


def test_sparse_gradients_under_a_fused_grad_scaler():
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


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}])
def test_complex_parameters(options):
    p, q = (
        nn.Parameter(torch.complex(torch.linspace(0, 1, 9).double(), torch.linspace(2, 1, 9).double()))
        for _ in range(2)
    )
    mask = torch.rand(9, dtype=torch.float64)
    opt, sgd = (
        FusedRepSGD([p], lr=0.1, **options, grad_mults={p: mask}),
        torch.optim.SGD([q], lr=0.1, **options, foreach=False),
    )
    for step in range(STEADY):
        p.grad = torch.randn(9, dtype=torch.complex128, generator=torch.Generator().manual_seed(step))
        q.grad = p.grad * mask
        opt.step()
        sgd.step()
    assert torch.allclose(p, q, rtol=1e-14, atol=1e-14)
    assert float(opt.clip_grad_norm_(1e9)) == pytest.approx(
        float((mask * p.grad.abs().square()).sum().sqrt()), rel=1e-14
    )


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)], ids=["lr", "tensor_lr"]
)
def test_differentiable(lr):
    """d(loss after two steps) / d(gradients, initial weight, lr), through the multiplier."""
    torch.manual_seed(0)
    start, *grads = (torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mult = GradMult(torch.rand(4, 1, 3, 3).double(), torch.ones(4).double())
    options = {"lr": lr, "momentum": 0.9 if isinstance(lr, float) else 0.0, "weight_decay": 0.1, "differentiable": True}

    def run(multiplied):
        w = start.clone()
        opt = FusedRepSGD([w], **options, grad_mults={w: mult}) if multiplied else torch.optim.SGD([w], **options)
        w.retain_grad()
        for grad in grads:
            w.grad = grad if multiplied else grad * mult.dense(w.shape)
            opt.step()
        unknowns = (
            [start, grads[1], lr] if isinstance(lr, torch.Tensor) else [start, grads[1]]
        )  # the first gradient enters v detached, in torch too
        return torch.autograd.grad(w.pow(3).sum(), unknowns)

    for ours, theirs in zip(run(True), run(False)):
        assert_close(ours, theirs, 1e-12)


# ---- memory that moves


def swap_data(pair):
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            p.data = p.data * 0.5


def swap_storage(pair):
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            with torch.no_grad():
                p.set_(p.detach().clone() * 0.5)


def to_channels_last(pair):
    pair.ours.to(memory_format=torch.channels_last)
    pair.twin.to(memory_format=torch.channels_last)


def to_and_fro(pair):
    for model in (pair.ours, pair.twin):
        model.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)


def replace_buffers(pair):
    for opt in (pair.opt, pair.sgd):
        for n, state in enumerate(opt.state.values()):
            buffer = state["momentum_buffer"].clone() * 0.5
            state["momentum_buffer"] = (
                buffer.to(memory_format=torch.channels_last) if buffer.dim() == 4 and n % 2 else buffer
            )


def swap_buffer_data(pair):
    for opt in (pair.opt, pair.sgd):
        for state in opt.state.values():
            state["momentum_buffer"].data = state["momentum_buffer"].data * 0.5


def drop_one_buffer(pair):
    for opt in (pair.opt, pair.sgd):
        del opt.state[opt.param_groups[0]["params"][2]]


def clear_state(pair):
    pair.opt.state.clear()
    pair.sgd.state.clear()


def new_state(pair):
    for opt in (pair.opt, pair.sgd):
        opt.state = type(opt.state)(dict)


def load_older_state(pair):
    older = Pair(momentum=0.5, groups=1)
    older.train(1)
    state = older.opt.state_dict()
    pair.opt.load_state_dict(state)
    pair.sgd.load_state_dict(copy.deepcopy(state))  # loading keeps the tensors it is given


def load_weights(pair):
    state = net(torch.float64, seed=9).state_dict()
    pair.ours.load_state_dict(state)
    pair.twin.load_state_dict(state, assign=False)


def flatten_into_one_buffer(pair):
    """As DDP, FSDP1 and ZeroRedundancyOptimizer do: parameters become views at odd offsets."""
    for model in (pair.ours, pair.twin):
        params = list(model.parameters())
        flat = torch.cat([torch.zeros(1, dtype=params[0].dtype)] + [p.detach().flatten() for p in params])
        at = 1
        for p in params:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()


def delete_one_buffer(pair):
    for opt in (pair.opt, pair.sgd):
        del opt.state[opt.param_groups[0]["params"][2]]["momentum_buffer"]


def exchange_states(pair):
    """Of two parameters of one shape: the same entries in the same order, under other keys."""
    for opt in (pair.opt, pair.sgd):
        same = {}
        for p in opt.state:
            same.setdefault(p.shape, []).append(p)
        p, q = next(alike for alike in same.values() if len(alike) > 1)[:2]
        entries = {{p: q, q: p}.get(key, key): entry for key, entry in opt.state.items()}
        opt.state.clear()
        opt.state.update(entries)


def empty_entries(pair):
    """A look at the defaultdict makes one; whatever else is in it is no concern of the step."""
    for opt in (pair.opt, pair.sgd):
        assert opt.state[nn.Parameter(torch.zeros(1))] == {}
        opt.state["note"] = 5


MOVES = [
    swap_data,
    swap_storage,
    to_channels_last,
    to_and_fro,
    replace_buffers,
    swap_buffer_data,
    drop_one_buffer,
    clear_state,
    new_state,
]
MOVES += [load_older_state, load_weights, flatten_into_one_buffer, delete_one_buffer, exchange_states, empty_entries]


@pytest.mark.parametrize("move", MOVES)
def test_after_the_memory_has_moved(move):
    """Whatever is cached between steps must notice."""
    pair = Pair(momentum=0.9)
    pair.train(STEADY)
    move(pair)
    pair.train(STEADY, seed=20).assert_equal()


def to_the_group_before(opt):
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))


def an_empty_group_in_front(opt):
    opt.param_groups.insert(0, {**opt.param_groups[0], "params": [], "lr": 10.0})


@pytest.mark.parametrize("regroup", [to_the_group_before, an_empty_group_in_front])
def test_after_a_parameter_has_changed_its_group(regroup):
    """The same parameters in the same order, with the hyper-parameters of another group."""
    models = net(torch.float64), net(torch.float64)
    groups = [
        [{"params": params[:3], "lr": 0.05}, {"params": params[3:], "lr": 0.2}]
        for params in (list(model.parameters()) for model in models)
    ]
    opt, sgd = FusedRepSGD(groups[0], **MOMENTUM), torch.optim.SGD(groups[1], **MOMENTUM, foreach=False)
    for step in range(2 * STEADY):
        if step == STEADY:
            regroup(opt)
            regroup(sgd)
        for model, optimizer in zip(models, (opt, sgd)):
            set_grads(model.parameters(), step)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models)):
        assert_close(p, q)


def test_parameters_that_share_memory_are_stepped_one_after_the_other(backend):
    """Threads that share out all parameters must not race: 50 steps of a million elements lost up to 73."""
    torch.set_num_threads(2)

    def make():
        base = torch.linspace(-1, 1, 1 << 18, dtype=torch.float64)
        return [nn.Parameter(base), nn.Parameter(base[:])]

    ours, twin = make(), make()
    opt, sgd = FusedRepSGD(ours, lr=0.1, momentum=0.9), torch.optim.SGD(twin, lr=0.1, momentum=0.9, foreach=False)
    for step in range(50):
        for params, optimizer in ((ours, opt), (twin, sgd)):
            set_grads(params, step)
            optimizer.step()
    assert_close(ours[0], twin[0], 1e-12)


@needs_plan
def test_strides_of_sizes_of_one_say_nothing(backend):
    """A channels_last input gives the contiguous weight of a 1 x 1 or depthwise convolution a gradient of strides (16, 1, 16, 16)."""
    weights = [nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(8, 1, 3, 3))]
    opt = FusedRepSGD(weights, lr=0.1, momentum=0.9)
    for _ in range(STEADY):
        for w in weights:
            w.grad = torch.randn(w.shape).to(memory_format=torch.channels_last)
            assert w.grad.stride() != w.stride()
        opt.step()
    assert (opt._plan is not None) == (backend == "auto")


@pytest.mark.parametrize(
    "look",
    [lambda opt: opt.state[nn.Parameter(torch.zeros(1))], lambda opt: opt.state.update(note=5)],
    ids=["entry", "note"],
)
@needs_plan
def test_the_plan_outlives_what_is_no_parameters_state(look, backend):
    pair = Pair(momentum=0.9)
    look(pair.opt)
    pair.train(STEADY)
    plan = pair.opt._plan
    pair.train(STEADY)
    assert pair.opt._plan is plan
    assert (plan is not None) == (backend == "auto")


def test_a_gradient_becomes_sparse():
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


def test_an_address_that_is_used_again_with_another_size():
    p, q = (nn.Parameter(torch.linspace(0, 1, 64, dtype=torch.float64)) for _ in range(2))
    opt, sgd = FusedRepSGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1, foreach=False)
    for size in (64, 64, 64, 64, 10, 10):
        for w, optimizer in ((p, opt), (q, sgd)):
            w.grad = None
            w.data = w.data[:size]
            w.grad = torch.ones(size, dtype=torch.float64)
            optimizer.step()
    assert_close(p, q)
    assert p.data.untyped_storage()[:].nbytes() == 512


def test_gradients_in_the_same_and_in_new_memory():
    pair = Pair(momentum=0.9)
    for step in range(8):
        for model in (pair.ours, pair.twin):
            kept = [p.grad for p in model.parameters()]
            set_grads(model.parameters(), step)
            for p, grad in zip(model.parameters(), kept):
                if grad is not None and step % 3:
                    p.grad = grad.copy_(p.grad)
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    pair = Pair(momentum=0.9)
    for step in range(STEADY):
        pair.train(1, seed=step)
        pair.opt.zero_grad(set_to_none=to_none)
        pair.sgd.zero_grad(set_to_none=to_none)
        pair.opt.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


def test_a_default_device_is_none_of_the_steps_business():
    pair = Pair(momentum=0.9)
    for step in range(STEADY):
        pair.set_grads(step)
        with torch.device("meta"):
            pair.opt.step()
            assert pair.opt.clip_grad_norm_(1e9).device.type == "cpu"
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


def test_an_optimizer_is_freed_with_its_parameters():
    pair = Pair(momentum=0.9)
    pair.train(STEADY)
    seen = weakref.ref(pair.opt), weakref.ref(next(pair.ours.parameters()))
    gc.disable()
    try:
        del pair
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


# ---- the life of an optimizer


def test_hooks_before_and_after_the_step():
    pair = Pair(momentum=0.9)
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
        oracle_step(pair.sgd, pair.masks)
    assert calls == ["before", "after"] * STEADY
    for handle in handles:
        handle.remove()
    pair.train(1)
    assert len(calls) == 2 * STEADY
    pair.assert_equal()


def test_hooks_of_all_optimizers_and_the_profiler_hear_of_a_step():
    pair = Pair(momentum=0.9).train(STEADY)
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
    assert "Optimizer.step#FusedRepSGD.step" in {event.name for event in seen.events()}


def test_state_dict_hooks():
    opt = Pair(momentum=0.9).opt
    seen = []
    opt.register_state_dict_post_hook(lambda opt, state: state.update(mine=1))
    opt.register_load_state_dict_pre_hook(lambda opt, state: seen.append(sorted(state)))
    state = opt.state_dict()
    assert state["mine"] == 1
    opt.load_state_dict(state)
    assert seen == [["grad_mults", "mine", "param_groups", "state"]]


def test_torch_sgd_ignores_our_extra_key_and_we_ignore_others():
    pair = Pair(momentum=0.9)
    pair.train(1)
    state = pair.opt.state_dict()
    pair.sgd.load_state_dict(copy.deepcopy(state))
    pair.opt.load_state_dict({**state, "something": 1})
    pair.train(2).assert_equal()


def test_the_state_is_the_momentum_buffer_only_and_lazy():
    pair = Pair(momentum=0.9)
    assert not pair.opt.state
    pair.set_grads(0)
    first = next(pair.ours.parameters())
    first.grad = None
    pair.opt.step()
    assert first not in pair.opt.state
    assert all(list(state) == ["momentum_buffer"] for state in pair.opt.state.values())
    plain = Pair()
    plain.train(2)
    assert not plain.opt.state_dict()["state"]


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_model_and_swa_lr(average):
    pair = Pair(momentum=0.9)
    averages = [AveragedModel(model, multi_avg_fn=average) for model in (pair.ours, pair.twin)]
    schedulers = [SWALR(opt, swa_lr=0.01, anneal_epochs=3) for opt in (pair.opt, pair.sgd)]
    for step in range(6):
        pair.train(1, seed=step)
        for averaged, model in zip(averages, (pair.ours, pair.twin)):
            averaged.update_parameters(model)
        for scheduler in schedulers:
            scheduler.step()
    pair.assert_equal()
    for p, q in zip(*(averaged.parameters() for averaged in averages)):
        assert_close(p, q)


def test_one_optimizer_per_parameter_stepped_in_the_backward_pass():
    ours, twin = net(torch.float64), net(torch.float64)
    found = mults(ours)
    masks = {q: dense(found[p], p.shape) for p, q in zip(ours.parameters(), twin.parameters()) if p in found}
    opts = {
        p: FusedRepSGD([p], lr=0.05, **MOMENTUM, grad_mults={p: found[p]} if p in found else None)
        for p in ours.parameters()
    }
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, **MOMENTUM, foreach=False)

    def step(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(STEADY):
        ours(batch(torch.float64, seed)).square().mean().backward()
        sgd.zero_grad()
        twin(batch(torch.float64, seed)).square().mean().backward()
        oracle_step(sgd, masks)
    assert all(p.grad is None for p in ours.parameters())
    for p, q in zip(ours.parameters(), twin.parameters()):
        assert_close(p, q)


def test_two_optimizers_on_two_halves_of_a_model():
    """Interleaved, so that nothing cached by one may serve the other."""
    pair = Pair()
    params = list(pair.ours.parameters())
    halves = [
        FusedRepSGD(half, lr=0.05, grad_mults={p: pair.mults[p] for p in half if p in pair.mults})
        for half in (params[:4], params[4:])
    ]
    for step in range(STEADY):
        pair.set_grads(step)
        for half in halves:
            half.step()
        oracle_step(pair.sgd, pair.masks)
    pair.assert_equal()


# ---- torch.compile


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


# ---- CUDA


def captured(pair: Pair) -> torch.cuda.CUDAGraph:
    """A graph of one step of ours, on the GPU; buffers and what is derived from the multipliers are made before."""
    pair.ours.cuda()
    pair.train(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.opt.step()
    return graph


def replay(pair: Pair, graph, steps: int = 3) -> None:
    """With new values in the gradients that were captured."""
    for step in range(steps):
        for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad.copy_(q.grad)
        graph.replay()
        oracle_step(pair.sgd, pair.masks)
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.cpu(), q, 1e-6)


@on_gpu
@pytest.mark.parametrize("options", [{}, MOMENTUM])
def test_cuda_graph(options):
    pair = Pair(torch.float32, **options)
    replay(pair, captured(pair))


@on_gpu
def test_cuda_graph_follows_a_tensor_lr(backend):
    if backend == "reference":
        pytest.skip("the reference reads hyper-parameters on the host")
    pair = Pair(torch.float32, **MOMENTUM)
    lr = torch.tensor(0.05, device="cuda")
    pair.opt.param_groups[0]["lr"] = lr
    graph = captured(pair)
    for value in (0.05, 0.2, 0.01):
        lr.fill_(value)
        pair.sgd.param_groups[0]["lr"] = value
        replay(pair, graph, steps=2)


class WholeStep:
    """Forward, backward and step of a Pair on the GPU, in one graph; float64, for convolutions in float32 may use TF32."""

    def __init__(self, pair: Pair, images: int = 4, by_hand: bool = False):
        self.pair, self.x = pair, batch(torch.float64, images=images).cuda()
        pair.ours.cuda()
        side = torch.cuda.Stream()  # the capture is on yet another one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.ours()
                self.theirs()
        torch.cuda.current_stream().wait_stream(side)
        self.capture(by_hand)

    def ours(self) -> None:
        self.pair.opt.zero_grad()
        self.pair.ours(self.x).square().mean().backward()
        self.pair.opt.step()

    def theirs(self) -> None:
        self.pair.sgd.zero_grad()
        self.pair.twin(self.x.cpu()).square().mean().backward()
        oracle_step(self.pair.sgd, self.pair.masks)

    def capture(self, by_hand: bool = False) -> None:
        self.pair.opt.zero_grad()  # so that the gradients are in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        if not by_hand:
            with torch.cuda.graph(self.graph):
                self.ours()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph.capture_begin()
            self.ours()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, seed: int) -> None:
        self.x.copy_(batch(torch.float64, seed, images=len(self.x)))
        self.graph.replay()
        self.theirs()

    def check(self) -> None:
        for p, q in zip(self.pair.ours.parameters(), self.pair.twin.parameters()):
            assert_close(p.cpu(), q, 1e-10)


@on_gpu
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("options", [{}, MOMENTUM])
def test_cuda_graph_of_the_whole_training_step(options, by_hand):
    """After a warm-up on another stream; the gradients' addresses are new in the capture."""
    whole = WholeStep(Pair(**options), by_hand=by_hand)
    for seed in range(3):
        whole.replay(seed)
    whole.check()


@on_gpu
def test_two_cuda_graphs_of_one_optimizer_in_turns():
    pair = Pair(**MOMENTUM)
    graphs = [WholeStep(pair, images) for images in (4, 3)]
    for seed in range(4):
        graphs[seed % 2].replay(seed)
    graphs[0].check()


@on_gpu
def test_spatial_scalings_set_between_cuda_graphs(backend):
    """Neither a step nor anything else comes between the setting and the capture; the first graph keeps its multipliers."""
    if backend == "reference":
        pytest.skip("the reference keeps no multipliers for a graph once others are set")
    whole = WholeStep(Pair(**MOMENTUM))
    weight, twin = next(whole.pair.ours.parameters()), next(whole.pair.twin.parameters())
    plain, graphs = whole.pair.masks[twin], []
    for scaling in (torch.rand(3, 3), torch.rand(3, 3)):
        whole.pair.opt.set_spatial_scaling(weight, scaling)
        whole.capture()
        graphs.append((whole.graph, plain * scaling))
    for seed, (whole.graph, whole.pair.masks[twin]) in enumerate(graphs * 2):
        whole.replay(seed)
    whole.check()


@on_gpu
def test_models_on_two_kinds_of_device():
    """Some parameters on the CPU, some on the GPU, one scaler."""
    pair = Pair(torch.float32, fused=True, **MOMENTUM)
    pair.ours[:4].cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for step in range(STEADY):
        pair.set_grads(step)
        scaler.scale(torch.zeros((), device="cuda"))
        for p in pair.ours.parameters():
            p.grad.mul_(8.0)
        scaler.step(pair.opt)
        scaler.update()
        oracle_step(pair.sgd, pair.masks)
    pair.set_grads(0)
    overflow(pair)
    before = weights(pair.ours)
    scaler.step(pair.opt)
    assert all_equal(before, weights(pair.ours))
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.cpu(), q, 1e-6)
