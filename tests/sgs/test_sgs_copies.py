"""Copies and pickles of what SpatialGradientScaling scales by hooks step as the original does."""

import copy
import pickle
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from files import through_a_file
from sgs_controllers import all_hooks, assert_same, controller, make_batches, small_model, train
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels.sgs.every_steps import ForwardWatch

pytestmark = pytest.mark.usefixtures("one_thread")


COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda everything: pickle.loads(pickle.dumps(everything)),
    "pickle, protocol 0": lambda everything: pickle.loads(pickle.dumps(everything, protocol=0)),
    "torch.save": partial(through_a_file, weights_only=False),
}
copies = pytest.mark.parametrize("copied", COPY.values(), ids=COPY)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))


class KeepsAll(torch.optim.SGD):
    """Pickles all its attributes, among them its hooks."""

    def __getstate__(self):
        return self.__dict__.copy()


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "keeps all": lambda p: KeepsAll(p, lr=1e-4, momentum=0.9),
    "told": lambda p: gr.FusedRepSGD(p, lr=1e-4, momentum=0.9),
}
OPTIONS = [
    ("sgd", {}),
    ("adamw", {"apply_to": "update"}),
    ("keeps all", {}),
    ("sgd", {"every_steps": 2}),
    ("told", {}),
    ("told", {"apply_to": "update"}),
    ("told", {"every_steps": 1}),
    ("adamw", {"every_steps": 1, "apply_to": "update"}),
]
cases = pytest.mark.parametrize(("make", "options"), OPTIONS, ids=lambda value: str(value))


def started(make, options):
    """A run with scalings."""
    model = network()
    optimizer = MAKERS[make](model.parameters())
    sgs = gr.SpatialGradientScaling(model, optimizer, **options)
    if "every_steps" not in options:
        sgs.update(make_batches())
    train(model, optimizer, make_batches(4, seed=4))
    assert not any(torch.equal(g, torch.ones(3, 3)) for g in sgs.scalings.values())
    return model, optimizer, sgs


def assert_alike(model, other):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


def differ_unscaled(make, options):
    """The weights of the run when the copy steps without scaling."""
    model, optimizer, sgs = started(make, options)
    sgs.remove()
    train(model, optimizer, make_batches(5, seed=6))
    return model


@copies
@cases
def test_model_optimizer_and_controller_go_on_together(make, options, copied):
    model, optimizer, sgs = started(make, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, other_optimizer, other_sgs = copied((model, optimizer, sgs))
        assert other_sgs.optimizer is other_optimizer
        hooks = len(optimizer._optimizer_step_pre_hooks)
        assert len(other_optimizer._optimizer_step_pre_hooks) == hooks == (make != "told" or len(options))
        assert all_hooks(other) == all_hooks(model) == (2 if "every_steps" in options else 0)
        batches = make_batches(5, seed=6)
        train(other, other_optimizer, batches)  # alone: nothing of it reaches the original
        assert not torch.equal(model[0].weight, other[0].weight)
        train(model, optimizer, batches)
        assert_alike(model, other)
        assert_same(sgs.scalings, other_sgs.scalings)
        if "every_steps" not in options:
            sgs.update(make_batches(seed=8))
            assert not torch.equal(sgs.scalings["0"], other_sgs.scalings["0"])
            other_sgs.update(make_batches(seed=8))
        train(model, optimizer, batches)
        train(other, other_optimizer, batches)
    assert_alike(model, other)
    assert sgs.state_dict()["steps"] == other_sgs.state_dict()["steps"]
    other_sgs.remove()
    assert not other_optimizer._optimizer_step_pre_hooks
    assert all_hooks(other) == 0
    train(model, optimizer, batches)
    train(other, other_optimizer, batches)
    assert not torch.equal(model[0].weight, other[0].weight)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2, 0, 1), (0, 2, 1)])
@copies
def test_in_any_order(copied, order):
    parts = started("sgd", {"every_steps": 1})
    found = copied([parts[i] for i in order])
    model, optimizer, sgs = (found[order.index(i)] for i in range(3))
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    for m, o in (parts[:2], (model, optimizer)):
        train(m, o, make_batches(3, seed=6))
    assert_alike(parts[0], model)
    assert_same(parts[2].scalings, sgs.scalings)


