"""The history of G, and the line that tells how far a controller is."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from files import through_a_file
from sgs_controllers import assert_same, controller, make_batches, small_model, train

import gradrep_kernels as gr
from gradrep_kernels.sgs.history import MOST, History

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_history(a, b):
    assert [entry[:3] for entry in a] == [entry[:3] for entry in b]
    for one, other in zip(a, b, strict=True):
        assert_same(one.scalings, other.scalings)


def test_each_update_is_there_with_its_epoch():
    model, batches = small_model(), make_batches()
    sgs = controller(model, every=2)
    assert sgs.history == []
    seen = []
    for epoch in range(5):
        if sgs.update_if_due(epoch, batches):
            seen.append(sgs.scalings)
        train(model, sgs.optimizer, batches)
    assert [entry[:3] for entry in sgs.history] == [(1, 1, None), (2, 2, None), (3, 4, None)]
    for entry, scalings in zip(sgs.history, seen, strict=True):
        assert_same(entry.scalings, scalings)
    assert not torch.equal(seen[0]["3"], seen[2]["3"])
    assert all(bool((g > 0).all()) for g in sgs.history[0].scalings.values())
    sgs.history[0].scalings["3"].zero_()
    assert bool((sgs.history[0].scalings["3"] > 0).all()), "they are copies"


def test_an_update_of_the_callers_own_has_no_epoch():
    sgs = controller(small_model())
    sgs.update(make_batches())
    assert [entry[:3] for entry in sgs.history] == [(1, None, None)]


def test_an_update_that_learns_nothing_is_none():
    sgs = controller(small_model())
    with pytest.warns(RuntimeWarning, match="not finite"):
        sgs.update([torch.full((4, 2, 12, 12), float("nan"))] * 2)
    assert sgs.history == []


def test_updates_of_steps_say_in_which_step_they_were():
    model, batches = small_model(), make_batches()
    sgs = controller(model, every_steps=2)
    sgs.update_if_due(4, batches)
    for n in range(6):
        train(model, sgs.optimizer, batches[n % 2 : n % 2 + 1])
    # The first update, in step 2, only finds ranges.
    assert [entry[:3] for entry in sgs.history] == [(1, 4, 4), (2, 4, 6)]
    assert_same(sgs.history[-1].scalings, sgs.scalings)


def test_a_layer_that_joins_had_ones():
    model, batches = small_model(), make_batches()
    last = model[6].weight
    optimizer = gr.FusedRepSGD([p for p in model.parameters() if p is not last], lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(batches)
    optimizer.add_param_group({"params": [last]})
    sgs.update(batches)
    first, second = sgs.history
    assert first.scalings.keys() == second.scalings.keys() == {"0", "3", "6"}
    assert bool((first.scalings["6"] == 1).all())
    assert not bool((second.scalings["6"] == 1).all())
    assert_same_history(sgs.history, through_state(sgs).history)


def through_state(sgs):
    restored = controller(small_model(seed=5))
    restored.load_state_dict(through_a_file(sgs.state_dict()))
    return restored


@pytest.mark.parametrize("updates", [1, MOST - 1, MOST, 1000, 100_000])
def test_it_stays_small(updates):
    history = History()
    for n in range(updates):
        history.add(n, None, {"a": torch.empty(0)} if updates > 5000 else {"a": torch.full((1, 1), float(n))})
    entries = history.entries()
    numbers = [entry.number for entry in entries]
    assert numbers[0] == 1
    assert numbers[-1] == history.updates == updates
    assert len(entries) <= MOST
    assert [entry.epoch for entry in entries] == [number - 1 for number in numbers]
    gaps = {b - a for a, b in itertools.pairwise(numbers[:-1])}
    assert len(gaps) <= 1  # at equal distances, but for the last
    if updates < MOST:
        assert numbers == list(range(1, updates + 1))
    else:
        assert len(entries) >= MOST // 2
    again = History.of_state(history.state())
    assert [entry.number for entry in again.entries()] == numbers


def test_a_restored_history_is_thinned_on_as_if_it_had_not_been_interrupted():
    whole, resumed = History(), History()
    for n in range(700):
        if n in (130, 131, 400):
            resumed = History.of_state(resumed.state())
        for history in (whole, resumed):
            history.add(None, n, {"a": torch.full((1, 1), float(n))})
    assert [e.number for e in resumed.entries()] == [e.number for e in whole.entries()]
    assert all(float(e.scalings["a"]) == e.step == e.number - 1 for e in resumed.entries())


def test_the_state_has_it_and_a_state_without_it_loads():
    model, batches = small_model(), make_batches()
    sgs = controller(model)
    for epoch in (1, 5):
        sgs.update_if_due(epoch, batches)
        train(model, sgs.optimizer, batches)
    restored = through_state(sgs)
    assert len(restored.history) == 2
    assert_same_history(restored.history, sgs.history)
    assert repr(restored) == repr(sgs)
    old = {key: value for key, value in sgs.state_dict().items() if key not in ("history", "epoch")}
    restored.load_state_dict(old)
    assert restored.history == []
    assert_same(restored.scalings, sgs.scalings)


def drop(key):
    return lambda history: history.pop(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("scalings"), "history must be what"),
        (drop("epochs"), "history must hold lists"),
        (lambda h: h["numbers"].append(9), "of one length"),
        (lambda h: h.update(stride=0), "must be ints"),
        (lambda h: h.update(epochs=["1"]), "must be ints"),
        (lambda h: h["scalings"].update(other=torch.ones(1, 3, 3)), "unexpected other"),
        (lambda h: h["scalings"].update({"0": torch.ones(3, 3)}), r"history: 0 must be \[1, 3, 3\], got \[3, 3\]"),
    ],
)
def test_a_spoiled_history_changes_nothing(spoil, message):
    sgs = controller(small_model())
    sgs.update_if_due(1, make_batches())
    state = copy.deepcopy(sgs.state_dict())
    spoil(state["history"])
    other = controller(small_model(seed=5))
    before = other.scalings
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.history == []
    assert_same(other.scalings, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_it_and_go_on_by_themselves(duplicate):
    model, batches = small_model(), make_batches()
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update_if_due(1, batches)
    _, _, other = duplicate((model, optimizer, sgs))
    assert_same_history(other.history, sgs.history)
    other.update_if_due(5, batches)
    assert [len(s.history) for s in (sgs, other)] == [1, 2]


# ---- repr


def test_repr_tells_how_far_it_is():
    model, batches = small_model(), make_batches()
    sgs = controller(model, every=4, warmup=2)
    assert repr(sgs).startswith("SpatialGradientScaling(3 layers, ")
    assert repr(sgs).endswith("skipped, no update yet, next at epoch 2)")
    for epoch, due in ((0, 2), (1, 2), (2, 4), (3, 4), (4, 8)):
        sgs.update_if_due(epoch, batches)
        assert repr(sgs).endswith(f"next at epoch {due})")
    least = min(float(g.min()) for g in sgs.scalings.values())
    greatest = max(float(g.max()) for g in sgs.scalings.values())
    assert f", 2 updates, G from {least:.3g} to {greatest:.3g}, " in repr(sgs)
    sgs.remove()
    assert repr(sgs).endswith("removed)")


def test_repr_with_updates_of_steps_or_by_the_caller():
    model, batches = small_model(), make_batches()
    sgs = controller(model, every_steps=2)
    for n, due in enumerate((2, 2, 4, 4, 6)):
        assert repr(sgs).endswith(f"next at step {due})")
        train(model, sgs.optimizer, batches[n % 2 : n % 2 + 1])
    sgs.update_if_due(0, batches)
    assert repr(sgs).endswith("paused up to epoch 1)")
    sgs.remove()
    own = controller(small_model())
    own.update(batches)
    assert "1 update, G from" in repr(own)
    assert "next" not in repr(own)


def test_repr_never_raises():
    assert repr(gr.SpatialGradientScaling.__new__(gr.SpatialGradientScaling)) == "SpatialGradientScaling(not whole)"
    sgs = controller(small_model())
    sgs.every = 0  # a mistake that repr must not hide behind another
    sgs.update_if_due(0, [])
    assert repr(sgs).startswith("SpatialGradientScaling(")
