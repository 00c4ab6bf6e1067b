"""SpatialGradientScaling: when it learns, from what, and what it leaves behind."""

import copy
import gc
import io
import logging
import math
import pickle
import random
import sys
import warnings
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.sgs.ranks import Ranks


@pytest.fixture(autouse=True)
def one_thread():
    """Maps of a few hundred pixels: on a busy machine, threads that wait for each other take 50 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (3, 5), padding=(0, 2), groups=2),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def make_batches(number=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [F.avg_pool2d(torch.randn(5, 2, 14, 13, generator=generator), 3, 1) for _ in range(number)]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def controller(model, **options):
    return gr.SpatialGradientScaling(model, sgd(model), **options)


def maps_of(model, batches):
    """The input maps of each convolution, in eval mode, batch by batch."""
    maps, handles = {}, []
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            handles.append(
                conv.register_forward_pre_hook(lambda _, args, name=name: maps.setdefault(name, []).append(args[0]))
            )
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train()
    for handle in handles:
        handle.remove()
    return maps


def all_hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def live_tensors():
    """The ids of all tensors that Python code holds."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# -- what it learns ----------------------------------------------------------------------------------------------------


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
    ranges, counts, n = [], [], []
    taps = [(0, 1), (1, -1), (1, 0), (1, 1)]
    maps = ((first, taps, 1), (second, [(2 * i, 2 * j) for i, j in taps], 2))
    for x, displacements, padding in maps:
        ends, pairs = gr.pair_ranges(x, displacements, padding=padding)
        ranges.append(ends)
        n.append(pairs)
    pooled = torch.stack((torch.minimum(*(r[..., 0] for r in ranges)), torch.maximum(*(r[..., 1] for r in ranges))), -1)
    bins = torch.tensor([[1 + (int(v) - 1).bit_length() for v in row] for row in sum(n)])
    counts = sum(
        gr.joint_histogram(x, displacements, bins, padding=padding, ranges=pooled) for x, displacements, padding in maps
    )
    nmi = gr.normalized_mutual_information(counts)
    s = torch.ones(9, dtype=torch.float64)
    s[5:] = (5 * nmi / (4 * nmi + 1)).mean(0)
    s[:4] = s[5:].flip(0)
    assert torch.allclose(sgs.scalings["0"], (s / s.mean()).float().view(3, 3), atol=1e-6)


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
    model, batches = small_model(), make_batches()
    sgs, stepping = controller(model, batches=3), controller(model, every_steps=1)
    torch.optim.lr_scheduler.StepLR(stepping.optimizer, 1)
    batches[1] = batches[1] * math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller(nn.Linear(2, 2))
        sgs.update(batches)
        sgs.update_if_due(1, batches)
        train(model, stepping.optimizer, batches[1:])
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


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, image, gain=1.0):
        return self.conv(image * gain)


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


# -- what it leaves behind ---------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Random, stateful in eval mode too, and able to fail."""

    def __init__(self):
        super().__init__()
        self.body = small_model()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("nothing", None)
        self.calls, self.fail_at = 0, None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the model fails")
        self.body[5].training = True  # as some do by hand: dropout draws random numbers
        self.seen[0] += 1
        self.seen = self.seen + 1  # replaced, not written
        self.body[1].train()  # the norm then updates its running statistics
        random.random()
        np.random.rand()
        torch.rand(1)
        return self.body(x)