def test_a_copied_controller_has_no_idle_hooks_and_one_of_its_own():
    parts = started("sgd", {"every_steps": 1})
    model, _, sgs = copy.deepcopy(copy.deepcopy(parts))
    hooks = [hook for conv in model for hook in conv._forward_pre_hooks.values()]
    assert [type(hook) for hook in hooks] == [ForwardWatch] * 2
    assert all(hook.updates is sgs._training for hook in hooks)
    assert all(len(conv._forward_pre_hooks_with_kwargs) == len(conv._forward_pre_hooks) for conv in model)
    other = gr.SpatialGradientScaling(alone := copy.deepcopy(model), MAKERS["told"](alone.parameters()), every_steps=1)
    assert all_hooks(alone) == 2
    other.remove()
    assert all_hooks(alone) == 0


@copies
@pytest.mark.parametrize(("make", "options"), [row for row in OPTIONS if row != ("told", {"every_steps": 1})], ids=str)
def test_an_optimizer_without_its_controller_stays_scaled(make, options, copied):
    model, optimizer, sgs = started(make, options)
    other, other_optimizer = copied((model, optimizer))
    again, again_optimizer = copied((other, other_optimizer))
    alone = copied(optimizer)
    sgs.every_steps = None  # G stays as it is
    batches = make_batches(5, seed=6)
    train(model, optimizer, batches)
    for m, o in ((other, other_optimizer), (again, again_optimizer)):
        train(m, o, batches)
        assert_alike(model, m)
    twin = network()
    weights = iter([p for group in alone.param_groups for p in group["params"]])
    for conv in (twin[0], twin[2]):
        conv.weight, conv.bias = next(weights), next(weights)
    train(twin, alone, batches)
    assert_alike(model, twin)
    assert not torch.equal(model[0].weight, differ_unscaled(make, options)[0].weight)


@copies
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_controller_that_is_made_later_takes_over(copied, apply_to):
    model, optimizer, sgs = started("sgd", {"apply_to": apply_to})
    other, other_optimizer = copied((model, optimizer))
    later = gr.SpatialGradientScaling(other, other_optimizer, apply_to=apply_to)
    assert len(other_optimizer._optimizer_step_pre_hooks) == len(other_optimizer._optimizer_step_post_hooks) == 1
    assert_same(later.scalings, sgs.scalings)
    batches = make_batches(3, seed=6)
    for restored in (False, True):
        if restored:
            sgs.update(batches[:2])
            later.load_state_dict(sgs.state_dict())
        train(model, optimizer, batches)
        train(other, other_optimizer, batches)
        assert_alike(model, other)
    with pytest.raises(ValueError, match="scaled by another"):
        gr.SpatialGradientScaling(other, other_optimizer)
    later.remove()
    assert not other_optimizer._optimizer_step_pre_hooks
    assert "__reduce_ex__" not in vars(other_optimizer)


def test_an_optimizer_that_is_told_takes_over_the_scalings_of_hooks():
    model, optimizer, sgs = started("told", {"apply_to": "update"})
    other, other_optimizer = copy.deepcopy((model, optimizer))
    later = gr.SpatialGradientScaling(other, other_optimizer)
    assert not other_optimizer._optimizer_step_pre_hooks
    assert_same(later.scalings, sgs.scalings)
    assert torch.equal(other_optimizer.grad_mult(other[0].weight, total=True).scale.view(3, 3), sgs.scalings["0"])


@copies
def test_after_remove_copies_are_plain(copied):
    model, optimizer, sgs = started("sgd", {})
    sgs.remove()
    other, other_optimizer, other_sgs = copied((model, optimizer, sgs))
    assert not other_optimizer._optimizer_step_pre_hooks
    assert not any("__reduce_ex__" in vars(each) for each in (optimizer, other_optimizer))
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, make_batches())
    assert_alike(model, other)
    gr.SpatialGradientScaling(other, other_optimizer)  # the copied one was removed too
    assert_same(other_sgs.scalings, sgs.scalings)


