"""How the scalings reach an optimizer: it is told, or hooks scale its gradients or its updates."""

import copy
import gc
import warnings

import pytest
import torch
from sgs_controllers import OPTIMIZERS, FailingOnce, WithScaling, assert_same, make_batches, sgd, small_model

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_optimizer_with_set_spatial_scaling_is_told_and_not_hooked():
    model = small_model()
    optimizer = WithScaling(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    assert optimizer.told == []
    sgs.update(make_batches())
    assert [id(param) for param, _ in optimizer.told] == [id(model[i].weight) for i in (0, 3, 6)]
    assert_same({str(i): g for i, (_, g) in zip((0, 3, 6), optimizer.told)}, sgs.scalings)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.told.clear()
    sgs.remove()
    assert [g for _, g in optimizer.told] == [None] * 3


@pytest.mark.parametrize("closure", [None, "positional", "keyword"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_with_scaled_gradients(name, closure):
    batches = make_batches(4)
    model = small_model().eval()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(batches)
    scalings = {f"{n}.weight": g for n, g in sgs.scalings.items()}

    def backward(model, batch):
        model.zero_grad()
        loss = model(batch).square().sum()
        loss.backward()
        return loss

    for batch in batches:
        backward(twin, batch)
        plain = {n: p.grad.clone() for n, p in twin.named_parameters()}
        for n, p in twin.named_parameters():
            if n in scalings:
                p.grad.mul_(scalings[n])
        twin_optimizer.step()
        objects = {}

        def evaluate(batch=batch, objects=objects):
            loss = backward(model, batch)
            objects.update({n: p.grad for n, p in model.named_parameters()})
            return loss

        if closure == "positional":
            assert optimizer.step(evaluate) is not None
        elif closure == "keyword":
            assert optimizer.step(closure=evaluate) is not None
        else:
            evaluate()
            optimizer.step()
        for n, p in model.named_parameters():
            assert p.grad is objects[n]
            assert torch.equal(p.grad, plain[n])
            assert torch.equal(p, dict(twin.named_parameters())[n]), n


def test_a_closure_sees_the_callers_gradients_every_time():
    """LBFGS calls its closure several times a step."""
    model = small_model().eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    batches = make_batches()
    sgs.update(batches)
    optimizer.zero_grad(set_to_none=False)
    model(batches[0]).square().sum().backward()
    objects = [p.grad for p in model.parameters()]
    calls = []

    def closure():
        assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))
        optimizer.zero_grad(set_to_none=False)
        loss = model(batches[0]).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert calls[-1] < calls[0]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))


def test_a_closure_that_raises_leaves_the_callers_gradients():
    model = small_model()
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(make_batches())
    model(make_batches()[0]).sum().backward()
    objects = [p.grad for p in model.parameters()]

    def closure():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(closure)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))


def test_after_a_step_that_raised_the_next_one_begins_with_the_callers_gradients():
    model, batches = small_model().eval(), make_batches()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = FailingOnce(model.parameters(), lr=0.1), sgd(twin)
    sgs, twin_sgs = gr.SpatialGradientScaling(model, optimizer), gr.SpatialGradientScaling(twin, twin_optimizer)
    for m, s in ((model, sgs), (twin, twin_sgs)):
        s.update(batches)
        m(batches[0]).square().sum().backward()
    objects = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="the step fails"):
        optimizer.step()
    optimizer.step()
    twin_optimizer.step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_gradients_made_after_a_step_that_raised_are_kept():
    model, batches = small_model().eval(), make_batches()
    optimizer = FailingOnce(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(batches)
    model(batches[0]).square().sum().backward()
    with pytest.raises(RuntimeError, match="the step fails"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # writes into the copies
    model(batches[1]).square().sum().backward()
    fresh = [p.grad.clone() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), fresh))
    expected = before[0] - 0.1 * fresh[0] * sgs.scalings["0"]
    assert torch.allclose(model[0].weight, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_product_is_rounded_once_to_the_gradients_dtype(dtype):
    model = small_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(make_batches())
    model.to(dtype)
    with torch.no_grad():
        model[0].weight.zero_()
    model[0].weight.grad = torch.randn_like(model[0].weight)
    before = model[0].weight.grad.clone()
    optimizer.step()
    expected = -(before.double() * sgs.scalings["0"].double()).to(dtype)
    assert torch.equal(model[0].weight, expected)
    assert torch.equal(model[0].weight.grad, before)


def test_before_the_first_update_nothing_is_swapped():
    model = small_model()
    optimizer = sgd(model)
    gr.SpatialGradientScaling(model, optimizer)
    model(make_batches()[0]).sum().backward()
    objects = []
    optimizer.register_step_pre_hook(lambda *_: objects.extend(p.grad for p in model.parameters()))
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), objects))


