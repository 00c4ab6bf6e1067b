"""DyRep: growing and cutting change no output, a resumed training is the same, the optimizer has what the model has."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.branches.dynamic import DynamicReparameterization
from gradrep_kernels.branches.grown import DynamicBranches

# Sums in another order, in float64, of outputs of size 1.
TOLERANCE = 1e-9


def network():
    """Convolutions with a shortcut, with a stride, in groups, and one that is padded otherwise than 'same'."""
    torch.manual_seed(1)
    layers = [
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.GroupNorm(2, 6)),
        *(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double()


CONVS = ("0", "3", "6", "9", "11")


def groups(model):
    return gr.param_groups(model, 1e-3)


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = {"dtype": torch.float64, "generator": generator}
    return [(torch.randn(8, 3, 9, 8, **make), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


def sgd(model):
    return torch.optim.SGD(groups(model), 0.05, momentum=0.9)


def fused(model):
    return gr.FusedRepSGD(groups(model), 0.05, momentum=0.9)


class Training:
    """A network, its optimizer, and DyRep beside it."""

    def __init__(self, optimizer=sgd, **options):
        self.model = network()
        self.optimizer = optimizer(self.model)
        self.dyrep = DynamicReparameterization(self.model, self.optimizer, groups, **{"every": 1, **options})

    def steps(self, n, seed=0):
        self.model.train()
        for x, labels in batches(n, seed):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), labels).backward()
            self.optimizer.step()
        return self

    def grow(self, name):
        """Make an update that chooses this convolution, and cuts nothing."""
        self.dyrep._sums, least, self.dyrep.least = {name: torch.ones((), dtype=torch.float64)}, self.dyrep.least, 0.0
        assert self.dyrep.update(batches(1, 7))
        self.dyrep.least = least
        assert self.dyrep.history[-1].name == name
        return self

    def block(self, name):
        module = self.model.get_submodule(name)
        assert isinstance(module, DynamicBranches)
        return module

    def state(self):
        saved = [self.dyrep.state_dict(), self.model.state_dict(), self.optimizer.state_dict()]
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def resumed(self, optimizer=sgd, **options):
        new = Training(optimizer, **options)
        structure, model, state = self.state()
        new.dyrep.load_state_dict(structure)
        new.model.load_state_dict(model)
        new.optimizer.load_state_dict(state)
        return new


def in_eval(model, x):
    return copy.deepcopy(model).eval()(x)


def in_train(model, x):
    """In train mode, with statistics that stay, so that what an inner norm pads with does."""
    model = copy.deepcopy(model).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    return model(x)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_in_step(training):
    """The optimizer has the parameters of the model, in the groups of their kinds, and states of no others."""
    held = [group["params"] for group in training.optimizer.param_groups]
    assert [[id(p) for p in params] for params in held] == [
        [id(p) for p in group["params"]] for group in groups(training.model)
    ]
    names = dict(training.model.named_parameters())
    for group in training.optimizer.param_groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert {*training.optimizer.state} <= {p for params in held for p in params}


@pytest.mark.parametrize("name", [*CONVS, "3.branches.kxk.conv", "3.branches.1x1_kxk.conv", "6.branches.1x1_kxk.conv"])
def test_growing_changes_no_output(name):
    training = Training().steps(6)
    if "." in name:
        training.grow(name.partition(".")[0]).steps(4, 1)
    (calibration, _), x = batches(1, 7)[0], torch.randn(4, 3, 11, 7, dtype=torch.float64)
    expected = in_eval(training.model, x), in_train(training.model, calibration)
    before, kernel = sum(p.numel() for p in training.model.parameters()), training.model.get_submodule(name).weight
    state = copy.deepcopy({k: v for k, v in training.model.state_dict().items() if not k.startswith(name[0])})
    training.grow(name)
    assert sum(p.numel() for p in training.model.parameters()) > before
    assert training.block(name).plain.weight is kernel
    torch.testing.assert_close(in_eval(training.model, x), expected[0], rtol=0, atol=TOLERANCE)
    # What an inner norm pads with moves with its statistics in every forward in train mode.
    allowed = 1e-5 if name.endswith("1x1_kxk.conv") else TOLERANCE
    torch.testing.assert_close(in_train(training.model, calibration), expected[1], rtol=0, atol=allowed)
    after = training.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())  # of all other modules
    assert_in_step(training)
    assert kernel not in training.optimizer.state
    training.steps(3, 2)
    deployed = csla.merge(training.model, example=x)
    torch.testing.assert_close(in_eval(deployed, x), in_eval(training.model, x), rtol=0, atol=TOLERANCE)
    assert not torch.allclose(in_eval(training.model, x), expected[0], atol=1e-4)  # it has learned


def test_what_grows_is_what_fits():
    training = Training().steps(1)
    for name in CONVS:
        training.grow(name)
    kinds = {name: list(training.block(name).branches) for name in CONVS}
    sequences = ["kxk", "1x1", "1x1_kxk", "1x1_average", "1xk", "kx1"]
    assert kinds == {
        "0": sequences,
        "3": [*sequences, "identity"],
        "6": sequences,
        "9": [*sequences, "identity"],
        "11": ["kxk", "1x1_kxk", "1x1_average"],
    }
    assert training.block("9").branches["1x1_average"].first is None
    sizes = [tuple(training.block("6").branches[kind].conv.kernel_size) for kind in ("1x1", "1xk", "kx1")]
    assert sizes == [(1, 1), (1, 5), (3, 1)]
    # Two levels of blocks, no third.
    training.grow("3.branches.kxk.conv").steps(1)
    assert "3.branches.1x1_kxk.conv" in training.dyrep.scores
    assert not any(name.startswith("3.branches.kxk") for name in training.dyrep.scores)


def test_new_branches_start_at_a_hundredth_of_the_output():
    training = Training().steps(3).grow("3")
    assert {kind: round(size, 4) for kind, size in training.block("3").loudness().items()} == pytest.approx(
        dict.fromkeys(["1x1", "1x1_kxk", "1x1_average", "1xk", "kx1", "identity"], 0.01), rel=0.05
    )


def quieten(block, sizes):
    """Set the loudness of branches."""
    with torch.no_grad():
        own = block.branches["kxk"].norm.weight.abs().mean()
        for kind, size in sizes.items():
            weight = block.branches[kind].norm.weight
            weight.mul_(size * own / weight.abs().mean())


LOUD = {"1x1": 0.3, "1x1_kxk": 0.5, "1x1_average": 0.4, "1xk": 0.2, "kx1": 0.3, "identity": 0.6}


@pytest.mark.parametrize("name", ["3", "3.branches.kxk.conv"])
@pytest.mark.parametrize("quiet", [("identity",), ("1x1", "kx1"), ("1x1_kxk", "1x1_average", "1xk")])
def test_cutting_changes_no_output_in_eval_mode(name, quiet):
    training = Training().steps(3).grow("3").steps(3, 1)
    if name != "3":
        training.grow(name)
    training.steps(3, 2)
    block = training.block(name)
    quieten(training.block("3"), LOUD)
    quieten(block, {**LOUD, **dict.fromkeys(quiet, 0.05)})
    x = torch.randn(4, 3, 11, 7, dtype=torch.float64)
    expected = in_eval(training.model, x)
    training.dyrep._sums = {}
    assert training.dyrep.update(batches(1, 7))
    assert training.dyrep.history[-1] == (None, name, (), tuple(kind for kind in LOUD if kind in quiet))
    assert list(block.branches) == ["kxk", *(kind for kind in LOUD if kind not in quiet)]
    torch.testing.assert_close(in_eval(training.model, x), expected, rtol=0, atol=TOLERANCE)
    assert_in_step(training)
    assert block.plain.weight not in training.optimizer.state
    training.steps(3, 3)
    torch.testing.assert_close(
        in_eval(csla.merge(training.model), x), in_eval(training.model, x), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_block_that_loses_all_is_a_convolution_with_a_bias(bias):
    training = Training(least=1.0).steps(3).grow("6" if bias else "0").steps(3, 1)
    name = "6" if bias else "0"
    block, kernel = training.block(name), training.block(name).plain.weight
    for kind in ("1x1", "1x1_kxk", "1xk"):  # All but two, which are alike to the last bit, would stay above their mean.
        del block.branches[kind]
    quieten(block, {"1x1_average": 0.5, "kx1": 0.9})
    training.dyrep._renew_groups()
    training.dyrep._sums = {}
    x = torch.randn(4, 3, 11, 7, dtype=torch.float64)
    expected = in_eval(training.model, x)
    assert training.dyrep.update(batches(1, 7))
    assert list(block.branches) == ["kxk", "kx1"]
    del block.branches["kx1"]
    expected = in_eval(training.model, x)
    training.dyrep._cut(name, (), x)  # What is left of a block is one branch.
    training.dyrep._renew_groups()
    conv = training.model.get_submodule(name)
    assert type(conv) is nn.Conv2d
    assert conv.weight is kernel
    assert conv.bias.abs().max() > 0
    torch.testing.assert_close(in_eval(training.model, x), expected, rtol=0, atol=TOLERANCE)
    assert_in_step(training)
    again = training.resumed(least=1.0)
    assert torch.equal(in_eval(again.model, x), in_eval(training.model, x))
    assert_in_step(again)


def test_blocks_that_go_with_the_block_around_them():
    """One update grows inside a branch, and cuts this branch."""
    training = Training().steps(3).grow("3").grow("3.branches.1x1_kxk.conv").steps(3, 1)
    quieten(training.block("3"), {**LOUD, "1x1_kxk": 0.01})
    quieten(training.block("3.branches.1x1_kxk.conv"), {"1x1_kxk": 0.01, "1x1_average": 0.5})
    training.dyrep._sums = {"3.branches.1x1_kxk.conv.branches.kxk.conv": torch.ones(())}
    x = torch.randn(4, 3, 11, 7, dtype=torch.float64)
    expected = in_eval(training.model, x)
    assert training.dyrep.update(batches(1, 7))
    assert "1x1_kxk" not in training.block("3").branches
    torch.testing.assert_close(in_eval(training.model, x), expected, rtol=0, atol=TOLERANCE)
    assert_in_step(training)


def test_the_rule_of_cutting():
    """Below the mean and below `least`, where the loudnesses spread."""
    training = Training(least=0.1, spread=0.02).steps(1).grow("0")
    block = training.block("0")

    def cut(*sizes):
        quieten(block, dict(zip(("1x1", "1x1_kxk", "1x1_average", "1xk", "kx1"), sizes, strict=True)))
        return training.dyrep._quiet(block)

    assert cut(0.05, 0.05, 0.05, 0.05, 0.05) == ()  # no spread
    assert cut(0.05, 0.05, 0.05, 0.05, 0.09) == ()  # 0.018
    assert cut(0.05, 0.05, 0.05, 0.05, 0.10) == ("1x1", "1x1_kxk", "1x1_average", "1xk")  # 0.022
    assert cut(0.2, 0.2, 0.2, 0.2, 0.9) == ()  # none below `least`
    assert cut(0.09, 0.01, 0.02, 0.03, 0.1) == ("1x1_kxk", "1x1_average", "1xk")


@pytest.mark.parametrize("score", ["synflow", "snip", "grad_norm"])
def test_the_convolution_with_the_highest_mean_score_grows(score):
    by_hand = {
        "synflow": lambda w, g: (w * g).sum(),
        "snip": lambda w, g: (w * g).abs().sum(),
        "grad_norm": lambda w, g: g.square().sum().sqrt(),
    }[score]
    training, sums = Training(score=score), dict.fromkeys(CONVS, 0.0)

    def add(optimizer, *_):
        for name in CONVS:
            weight = training.model.get_submodule(name).weight
            sums[name] += float(by_hand(weight.detach(), weight.grad))

    training.optimizer.register_step_pre_hook(add)
    training.steps(4)
    assert training.dyrep.scores == pytest.approx({name: total / 4 for name, total in sums.items()}, abs=1e-12)
    assert training.dyrep.update(batches(1))
    assert training.dyrep.history[0].name == max(sums, key=sums.get)
    assert training.dyrep.scores == {}


def test_before_a_batch_norm_synflow_is_next_to_nothing():
    """As the docstring says: the loss does not depend on the size of such a kernel, but for eps. A GroupNorm is one."""
    snip, synflow = (Training(score=score).steps(3).dyrep.scores for score in ("snip", "synflow"))
    for name in CONVS:
        assert abs(synflow[name]) < 1e-3 * snip[name]


@pytest.mark.parametrize("epochs", [12])
def test_updates_come_every_so_many_epochs_up_to_one(epochs):
    training = Training(every=3, until=7)
    done = []
    for epoch in range(epochs):
        steps = training.dyrep._steps
        if training.dyrep.update_if_due(epoch, batches(1)):
            done.append(epoch)
        training.steps(1, epoch)
        if epoch > 6:
            assert training.dyrep._steps == steps or epoch == 7  # Nothing is recorded for no update.
    assert done == [3, 6]
    assert [change.epoch for change in training.dyrep.history if change.grown] == [3, 6]
    assert not training.dyrep.scores
    assert not Training().dyrep.update(batches(1))  # no step, no score


@pytest.mark.parametrize("optimizer", [sgd, fused], ids=["sgd", "fused"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_training_is_the_same_bit_for_bit(optimizer, stop):
    """Stopped inside an interval of updates too, with scores, cuts and nested blocks."""

    def epochs(training, some):
        for epoch in some:
            training.dyrep.update_if_due(epoch, batches(1, 100 + epoch))
            training.steps(3, epoch)
        return training

    options = {"every": 2, "score": "snip", "least": 0.3, "spread": 0.0005, "optimizer": optimizer, "seed": 5}
    whole = epochs(Training(**options), range(9))
    kinds = {(bool(change.grown), bool(change.cut)) for change in whole.dyrep.history}
    assert kinds == {(True, False), (False, True)}
    stopped = epochs(Training(**options), range(stop))
    torch.randn(3)  # The default generator does not matter.
    resumed = stopped.resumed(**options)
    assert resumed.dyrep.scores == stopped.dyrep.scores != {}
    epochs(resumed, range(stop, 9))
    assert resumed.dyrep.history == whole.dyrep.history
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert [name for name, _ in resumed.model.named_parameters()] == [n for n, _ in whole.model.named_parameters()]
    a, b = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n]["momentum_buffer"], b[n]["momentum_buffer"]) for n in a)
    assert_in_step(resumed)
    other = epochs(Training(**{**options, "seed": 6}), range(9))
    assert not torch.equal(other.model[0](batches(1)[0][0]), whole.model[0](batches(1)[0][0]))


def test_the_structure_is_in_the_names_of_the_weights():
    trained = Training().steps(2).grow("3").grow("0").grow("0.branches.kxk.conv").grow("0.branches.1x1_kxk.conv")
    del trained.block("3").branches["1xk"]
    block = trained.block("0").branches["1x1_kxk"].conv
    trained.dyrep._cut("0.branches.1x1_kxk.conv", tuple(block.branches)[1:], torch.zeros(()).double())
    trained.dyrep._renew_groups()
    assert trained.model.get_submodule("0.branches.1x1_kxk.conv").bias is not None
    new = Training()
    new.dyrep.take_structure_of(trained.model.state_dict())
    new.model.load_state_dict(trained.model.state_dict())
    assert new.dyrep.state_dict()["blocks"] == trained.dyrep.state_dict()["blocks"] != []
    assert_in_step(new)
    x = torch.randn(4, 3, 11, 7, dtype=torch.float64)
    assert torch.equal(in_eval(new.model, x), in_eval(trained.model, x))
    again = Training()
    again.dyrep.take_structure_of(again.model.state_dict())
    assert not list(again.dyrep._blocks())


def test_the_fused_step_trains_what_torchs_does():
    """Its plans must not outlive the parameters."""
    models = []
    for optimizer in (sgd, fused):
        training = Training(optimizer, score="snip", least=0.3, spread=0.0005)
        for epoch in range(5):
            training.dyrep.update_if_due(epoch, batches(1, 100 + epoch))
            training.steps(4, epoch)
        models.append(training.model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-9, atol=1e-9)


def test_nothing_else_is_disturbed():
    training = Training().steps(2)
    training.model.add_module("dropout", nn.Dropout())
    training.model.eval()
    training.model[3].train()
    modes = {name: module.training for name, module in training.model.named_modules()}
    grads = {name: p.grad.clone() for name, p in training.model.named_parameters()}
    buffers = {name: value.clone() for name, value in training.model.named_buffers()}
    random = torch.get_rng_state()
    training.grow("3")
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(training.model.named_modules())
    assert all(after[name].training == mode for name, mode in modes.items())
    assert all(module.training for module in after["3"].modules())
    named = dict(training.model.named_parameters())
    assert all(torch.equal(named[name].grad, grad) for name, grad in grads.items() if name in named)
    assert all(torch.equal(value, buffers[name]) for name, value in training.model.named_buffers() if name in buffers)


def test_a_failed_update_changes_nothing():
    training = Training().steps(2)
    before, scores = copy.deepcopy(training.model.state_dict()), training.dyrep.scores
    with pytest.raises(ValueError, match="loader gives no batch"):
        training.dyrep.update([])
    with pytest.raises(ValueError, match="does not call"):
        training.dyrep.update(batches(1), lambda model, batch: None)
    assert_same(before, training.model.state_dict())
    assert training.dyrep.scores == scores
    assert_in_step(training)


def test_hooks_end_with_remove():
    training = Training()
    training.dyrep.remove()
    assert not training.steps(1).dyrep.scores


def test_wrong_input():
    model = network()
    optimizer = sgd(model)
    for wrong, message in {
        "every": "every must be at least 1, got 0",
        "score": "score must be one of synflow, snip, grad_norm, got 0",
        "size": "size must be a number above 0, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            DynamicReparameterization(model, optimizer, groups, **{wrong: 0})
    with pytest.raises(ValueError, match="spread must be a number of at least 0, got -1"):
        DynamicReparameterization(model, optimizer, groups, spread=-1)
    with pytest.raises(ValueError, match=r"groups must be the function .*\[18\] .* \[6, 12\]"):
        DynamicReparameterization(model, optimizer, lambda model: [{"params": model.parameters()}])
    with pytest.raises(ValueError, match="got it inside a DataParallel"):
        DynamicReparameterization(nn.DataParallel(model), optimizer, groups)
    with pytest.raises(ValueError, match="that `where` chooses"):
        DynamicReparameterization(model, optimizer, groups, where=lambda name, conv: False)
    small = nn.Sequential(nn.Conv2d(3, 4, (1, 3)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="no convolution that could grow"):
        DynamicReparameterization(small, sgd(small), groups, where="0")
    grown = Training().steps(1).grow("0")
    with pytest.raises(ValueError, match=r"the model must be the plain one, it has branches already: 0"):
        grown.dyrep.load_state_dict(grown.dyrep.state_dict())
    state = grown.dyrep.state_dict()
    for blocks in ([["13", ["kxk", "1x1"]]], [["0", ["1x1"]]], [["0", ["kxk", "new"]]]):
        with pytest.raises(ValueError, match="the structure that was saved does not fit the model"):
            DynamicReparameterization(model, optimizer, groups).load_state_dict({**state, "blocks": blocks})
    assert not any(isinstance(module, DynamicBranches) for module in model.modules())
