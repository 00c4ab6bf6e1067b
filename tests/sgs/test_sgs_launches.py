"""What the statistics launch and wait for, counted where Python calls torch.

On CPU tensors, whose Python path is that of a GPU's: each ATen call that is no view and no allocation would be a launch
there, or a wait. Tests on a GPU ask the driver.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from implementations import on_gpu
from sgs_controllers import WithScaling, make_batches, sgd, small_model, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import gradrep_kernels as gr
from gradrep_kernels.sgs import dependence, gathering, learning, transfers
from gradrep_kernels.sgs.transfers import LINE, on_device, on_host

pytestmark = pytest.mark.usefixtures("one_thread")

NO_LAUNCH = {
    "view",
    "slice",
    "detach",
    "alias",
    "empty",
    "split_with_sizes",
    "split",
    "unsqueeze",
    "select",
    "as_strided",
}
WAITS = {"_local_scalar_dense", "_to_copy", "nonzero", "equal", "is_nonzero", "item", "copy_"}


class Calls(TorchDispatchMode):
    """Counts the ATen calls that would launch, or wait."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.split("::")[1]
        if name not in NO_LAUNCH:
            self.found[name] += 1
        return function(*arguments, **(named or {}))


@pytest.fixture
def in_hooks(monkeypatch):
    """The calls within the hooks of convolutions, which is all that a forward has of SGS."""
    calls = Calls()

    def gather(*arguments):
        with calls:
            return own(*arguments)

    own = gathering.gather_map
    for module in ("every_steps", "drawn"):
        monkeypatch.setattr(f"gradrep_kernels.sgs.{module}.gather_map", gather)
    return calls


@pytest.fixture
def transferred(monkeypatch):
    """How many tensors each call of `on_device` brought."""
    sent = []

    def spy(parts, device):
        sent.append(len(parts))
        return on_device(parts, device)

    for module in (gathering, learning):
        monkeypatch.setattr(module, "on_device", spy)
    return sent


def steps(model, number, dtype=torch.float32, remove_near=False):
    optimizer = sgd(model.to(dtype))
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1, remove_near=remove_near)
    batches = [batch.to(dtype) for batch in make_batches(number)]
    return sgs, optimizer, batches


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_and_batch_takes_two_launches_with_every_steps(in_hooks, transferred, dtype, remove_near):
    """And one fill for each kind of statistic takes all layers. Nothing is sent in a forward, nor waited for."""
    model = small_model()
    sgs, optimizer, batches = steps(model, 3, dtype, remove_near)
    layers, fills = 3, 3 if remove_near else 2
    train(model, optimizer, batches[:1])
    assert in_hooks.found == {"pair_ranges_": layers, "full": fills - 1}  # no binnings yet
    assert transferred == [2 * layers]
    in_hooks.found.clear()
    transferred.clear()
    model(batches[1]).sum().backward()  # two forwards, one step
    assert not transferred
    train(model, optimizer, batches[2:])
    assert in_hooks.found == {"pair_ranges_": 2 * layers, "joint_histogram_": 2 * layers, "full": fills}
    assert transferred == [len(sgs.scalings), 2 * layers]  # the scalings, and the next binnings
    assert all(g.ne(1).any() for g in sgs.scalings.values())


def test_a_layer_and_batch_takes_one_launch_in_each_pass_of_an_update(in_hooks, transferred):
    model = small_model()
    sgs = gr.SpatialGradientScaling(model, sgd(model), batches=2)
    sgs.update(make_batches(2))
    assert in_hooks.found == {"pair_ranges_": 6, "joint_histogram_": 6, "full": 2}
    assert transferred == [6, 3]


def test_a_restored_state_is_sent_before_the_next_forward(in_hooks, transferred):
    model = small_model()
    sgs, optimizer, batches = steps(model, 2)
    train(model, optimizer, batches[:1])
    state = sgs.state_dict()
    transferred.clear()
    sgs.load_state_dict(state)
    assert transferred == [6]
    in_hooks.found.clear()
    model(batches[1])
    assert transferred == [6]
    assert in_hooks.found == {"pair_ranges_": 3, "joint_histogram_": 3, "full": 2}


