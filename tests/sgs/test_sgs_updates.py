"""Updates from batches of a loader: which scalings they learn, from which batches, and when."""

import math
import warnings

import numpy as np
import pytest
import torch
from sgs_controllers import (
    TAPS,
    Named,
    all_hooks,
    assert_same,
    controller,
    make_batches,
    maps_of,
    scaling_of,
    sgd,
    small_model,
    sturges_bins,
)
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [{}, {"remove_near": True}, {"k": 2.0}])
def test_each_layer_gets_the_scaling_of_its_maps(options):
    model, batches = small_model(), make_batches()
    sgs = controller(model, **options)
    assert list(sgs.scalings) == ["0", "3", "6"]
    assert all(torch.equal(g, torch.ones_like(g)) for g in sgs.scalings.values())
    sgs.update(batches)
    maps = {name: torch.cat(pieces) for name, pieces in maps_of(model, batches).items()}
    expected = {
        "0": gr.spatial_gradient_scaling(maps["0"], 3, padding=1, **options),
        "3": gr.spatial_gradient_scaling(maps["3"], (3, 5), padding=(0, 2), **options),
        "6": gr.spatial_gradient_scaling(maps["6"], 3, padding=2, dilation=2, **options),
    }
    assert_same(sgs.scalings, expected)
    assert sgs.scalings["3"].shape == (3, 5)
    assert sgs.scalings["0"].dtype == torch.float32


def test_only_as_many_batches_as_asked_are_drawn():
    model, batches = small_model(), make_batches(4)
    drawn = []

    def loader():
        for batch in batches:
            drawn.append(len(batch))
            yield batch

    sgs = controller(model, batches=3)
    sgs.update(loader())
    assert len(drawn) == 3
    expected = controller(model, batches=3)
    expected.update(batches[:3])
    assert_same(sgs.scalings, expected.scalings)


def test_autocorrelation():
    model, batches = small_model(), make_batches()
    sgs = controller(model, dependence="autocorrelation")
    sgs.update(batches)
    x = F.pad(torch.cat(batches).double(), (1, 1, 1, 1)).numpy()
    s = np.ones((3, 3))
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            p = x[:, :, max(0, -i) : x.shape[2] - max(0, i), max(0, -j) : x.shape[3] - max(0, j)]
            q = x[:, :, max(0, i) : x.shape[2] + min(0, i), max(0, j) : x.shape[3] + min(0, j)]
            r = np.abs([np.corrcoef(p[:, c].ravel(), q[:, c].ravel())[0, 1] for c in range(2)])
            s[i + 1, j + 1] = (5 * r / (4 * r + 1)).mean()
    assert np.abs(sgs.scalings["0"].numpy() - s / s.mean()).max() < 1e-6


def test_a_convolution_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(input=self.conv(x) * 3)

    torch.manual_seed(0)
    model, (batch,) = Twice(), make_batches(1)
    sgs = controller(model, batches=1)
    sgs.update([batch])
    both = torch.cat([batch, model.conv(batch) * 3])
    assert_same(sgs.scalings, {"conv": gr.spatial_gradient_scaling(both, 3, padding=1)})


def test_tied_weights_pool_their_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=2, dilation=2))
    model[2].weight = model[0].weight
    (batch,) = make_batches(1)
    sgs = controller(model, batches=1)
    sgs.update([batch])
    assert torch.equal(sgs.scalings["0"], sgs.scalings["2"])
    first, second = batch, torch.tanh(model[0](batch)).detach()
    ranges, n = [], []
    maps = ((first, TAPS, 1), (second, [(2 * i, 2 * j) for i, j in TAPS], 2))
    for x, displacements, padding in maps:
        ends, pairs = gr.pair_ranges(x, displacements, padding=padding)
        ranges.append(ends)
        n.append(pairs)
    pooled = torch.stack((torch.minimum(*(r[..., 0] for r in ranges)), torch.maximum(*(r[..., 1] for r in ranges))), -1)
    bins = sturges_bins(sum(n))
    counts = sum(
        gr.joint_histogram(x, displacements, bins, padding=padding, ranges=pooled) for x, displacements, padding in maps
    )
    expected = scaling_of(gr.normalized_mutual_information(counts))
    assert torch.allclose(sgs.scalings["0"], expected, atol=1e-6)