def test_two_controllers_would_scale_twice():
    model = small_model()
    optimizer = sgd(model)
    first = gr.SpatialGradientScaling(model, optimizer)
    with pytest.raises(ValueError, match="scaled by another"):
        gr.SpatialGradientScaling(model, optimizer)
    first.update(make_batches())
    first.remove()
    model(make_batches()[0]).sum().backward()
    before, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    gr.SpatialGradientScaling(model, optimizer)
    optimizer.step()
    assert torch.allclose(model[0].weight, before - 0.1 * grad, atol=1e-7)


@pytest.mark.parametrize("order", [("gradient", "update"), ("update", "gradient")])
def test_hooks_beside_an_optimizer_that_is_told_would_scale_twice(order):
    model = small_model()
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    first = gr.SpatialGradientScaling(model, optimizer, apply_to=order[0])
    with pytest.raises(ValueError, match="scaled by another"):
        gr.SpatialGradientScaling(model, optimizer, apply_to=order[1])
    first.remove()
    gr.SpatialGradientScaling(model, optimizer, apply_to=order[1]).remove()


def test_two_controllers_that_tell_an_optimizer_are_allowed_and_let_go():
    model = small_model()
    optimizer = WithScaling(model.parameters(), lr=0.1)
    first, second = (gr.SpatialGradientScaling(model, optimizer) for _ in range(2))
    del first, second
    gc.collect()
    gr.SpatialGradientScaling(model, optimizer, apply_to="update")


@pytest.mark.parametrize("name", ["adagrad", "sgd", "told"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_scaling_is_the_papers_adagrad_star(name, dtype):
    model = small_model().to(dtype).eval()
    twin = copy.deepcopy(model)
    make = {**OPTIMIZERS, "told": lambda p: WithScaling(p, lr=0.1)}[name]
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    sgs = gr.SpatialGradientScaling(model, optimizer, apply_to="update")
    batches = [b.to(dtype) for b in make_batches(3)]
    sgs.update(batches)
    scalings = {f"{n}.weight": g for n, g in sgs.scalings.items()}
    for batch in batches:
        before = {n: p.detach().double() for n, p in twin.named_parameters()}
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            m(batch).float().square().sum().backward()
            o.step()
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in scalings:
                    p.copy_((before[n] + scalings[n].double() * (p.double() - before[n])).to(dtype))
        for (n, p), q in zip(model.named_parameters(), twin.parameters()):
            assert torch.allclose(p, q, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6), n
            q.data.copy_(p)
    assert not getattr(optimizer, "told", [])


class Centralized(torch.optim.SGD):
    """Writes into the gradients and calls the step of its base class.

    torch runs the hooks twice then, one pair within the other.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad.dim() > 1:
                    p.grad.sub_(p.grad.mean())
        return super().step(closure)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_hooks_within_hooks_scale_once(apply_to):
    model, batches = small_model().eval(), make_batches()
    sgd(small_model())  # from here on torch hooks the base class too
    optimizer = Centralized(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer, apply_to=apply_to)
    sgs.update(batches)
    for _ in range(2):
        optimizer.zero_grad()
        model(batches[0]).square().sum().backward()
        grad, before, mine = model[0].weight.grad.clone(), model[0].weight.detach().clone(), model[0].weight.grad
        optimizer.step()
        g = sgs.scalings["0"]
        scaled = g * grad - (g * grad).mean() if apply_to == "gradient" else g * (grad - grad.mean())
        assert torch.allclose(model[0].weight, before - 0.1 * scaled, atol=1e-6)
        assert model[0].weight.grad is mine


def test_a_scheduler_sees_its_steps_in_order():
    model = small_model()
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    sgs.update(make_batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(make_batches()[0]).sum().backward()
        optimizer.step()
        scheduler.step()