def test_maps_of_another_dtype_are_sent_for_once():
    """bfloat16 maps have float32 ranges, as their weights' arithmetic has. A float64 map has other ones."""
    torch.manual_seed(0)
    convs = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)])
    layers = [gathering.Layer(conv.weight, {str(i): conv}) for i, conv in enumerate(convs)]
    ranges = torch.tensor([-1.0, 1 / 3], dtype=torch.float64).expand(2, 4, 2, 2)
    binnings = {layer: gathering.Binning(ranges, torch.full((2, 4), 9)) for layer in layers}
    placed = gathering.PlacedBinnings(binnings, gathering.MutualInformation.ranges_dtype)
    placed.place()
    maps = {dtype: torch.zeros(1, 2, 4, 4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    narrow, bins = placed.of(layers[0], maps[torch.float32])
    assert placed.of(layers[0], maps[torch.bfloat16])[0] is narrow
    assert torch.equal(narrow, ranges.float())
    assert torch.equal(bins, binnings[layers[0]].bins)
    assert torch.equal(placed.of(layers[1], maps[torch.float64])[0], ranges)
    assert placed.of(layers[0], maps[torch.float64])[0].dtype == torch.float64


def own_arrays(arrays):
    return [array for by_layer in arrays._by_place.values() for array in by_layer.values()]


def test_copies_between_a_forward_and_its_step_go_on_alone():
    model = small_model()
    sgs, optimizer, batches = steps(model, 3)
    train(model, optimizer, batches[:1])
    torch.manual_seed(0)
    model(batches[1]).square().sum().backward()
    for copied in (copy.deepcopy((model, optimizer, sgs)), pickle.loads(pickle.dumps((model, optimizer, sgs)))):
        _, twin_optimizer, twin_sgs = copied
        training = twin_sgs._training
        kept = [array for kind in (training._ranges._ends, training._tables._arrays) for array in own_arrays(kind)]
        assert len(kept) == 2 * 3
        assert all(array.untyped_storage().nbytes() == array.nbytes for array in kept)  # not those of all layers
        twin_optimizer.step()
        found = twin_sgs.scalings
        twin_sgs.remove()
        assert all(g.ne(1).any() for g in found.values())
    optimizer.step()
    assert all(torch.equal(found[name], g) for name, g in sgs.scalings.items())


# ---- numbers of pairs


@pytest.fixture
def ranges():
    """Those of one layer, [2, 4]."""
    conv = nn.Conv2d(2, 2, 3)
    return gathering.Ranges([gathering.Layer(conv.weight, {"0": conv})])


def test_pairs_that_a_device_counts_stay_there(ranges):
    """Zeros of the host that are added to them would be sent for each layer, and waited for."""
    (layer,) = ranges._layers
    counted = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    ranges._n.adopt(layer, counted)
    assert ranges.n(layer) is counted


def test_maps_whose_pairs_all_count_and_others_pool(ranges):
    (layer,) = ranges._layers
    x, displacements = torch.tensor([[0.0, 1], [1, 1]]).expand(3, 2, 2, 2), [0, 1, 1, -1, 1, 0, 1, 1]
    assert ranges.n(layer).tolist() == [[0, 0, 0, 0]] * 2
    for remove_near in (False, True, False):
        ranges.add(layer, x, displacements, [0, 0], remove_near)
    assert ranges.n(layer).tolist() == [[3 * n for n in (2 + 1 + 2, 1 + 1 + 1, 2 + 1 + 2, 1 + 0 + 1)]] * 2


def test_threads_add_at_the_same_time(ranges, monkeypatch):
    """nn.DataParallel has one for each GPU."""
    (layer,) = ranges._layers
    monkeypatch.setattr(gathering, "implementation", lambda *_: lambda *_: None)
    interval, x = sys.getswitchinterval(), torch.ones(1, 2, 2, 2)
    add = functools.partial(ranges.add, layer, x, [0, 1, 1, -1, 1, 0, 1, 1], [0, 0], False)
    add()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: add(), range(4000)))
    finally:
        sys.setswitchinterval(interval)
    assert ranges.n(layer)[0].tolist() == [2 * 4001, 4001, 2 * 4001, 4001]


# ---- transfers


def parts_of_all_kinds():
    return [
        torch.arange(5, dtype=torch.int32),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0),
        torch.randn(3, 33).t(),
        torch.arange(6).view(2, 3),
    ]


def test_many_tensors_travel_as_one(monkeypatch):
    """To a device that keeps no data, so their values are looked at where they are packed."""
    packed, own, parts = [], transfers._parts, parts_of_all_kinds()

    def spy(*arguments):
        packed.append(own(*arguments))
        return packed[-1]

    monkeypatch.setattr(transfers, "_parts", spy)
    with Calls() as calls:
        there = on_device(parts, torch.device("meta"))
    assert calls.found["_to_copy"] == 1
    for part, on_the_way, arrived in zip(parts, packed[0], there, strict=True):
        assert torch.equal(on_the_way, part)
        assert on_the_way.dtype == part.dtype
        assert on_the_way.storage_offset() * part.element_size() % LINE == 0
        assert (arrived.device.type, arrived.shape, arrived.dtype) == ("meta", part.shape, part.dtype)
    assert on_device(parts, torch.device("cpu")) is parts
    assert all(a is b for a, b in zip(on_host(parts), parts, strict=True))