def test_tied_weights_of_unlike_inputs_are_skipped():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3))
    model[1].weight = model[0].weight
    sgs = controller(model)
    assert list(sgs.scalings) == ["2"]
    assert all("shares its weight" in sgs.skipped[name] for name in ("0", "1"))


def test_an_unused_convolution_keeps_its_scaling():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
            self.both = False

        def forward(self, x):
            return self.used(x) + (self.unused(x.exp()) if self.both else 0)

    model = Branches()
    sgs = controller(model)
    sgs.update(make_batches())
    assert torch.equal(sgs.scalings["unused"], torch.ones(3, 3))
    model.both = True
    sgs.update(make_batches())
    before = sgs.scalings
    assert not torch.equal(before["unused"], torch.ones(3, 3))
    model.both = False
    sgs.update(make_batches(seed=5))
    assert torch.equal(sgs.scalings["unused"], before["unused"])
    assert not torch.equal(sgs.scalings["used"], before["used"])


def test_undefined_dependence_keeps_the_scaling():
    model = small_model()
    sgs = controller(model)
    sgs.update(make_batches())
    before = sgs.scalings
    sgs.update([torch.zeros(2, 2, 12, 12)] * 2)
    assert_same({"0": sgs.scalings["0"]}, {"0": before["0"]})


def test_skipped_says_why():
    model = nn.Sequential(
        *[nn.Conv2d(1, 1, kernel) for kernel in (1, (1, 3), (5, 1), 4, (3, 2), 3)],
        nn.ConvTranspose2d(1, 1, 3),
        nn.Conv1d(1, 1, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3)),
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(1, 1, 3, dtype=torch.complex64),
    )
    held = [p for name, p in model.named_parameters() if not name.startswith("9.")]
    sgs = gr.SpatialGradientScaling(model, torch.optim.SGD(held, lr=0.1))
    assert list(sgs.scalings) == ["5"]
    assert sgs.skipped == {
        "0": "1 x 1 kernel: both sides must be larger than 1",
        "1": "1 x 3 kernel: both sides must be larger than 1",
        "2": "5 x 1 kernel: both sides must be larger than 1",
        "3": "4 x 4 kernel: both sides must be odd",
        "4": "3 x 2 kernel: both sides must be odd",
        "8": "its weight is not a parameter that the optimizer holds",
        "9": "its weight is not a parameter that the optimizer holds",
        "10": "its weight is complex",
    }


def test_nothing_to_scale_is_said_aloud():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.warns(UserWarning, match="found no convolution to scale"):
        sgs = controller(model)
    sgs.update([])
    assert sgs.scalings == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("remove_near", [False, True])
def test_a_map_that_is_not_finite_keeps_the_scaling_and_warns_once(value, remove_near):
    model = small_model()
    sgs = controller(model, remove_near=remove_near)
    sgs.update(make_batches())
    before = sgs.scalings
    with torch.no_grad():
        model[1].running_mean[2] = -value  # the input of "3" and of all that follows it
    with pytest.warns(RuntimeWarning) as caught:
        sgs.update(make_batches(seed=7))
    assert len(caught) == 1
    assert "3, 6" in str(caught[0].message)
    assert not torch.equal(sgs.scalings["0"], before["0"])
    assert torch.equal(sgs.scalings["3"], before["3"])
    assert torch.equal(sgs.scalings["6"], before["6"])


# -- batches -----------------------------------------------------------------------------------------------------------


def test_fewer_batches_than_asked_warn():
    model, batches = small_model(), make_batches()
    sgs = controller(model, batches=5)
    with pytest.warns(UserWarning, match="asked for 5 batches, there were 2"):
        sgs.update(batches)
    expected = controller(model, batches=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected.update(batches)
    assert_same(sgs.scalings, expected.scalings)


def test_warnings_point_to_the_callers_line():
    """With a scheduler and the profiler's wrapper of torch between the caller of a step and the hooks."""
    model, linear, batches = small_model(), nn.Linear(2, 2), make_batches()
    sgs, stepping = controller(model, batches=3), controller(model, every_steps=1)
    torch.optim.lr_scheduler.StepLR(stepping.optimizer, 1)
    batches[1] = batches[1] * math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gr.SpatialGradientScaling(linear, sgd(linear))
        sgs.update(batches)
        sgs.update_if_due(1, batches)
        model(batches[1]).square().sum().backward()
        stepping.optimizer.step()
    assert [str(w.message).split()[0] for w in caught] == [
        "SpatialGradientScaling",
        "asked",
        "the",
        "asked",
        "the",
        "the",
    ]
    assert {w.filename for w in caught} == {__file__}


def test_no_batch_is_an_error_and_changes_nothing():
    model = small_model()
    sgs = controller(model)
    with pytest.raises(ValueError, match="batches is empty"):
        sgs.update([])
    assert model.training
    assert all_hooks(model) == 0
    assert torch.equal(sgs.scalings["0"], torch.ones(3, 3))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "forward"])
