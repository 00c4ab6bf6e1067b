"""Whatever is cached between steps notices that memory has moved, and a step moves what autograd watches."""

from __future__ import annotations

import copy

import pytest
import torch
from cases_optim import (
    MOMENTUM,
    STEADY,
    Pair,
    assert_close,
    batch,
    net,
    set_grads,
)
from torch import nn

from gradrep_kernels import FusedRepSGD
from gradrep_kernels.ops import backends

pytestmark = pytest.mark.usefixtures("backend")


needs_plan = pytest.mark.skipif(backends.report(("cpu",))[0]["serves"] != "cpp", reason="only the C++ step has a plan")


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_step_bumps_the_version_counters(steps):
    """Autograd must notice that a saved weight has changed, as it does after SGD(foreach=False)."""
    pair = Pair(**MOMENTUM)
    pair.train(steps)
    loss = pair.ours(batch(torch.float64)).sum()
    pair.set_grads(0)
    before = [p._version for p in pair.ours.parameters()]
    counts = [state["momentum_buffer"]._version for state in pair.opt.state.values()]
    pair.opt.step()
    assert all(p._version > version for p, version in zip(pair.ours.parameters(), before))
    assert all(state["momentum_buffer"]._version > version for state, version in zip(pair.opt.state.values(), counts))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_buffers_of_another_dtype():
    """model.double() in mid-run leaves float32 buffers behind."""
    pair = Pair(torch.float32, momentum=0.9)
    pair.train(STEADY)
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            p.grad = None
        model.double()
    pair.train(STEADY).assert_equal(1e-6)  # they stay float32, in torch as in ours


def swap_data(pair):
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            p.data = p.data * 0.5


def swap_storage(pair):
    for model in (pair.ours, pair.twin):
        for p in model.parameters():
            with torch.no_grad():
                p.set_(p.detach().clone() * 0.5)


def to_channels_last(pair):
    pair.ours.to(memory_format=torch.channels_last)
    pair.twin.to(memory_format=torch.channels_last)


def to_and_fro(pair):
    for model in (pair.ours, pair.twin):
        model.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)


def replace_buffers(pair):
    for opt in (pair.opt, pair.sgd):
        for n, state in enumerate(opt.state.values()):
            buffer = state["momentum_buffer"].clone() * 0.5
            state["momentum_buffer"] = (
                buffer.to(memory_format=torch.channels_last) if buffer.dim() == 4 and n % 2 else buffer
            )


def swap_buffer_data(pair):
    for opt in (pair.opt, pair.sgd):
        for state in opt.state.values():
            state["momentum_buffer"].data = state["momentum_buffer"].data * 0.5


def drop_one_buffer(pair):
    for opt in (pair.opt, pair.sgd):
        del opt.state[opt.param_groups[0]["params"][2]]


def clear_state(pair):
    pair.opt.state.clear()
    pair.sgd.state.clear()


def new_state(pair):
    for opt in (pair.opt, pair.sgd):
        opt.state = type(opt.state)(dict)


def load_older_state(pair):
    older = Pair(momentum=0.5, groups=1)
    older.train(1)
    state = older.opt.state_dict()
    pair.opt.load_state_dict(state)
    pair.sgd.load_state_dict(copy.deepcopy(state))  # loading keeps the tensors it is given


def load_weights(pair):
    state = net(torch.float64, seed=9).state_dict()
    pair.ours.load_state_dict(state)
    pair.twin.load_state_dict(state, assign=False)


def flatten_into_one_buffer(pair):
    """As DDP, FSDP1 and ZeroRedundancyOptimizer do: parameters become views at odd offsets."""
    for model in (pair.ours, pair.twin):
        params = list(model.parameters())
        flat = torch.cat([torch.zeros(1, dtype=params[0].dtype)] + [p.detach().flatten() for p in params])
        at = 1
        for p in params:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()


def delete_one_buffer(pair):
    for opt in (pair.opt, pair.sgd):
        del opt.state[opt.param_groups[0]["params"][2]]["momentum_buffer"]