@pytest.mark.parametrize("capturing", [False, True])
def test_memory_is_pinned_for_a_gpu_and_in_no_capture(monkeypatch, capturing):
    """Without a GPU: memory is not pinned and goes nowhere."""
    empty, asked = torch.empty, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "empty", lambda n, pin_memory, **named: asked.append(pin_memory) or empty(n, **named))
    monkeypatch.setattr(torch.Tensor, "to", lambda flat, device, non_blocking: flat)
    parts = [torch.arange(5), torch.ones(3)]
    there = on_device(parts, torch.device("cuda", 0))
    assert all(torch.equal(a, b) for a, b in zip(there, parts, strict=True))
    assert asked == [not capturing]


class OfADevice(Calls):
    """Takes a tensor, and all that is computed from it, for those of a device, and notes what waits for them."""

    def __init__(self, x):
        super().__init__()
        self.there, self.waits = [x], []

    def _is_there(self, tensor):
        return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in self.there)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = super().__torch_dispatch__(function, types, arguments, named)
        name = function._schema.name.split("::")[1]
        if any(isinstance(part, torch.Tensor) and self._is_there(part) for part in tree_leaves((arguments, named))):
            self.waits += [name] if name in WAITS - {"_to_copy"} else []
            self.there += [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        return result

    def on_host(self, parts):
        self.waits.append("on_host")
        with _disable_current_modes():
            return [part.clone() for part in parts]


@pytest.mark.parametrize("remove_near", [False, True])
def test_what_waits_for_the_bins(remove_near):
    x = torch.relu(torch.randn(2, 3, 6, 6))
    with OfADevice(x) as device:
        gr.joint_histogram(x, [(0, 1)], "sturges", padding=1, remove_near=remove_near)
        gr.joint_histogram(x, [(0, 1)], 8, padding=1, remove_near=remove_near)
    assert device.waits == ["_local_scalar_dense"] * remove_near  # zeros say how many pairs are left
    with OfADevice(x) as device:
        gr.joint_histogram(x, [(0, 1)], x.new_full((1,), 8).int(), padding=1)
    assert len(device.waits) > 0


@pytest.mark.parametrize("remove_near", [False, True])
def test_the_scaling_of_one_map_waits_once(monkeypatch, remove_near):
    x = torch.relu(torch.randn(2, 3, 6, 6))
    expected = gr.spatial_gradient_scaling(x, 3, padding=1, remove_near=remove_near)
    device = OfADevice(x)
    monkeypatch.setattr(dependence, "on_host", device.on_host)
    with device:
        found = gr.spatial_gradient_scaling(x, 3, padding=1, remove_near=remove_near)
    assert device.waits == ["_local_scalar_dense"] * remove_near + ["on_host"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("remove_near", [False, True])
def test_an_update_waits_twice(monkeypatch, remove_near):
    """For the ranges of all layers, and for their dependence."""
    received = []
    monkeypatch.setattr(learning, "on_host", lambda parts: received.append(len(parts)) or on_host(parts))
    model = small_model()
    _sgs, optimizer, batches = steps(model, 2, remove_near=remove_near)
    train(model, optimizer, batches[:1])
    received.clear()
    train(model, optimizer, batches[1:])
    assert len(received) == 2
    assert received[0] == 3 + 1 + 1  # n of each layer, the status, and the ends of all


# ---- on a GPU


@on_gpu
@pytest.mark.parametrize("remove_near", [False, True])
def test_no_forward_waits_for_a_gpu(remove_near):
    model = small_model().cuda()
    sgs, optimizer, batches = steps(model, 4, remove_near=remove_near)
    batches = [batch.cuda() for batch in batches]
    train(model, optimizer, batches[:2])
    before = torch.cuda.get_sync_debug_mode()
    for batch in batches[2:]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = model(batch).square().sum()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        loss.backward()
        optimizer.step()
    assert all(g.ne(1).any() for g in sgs.scalings.values())


@on_gpu
def test_launches_on_a_gpu():
    """Those of a forward with every_steps, less those of the same forward without."""
    from torch.profiler import ProfilerActivity, profile

    def launched(every_steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2)).cuda()
        optimizer = WithScaling(model.parameters(), lr=0.1)
        gr.SpatialGradientScaling(model, optimizer, every_steps=every_steps)
        batches = [batch.cuda() for batch in make_batches(3)]
        train(model, optimizer, batches[:2])
        model(batches[2])  # fills
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            model(batches[2])
            torch.cuda.synchronize()
        return sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in found.events())

    assert launched(1) - launched(None) == 2 * 2
