"""Wrappers of optimizers are opened, and names are those of a plain script whatever wraps the model or a part of it."""

import pickle
from pathlib import Path

import pytest
import torch
from sgs_controllers import assert_same, controller, make_batches, sgd, small_model, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


class Prepared(torch.optim.Optimizer):
    """Never ran Optimizer.__init__, as the wrapper of Accelerate."""

    def __init__(self, optimizer, attribute="optimizer"):
        setattr(self, attribute, optimizer)
        self._inner = [optimizer]

    @property
    def param_groups(self):
        return self._inner[0].param_groups

    def zero_grad(self, set_to_none=True):
        self._inner[0].zero_grad(set_to_none)

    def step(self, closure=None):
        return self._inner[0].step(closure)


MAKERS = {
    "told": lambda p: gr.FusedRepSGD(p, lr=0.1, momentum=0.9),
    "hooks": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("options", [{}, {"apply_to": "update"}, {"every_steps": 1}], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_steps_through_a_wrapper_are_those_without_it(make, options):
    batches = make_batches(3)
    model, twin = small_model().eval(), small_model().eval()
    for module in (*model, *twin):
        module.training = isinstance(module, nn.Conv2d)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    wrapped = Prepared(Prepared(optimizer))
    sgs = gr.SpatialGradientScaling(model, wrapped, **options)
    twin_sgs = gr.SpatialGradientScaling(twin, twin_optimizer, **options)
    assert sgs.optimizer is optimizer
    for each in (sgs, twin_sgs):
        each.update(batches[:2])
    train(model, wrapped, batches)
    train(twin, twin_optimizer, batches)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    plain = small_model().eval()
    train(plain, make(plain.parameters()), batches)
    assert not torch.equal(model[0].weight, plain[0].weight)


def test_two_controllers_around_one_optimizer_are_found_through_wrappers():
    model = small_model()
    optimizer = sgd(model)
    gr.SpatialGradientScaling(model, Prepared(optimizer))
    with pytest.raises(ValueError, match="scaled by another"):
        gr.SpatialGradientScaling(model, optimizer)


def test_a_wrapper_that_cannot_be_opened():
    model = small_model()
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"Prepared around another one: pass its attribute 'base'$"):
        gr.SpatialGradientScaling(model, Prepared(optimizer, "base"))
    assert not optimizer._optimizer_step_pre_hooks


def test_what_accelerate_prepares():
    accelerate = pytest.importorskip("accelerate")
    batches, model, twin = make_batches(3), small_model().eval(), small_model().eval()
    prepared, optimizer = accelerate.Accelerator(cpu=True).prepare(model, sgd(model))
    sgs, twin_sgs = gr.SpatialGradientScaling(prepared, optimizer), controller(twin)
    for each in (sgs, twin_sgs):
        each.update(batches[:2])
    train(prepared, optimizer, batches)
    train(twin, twin_sgs.optimizer, batches)
    assert_same(sgs.scalings, twin_sgs.scalings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


# -- names -------------------------------------------------------------------------------------------------------------


class Fabric(nn.Module):
    """Holds the model twice, as Lightning Fabric does."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = model
        self._original_module = model

    def forward(self, *args):
        return self._forward_module(*args)


class Sharded(nn.Module):
    """Names as FullyShardedDataParallel makes them."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args):
        return self._fsdp_wrapped_module(*args)


def of_blocks(wrap=lambda block: block):
    whole = small_model()
    model = nn.Sequential()
    model.add_module("stem", wrap(whole[:3]))
    model.add_module("body", whole[3:])
    model.body[3] = wrap(model.body[3])
    return model


WRAPPED = {
    "Fabric": lambda: Fabric(of_blocks()),
    "compiled in Fabric": lambda: Fabric(torch.compile(of_blocks(), backend="eager")),
    "compiled blocks": lambda: of_blocks(lambda block: torch.compile(block, backend="eager")),
    "checkpointed blocks": lambda: of_blocks(checkpoint_wrapper),
    "both": lambda: Fabric(of_blocks(lambda block: torch.compile(checkpoint_wrapper(block), backend="eager"))),
    "sharded": lambda: Sharded(of_blocks(Sharded)),
    "a list of one": lambda: nn.ModuleDict({"module": of_blocks()}),
}
NAMES = ["stem.0", "body.3", "body.6"]


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_are_those_of_a_plain_model(wrap):
    sgs, plain = controller(model := wrap()), controller(of_blocks())
    assert list(sgs.scalings) == list(plain.scalings) == NAMES
    assert sgs.skipped == plain.skipped
    assert list(sgs.skipped) == ["body.7"]
    plain.update(make_batches())
    sgs.load_state_dict(plain.state_dict())
    assert_same(sgs.scalings, plain.scalings)
    if not isinstance(model, nn.ModuleDict):
        sgs.update(make_batches(seed=3))
        plain.update(make_batches(seed=3))
        assert_same(sgs.scalings, plain.scalings)
        plain.load_state_dict(sgs.state_dict())


@pytest.mark.parametrize("prefix", ["_forward_module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_a_state_with_the_prefixes_of_wrappers(prefix):
    def prefixed(names):
        return {prefix + name.replace("body.", "body._orig_mod."): value for name, value in names.items()}

    model = of_blocks()
    sgs = controller(model, every_steps=1)
    train(model, sgs.optimizer, make_batches(3))
    state = sgs.state_dict()
    assert len(state["ranges"]) == 3
    saved = {**state, "scalings": prefixed(state["scalings"]), "ranges": prefixed(state["ranges"])}
    restored = controller(of_blocks(), every_steps=1)
    restored.load_state_dict(saved)
    assert_same(restored.scalings, sgs.scalings)
    for name, (ranges, n) in restored.state_dict()["ranges"].items():
        assert torch.equal(ranges, state["ranges"][name][0])
        assert torch.equal(n, state["ranges"][name][1])


def test_a_state_that_was_saved_under_fabric_before_names_were_plain():
    _, state, scalings = pickle.loads((Path(__file__).parent / "data" / "controllers.pkl").read_bytes())["fabric"]
    assert list(state["scalings"]) == ["_forward_module.0", "_forward_module.2"]
    sgs = controller(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)).double())
    sgs.load_state_dict(state)
    assert_same(sgs.scalings, {name.removeprefix("_forward_module."): g for name, g in scalings.items()})


def test_names_that_would_be_alike_stay_whole():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 2, 3)
            self.module = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 5)})

        def forward(self, x):
            return self.module["conv"](self.conv(x))

    sgs = controller(Pair())
    assert {name: list(g.shape) for name, g in sgs.scalings.items()} == {"conv": [3, 3], "module.conv": [5, 5]}
    sgs.update(make_batches())
    other = controller(Pair())
    other.load_state_dict(sgs.state_dict())
    assert_same(other.scalings, sgs.scalings)


def test_a_weight_that_is_stored_flat_is_skipped():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[0].weight = nn.Parameter(model[0].weight.detach().flatten())
    assert controller(model).skipped == {"0": "its weight is stored flat, as FullyShardedDataParallel does"}