@pytest.mark.parametrize("make", ["sgd", "told"])
def test_a_shallow_copy_of_a_controller_does_not_hook_again(make):
    model, optimizer, sgs = started(make, {"every_steps": 1})
    twin = copy.copy(sgs)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert all_hooks(model) == 2
    assert_same(twin.scalings, sgs.scalings)


class Failing(torch.optim.SGD):
    fail = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("the step fails")
        return super().step(closure)


def test_a_copy_after_a_step_that_raised_begins_its_own():
    model = network()
    optimizer = Failing(model.parameters(), lr=1e-4)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(make_batches())
    model(make_batches()[0]).square().sum().backward()
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="the step fails"):
        optimizer.step()
    optimizer.fail = False
    other, other_optimizer, _ = copy.deepcopy((model, optimizer, sgs))
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, make_batches(seed=6))
    assert_alike(model, other)


def test_schedulers_and_other_hooks_of_a_copy():
    """The learning rate of the copy is the scheduler's copy to set. Hooks of others are no part of a copy in torch."""
    model, optimizer, sgs = started("keeps all", {})
    optimizer.register_step_pre_hook(lambda *_: None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parts = copy.deepcopy((model, optimizer, sgs, scheduler))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler's copy does not see the steps of its optimizer
        parts[3].step()
    assert (parts[1].param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (pytest.approx(1e-5), 1e-4)
    assert isinstance(parts[1]._optimizer_step_pre_hooks, OrderedDict)
    assert len(parts[1]._optimizer_step_pre_hooks) == 2  # this class keeps those of others


def test_a_process_group_is_shared_with_the_copy():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = network()
        sgs = controller(model, process_group=group)
        other_sgs = copy.deepcopy(sgs)
        assert other_sgs._ranks.group is group
        other_sgs.update(make_batches())
        sgs.update(make_batches())
        assert_same(sgs.scalings, other_sgs.scalings)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["hooks", "update", "every_steps"])
def test_pickles_of_earlier_versions(name):
    """They had the hooks in the controller, and the optimizer came without."""
    written = pickle.loads((Path(__file__).parent / "data" / "controllers.pkl").read_bytes())
    parts, state, scalings = written[name]
    model, optimizer, sgs = pickle.loads(parts)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    assert all_hooks(model) == (2 if name == "every_steps" else 0)
    assert_same(sgs.scalings, scalings)
    assert sgs.state_dict()["steps"] == state["steps"]
    twin, twin_optimizer = pickle.loads(parts)[:2]
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)  # without momenta, as this one
    optimizer.state.clear()
    optimizer.param_groups[0]["momentum"] = 0
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    train(model, optimizer, [x])
    g = sgs.scalings["0"]
    assert torch.equal(g, scalings["0"]) == (name != "every_steps")
    before = twin[0].weight.detach().clone()
    train(twin, twin_optimizer, [x])
    change = twin[0].weight - before
    torch.testing.assert_close(model[0].weight, before + g * change, rtol=1e-12, atol=1e-14)
    assert len(copy.deepcopy((model, optimizer, sgs))[1]._optimizer_step_pre_hooks) == 1


def test_a_controller_for_a_copied_optimizer_that_scales_by_itself_begins_with_its_scalings():
    model, batches = small_model().eval(), make_batches()
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(batches)
    for apply_to in ("gradient", "update"):
        other, copied = copy.deepcopy((model, optimizer))
        new = gr.SpatialGradientScaling(other, copied, apply_to=apply_to)
        assert_same(new.scalings, sgs.scalings)
        total = copied.grad_mult(other[0].weight, total=True)
        assert (total is None) == (apply_to == "update")  # never by both
        before = other[0].weight.detach().clone()
        other[0].weight.grad = torch.ones_like(before)
        copied.step()
        assert torch.allclose(other[0].weight, before - 0.1 * sgs.scalings["0"], atol=1e-7)
        new.load_state_dict(new.state_dict())
        assert_same(new.scalings, sgs.scalings)
