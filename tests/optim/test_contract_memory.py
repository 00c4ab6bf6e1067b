"""Whatever is cached between steps notices that memory has moved, and a step moves what autograd watches."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from cases_optim import STEADY, Pair, all_equal, assert_close, batch, net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradrep_kernels.ops import backends


def planned(case) -> bool:
    """Whether the backend that serves the case now plans its steps."""
    return backends.planner(case.make.update_rule.op, "cpu") is not None


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_step_bumps_the_version_counters(case, steps):
    """Autograd must notice that a saved weight has changed, as it does after SGD(foreach=False)."""
    pair = Pair(case)
    pair.train(steps)
    loss = pair.ours(batch(torch.float64)).sum()
    pair.set_grads(0)
    before = [p._version for p in pair.ours.parameters()]
    counts = [state[key]._version for state in pair.opt.state.values() for key in case.states]
    pair.opt.step()
    assert all(p._version > version for p, version in zip(pair.ours.parameters(), before))
    after = [state[key]._version for state in pair.opt.state.values() for key in case.states]
    assert all(now > version for now, version in zip(after, counts))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("steps", [0, STEADY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_clipping_bumps_the_version_counters_of_gradients(case, steps, dtype):
    """Of those that it writes to. A saved gradient is one of a gradient penalty, say."""
    pair = Pair(case, dtype)
    pair.train(steps)
    pair.set_grads(0)
    grads = [p.grad for p in pair.ours.parameters()]
    before = [g._version for g in grads]
    pair.opt.clip_grad_norm_(1e9)
    assert [g._version for g in grads] == before
    pair.opt.clip_grad_norm_(1e-3)
    assert all(g._version > version for g, version in zip(grads, before))


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_step_bumps_the_version_counters_of_averages(case, steps):
    pair = Pair(case)
    pair.opt.ema_decay = 0.9
    pair.train(1 + steps)
    averages = [pair.opt.ema(p) for p in pair.ours.parameters()]
    before = [average._version for average in averages]
    pair.train(1)
    assert all(average._version > version for average, version in zip(averages, before))


def test_arrays_of_another_dtype(case):
    """model.double() in mid-run leaves float32 arrays behind."""
    if not case.takes_other_dtypes:
        pytest.skip("its oracle takes none")
    pair = Pair(case, torch.float32)
    pair.train(STEADY)
    for model in pair.models:
        for p in model.parameters():
            p.grad = None
        model.double()
    pair.train(STEADY).assert_equal(1e-6)  # they stay float32, in torch as in ours


def swap_data(pair):
    for model in pair.models:
        for p in model.parameters():
            p.data = p.data * 0.5


def swap_storage(pair):
    for model in pair.models:
        for p in model.parameters():
            with torch.no_grad():
                p.set_(p.detach().clone() * 0.5)


def to_channels_last(pair):
    pair.ours.to(memory_format=torch.channels_last)
    pair.twin.to(memory_format=torch.channels_last)


def to_and_fro(pair):
    for model in pair.models:
        model.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)


def replace_arrays(pair):
    for opt in pair.optimizers:
        for n, state in enumerate(opt.state.values()):
            for key in pair.case.states:
                array = state[key].clone() * 0.5
                state[key] = array.to(memory_format=torch.channels_last) if array.dim() == 4 and n % 2 else array


def swap_data_of_arrays(pair):
    for opt in pair.optimizers:
        for state in opt.state.values():
            for key in pair.case.states:
                state[key].data = state[key].data * 0.5


def drop_one_state(pair):
    for opt in pair.optimizers:
        del opt.state[opt.param_groups[0]["params"][2]]


def clear_state(pair):
    pair.opt.state.clear()
    pair.oracle.state.clear()


def new_state(pair):
    for opt in pair.optimizers:
        opt.state = type(opt.state)(dict)


def load_older_state(pair):
    older = Pair(pair.case, lr=0.02)
    older.train(1)
    state = older.opt.state_dict()
    pair.opt.load_state_dict(state)
    pair.oracle.load_state_dict(copy.deepcopy(state))  # loading keeps the tensors it is given


def load_weights(pair):
    state = net(torch.float64, seed=9).state_dict()
    pair.ours.load_state_dict(state)
    pair.twin.load_state_dict(state, assign=False)


def flatten_into_one_buffer(pair):
    """As DDP, FSDP1 and ZeroRedundancyOptimizer do: parameters become views at odd offsets."""
    for model in pair.models:
        params = list(model.parameters())
        flat = torch.cat([torch.zeros(1, dtype=params[0].dtype)] + [p.detach().flatten() for p in params])
        at = 1
        for p in params:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()


def delete_one_array(pair):
    for opt in pair.optimizers:
        del opt.state[opt.param_groups[0]["params"][2]][pair.case.states[0]]


def exchange_states(pair):
    """Of two parameters of one shape: the same entries in the same order, under other keys."""
    for opt in pair.optimizers:
        same = {}
        for p in opt.state:
            same.setdefault(p.shape, []).append(p)
        p, q = next(alike for alike in same.values() if len(alike) > 1)[:2]
        entries = {{p: q, q: p}.get(key, key): entry for key, entry in opt.state.items()}
        opt.state.clear()
        opt.state.update(entries)


def empty_entries(pair):
    """A look at the defaultdict makes one; whatever else is in it is no concern of the step."""
    for opt in pair.optimizers:
        assert opt.state[nn.Parameter(torch.zeros(1))] == {}
        opt.state["note"] = 5


MOVES = [
    swap_data,
    swap_storage,
    to_channels_last,
    to_and_fro,
    replace_arrays,
    swap_data_of_arrays,
    drop_one_state,
    clear_state,
    new_state,
]
MOVES += [load_older_state, load_weights, flatten_into_one_buffer, delete_one_array, exchange_states, empty_entries]


@pytest.mark.parametrize("move", MOVES)
def test_after_the_memory_has_moved(case, move):
    """Whatever is cached between steps must notice."""
    if move is delete_one_array and case.counts:
        pytest.skip("its oracle makes all arrays of a parameter in its first step")
    pair = Pair(case)
    pair.train(STEADY)
    move(pair)
    pair.train(STEADY, seed=20).assert_equal()


def test_parameters_that_share_memory_are_stepped_one_after_the_other(case):
    """Threads that share out all parameters must not race: 50 steps of a million elements lost up to 73."""
    torch.set_num_threads(2)

    def make():
        base = torch.linspace(-1, 1, 1 << 18, dtype=torch.float64)
        return [nn.Parameter(base), nn.Parameter(base[:])]

    ours, twin = make(), make()
    opt, oracle = case.make(ours, lr=0.1, **case.hyper), case.oracle(twin, lr=0.1, **case.hyper)
    drawn = [torch.randn(1 << 18, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for step in range(50 if case.kernels else STEADY):
        for params, optimizer in ((ours, opt), (twin, oracle)):
            params[0].grad, params[1].grad = drawn[step % 3], drawn[(step + 1) % 3]
            optimizer.step()
    assert_close(ours[0], twin[0], 1e-12)


def test_strides_of_sizes_of_one_say_nothing(case):
    """A channels_last input gives the contiguous weight of a 1 x 1 or depthwise convolution channels_last gradients.

    Their strides are (16, 1, 16, 16), those of the weight (16, 1, 1, 1).
    """
    weights = [nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(8, 1, 3, 3))]
    opt = case.make(weights, lr=0.1, **case.hyper)
    for _ in range(STEADY):
        for w in weights:
            w.grad = torch.randn(w.shape).to(memory_format=torch.channels_last)
            assert w.grad.stride() != w.stride()
        opt.step()
    assert (opt._plan is not None) == planned(case)


@pytest.mark.parametrize(
    "look",
    [lambda opt: opt.state[nn.Parameter(torch.zeros(1))], lambda opt: opt.state.update(note=5)],
    ids=["entry", "note"],
)
def test_the_plan_outlives_what_is_no_parameters_state(case, look):
    pair = Pair(case)
    look(pair.opt)
    pair.train(STEADY)
    plan = pair.opt._plan
    pair.train(STEADY)
    assert pair.opt._plan is plan
    assert (plan is not None) == planned(case)


def test_tensors_on_a_device_that_takes_no_planned_steps(case):
    """The plan refuses them, as a GPU's where kernels of plans are built for the CPU alone."""
    pair = Pair(case).train(STEADY)
    plan, groups = pair.opt._plan, pair.opt.param_groups
    assert (plan is not None) == planned(case)
    if plan is not None:
        before = pair.weights()
        groups[0]["lr"] = torch.tensor(0.1, device="meta")
        assert plan.step(groups, pair.opt.state, (None, None)) is False
        assert all_equal(before, pair.weights())


class NothingPasses(TorchDispatchMode):
    """As a mode of torch.compile, which does not know the ops of plans."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} in another's trace")


def test_a_plan_is_freed_wherever_its_parameters_are_and_whatever_is_traced(case, monkeypatch):
    """The garbage collector drops it at any time, and parameters move to devices that free no plans."""
    planner = backends.planner(case.make.update_rule.op, "cpu")
    if planner is None:
        pytest.skip("this backend makes no plans")
    freed, errors = [], []

    def free(somewhere: torch.Tensor, handle: int) -> None:
        planner.free(somewhere, handle)
        freed.append(somewhere)

    counting = dataclasses.replace(planner, free=free)
    monkeypatch.setattr(backends, "planner", lambda op, device: counting)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: errors.append(error))
    pair = Pair(case).train(STEADY)
    assert not freed
    with NothingPasses():
        pair.opt._plan = None
    assert not errors
    (somewhere,) = freed
    assert somewhere.device.type == "cpu"
    assert not any(somewhere is p for p in pair.ours.parameters())
