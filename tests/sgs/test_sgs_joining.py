"""Layers whose weights join the optimizer after the controller was made: gradual unfreezing."""

import pytest
import torch
from sgs_controllers import WithScaling, all_hooks, assert_same, controller, make_batches, small_model, train
from torch import nn

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_HELD = "its weight is not a parameter that the optimizer holds"


def frozen(kind=torch.optim.SGD, held=(3, 4), **options):
    """A model of which the optimizer has two modules, as of a head."""
    model = small_model().eval()
    for module in model:
        module.training = isinstance(module, nn.Conv2d)
    optimizer = kind([p for i in held for p in model[i].parameters()], lr=0.01, momentum=0.9)
    return model, optimizer, gr.SpatialGradientScaling(model, optimizer, **options)


def join(model, optimizer, *modules):
    optimizer.add_param_group({"params": [p for i in modules for p in model[i].parameters()]})


LOOKS = {
    "update": lambda sgs: sgs.update(make_batches()),
    "update_if_due": lambda sgs: sgs.update_if_due(2, None),
    "load_state_dict": lambda sgs: sgs.load_state_dict(controller(small_model()).state_dict()),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_layers_join_in_module_order(look):
    model, optimizer, sgs = frozen()
    assert list(sgs.scalings) == ["3"]
    assert {name: why for name, why in sgs.skipped.items() if name != "7"} == {"0": NOT_HELD, "6": NOT_HELD}
    before = list(sgs._layers)
    join(model, optimizer, 0, 6)
    look(sgs)
    assert list(sgs.scalings) == ["0", "3", "6"]
    assert sgs._layers[1] is before[0]
    assert list(sgs.skipped) == ["7"]
    layers = list(sgs._layers)
    look(sgs)
    assert all(a is b for a, b in zip(sgs._layers, layers, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.SGD, WithScaling, gr.FusedRepSGD])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_layers_that_joined_are_scaled_as_if_they_had_been_there(kind, apply_to):
    batches = make_batches(3)
    model, optimizer, sgs = frozen(kind, apply_to=apply_to)
    twin, twin_optimizer, twin_sgs = frozen(kind, apply_to=apply_to)
    twin_sgs.remove()
    join(model, optimizer, 0, 6)
    join(twin, twin_optimizer, 0, 6)
    twin_sgs = gr.SpatialGradientScaling(twin, twin_optimizer, apply_to=apply_to)
    for each in (sgs, twin_sgs):
        assert each.update_if_due(1, batches)
    train(model, optimizer, batches)
    train(twin, twin_optimizer, batches)
    assert_same(sgs.scalings, twin_sgs.scalings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert not torch.equal(sgs.scalings["0"], torch.ones(3, 3))


def test_nothing_to_scale_at_first():
    model = small_model()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="found no convolution to scale"):
        sgs = gr.SpatialGradientScaling(model, optimizer)
    join(model, optimizer, 0)
    sgs.update(make_batches())
    assert list(sgs.scalings) == ["0"]
    assert not torch.equal(sgs.scalings["0"], torch.ones(3, 3))


@pytest.mark.parametrize("calls_update_if_due", [False, True])
def test_layers_that_join_are_watched_by_every_steps(calls_update_if_due):
    """The step after which they joined is the last that does not count for them."""
    batches = make_batches(4)
    model, optimizer, sgs = frozen(every_steps=1)
    assert all_hooks(model) == 1
    train(model, optimizer, batches[:2])
    join(model, optimizer, 0)
    if calls_update_if_due:
        sgs.update_if_due(1, None)
    else:
        train(model, optimizer, batches[:1])  # finds them in its step
    assert all_hooks(model) == 2
    assert list(sgs.scalings) == ["0", "3"]
    train(model, optimizer, batches)
    assert not any(torch.equal(g, torch.ones_like(g)) for g in sgs.scalings.values())
    assert set(sgs.state_dict()["ranges"]) == {"0", "3"}
    sgs.remove()
    assert all_hooks(model) == 0
    join(model, optimizer, 6)
    sgs.update_if_due(2, None)
    assert all_hooks(model) == 0


def test_layers_whose_weight_left_stay():
    model, optimizer, sgs = frozen(held=(0, 3, 6))
    sgs.update(make_batches())
    before = sgs.scalings
    optimizer.param_groups[0]["params"] = list(model[3].parameters())
    sgs.update_if_due(2, None)
    assert_same(sgs.scalings, before)
    assert list(sgs.skipped) == ["7"]


def test_layers_whose_module_left_the_model_stay():
    model, _, sgs = frozen(held=(0, 3, 6))
    sgs.update(make_batches())
    before = sgs.scalings
    model[0] = nn.Identity()
    sgs.update_if_due(2, None)
    assert list(sgs.scalings) == ["3", "6", "0"]
    assert_same(sgs.scalings, before)


def test_a_convolution_that_is_tied_later_pools():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(4, 2, 3, groups=2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    model[1].weight = model[2].weight = model[0].weight
    sgs.update_if_due(0, None)
    assert list(sgs.scalings) == ["0", "1"]
    assert len(sgs._layers) == 1
    assert "shares its weight" in sgs.skipped["2"]


def test_a_state_of_all_layers_after_they_joined():
    saved = controller(small_model())
    saved.update(make_batches())
    model, optimizer, sgs = frozen()
    with pytest.raises(ValueError, match="unexpected 0, 6"):
        sgs.load_state_dict(saved.state_dict())
    join(model, optimizer, 0, 6)
    sgs.load_state_dict(saved.state_dict())
    assert_same(sgs.scalings, saved.scalings)
