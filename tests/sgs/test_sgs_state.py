"""state_dict and load_state_dict."""

import copy
import math
import warnings

import pytest
import torch
from files import through_a_file
from sgs_controllers import WithScaling, assert_same, controller, make_batches, small_model, train
from torch import nn

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


def test_state_dict_restores_the_scalings_and_tells_the_optimizer():
    model, batches = small_model(), make_batches()
    sgs = controller(model)
    sgs.update(batches)
    other = small_model(seed=9)
    optimizer = WithScaling(other.parameters(), lr=0.1)
    restored = gr.SpatialGradientScaling(other, optimizer)
    restored.load_state_dict(through_a_file(sgs.state_dict()))
    assert_same(restored.scalings, sgs.scalings)
    assert_same({n: g for n, (_, g) in zip(("0", "3", "6"), optimizer.told)}, sgs.scalings)
    optimizer.told.clear()
    restored.load_state_dict(
        controller(small_model()).state_dict()
    )  # before any update: ones, which need no multiplication
    assert [g for _, g in optimizer.told] == [None] * 3


def test_the_state_is_a_copy():
    model = small_model()
    sgs = controller(model)
    sgs.update(make_batches())
    before = sgs.scalings
    sgs.state_dict()["scalings"]["0"].zero_()
    sgs.scalings["0"].zero_()
    state = sgs.state_dict()
    sgs.load_state_dict(state)
    state["scalings"]["0"].zero_()
    assert_same(sgs.scalings, before)


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("kind", [WithScaling, torch.optim.SGD])
def test_a_run_that_updates_every_n_steps_resumes_exactly(stop, kind):
    class Applied(kind):  # WithScaling only listens; scale here what it was told
        def step(self, closure=None):
            told = {id(p): g for p, g in getattr(self, "told", []) if g is not None}
            for p in self.param_groups[0]["params"]:
                if id(p) in told:
                    p.grad.mul_(told[id(p)])
            return super().step(closure)

    batches = make_batches(8)

    def start(model):
        optimizer = Applied(model.parameters(), lr=0.01, momentum=0.9)
        return optimizer, gr.SpatialGradientScaling(model, optimizer, every_steps=2)

    model = small_model().eval()
    for module in model:
        module.training = isinstance(module, nn.Conv2d)  # no dropout
    optimizer, sgs = start(model)
    train(model, optimizer, batches[:stop])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sgs": sgs.state_dict()})
    train(model, optimizer, batches[stop:])
    other = copy.deepcopy(small_model())
    for module in other:
        module.training = isinstance(module, nn.Conv2d)
    optimizer, resumed = start(other)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["sgs"])
    train(other, optimizer, batches[stop:])
    assert_same(resumed.scalings, sgs.scalings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), "it has no 'scalings'"),
        (lambda s: s["scalings"].pop("3"), "missing 3"),
        (lambda s: s["scalings"].update({"stem": torch.ones(3, 3)}), "unexpected stem"),
        (lambda s: s["scalings"].update({"3": torch.ones(3, 3)}), r"scalings: 3 must be \[3, 5\], got \[3, 3\]"),
        (lambda s: s["scalings"].update({"0": -torch.ones(3, 3)}), r"0 must be finite and not negative, got \[\[-1"),
        (lambda s: s["scalings"].update({"0": torch.full((3, 3), math.nan)}), "0 must be finite"),
        (lambda s: s["scalings"].update({"0": [[1.0] * 3] * 3}), "scalings: 0 must be a Tensor, got list"),
        (
            lambda s: s["scalings"].update({"0": torch.ones(3, 3, dtype=torch.int64)}),
            "scalings: 0 must be floating point, got torch.int64",
        ),
        (lambda s: s["scalings"].update({7: torch.ones(3, 3), "stem": torch.ones(3, 3)}), "unexpected 7, stem"),
        (lambda s: s.update(ranges=3), "ranges must be a dict by layer, got int"),
        (lambda s: s["ranges"].update(stem=s["ranges"]["0"]), "ranges do not fit the model: unexpected stem"),
        (
            lambda s: s["ranges"].update({"0": torch.zeros(2, 4, 2, 2)}),
            r"ranges: 0 must be a pair \(ranges, n\), got Tensor",
        ),
        (
            lambda s: s["ranges"].update({"0": (torch.zeros(2, 4, 2), s["ranges"]["0"][1])}),
            r"ranges: 0 must be \[2, 4, 2, 2\], got \[2, 4, 2\]",
        ),
        (
            lambda s: s["ranges"].update({"0": (s["ranges"]["0"][0].long(), s["ranges"]["0"][1])}),
            "ranges: 0 must be floating point, got torch.int64",
        ),
        (
            lambda s: s["ranges"].update({"0": (s["ranges"]["0"][0], torch.ones(5, 4))}),
            r"ranges: n of 0 must be \[2, 4\], got \[5, 4\]",
        ),
        (
            lambda s: s["ranges"].update({"0": (s["ranges"]["0"][0], torch.ones(2, 4))}),
            "ranges: n of 0 must be int64, got torch.float32",
        ),
        (
            lambda s: s["ranges"].update({"6": (s["ranges"]["6"][0], -s["ranges"]["6"][1])}),
            "ranges: n of 6 must not be negative",
        ),
        (lambda s: s.update(steps=None), "steps must be an int, 0 or more, and paused a bool, got None and False"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model, other_model = small_model(), small_model()
    sgs, other = controller(model, every_steps=1), controller(other_model, every_steps=2)
    train(model, sgs.optimizer, make_batches())
    train(other_model, other.optimizer, make_batches(4, seed=2))
    before, state = sgs.state_dict(), other.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        sgs.load_state_dict(state)
    after = sgs.state_dict()
    assert_same(after["scalings"], before["scalings"])
    assert (after["steps"], after["paused"]) == (before["steps"], before["paused"])
    for part in (0, 1):
        assert_same(*({name: pair[part] for name, pair in found["ranges"].items()} for found in (after, before)))


@pytest.mark.parametrize("state", [None, 3, [("scalings", {})]])
def test_a_state_that_is_no_dict(state):
    with pytest.raises(ValueError, match="state_dict must be what state_dict"):
        controller(small_model()).load_state_dict(state)


# -- a resumed run whose controller was forgotten ----------------------------------------------------------------------


def resumed(**options):
    """A model, an optimizer with momenta and a new controller, as after a restart."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, make_batches())
    return model, optimizer, gr.SpatialGradientScaling(model, optimizer, batches=2, **options)


def warned(sgs, *epochs, batches=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in epochs:
            sgs.update_if_due(epoch, batches)
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("options", "epoch", "until"), [({}, 2, 5), ({}, 7, 10), ({"every": 4, "warmup": 6}, 9, 12), ({"warmup": 0}, 1, 5)]
)
def test_a_forgotten_state_is_told_once(options, epoch, until):
    _, _, sgs = resumed(**options)
    (message,) = warned(sgs, epoch, epoch, epoch)
    assert message == (
        f"scalings were neither learned nor loaded, though epoch {epoch} is past the warm-up ({sgs.warmup}). "
        f"Convolutions train unscaled until epoch {until}. A resumed run must load the controller's state_dict too"
    )
    assert sgs.update_if_due(until, make_batches())


def test_a_forgotten_state_of_every_steps_is_told_once():
    _, _, sgs = resumed(every_steps=2)
    assert warned(sgs, 0, 1) == []
    (message,) = warned(sgs, 4, 5)
    assert "epoch 4 is past the warm-up (1). Convolutions train unscaled until the updates of its steps" in message
    _, _, sgs = resumed(every_steps=2)
    sgs.load_state_dict(controller(small_model(), every_steps=2).state_dict())
    assert warned(sgs, 4) == []
    model, optimizer, sgs = resumed(every_steps=2)
    train(model, optimizer, make_batches(1))  # the step counts, even though it was not due
    assert warned(sgs, 4) == []
    assert warned(controller(small_model(), every_steps=2, warmup=0), 1) == []  # a fresh run that counts from 1


@pytest.mark.filterwarnings("ignore:SpatialGradientScaling found no convolution")
def test_an_update_that_found_no_layer_was_not_forgotten():
    """As of a model whose convolutions are frozen when the first update is due."""
    model = small_model()
    head = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.01, momentum=0.9)
    head.state[head.param_groups[0]["params"][0]]["momentum_buffer"] = torch.ones(2)
    sgs = gr.SpatialGradientScaling(model, head)
    assert sgs.update_if_due(1, make_batches())
    head.add_param_group({"params": list(model.parameters())})
    assert warned(sgs, 2) == []
    assert len(sgs.scalings) == 3


@pytest.mark.parametrize("why", ["fresh optimizer", "during the warm-up", "learned", "loaded", "loaded ones", "due"])
def test_nothing_is_told_where_nothing_was_forgotten(why):
    _, optimizer, sgs = resumed(warmup=3)
    if why == "fresh optimizer":
        optimizer.state.clear()
    elif why == "learned":
        sgs.update(make_batches())
    elif why.startswith("loaded"):
        other = controller(small_model())
        if why == "loaded":
            other.update(make_batches())
        sgs.load_state_dict(through_a_file(other.state_dict()))
    elif why == "due":
        assert warned(sgs, 5, batches=make_batches()) == []
    assert warned(sgs, *((0, 1, 2) if why == "during the warm-up" else (4, 6))) == []


def test_a_whole_run_tells_nothing():
    model, batches = small_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    sgs = gr.SpatialGradientScaling(model, optimizer, batches=2)
    for epoch in range(7):
        assert warned(sgs, epoch, batches=batches) == []
        train(model, optimizer, batches)
    assert warned(copy.deepcopy(sgs), 8) == []