def everything(model, generator):
    return [
        [module.training for module in model.modules()],
        all_hooks(model),
        [(name, id(b), b.clone(), b.data_ptr()) for name, b in model.named_buffers()],
        [(p.clone(), p.grad, p.requires_grad) for p in model.parameters()],
        torch.get_rng_state(),
        generator.get_state(),
        random.getstate(),
        str(np.random.get_state()),
        torch.is_grad_enabled(),
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a is b or a == b


@pytest.mark.parametrize("fail_at", [None, 1, 2, 3, 4, "draw"])
def test_all_is_as_before(fail_at):
    """Calls 1 and 2 are the first pass, 3 and 4 the second."""
    model = Fragile()
    model.body[4].eval()  # one norm is frozen
    generator = torch.Generator().manual_seed(3)
    images = torch.cat(make_batches(4))
    failing = fail_at == "draw"
    dataset = [image if i < 7 or not failing else None for i, image in enumerate(images)]  # None cannot be collated
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, generator=generator)
    sgs = gr.SpatialGradientScaling(model, sgd(model))
    model.fail_at = None if failing else fail_at
    before = everything(model, generator)
    if fail_at is None:
        sgs.update(loader)
        assert model.calls == 4
        assert not torch.equal(sgs.scalings["body.0"], torch.ones(3, 3))
    else:
        with pytest.raises(TypeError if failing else RuntimeError, match="NoneType" if failing else "the model fails"):
            sgs.update(loader)
        assert all(torch.equal(g, torch.ones_like(g)) for g in sgs.scalings.values())
    after = everything(model, generator)
    for was, now in zip(before, after):
        assert same(was, now)


class Buckets(torch.utils.data.Sampler):
    """Batches in an order of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        yield from (torch.randperm(4, generator=self.generator)[:, None] * 5 + torch.arange(5)).tolist()


@pytest.mark.parametrize("where", ["loader", "sampler", "batch_sampler", "batch_sampler.sampler"])
def test_the_generators_of_a_loader_are_as_before(where):
    data, generator = torch.utils.data, torch.Generator().manual_seed(3)
    images = torch.cat(make_batches(4))
    loader = {
        "loader": lambda: data.DataLoader(images, 5, shuffle=True, generator=generator),
        "sampler": lambda: data.DataLoader(images, 5, sampler=data.RandomSampler(images, generator=generator)),
        "batch_sampler": lambda: data.DataLoader(images, batch_sampler=Buckets(generator)),
        "batch_sampler.sampler": lambda: data.DataLoader(
            images, batch_sampler=data.BatchSampler(data.RandomSampler(images, generator=generator), 5, False)
        ),
    }[where]()
    before = generator.get_state()
    controller(small_model()).update(loader)
    assert torch.equal(generator.get_state(), before)
    next(iter(loader))
    assert not torch.equal(generator.get_state(), before)


def test_overridden_train_and_eval_are_not_called():
    class Merging(Named):
        def train(self, mode=True):
            raise AssertionError("merges weights")

    sgs = controller(Merging())
    sgs.update(make_batches())


def test_one_map_at_a_time():
    """The maps of a batch are gone when the next batch comes, and nothing holds one at the end."""
    model, alive = small_model(), []

    def watch(conv, args):
        if conv is model[0]:
            assert not any(ref() is not None for ref in alive[:-1])
        alive.append(weakref.ref(args[0]))

    for module in model:
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(watch)
    sgs = controller(model, batches=3)
    sgs.update(make_batches(3))
    assert len(alive) == 2 * 3 * 4
    assert not any(ref() is not None for ref in alive)


class Tap(nn.Conv2d):
    """Computes nothing, so all that an update allocates is the update's."""

    def forward(self, x):
        return None


