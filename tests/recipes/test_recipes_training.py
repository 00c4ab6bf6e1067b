"""One epoch: its schedule, its loss, its order, its evaluation, and the same bits again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases_recipes import TINY
from torch.optim.swa_utils import update_bn

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.recipes.build import build
from gradrep_kernels.recipes.networks import MODELS
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.schedules import learning_rate
from gradrep_kernels.recipes.table import RECIPES
from gradrep_kernels.recipes.training import accuracies, accuracy, averaged, repeatable, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_epoch_is_repeatable_whatever_the_default_generator_holds(options, data, scales):
    results = []
    for state in (1, 2):
        trainee = build(RECIPES["repopt+sgs"], options, data, scales, 0, 0.1)
        torch.manual_seed(state)
        records = [train_epoch(trainee, data, options, 0, epoch, 3, lambda: None) for epoch in range(3)]
        results.append((trainee.model.state_dict(), [record["train_loss"] for record in records]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values()))


def test_an_epoch_follows_the_schedule_and_calls_for_every_batch(options, data):
    calls = []
    trainee = build(RECIPES["sgs"], options, data, None, 0, 0.1)
    records = [train_epoch(trainee, data, options, 0, epoch, 4, lambda: calls.append(1)) for epoch in range(4)]
    assert len(calls) == 4 * 3
    assert records[0]["lr"] == 0.1  # end of the warm-up
    assert records[3]["lr"] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 8 / 9)))
    assert [record["sgs_updated"] for record in records] == [False, True, False, False]


def test_every_epoch_has_an_order_of_its_own(options, data):
    trainee = build(RECIPES["sgd"], options, data, None, 0, 0.1)
    seen = []
    trainee.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    for epoch in (0, 1, 0):
        train_epoch(trainee, data, options, 0, epoch, 2, lambda: None)
    train_epoch(trainee, data, options, 1, 0, 2, lambda: None)
    first, second, first_again, of_another_seed = (torch.cat(seen[3 * n : 3 * n + 3]) for n in range(4))
    assert torch.equal(first, first_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, of_another_seed)


def test_the_loss_is_smoothed_cross_entropy(source, data):
    smoothed = resolve({"data": source, **TINY, "label_smoothing": 0.3, "augment": (), "batch_size": 30})
    trainee = build(RECIPES["sgd"], smoothed, data, None, 0, 0.1)
    outputs = []
    trainee.model.register_forward_hook(lambda model, args, y: outputs.append((args[0].detach(), y.detach())))
    loss = train_epoch(trainee, data, smoothed, 0, 0, 1, lambda: None)["train_loss"]
    ((x, y),) = outputs
    everything = data.standardise(data.train.read(torch.arange(30))).flatten(1)
    labels = data.train.labels[torch.cdist(x.flatten(1), everything).argmin(1)]
    surprise = -y.log_softmax(1)
    expected = 0.7 * surprise[torch.arange(30), labels] + 0.3 * surprise.mean(1)
    assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_clipping_uses_the_norm_of_the_branches(options, data, scales, monkeypatch):
    """Clipped CSLA and clipped RepOpt stay the same network; RepOpt clipped by its plain gradient norm would not."""
    clipped = resolve({**options.to_json(), "augment": (), "clip_norm": 0.05})
    exact = {}
    for name, value in scales.items():
        identity = value.identity.double() if value.has_identity else False
        exact[name] = gr.BranchScales(value.kxk.double(), value.one_by_one.double(), identity)
    doubled = type(data.train)(data.train.labels, lambda indices: data.train.read(indices).double())
    double = type(data)(data.name, doubled, data.test, data.classes, data.side, data.mean.double(), data.std.double())
    monkeypatch.setitem(MODELS, "repopt_vgg_small", lambda **shape: gr.models.repopt_vgg_small(**shape).double())
    explicit, target = (build(RECIPES[recipe], clipped, double, exact, 0, 0.1) for recipe in ("csla", "repopt"))
    for trainee in (explicit, target):
        train_epoch(trainee, double, clipped, 0, 0, 1, lambda: None)
    merged = csla.merge(explicit.model).state_dict()
    unclipped = build(RECIPES["repopt"], options, double, exact, 0, 0.1)
    train_epoch(unclipped, double, options, 0, 0, 1, lambda: None)
    for name, tensor in target.model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-10, rtol=0)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(target.model.parameters(), unclipped.model.parameters()))


@pytest.mark.parametrize("recipe", ["sgd", "repopt", "csla"])
def test_averages_are_judged_with_norm_statistics_of_their_own(options, data, scales, recipe):
    """Every row keeps them, torch's own SGD with Grad Mults or without, and nothing is changed by the judging."""
    averaging = resolve({**options.to_json(), "augment": (), "ema_decay": 0.5, "momentum_dtype": "bfloat16"})
    trainee = build(RECIPES[recipe], averaging, data, scales, 0, 0.1)
    train_epoch(trainee, data, averaging, 0, 0, 1, lambda: None)
    assert {state["momentum_buffer"].dtype for state in trainee.optimizer.state.values()} == {torch.bfloat16}
    before = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
    found = accuracies(trainee, data, data.test, averaging, 0, "accuracy")
    assert found["weights_accuracy"] == accuracy(trainee.model, data, data.test, "cpu")
    for name, tensor in trainee.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # By hand: averages in place of the weights, and statistics of batches of the same data.
    by_hand = copy.deepcopy(trainee.model)
    with torch.no_grad():
        for p, own in zip(by_hand.parameters(), trainee.model.parameters()):
            p.copy_(trainee.optimizer.ema(own))
    with averaged(trainee, data, averaging, 0):
        inside = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
        assert accuracy(trainee.model, data, data.test, "cpu") == found["accuracy"]
    for name, p in by_hand.named_parameters():
        assert torch.equal(inside[name], p), name
    whole = data.standardise(data.train.read(torch.arange(30)))
    update_bn([whole], by_hand)
    means = [name for name in inside if name.endswith("running_mean")]
    torch.testing.assert_close(inside[means[0]], by_hand.state_dict()[means[0]])  # of the first norm: means of batches
    assert not torch.equal(inside[means[0]], before[means[0]])


