"""Updates from the training batches, at every n-th step."""

import copy
import gc
import math
import pickle
import sys
import warnings

import pytest
import torch
from sgs_controllers import (
    TAPS,
    Named,
    WithScaling,
    all_hooks,
    assert_same,
    live_tensors,
    make_batches,
    scaling_of,
    sgd,
    small_model,
    sturges_bins,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("closure", [False, True])
def test_every_n_steps_counts_within_the_ranges_of_the_update_before(closure):
    model, batches = Named(), make_batches(6)
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=2)
    train(model, optimizer, batches[:2], closure)  # the second step finds ranges
    assert torch.equal(sgs.scalings["conv"], torch.ones(3, 3))
    for last, now in ((1, 3), (3, 5)):
        train(model, optimizer, batches[now - 1 : now + 1], closure)
        ranges, n = gr.pair_ranges(batches[last], TAPS, padding=1)
        counts = gr.joint_histogram(batches[now], TAPS, sturges_bins(n), padding=1, ranges=ranges)
        expected = scaling_of(gr.normalized_mutual_information(counts))
        assert torch.allclose(sgs.scalings["conv"], expected, atol=1e-6)


def test_a_convolution_that_a_due_step_does_not_call_keeps_its_ranges():
    model = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)])
    optimizer = WithScaling(model.parameters(), lr=0.01)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    batches = make_batches(3)
    for step, batch in enumerate(batches):
        (model[0](batch).sum() + (model[1](batch).sum() if step != 1 else 0)).backward()
        optimizer.step()
        assert torch.equal(sgs.scalings["1"], torch.ones(3, 3)) == (step < 2)
    ranges, n = gr.pair_ranges(batches[0], TAPS)
    counts = gr.joint_histogram(batches[2], TAPS, sturges_bins(n), ranges=ranges)
    expected = scaling_of(gr.normalized_mutual_information(counts))
    assert torch.allclose(sgs.scalings["1"], expected, atol=1e-6)


def test_a_due_step_uses_what_its_own_forward_showed():
    model, batches = small_model(), make_batches(2)
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, batches[:1])
    before = model[0].weight.detach().clone()
    train(model, optimizer, batches[1:])
    g = sgs.scalings["0"]
    assert not torch.equal(g, torch.ones(3, 3))
    assert torch.allclose(model[0].weight, before - 0.1 * model[0].weight.grad * g, atol=1e-6)


def test_only_training_forwards_of_due_steps_are_counted():
    def run(disturb):
        model, batches = small_model(), make_batches(6)
        optimizer = WithScaling(model.parameters(), lr=0.01)
        sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=2, batches=1)
        for batch in batches:
            if disturb:
                model.eval()
                model(batch * 100)  # validation
                model.train()
                with torch.no_grad():
                    model(batch * 100)
            torch.manual_seed(0)  # of the dropout
            train(model, optimizer, [batch])
        return sgs.scalings

    assert_same(run(True), run(False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_maps_that_a_checkpoint_recomputes_are_counted_once(reentrant):
    def run(forward):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        model.load_state_dict(weights)
        optimizer = WithScaling(model.parameters(), lr=0.01)
        sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
        for step in range(3):
            for batch in make_batches(2, seed=step):  # two backwards for a step
                forward(model, batch.requires_grad_()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {**sgs.scalings, **{f"n of {name}": n for name, (_, n) in sgs.state_dict()["ranges"].items()}}

    weights = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).state_dict()
    assert_same(run(lambda model, x: checkpoint(model, x, use_reentrant=reentrant)), run(lambda model, x: model(x)))


@pytest.mark.parametrize("scale", [1.0, math.nan])
def test_the_maps_of_a_step_that_a_scaler_skips_pool_with_the_next(scale):
    model, batches = Named(), make_batches(3)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    warned = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(model(batch * (scale if step == 1 else 1)).sum() * (math.inf if step == 1 else 1)).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.step(optimizer)
        scaler.update()
        warned.append(any("is not finite" in str(w.message) for w in caught))
    state, n = sgs.state_dict(), gr.pair_ranges(batches[0], TAPS, padding=1)[1]
    assert state["steps"] == 2
    assert torch.equal(state["ranges"]["conv"][1], n * (1 if math.isnan(scale) else 2))
    assert torch.equal(sgs.scalings["conv"], torch.ones(3, 3)) == math.isnan(scale)
    assert warned == [False, False, math.isnan(scale)]


def test_removed_between_forward_and_step_nothing_gathered_stays():
    model, batches = small_model(), make_batches()
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, batches)
    gc.collect()
    before, references = live_tensors(), [sys.getrefcount(model[0])]
    model(batches[0])
    gathered = live_tensors() - before
    references.append(sys.getrefcount(model[0]))
    sgs.remove()
    left = live_tensors() & gathered
    references.append(sys.getrefcount(model[0]))
    assert len(gathered) == 8  # ends and counts of three layers, and the memory of both
    assert not left
    assert references[1] == references[0] + 1  # it is remembered as called
    assert references[2] <= references[0]


def test_update_if_due_pauses_the_updates_during_warmup():
    model, batches = small_model(), make_batches(2)
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1, warmup=1)
    assert sgs.update_if_due(0, None) is False
    train(model, optimizer, batches)
    assert torch.equal(sgs.scalings["0"], torch.ones(3, 3))
    assert sgs.update_if_due(1, None) is False
    train(model, optimizer, batches)
    assert not torch.equal(sgs.scalings["0"], torch.ones(3, 3))


