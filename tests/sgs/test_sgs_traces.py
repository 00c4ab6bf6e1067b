"""What an update leaves behind: modes, buffers, hooks, random states, memory, and the wrappers of a model."""

import gc
import random
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import start_processes
from sgs_controllers import Named, all_hooks, assert_same, controller, make_batches, maps_of, sgd, small_model
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels.ops import backends

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Observed(nn.Module):
    """Does to its buffers what observers of quantization do, also in eval mode, and worse."""

    def __init__(self):
        super().__init__()
        self.body = small_model()
        self.register_buffer("least", torch.tensor([]))  # grows in its first forward
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("columns", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("gone", torch.ones(3), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        channels = x.amin((0, 2, 3))
        if self.least.numel() == 0:
            self.least.resize_(channels.shape).copy_(channels)
        self.least.copy_(torch.minimum(self.least, channels))
        self.scale.resize_(4).copy_(torch.full((4,), 7.0)).mul_(x.std())
        self.columns.data = torch.zeros(5, dtype=torch.int64)
        if "gone" in self._buffers:
            del self.gone
            self.gone = 3
            self.register_buffer("late", torch.ones(2), persistent=False)
            self.nothing = torch.ones(1)
        return self.body(x.clamp(min=self.least.view(1, -1, 1, 1)) + 0 * self.scale[0])


def places(model):
    return [(name, id(b), b.shape, b.dtype, b.stride(), b.clone()) for name, b in model.named_buffers()]


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_as_before_whatever_a_forward_does_to_them(fails):
    model = Observed()
    if fails:
        model.body[3].register_forward_pre_hook(lambda *_: 1 / 0)
    sgs, before = controller(model), places(model)
    keys = list(model.state_dict()), [list(module._buffers) for module in model.modules()]
    state, pointer = random.getstate(), model.columns.data_ptr()
    if fails:
        with pytest.raises(ZeroDivisionError):
            sgs.update(make_batches())
    else:
        sgs.update(make_batches())
    assert same(before, places(model))
    assert keys == (list(model.state_dict()), [list(module._buffers) for module in model.modules()])
    assert model.columns.data_ptr() == pointer
    assert model.nothing is None
    assert torch.equal(model.gone, torch.ones(3))
    assert not hasattr(model, "late")
    assert random.getstate() == state
    assert all_hooks(model) == fails


def test_both_passes_see_the_same_maps():
    """Of a model that moves its buffers, draws random numbers and changes modes in eval mode."""

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
            self.register_buffer("gain", torch.ones(()))
            self.seen = []

        def forward(self, x):
            self.gain.mul_(1.5)
            x = self.norm(x * self.gain * (1 + torch.rand(()) + random.random() + np.random.rand()))
            self.norm.train()
            self.seen.append(x.clone())
            return self.conv(x)

    model = Drifting()
    sgs = controller(model, batches=3)
    sgs.update(make_batches(3))
    assert len(model.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(model.seen[:3], model.seen[3:]))
    assert not torch.equal(model.seen[0] / model.seen[0].std(), model.seen[1] / model.seen[1].std())
    assert_same(sgs.scalings, {"conv": gr.spatial_gradient_scaling(torch.cat(model.seen[:3]), 3)})


def test_what_can_be_restored_is_restored_where_something_cannot():
    class Stubborn(Named):
        def __setattr__(self, name, value):
            if name == "training" and value and "broken" in vars(self):
                raise RuntimeError("no way back")
            super().__setattr__(name, value)

        def forward(self, image):
            vars(self)["broken"] = True
            return self.conv(image)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + torch.rand(()) + random.random() + np.random.rand()

    model = nn.Sequential(Counting(), Stubborn(), Counting())
    sgs = controller(model)
    generator = torch.Generator()
    loader = torch.utils.data.DataLoader(torch.cat(make_batches()), 5, shuffle=True, generator=generator)
    before = everything(model, generator)
    with pytest.raises(RuntimeError, match="no way back"):
        sgs.update(loader)
    after = everything(model, generator)
    assert after[0] == [True, True, False, True, True]  # the stubborn one alone is not as before
    assert all(same(was, now) for was, now in zip(before[1:], after[1:]))


def test_quantization_aware_training_before_its_first_step():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(quantization.QuantStub(), *small_model()[:3], quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantization.prepare_qat(quantization.fuse_modules_qat(model, [["1", "2", "3"]]))
    sgs, before, state = controller(model), places(model), random.getstate()
    assert any(b.numel() == 0 for b in model.buffers())
    sgs.update(make_batches())
    assert same(before, places(model))
    assert random.getstate() == state
    ((name, g),) = sgs.scalings.items()
    assert name == "1"
    assert not torch.equal(g, torch.ones(3, 3))


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
    peaks = {}

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
                peaks[desc, kernel, remove_near] = update(images, *form, kernel, remove_near)
    torch.save(peaks, path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(any(row["serves"] != "cpp" for row in backends.report(("cpu",))), reason="a promise of the kernels")
def test_an_update_takes_less_memory_than_the_largest_map(tmp_path):
    """The peak of a process over what it held before, in maps, is up to 0.08.

    Maps have 75 MB (bf16: 38), which malloc maps and unmaps. A padded copy would be 1, a map widened to float32 2.
    """
    start_processes(measure_memory, (tmp_path / "peaks",), 1)
    peaks = torch.load(tmp_path / "peaks")
    assert len(peaks) == 2 * len(MEMORY)
    assert all(extra < 0.5 for extra in peaks.values()), peaks


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
    """Maps are what the convolutions are given.

    That is bf16 from one to another, but float32 images, although the first convolution casts them inside. And casts of
    weights that were cached without autograd do not lose the gradients (pytorch #112583).
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


def test_a_buffer_of_overlapping_elements_is_left_alone():
    model = small_model()
    model.register_buffer("mean", torch.tensor([0.5]).expand(3))
    sgs = controller(model)
    sgs.update(make_batches())
    assert torch.equal(model.mean, torch.full((3,), 0.5))
    assert model.mean.stride() == (0,)