class Played(nn.Module):
    def __init__(self, x, kernel):
        super().__init__()
        self.conv, self.x = Tap(x.shape[1], 1, kernel, padding=kernel // 2), x

    def forward(self, n):
        self.conv(self.x)


MEMORY = {  # from small maps to large ones: the peak of a process never falls. Few channels, so the tables are small
    "bf16, in autocast": (torch.bfloat16, torch.contiguous_format),
    "bf16, channels_last, in autocast": (torch.bfloat16, torch.channels_last),
    "contiguous": (torch.float32, torch.contiguous_format),
    "channels_last": (torch.float32, torch.channels_last),
}


def status_bytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def measure_memory(_, path):
    torch.set_num_threads(2)
    found = {}

    def update(images, dtype, memory_format, kernel, remove_near):
        gc.collect()  # the controller before, and its map
        x = torch.empty(images, 4, 256, 256, dtype=dtype, memory_format=memory_format).copy_(
            torch.randn(1, 4, 256, 256).relu_()
        )
        sgs = controller(Played(x, kernel), remove_near=remove_near)
        before = status_bytes("VmRSS")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            sgs.update(range(2), lambda model, n: model(n))
        return (status_bytes("VmHWM") - before) / x.nbytes

    for images in (1, 72):  # the first warms up
        for desc, form in MEMORY.items():
            for kernel, remove_near in ((5, False), (3, True)):
                found[desc, kernel, remove_near] = update(images, *form, kernel, remove_near)
    torch.save(found, path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(any(row["serves"] != "cpp" for row in backends.report(("cpu",))), reason="a promise of the kernels")
def test_an_update_takes_less_memory_than_the_largest_map(tmp_path):
    """Peak of a process over what it held before, in maps of 75 (bf16: 38) MB, which malloc maps and unmaps: up to 0.08.

    One padded copy would be 1, a map widened to float32 2.
    """
    mp.spawn(measure_memory, args=(tmp_path / "found",))
    found = torch.load(tmp_path / "found")
    assert len(found) == 2 * len(MEMORY)
    assert all(extra < 0.5 for extra in found.values()), found


def test_no_autograd():
    seen = []

    class Probe(Named):
        def forward(self, image):
            y = super().forward(image)
            seen.append((torch.is_grad_enabled(), y.requires_grad, self.training))
            return y

    sgs = controller(Probe())
    sgs.update(make_batches())
    assert seen == [(False, False, False)] * 4


def test_inside_autocast():
    """Maps are what the convolutions are given: bf16 from one to another, float32 images although the first one casts them inside.

    And casts of weights that were cached without autograd do not lose the gradients (pytorch #112583).
    """
    model, batches = small_model(), make_batches()
    sgs = controller(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = {piece.dtype for piece in maps_of(model, batches)["6"]}
        torch.clear_autocast_cache()
        sgs.update(batches)
        maps = torch.cat(maps_of(model, batches)["6"])
        torch.clear_autocast_cache()
        sgs.update(batches)
        model(batches[0]).sum().backward()
    assert dtypes == {torch.bfloat16}
    assert torch.equal(sgs.scalings["0"], gr.spatial_gradient_scaling(torch.cat(batches), 3, padding=1))
    assert torch.equal(sgs.scalings["6"], gr.spatial_gradient_scaling(maps, 3, padding=2, dilation=2))
    assert all(p.grad is not None for p in model.parameters())


# -- wrapped models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_and_results_under_wrappers(one_process):
    batches = make_batches()
    expected = controller(small_model())
    expected.update(batches)
    for wrap in (
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
    ):
        model = wrap(small_model())
        sgs = controller(model)
        sgs.update(batches)
        assert_same(sgs.scalings, expected.scalings)
        sgs.load_state_dict(expected.state_dict())
        assert set(sgs.skipped) == {"7"}


def test_a_wrapper_of_the_users_own_is_called_whole():
    """Its only child is named `module`, and its forward is more than the child's."""

    class Doubling(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x.exp())

    model, batches = Doubling(small_model()), make_batches()
    sgs = controller(model)
    sgs.update(batches)
    assert torch.equal(sgs.scalings["0"], gr.spatial_gradient_scaling(torch.cat(batches).exp(), 3, padding=1))


def test_a_model_that_was_compiled_and_run_before():
    """Compiled code may not see hooks that come later; if it does, every update compiles the model anew."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    class Own(nn.Module):  # torch does not compile the forward of its own containers by themselves
        def __init__(self):
            super().__init__()
            self.body = small_model()

        def forward(self, x):
            return self.body(x)

    model, batches = Own(), make_batches()
    model.compile(backend=backend)
    model.eval()
    with torch.no_grad():
        model(batches[0])
    sgs, expected = controller(model), controller(Own())
    before = len(compilations)
    sgs.update(batches)
    assert len(compilations) == before > 0
    expected.update(batches)
    assert_same(sgs.scalings, expected.scalings)


# -- optimizers --------------------------------------------------------------------------------------------------------


class WithScaling(torch.optim.SGD):
    """An optimizer that does the rest itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told = []

    def set_spatial_scaling(self, param, g):
        self.told.append((param, g))


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


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


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


class FailingOnce(torch.optim.SGD):
    fail = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail:
            self.fail = False
            raise RuntimeError("the step fails")
        return super().step(closure)


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
    """Writes into the gradients and calls the step of its base class: torch runs the hooks twice, one pair within the other."""

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


# -- updates from the training batches ---------------------------------------------------------------------------------


def train(model, optimizer, batches, closure=False):
    for batch in batches:

        def evaluate(batch=batch):
            optimizer.zero_grad()
            loss = model(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())


@pytest.mark.parametrize("closure", [False, True])
def test_every_n_steps_counts_within_the_ranges_of_the_update_before(closure):
    model, batches = Named(), make_batches(6)
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=2)
    train(model, optimizer, batches[:2], closure)  # the second step finds ranges
    assert torch.equal(sgs.scalings["conv"], torch.ones(3, 3))
    displacements = [(0, 1), (1, -1), (1, 0), (1, 1)]
    for last, now in ((1, 3), (3, 5)):
        train(model, optimizer, batches[now - 1 : now + 1], closure)
        ranges, n = gr.pair_ranges(batches[last], displacements, padding=1)
        bins = torch.tensor([[1 + (int(v) - 1).bit_length() for v in row] for row in n])
        nmi = gr.normalized_mutual_information(
            gr.joint_histogram(batches[now], displacements, bins, padding=1, ranges=ranges)
        )
        s = torch.ones(9, dtype=torch.float64)
        s[5:] = (5 * nmi / (4 * nmi + 1)).mean(0)
        s[:4] = s[5:].flip(0)
        assert torch.allclose(sgs.scalings["conv"], (s / s.mean()).float().view(3, 3), atol=1e-6)


def test_a_convolution_that_a_due_step_does_not_call_keeps_its_ranges():
    model = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)])
    optimizer = WithScaling(model.parameters(), lr=0.01)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    batches = make_batches(3)
    for step, batch in enumerate(batches):
        (model[0](batch).sum() + (model[1](batch).sum() if step != 1 else 0)).backward()
        optimizer.step()
        assert torch.equal(sgs.scalings["1"], torch.ones(3, 3)) == (step < 2)
    displacements = [(0, 1), (1, -1), (1, 0), (1, 1)]
    ranges, n = gr.pair_ranges(batches[0], displacements)
    bins = torch.tensor([[1 + (int(v) - 1).bit_length() for v in row] for row in n])
    nmi = gr.normalized_mutual_information(gr.joint_histogram(batches[2], displacements, bins, ranges=ranges))
    s = (5 * nmi / (4 * nmi + 1)).mean(0)
    assert torch.allclose(sgs.scalings["1"].flatten()[5:] / sgs.scalings["1"][1, 1], s.float(), atol=1e-6)


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
    state, n = sgs.state_dict(), gr.pair_ranges(batches[0], [(0, 1), (1, -1), (1, 0), (1, 1)], padding=1)[1]
    assert state["steps"] == 2
    assert torch.equal(state["ranges"]["conv"][1], n * (1 if math.isnan(scale) else 2))
    assert torch.equal(sgs.scalings["conv"], torch.ones(3, 3)) == math.isnan(scale)
    assert warned == [False, False, math.isnan(scale)]