class Still(WithScaling):
    """Takes no step, as under a GradScaler that found an overflow."""

    def step(self, closure=None):
        pass


def test_a_diverging_step_warns_and_keeps_everything():
    model, batches = small_model(), make_batches(3)
    optimizer = Still(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, batches[:2])
    before = sgs.scalings
    with pytest.warns(RuntimeWarning, match="0, 3, 6"):
        train(model, optimizer, [batches[0] * math.nan])
    assert_same(sgs.scalings, before)
    model[1].reset_running_stats()
    model[4].reset_running_stats()
    train(model, optimizer, batches[2:])
    assert not torch.equal(sgs.scalings["0"], before["0"])


def test_copies_and_pickles_of_the_model_carry_no_controller():
    model = small_model()
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.optim.swa_utils.AveragedModel(model).module]
    gc.collect()
    before = live_tensors()
    for twin in twins:
        twin(make_batches()[0] * 100)
    assert not live_tensors() - before
    for twin in twins:
        assert all(hook.updates is None for module in twin.modules() for hook in module._forward_pre_hooks.values())
    sgs.remove()
    assert all_hooks(model) == 0


def test_models_that_were_pickled_before_the_hook_moved_can_be_loaded():
    hook = pickle.loads(b"cgradrep_kernels.sgs.controller\n_Watch\n(NNtR.")
    conv = nn.Conv2d(1, 1, 3)
    conv.register_forward_pre_hook(hook, with_kwargs=True)
    assert conv(torch.ones(1, 1, 3, 3)).shape == (1, 1, 1, 1)


def test_a_due_step_without_a_convolution_to_scale():
    model = nn.Conv2d(1, 1, 1)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="found no convolution to scale"):
        sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, [torch.ones(1, 1, 4, 4)])
    assert sgs.state_dict()["steps"] == 1


@pytest.mark.parametrize("option", ["k", "remove_near", "every_steps"])
def test_options_can_be_changed_between_updates(option):
    def run(before, after):
        model = Named()
        optimizer = WithScaling(model.parameters(), lr=0.01)
        sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1, **before)
        train(model, optimizer, make_batches(1))
        for name, value in after.items():
            assert getattr(sgs, name) != value
            setattr(sgs, name, value)
        train(model, optimizer, make_batches(1))
        return sgs.scalings["conv"]

    changed = {"k": 2.0, "remove_near": True, "every_steps": None}[option]
    assert not torch.equal(run({}, {option: changed}), run({}, {}))


@pytest.mark.filterwarnings("ignore")
def test_watching_goes_on_after_a_model_is_prepared_for_quantization():
    """torch.ao moves the hook to the module that it puts in, as one without keyword arguments."""
    import torch.ao.quantization as tq

    torch.manual_seed(0)
    model = tq.QuantWrapper(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    average = copy.deepcopy(model)  # carries idle hooks
    for each in (model, average):
        tq.prepare_qat(each.train(), inplace=True)
    for batch in make_batches(3):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        average(batch)
    assert all(bool((g != 1).any()) for g in sgs.scalings.values())