def test_forms_of_batches(form):
    model, batches = Named(), make_batches()
    sgs, expected, forward = controller(model), controller(model), None
    expected.update([2 * b if form in ("dict", "forward") else b for b in batches])
    if form == "tuple":
        batches = [(b, torch.zeros(5), "a target") for b in batches]
    if form == "list":
        batches = [[b, None] for b in batches]
    if form == "dict":
        batches = [{"image": b, "gain": 2.0} for b in batches]
    if form == "forward":
        batches = [("x", {"inner": b}) for b in batches]

        def forward(model, batch):
            return model(batch[1]["inner"], gain=2.0)

    sgs.update(batches, forward)
    assert_same(sgs.scalings, expected.scalings)


def test_a_batch_of_another_kind():
    sgs = controller(small_model())
    with pytest.raises(TypeError, match=r"a batch must be a Tensor, .* got str .*forward="):
        sgs.update(["image.png"])


def test_a_model_that_writes_into_its_input():
    class InPlace(Named):
        def forward(self, image):
            return self.conv(image.sub_(0.5).mul_(image.abs()))

    model, batches = InPlace(), make_batches()
    before = [b.clone() for b in batches]
    sgs = controller(model)
    sgs.update(batches)
    assert all(torch.equal(a, b) for a, b in zip(batches, before))
    maps = torch.cat([(b - 0.5) * (b - 0.5).abs() for b in batches])
    assert_same(sgs.scalings, {"conv": gr.spatial_gradient_scaling(maps, 3, padding=1)})


def test_a_single_image_without_batch_dimension():
    model, (batch,) = Named(), make_batches(1)
    sgs = controller(model, batches=1)
    sgs.update([batch[0]])
    assert_same(sgs.scalings, {"conv": gr.spatial_gradient_scaling(batch[:1], 3, padding=1)})


# -- cadence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "warmup", "due"),
    [
        (5, 1, [1, 5, 10, 15]),
        (1, 0, list(range(17))),
        (30, 1, [1]),
        (4, 6, [6, 8, 12, 16]),
        (3, 3, [3, 6, 9, 12, 15]),
        (5, 0, [0, 5, 10, 15]),
    ],
)
def test_cadence(every, warmup, due):
    sgs = controller(Named(), every=every, warmup=warmup, batches=1)
    batches = make_batches(1)
    assert [epoch for epoch in range(17) if sgs.update_if_due(epoch, batches)] == due
    assert sgs.update_if_due(due[0], batches) is True
    if 0 not in due:
        assert sgs.update_if_due(0, None) is False  # the loader is not touched


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(k=0), ValueError, "k must be positive and finite"),
        (dict(every=0), ValueError, "every must be an int, 1 or more, got 0"),
        (dict(warmup=-1), ValueError, "warmup must be an int, 0 or more"),
        (dict(batches=0), ValueError, "batches must be an int, 1 or more"),
        (dict(batches=1.5), ValueError, "batches must be an int"),
        (dict(every=True), ValueError, "every must be an int, 1 or more, got True"),
        (dict(every_steps=0), ValueError, "every_steps must be an int, 1 or more"),
        (dict(dependence="entropy"), ValueError, "dependence must be one of nmi, autocorrelation, got 'entropy'"),
        (dict(apply_to="weights"), ValueError, "apply_to must be one of gradient, update"),
        (dict(model="vgg"), TypeError, "model must be a torch.nn.Module, got str"),
        (
            dict(process_group="gloo"),
            TypeError,
            "process_group must be a torch.distributed.ProcessGroup or None, got str",
        ),
        (dict(optimizer=None), TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
    ],
)
def test_wrong_arguments(options, error, message):
    model = small_model()
    arguments = {"model": model, "optimizer": sgd(model), **options}
    with pytest.raises(error, match=message):
        gr.SpatialGradientScaling(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