def test_nothing_is_averaged_without_the_option(options, data):
    trainee = build(RECIPES["sgd"], options, data, None, 0, 0.1)
    assert type(trainee.optimizer) is torch.optim.SGD
    assert set(accuracies(trainee, data, data.test, options, 0, "accuracy")) == {"accuracy"}


def test_accuracy_is_the_share_of_right_answers(data):
    class Right(torch.nn.Module):
        def forward(self, x):  # brightest of ten squares, as the data set draws them
            return torch.stack([x[:, :, 3 * c : 3 * c + 4, 3 * c : 3 * c + 4].sum((1, 2, 3)) for c in range(10)], 1)

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[5].expand(len(x), 10)

    assert accuracy(Right(), data, data.test, "cpu") == 1
    assert accuracy(Always(), data, data.test, "cpu") == pytest.approx(float((data.test.labels == 5).float().mean()))


def test_repeatable_gives_back_what_it_changed():
    torch.set_num_threads(1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with repeatable(2, "cpu"):
        assert torch.get_num_threads() == 2
        torch.rand(3)
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_the_learning_rate_is_that_of_torchs_schedulers(warmup):
    steps, base = 40, 0.3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    schedulers, milestones = [], []
    if warmup:
        schedulers.append(torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, max(warmup - 1, 1)))
    if warmup and warmup < steps:
        milestones.append(warmup)
    if warmup < steps:
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup))
    scheduler = (
        torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones)
        if len(schedulers) > 1
        else schedulers[0]
    )
    for step in range(steps):
        assert learning_rate(step, steps, warmup, base) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("step", "steps", "warmup"), [(-1, 10, 0), (10, 10, 0), (0, 10, 11), (0, 10, -1)])
def test_steps_outside_the_schedule_are_refused(step, steps, warmup):
    with pytest.raises(ValueError, match="must lie in"):
        learning_rate(step, steps, warmup, 0.1)