def exchange_states(pair):
    """Of two parameters of one shape: the same entries in the same order, under other keys."""
    for opt in (pair.opt, pair.sgd):
        same = {}
        for p in opt.state:
            same.setdefault(p.shape, []).append(p)
        p, q = next(alike for alike in same.values() if len(alike) > 1)[:2]
        entries = {{p: q, q: p}.get(key, key): entry for key, entry in opt.state.items()}
        opt.state.clear()
        opt.state.update(entries)


def empty_entries(pair):
    """A look at the defaultdict makes one; whatever else is in it is no concern of the step."""
    for opt in (pair.opt, pair.sgd):
        assert opt.state[nn.Parameter(torch.zeros(1))] == {}
        opt.state["note"] = 5


MOVES = [
    swap_data,
    swap_storage,
    to_channels_last,
    to_and_fro,
    replace_buffers,
    swap_buffer_data,
    drop_one_buffer,
    clear_state,
    new_state,
]
MOVES += [load_older_state, load_weights, flatten_into_one_buffer, delete_one_buffer, exchange_states, empty_entries]


@pytest.mark.parametrize("move", MOVES)
def test_after_the_memory_has_moved(move):
    """Whatever is cached between steps must notice."""
    pair = Pair(momentum=0.9)
    pair.train(STEADY)
    move(pair)
    pair.train(STEADY, seed=20).assert_equal()


def test_parameters_that_share_memory_are_stepped_one_after_the_other(backend):
    """Threads that share out all parameters must not race: 50 steps of a million elements lost up to 73."""
    torch.set_num_threads(2)

    def make():
        base = torch.linspace(-1, 1, 1 << 18, dtype=torch.float64)
        return [nn.Parameter(base), nn.Parameter(base[:])]

    ours, twin = make(), make()
    opt, sgd = FusedRepSGD(ours, lr=0.1, momentum=0.9), torch.optim.SGD(twin, lr=0.1, momentum=0.9, foreach=False)
    for step in range(50):
        for params, optimizer in ((ours, opt), (twin, sgd)):
            set_grads(params, step)
            optimizer.step()
    assert_close(ours[0], twin[0], 1e-12)


@needs_plan
def test_strides_of_sizes_of_one_say_nothing(backend):
    """A channels_last input gives the contiguous weight of a 1 x 1 or depthwise convolution a gradient of strides (16, 1, 16, 16)."""
    weights = [nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(8, 1, 3, 3))]
    opt = FusedRepSGD(weights, lr=0.1, momentum=0.9)
    for _ in range(STEADY):
        for w in weights:
            w.grad = torch.randn(w.shape).to(memory_format=torch.channels_last)
            assert w.grad.stride() != w.stride()
        opt.step()
    assert (opt._plan is not None) == (backend == "auto")


@pytest.mark.parametrize(
    "look",
    [lambda opt: opt.state[nn.Parameter(torch.zeros(1))], lambda opt: opt.state.update(note=5)],
    ids=["entry", "note"],
)
@needs_plan
def test_the_plan_outlives_what_is_no_parameters_state(look, backend):
    pair = Pair(momentum=0.9)
    look(pair.opt)
    pair.train(STEADY)
    plan = pair.opt._plan
    pair.train(STEADY)
    assert pair.opt._plan is plan
    assert (plan is not None) == (backend == "auto")


def test_an_address_that_is_used_again_with_another_size():
    p, q = (nn.Parameter(torch.linspace(0, 1, 64, dtype=torch.float64)) for _ in range(2))
    opt, sgd = FusedRepSGD([p], lr=0.1), torch.optim.SGD([q], lr=0.1, foreach=False)
    for size in (64, 64, 64, 64, 10, 10):
        for w, optimizer in ((p, opt), (q, sgd)):
            w.grad = None
            w.data = w.data[:size]
            w.grad = torch.ones(size, dtype=torch.float64)
            optimizer.step()
    assert_close(p, q)
    assert p.data.untyped_storage()[:].nbytes() == 512