def test_removed_between_forward_and_step_nothing_gathered_stays():
    model = small_model().double()  # in float32 the bins would keep a copy of their ranges
    batches = [batch.double() for batch in make_batches()]
    optimizer = sgd(model)
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, batches)
    before, references = live_tensors(), [sys.getrefcount(model[0])]
    model(batches[0])
    gathered = live_tensors() - before
    references.append(sys.getrefcount(model[0]))
    sgs.remove()
    left = live_tensors() & gathered
    references.append(sys.getrefcount(model[0]))
    assert len(gathered) == 9  # ranges, n and counts of three layers
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
    before = live_tensors()
    for twin in twins:
        twin(make_batches()[0] * 100)
    assert not live_tensors() - before
    for twin in twins:
        assert all(hook.updates is None for module in twin.modules() for hook in module._forward_pre_hooks.values())
    sgs.remove()
    assert all_hooks(model) == 0


# -- checkpoints -------------------------------------------------------------------------------------------------------


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_restores_the_scalings_and_tells_the_optimizer():
    model, batches = small_model(), make_batches()
    sgs = controller(model)
    sgs.update(batches)
    other = small_model(seed=9)
    optimizer = WithScaling(other.parameters(), lr=0.1)
    restored = gr.SpatialGradientScaling(other, optimizer)
    restored.load_state_dict(through_disk(sgs.state_dict()))
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
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sgs": sgs.state_dict()})
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


