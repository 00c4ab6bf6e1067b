"""Steps with a tail in Triton on CPU tensors, against the reference: clipping, averages, states in bfloat16.

test_triton_step_tail.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import cases
import pytest
import torch
from step_tails import Tailed, bits

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import (
    addressing,
    plans,
    rep_grad_norm,
    rep_sgd_plan,
    rep_sgd_plan_norm,
    rep_sgd_plan_step,
    rep_sgd_step,
    scale_gradients_,
)
from gradrep_kernels.ops.triton.launching import LAUNCHES

SHAPES = [(1030,), (6, 5, 3, 3), (), (7, 6, 1, 1), (0, 3), (12, 4, 3, 3), (37, 29)]
WIDE_DTYPES = [torch.float32, torch.float64, torch.float16]  # the interpreter does not round to bfloat16 as a GPU does


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_all_options_at_once(dtype, aligned):
    """Beside parameters without an average, states like their parameter, and a group without momentum."""
    ours = Tailed(SHAPES, dtype)
    if not aligned:
        ours.at_odd_places()
    amp = {"grad_scale": torch.tensor(3.0), "found_inf": torch.zeros(())}
    LAUNCHES.clear()
    ours.assert_step(rep_sgd_step, clip=torch.tensor(0.3, dtype=torch.float64), **amp)
    assert LAUNCHES["rep_sgd_step", "cpu", dtype] == 2  # states in bfloat16, and like their parameter
    ours.assert_step(rep_sgd_step, found_inf=torch.ones(()), clip=torch.tensor(0.3))
    ours.averages = None
    ours.assert_step(rep_sgd_step)


def test_states_of_bfloat16_parameters():
    """They are rounded by random bits where the tail says so, else to the nearest as ever."""
    ours = Tailed(SHAPES, torch.bfloat16)
    twin = ours.clone()
    ours.run(rep_sgd_step)
    twin.run(reference.rep_sgd_step)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers, twin.buffers))
    plain = ours.clone()
    plain.tail[1] = 0
    plain.run(rep_sgd_step)
    assert not torch.equal(plain.buffers[0], ours.clone().run(rep_sgd_step).buffers[0])


def test_numbers_at_the_ends_of_the_range():
    """Random bits carry no NaN over into a zero, and no infinity into a NaN."""
    ends = [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x7F7FFFFF, -0x800001, 0, -(2**31), 1]
    ours = Tailed([(70,)], averaged=(), hypers=cases.HYPERS[2:3])
    ours.grads[0] = torch.tensor(ends * 7, dtype=torch.int32).view(torch.float32)
    ours.first = [True]
    twin = ours.clone()
    ours.run(rep_sgd_step)
    twin.run(reference.rep_sgd_step)
    assert torch.equal(ours.buffers[0].view(torch.int16), twin.buffers[0].view(torch.int16))


@pytest.mark.parametrize("first", [0, 1, 2**35 - 8, 2**40 + 16], ids=str)
def test_a_run_of_a_parameter_has_its_part_of_the_whole(first, monkeypatch):
    """Wherever it begins, and where it is taken in parts, as tensors beyond 2^30 elements are."""
    ours = Tailed([(1030,), (40, 30)])
    ours.elements = [torch.tensor([first]), torch.tensor([first + 5])]
    ours.assert_step(rep_sgd_step)
    monkeypatch.setattr(addressing, "PIECE", 400)
    monkeypatch.setattr(rep_sgd_step, "plans", plans.Plans("rep_sgd_step", plans.BLOCK, writes=True))
    ours.assert_step(rep_sgd_step)


@pytest.mark.parametrize(("seed", "step", "number"), [(0, 1, 0), (2**53 - 1, 2**32 - 1, 2**31 + 7)])
def test_the_greatest_numbers(seed, step, number):
    ours = Tailed([(70,), (5, 5, 3, 3)])
    ours.numbers = [number, number + 1]
    ours.tail[2:] = torch.tensor([seed, step])
    ours.assert_step(rep_sgd_step)
    ours.assert_planned_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_the_kernels_do_not_take_goes_to_the_reference(dtype):
    """States in bfloat16 that are to be rounded to the nearest; explicit numbers of elements; an average elsewhere."""
    ours = Tailed([(30,), (6, 5, 3, 3)], dtype, averaged=(0, 1))
    ours.elements = [torch.randperm(1000)[:30], None]
    LAUNCHES.clear()
    ours.assert_step(rep_sgd_step)
    assert sum(LAUNCHES.values()) == 1
    ours.averages[1] = ours.averages[1].to(memory_format=torch.channels_last)
    ours.assert_step(rep_sgd_step)
    assert sum(LAUNCHES.values()) == 1
    assert ours.planned() == 0
    ours = Tailed([(30,), (6, 5, 3, 3)], dtype, narrow=(0, 1))
    ours.tail[1] = 0
    LAUNCHES.clear()
    ours.assert_step(rep_sgd_step)
    assert not LAUNCHES


@pytest.mark.parametrize("of_whom", ["a parameter", "another average"])
def test_an_average_that_shares_memory(of_whom):
    ours = Tailed([(60,), (60,)], averaged=(0, 1))
    ours.averages[1] = ours.params[0] if of_whom == "a parameter" else ours.averages[0]
    assert ours.planned() == 0


# ---- planned


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_planned_steps(dtype):
    """The norm is written in any case, and the factor that follows from it is that of the step."""
    ours = Tailed(SHAPES, dtype)
    for max_norm, amp in (
        (1e6, {"grad_scale": torch.tensor(4.0)}),
        (0.5, {"grad_scale": torch.tensor(4.0), "found_inf": torch.zeros(1)}),
        (0.5, {"found_inf": torch.ones(1)}),
        (None, {}),
    ):
        ours.new_step()
        ours.assert_planned_step(max_norm, **amp)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_as_torchs(bad):
    ours = Tailed([(30,), (6, 5, 3, 3)], narrow=())
    ours.grads[0][3] = bad
    ours.assert_planned_step(1.0)
    assert all(bool(p.isnan().any()) for p in ours.params[:1])


def test_sixty_two_parameters_of_several_dtypes_and_groups(uploads):
    """In float32 and float64: the norm is a float64. A new count of steps is no new table."""
    ours = Tailed([(17,), (3, 3, 3, 3)] * 31, hypers=cases.HYPERS[2:7])
    for n in range(0, 62, 5):
        ours.change_dtype(n, torch.float64)
    handle = ours.planned()
    for _ in range(2):
        before = len(uploads)
        ours.new_step(gradients=False)
        LAUNCHES.clear()
        ours.assert_planned_step(2.0, handle=handle)
        assert LAUNCHES["rep_sgd_step", "cpu", torch.float32] == 2 * 2  # norm and step, for states of either kind
    assert len(uploads) == before


@pytest.mark.parametrize("on_device", [("step",), ("ema_decay", "step"), ("ema_decay", "stochastic", "seed", "step")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_on_the_device(dtype, on_device, uploads):
    """The others may change on the host without a new table."""
    ours = Tailed([(300,), (6, 5, 3, 3)], dtype)
    handle = ours.planned()
    for n in range(3):
        before = len(uploads)
        ours.new_step(gradients=False)
        ours.assert_planned_step(2.0, handle=handle, on_device=on_device, lr_on_device=n > 0)
    assert len(uploads) == before
    ours.tail[1] = 0 if "stochastic" in on_device else 1
    ours.assert_planned_step(handle=handle, on_device=on_device)


def test_a_tail_on_the_device():
    ours = Tailed([(300,), (6, 5, 3, 3)])
    twin, live = ours.clone(), ours.tail.clone()
    columns = {name: getattr(ours, name) for name in ("averages", "numbers", "elements")}
    known = torch.Tensor.is_cpu
    call_on = lambda t: t is not live and known.__get__(t)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", property(call_on))
        rep_sgd_step(*ours.lists(), ours.hyper, tail=live, **columns)
    ours.assert_same_bits(twin.run(reference.rep_sgd_step))


CHANGES = {
    "an average of another dtype": lambda t: setattr(t.averages[0], "data", t.averages[0].data.double()),
    "of another shape": lambda t: setattr(t.averages[0], "data", t.averages[0].data[:5]),
    "a state of another dtype": lambda t: setattr(t.buffers[0], "data", t.buffers[0].data.float()),
    "an average that shares memory": lambda t: setattr(t.averages[0], "data", t.params[0].data),
    "no random bits": lambda t: t.tail.__setitem__(1, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused_and_nothing_is_done(change):
    ours = Tailed([(30,), (6, 5, 3, 3)], averaged=(0,), narrow=(0,))
    handle, norm = ours.planned(), torch.tensor(-1.0)
    CHANGES[change](ours)
    before = [t.clone() for t in (*ours.params, *ours.buffers, ours.averages[0])]
    LAUNCHES.clear()
    assert not rep_sgd_plan_step(
        handle, ours.grads, ours.hyper.flatten().tolist(), [], [], None, None, ours.tail.tolist(), 1.0, norm
    )
    assert not LAUNCHES
    assert norm.item() == -1
    assert all(torch.equal(a, b) for a, b in zip(before, (*ours.params, *ours.buffers, ours.averages[0])))


def test_an_average_that_has_moved_is_found():
    ours = Tailed([(30,), (6, 5, 3, 3)], averaged=(0,))
    handle = ours.planned()
    ours.assert_planned_step(handle=handle)
    ours.averages[0].data = cases.unaligned(ours.averages[0].data)
    ours.assert_planned_step(handle=handle)


def test_the_norm_of_a_plan(uploads):
    """Its tables are those of the step, and those of its chunks, which are made once."""
    ours = Tailed(SHAPES)
    handle = ours.planned()
    norm = torch.zeros(())
    for n in range(3):
        assert rep_sgd_plan_norm(handle, ours.grads, norm)
        wanted = reference.rep_grad_norm(ours.grads, ours.scales, ours.identities)
        assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
        if n == 0:
            made = len(uploads)
    assert len(uploads) == made
    # A step divides the op's norm by the scale, in the norm's dtype, and clips as clip_factor does.
    for seed in range(12):
        scale, own = torch.tensor(3.0 + seed), torch.zeros(())
        ours.grads = [g * (1.1 + seed) for g in ours.grads]
        assert ours.planned_step(handle, 0.1, own, found_inf=torch.ones(1), grad_scale=scale)
        assert own == rep_grad_norm(ours.grads, ours.scales, ours.identities) / scale
        ours.assert_planned_step(0.1, handle=handle, grad_scale=scale)
    assert not rep_sgd_plan_norm(handle, ours.grads[1:], norm)
    empty = torch.zeros(0)
    nothing = rep_sgd_plan([empty], [empty.clone()], [None], [None], [0])
    assert rep_sgd_plan_norm(nothing, [empty.clone()], norm)
    assert norm.item() == 0


# ---- gradients that are scaled


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_gradients_are_scaled(dtype):
    sizes = [(0,), (1,), (4095,), (4097,), (6, 5, 3, 3)]
    grads = [cases.tensor(shape, n, dtype) for n, shape in enumerate(sizes)]
    grads += [cases.unaligned(grads[2]), torch.stack((grads[3], grads[3]), 1)[:, 0]]
    for factor in (torch.tensor(0.3), torch.tensor(1e-8, dtype=torch.float64), torch.tensor(float("nan"))):
        ours, twins = ([g.clone() if g.is_contiguous() else g for g in grads] for _ in range(2))
        twins[-1] = twins[-1].clone()
        scale_gradients_(ours, factor)
        reference.scale_gradients_(twins, factor)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours[:-1], twins[:-1]))
        grads[-1].copy_(grads[3])
    scale_gradients_([], torch.tensor(0.3))


def test_where_the_factor_is_1_nothing_is_written():
    """A product would turn a signalling NaN into a quiet one."""
    signalling = torch.full((4100,), 0x7F800001, dtype=torch.int32)
    for factor in (1.0, 0.5):
        grads = [signalling.clone().view(torch.float32), signalling.clone().view(torch.float32)[1:10]]
        scale_gradients_(grads, torch.tensor(factor))
        assert [bool((g.view(torch.int32) == 0x7F800001).all()) for g in grads] == [factor == 1] * 2


def test_gradients_that_share_memory_are_scaled_one_after_another():
    flat = torch.ones(100)
    scale_gradients_([flat[:60], flat[40:]], torch.tensor(0.5))
    assert torch.equal(flat, torch.cat((torch.full((40,), 0.5), torch.full((20,), 0.25), torch.full((40,), 0.5))))