# -- ranks -------------------------------------------------------------------------------------------------------------

DEALT = {0: [0, 2], 1: [1]}  # which batches each rank gets


class Uneven(nn.Module):
    """Its second convolution is only called for some batches: on one rank, never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rarely = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 5, padding=2)
        self.norm = nn.BatchNorm2d(3)  # its buffers: DistributedDataParallel's forward broadcasts them

    def forward(self, x):
        y = self.norm(self.always(x)).relu()
        return self.rarely(y) if x[0, 0, 0, 0] > 0 else y


def rank_batches():
    batches = make_batches(3)
    for i, batch in enumerate(batches):
        batch[0, 0, 0, 0] = 1.0 if i != 1 else -1.0
    return batches


def on_rank(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    warnings.simplefilter("ignore")
    found = {}
    batches = [rank_batches()[i] for i in DEALT[rank]]
    for key, options in OPTIONS.items():
        model = Uneven()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        sgs = gr.SpatialGradientScaling(wrapped, sgd(model), batches=2, **options)
        sgs.update(batches)
        found[key] = {name: g.tolist() for name, g in sgs.scalings.items()}
    alone = controller(Uneven(), batches=2, process_group=[dist.new_group([0]), dist.new_group([1])][rank])
    alone.update(batches)
    found["own group"] = {name: g.tolist() for name, g in alone.scalings.items()}

    poisoned = [batches[0] * (math.nan if rank else 1.0)]
    sgs = controller(Uneven(), batches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sgs.update(poisoned)
    found["not finite on rank 1"] = [str(w.message) for w in caught], sgs.scalings["always"].eq(1).all().item()

    sgs = controller(nn.parallel.DistributedDataParallel(Uneven(), find_unused_parameters=True), batches=2)
    errors = {}
    for what, batches_here in {"fails on rank 1": batches if rank == 0 else ["nonsense"], "all empty": []}.items():
        try:
            sgs.update(batches_here)
        except Exception as error:
            errors[what] = type(error).__name__ + ": " + str(error)
    sgs.update([] if rank else rank_batches())  # one empty rank is no error
    found["errors"], found["empty on rank 1"] = errors, {name: g.tolist() for name, g in sgs.scalings.items()}

    optimizer = sgd(model := Uneven())
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, [batches[0], batches[0] * 2])
    found["steps"] = {name: g.tolist() for name, g in sgs.scalings.items()}

    ranks = Ranks(None)
    big = torch.tensor([2**31 - 1, 5])
    found["sums"] = [ranks.reduce([big, big[:1]], "sum", torch.device("cpu"), 2**32)[0].tolist(), ranks.bytes]
    found["sums"] += [
        ranks.reduce([big // 2, big[:1] // 2], "sum", torch.device("cpu"), 2**31 - 1)[0].tolist(),
        ranks.bytes,
    ]
    results[rank] = found
    dist.destroy_process_group()


OPTIONS = {"plain": {}, "remove near": {"remove_near": True}, "autocorrelation": {"dependence": "autocorrelation"}}


def test_two_ranks(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, args=(tmp_path / "store", results), nprocs=2)
        first, second = results[0], results[1]

    def one_process(batches, number, **options):
        sgs = controller(Uneven(), batches=number, **options)
        sgs.update(batches)
        return {name: g.tolist() for name, g in sgs.scalings.items()}

    assert {name: np.array(g).shape for name, g in first["plain"].items()} == {"always": (3, 3), "rarely": (5, 5)}
    for key, options in OPTIONS.items():
        expected = one_process(rank_batches(), 3, **options)
        if key == "autocorrelation":  # sums of floats, in another order
            assert all(np.allclose(first[key][name], expected[name], atol=1e-6) for name in expected)
        else:
            assert first[key] == expected  # to the bit
        assert second[key] == first[key]
    assert first["own group"] == one_process([rank_batches()[i] for i in DEALT[0]], 2)
    assert second["own group"]["rarely"] == np.ones((5, 5)).tolist()
    for found in (first, second):
        messages, kept = found["not finite on rank 1"]
        assert kept
        assert any("always" in message for message in messages)
        assert found["sums"] == [[2**32 - 2, 10], 24, [2**31 - 2, 4], 24 + 12]  # int64, then int32
    assert "failed on 1 other rank" in first["errors"]["fails on rank 1"]
    assert second["errors"]["fails on rank 1"].startswith("TypeError: a batch must be a Tensor")
    assert all("ValueError: batches is empty" in found["errors"]["all empty"] for found in (first, second))
    assert first["empty on rank 1"] == second["empty on rank 1"] == one_process(rank_batches(), 2)
    assert first["steps"] == second["steps"]
    assert first["steps"]["always"] != np.ones((3, 3)).tolist()


MANY_DEALT = {
    1: [[0, 1, 2, 3, 4]],
    2: [[4], [0, 1, 2, 3]],
    4: [[0, 3], [1], [], [2, 4]],
}  # ranks: which batches each gets


def unlike_batches():
    """Of other numbers of images and other sizes; the second convolution is not called for the second."""
    shapes = [(5, 2, 14, 13), (2, 2, 9, 17), (7, 2, 6, 6), (3, 2, 12, 12), (1, 2, 20, 8)]
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for i, batch in enumerate(batches):
        batch[0, 0, 0, 0] = -1.0 if i == 1 else 1.0
    return batches


def scalings_and_bytes(batches, **options):
    """{name: G} and what the update says in its log of the bytes to other ranks."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("gradrep_kernels.sgs.controller")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # fewer batches than asked for
            sgs = controller(Uneven(), batches=5, **options)
            sgs.update(batches)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return {name: g.tolist() for name, g in sgs.scalings.items()}, int(records[-1].getMessage().split()[-5])


def on_one_of_four(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    groups = {4: None, 2: dist.new_group([0, 1])}
    batches, found = unlike_batches(), {}
    for ranks, group in groups.items():
        for remove_near in (False, True):
            if rank < ranks:
                mine = [batches[i] for i in MANY_DEALT[ranks][rank]]
                found[ranks, remove_near] = scalings_and_bytes(mine, remove_near=remove_near, process_group=group)
    torch.save(found, folder / f"{rank}")
    dist.destroy_process_group()


def test_the_same_batches_on_one_two_and_four_ranks(tmp_path):
    mp.spawn(on_one_of_four, args=(tmp_path,), nprocs=4)
    results = [torch.load(tmp_path / f"{rank}") for rank in range(4)]
    batches = unlike_batches()
    maps = {"always": [(batch, 3, 1) for batch in batches]}
    called = [batch for i, batch in enumerate(batches) if i != 1]
    maps["rarely"] = [(torch.empty(len(batch), 3, *batch.shape[2:]), 5, 2) for batch in called]
    for remove_near in (False, True):
        expected, nothing_sent = scalings_and_bytes(batches, remove_near=remove_near)
        assert nothing_sent == 0
        assert all(torch.tensor(g).ne(1).any() for g in expected.values())
        for ranks in (2, 4):
            for rank in range(ranks):
                found, sent = results[rank][ranks, remove_near]
                assert found == expected, (ranks, rank)  # to the bit
                if not remove_near:  # where n does not depend on the values
                    assert sent == bytes_of_an_update(maps)


def bytes_of_an_update(maps):
    """Of one rank: n and a flag of each layer and two numbers (int64), both ends of ranges (float64), tables and a flag (int32)."""
    pairs, cells = 0, 0
    for calls in maps.values():
        channels, radius = calls[0][0].shape[1], calls[0][1] // 2
        displacements = [(i, j) for i in range(radius + 1) for j in range(-radius, radius + 1) if (i, j) > (0, 0)]
        n = [
            sum(len(x) * (x.shape[2] + 2 * pad - abs(i)) * (x.shape[3] + 2 * pad - abs(j)) for x, _, pad in calls)
            for i, j in displacements
        ]
        pairs += channels * len(displacements)
        cells += channels * len(displacements) * (1 + (max(n) - 1).bit_length()) ** 2
    return 8 * (pairs + len(maps) + 2) + 8 * 4 * pairs + 4 * (cells + 1)
