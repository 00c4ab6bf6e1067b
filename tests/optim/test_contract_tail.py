"""The end of a step: clipping, averages and states in bfloat16, against torch's separate calls.

The oracle clips by √(Σ M ⊙ g²) in place, takes torch's step and moves torch's averages.
"""

from __future__ import annotations

import pytest
import torch
from cases_optim import (
    STEADY,
    Pair,
    all_equal,
    amp_steps,
    assert_close,
    assert_left_alone,
    csla_norm,
    gradients_of,
    net,
    overflow,
    scaled_step,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MAX_NORM, DECAY = 0.7, 0.9
OPTIONS = {"max_grad_norm": MAX_NORM, "ema_decay": DECAY}
ROUNDINGS = 3e-15  # relative to the largest of a tensor, after 6 steps of float64: 1e-15 and the oracle's own


class Tailed(Pair):
    """A Pair whose own optimizer has a tail, and whose twin clips and averages by torch's calls."""

    def __init__(self, case, *args, decay=DECAY, max_norm=MAX_NORM, **options):
        super().__init__(case, *args, **options)
        self.opt.max_grad_norm, self.opt.ema_decay = max_norm, decay
        self.max_norm = max_norm
        self.averages = (
            AveragedModel(self.twin, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay is not None else None
        )

    def oracle_step(self) -> None:
        kept = [q.grad.clone() for q in self.twin.parameters() if q.grad is not None]
        if self.max_norm is not None:
            given = [q for q in self.twin.parameters() if q.grad is not None]
            self.norm = csla_norm(given, self.masks)
            for q in given:
                q.grad.mul_(min(1.0, self.max_norm / (self.norm + 1e-6)))
        super().oracle_step()
        for q, grad in zip([q for q in self.twin.parameters() if q.grad is not None], kept):
            q.grad = grad
        if self.averages is not None:
            self.averages.update_parameters(self.twin)

    def assert_equal(self, tolerance: float = ROUNDINGS) -> None:
        super().assert_equal(tolerance)
        if self.averages is not None:
            for p, q in zip(self.ours.parameters(), self.averages.module.parameters()):
                assert_close(self.opt.ema(p).to(q.dtype), q, tolerance)
        if self.max_norm is not None:
            assert float(self.opt.last_grad_norm) == pytest.approx(self.norm, rel=max(1e-14, tolerance))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("max_norm", "decay"), [(MAX_NORM, DECAY), (MAX_NORM, None), (None, DECAY), (1e9, 0.0)])
def test_it_equals_separate_calls(case, max_norm, decay, groups):
    pair = Tailed(case, max_norm=max_norm, decay=decay, groups=groups).train(STEADY + 2)
    assert max_norm != MAX_NORM or pair.norm > MAX_NORM
    pair.assert_equal()


def test_every_variant_of_the_rule(case):
    for variant in case.variants:
        Tailed(case, hyper=variant.options).train(STEADY).assert_equal()


def test_a_drawn_step_equals_separate_calls(case):
    """Over shapes, layouts, groups and options. Each step of float32 begins where torch's is."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    shapes = st.sampled_from([(5, 3, 3, 3), (4, 1, 5, 5), (7,), (3, 11), (2, 2, 1, 3), (1,), (33, 2, 3, 3), (0, 3)])
    layouts = st.sampled_from(["plain", "channels_last", "transposed"])

    def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
        if layout == "channels_last" and t.dim() == 4:
            return t.to(memory_format=torch.channels_last)
        return t.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" and t.dim() == 2 else t

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        tensors=st.lists(st.tuples(shapes, layouts, st.integers(0, 2)), min_size=1, max_size=6),
        variant=st.sampled_from(case.variants),
        max_norm=st.sampled_from([None, 0.05, 1.0, 1e6]),
        decay=st.sampled_from([None, 0.0, 0.3, 0.999, 1.0]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def check(tensors, variant, max_norm, decay, dtype):
        g = torch.Generator().manual_seed(len(tensors))
        ours = [nn.Parameter(laid_out(torch.randn(shape, generator=g, dtype=dtype), how)) for shape, how, _ in tensors]
        twins = [nn.Parameter(p.detach().clone()) for p in ours]

        def dealt(params):
            return [
                {"params": own}
                for n in range(3)
                if (own := [p for p, (_, _, group) in zip(params, tensors) if group == n])
            ]

        opt = case.make(dealt(ours), **variant.options, max_grad_norm=max_norm, ema_decay=decay)
        oracle = case.oracle(dealt(twins), **variant.options)
        averages: list[torch.Tensor] = []
        for step in range(STEADY + 1):
            for p, q in zip(ours, twins):
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=dtype))
                q.grad = p.grad.clone()
            before = [q.detach().clone() for q in twins]
            if max_norm is not None:
                norm = csla_norm(twins, {})
                for q in twins:
                    q.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
            opt.step()
            oracle.step()
            if decay is not None:
                if step == 0:
                    averages = [q.detach().clone() for q in twins]
                else:
                    torch._foreach_lerp_(averages, [q.detach() for q in twins], 1 - decay)
            ulps = 4 * torch.finfo(dtype).eps
            for n, (p, q, w) in enumerate(zip(ours, twins, before)):
                # Gradient and momentum may cancel each other, and their products are rounded before.
                terms = case.terms(opt.state.get(p, {}), q.grad, variant.options)
                size = torch.maximum(w.abs(), variant.options["lr"] * terms)
                assert bool(((p - q).abs() <= ulps * size + torch.finfo(dtype).tiny).all())
                if decay is not None:
                    bound = torch.maximum(averages[n].abs(), size)
                    assert bool(((opt.ema(p) - averages[n]).abs() <= ulps * bound + torch.finfo(dtype).tiny).all())
                    averages[n].copy_(opt.ema(p))
                with torch.no_grad():
                    q.copy_(p)
                for key in case.states:
                    if key in opt.state.get(p, {}):
                        oracle.state[q][key].copy_(opt.state[p][key])

    check()


@pytest.mark.parametrize("steps", [1, STEADY])
def test_gradients_keep_their_values(case, steps):
    pair = Tailed(case, torch.float32).train(steps)
    pair.set_grads(9)
    before = gradients_of(pair.ours)
    pair.opt.step()
    assert_left_alone(pair.ours, before)


def test_the_norm_of_each_step_is_a_tensor_of_its_own(case):
    pair = Tailed(case)
    assert pair.opt.last_grad_norm is None
    norms, expected = [], []
    for step in range(STEADY + 2):
        pair.train(1, seed=step)
        norms.append(pair.opt.last_grad_norm)
        expected.append(pair.norm)
    assert [float(norm) for norm in norms] == pytest.approx(expected, rel=1e-12)
    assert {(norm.shape, norm.dtype) for norm in norms} == {(torch.Size([]), torch.float64)}


@pytest.mark.parametrize("steps", [0, STEADY])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_norm_that_is_not_finite_acts_as_torchs_clipping(case, value, steps):
    pair = Tailed(case, torch.float32, multiplied=False).train(steps)
    pair.set_grads(0)
    for model in pair.models:
        next(model.parameters()).grad.view(-1)[1] = value
    torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), MAX_NORM)
    pair.opt.step()
    pair.oracle.step()
    assert not bool(torch.isfinite(pair.opt.last_grad_norm))
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert torch.equal(p.isnan(), q.isnan())
        assert_close(p.nan_to_num(), q.nan_to_num(), 1e-6)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(case, fused):
    """The norm is that of unscaled gradients, whether the scaler or the step unscales them."""
    pair = Tailed(case, torch.float32, fused=fused, groups=2)
    amp_steps(pair, torch.amp.GradScaler("cpu", init_scale=16.0), steps=STEADY + 2)
    pair.assert_equal(1e-6)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("steps", [0, STEADY])
def test_an_overflow_leaves_everything_but_the_norm(case, fused, steps):
    pair = Tailed(case, torch.float32, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp_steps(pair, scaler, steps=steps)
    pair.set_grads(0)
    overflow(pair)
    before = pair.weights(), pair.arrays(), [pair.opt.ema(p).clone() for p in pair.ours.parameters()]
    scaled_step(scaler, pair.opt)
    assert all_equal(before[0], pair.weights())
    assert all_equal(before[1], pair.arrays())
    assert all_equal(before[2], [pair.opt.ema(p) for p in pair.ours.parameters()])
    if steps == 0:
        assert not pair.opt.state
    amp_steps(pair, scaler)
    pair.assert_equal(1e-6)


@pytest.mark.parametrize("late", [1, STEADY])
def test_the_average_of_a_late_parameter_begins_with_it(case, late):
    pair = Tailed(case)
    params = list(pair.ours.parameters())
    for step in range(late):
        pair.set_grads(step)
        params[2].grad = None
        pair.opt.step()
    weight = params[2].detach().clone()
    assert torch.equal(pair.opt.ema(params[2]), weight)
    assert "ema" not in pair.opt.state.get(params[2], {})
    pair.set_grads(99)
    pair.opt.step()
    assert torch.equal(pair.opt.ema(params[2]), params[2])
    assert not torch.equal(params[2], weight)
    pair.set_grads(100)
    pair.opt.step()
    assert not torch.equal(pair.opt.ema(params[2]), params[2])


@pytest.mark.parametrize("frozen", [[0, 2], [0, 1, 2, 3]], ids=["two", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_goes_on_where_there_is_no_gradient(case, frozen, dtype):
    """A backbone that is frozen in mid-training: its averages must reach its weights, as AveragedModel's do."""
    pair = Tailed(case, dtype).train(STEADY)
    assert len(list(pair.ours.parameters())) >= 4

    def step(seed: int, **numbers) -> None:
        pair.set_grads(seed)
        for model in pair.models:
            for n, p in enumerate(model.parameters()):
                p.grad = None if n in frozen or len(frozen) == 4 else p.grad
        for name, value in numbers.items():
            setattr(pair.opt, name, value)
        pair.step() if not numbers else pair.opt.step()

    for seed in range(STEADY + 2):
        step(seed)
        if len(frozen) < 4:
            pair.assert_equal(1e-6 if dtype == torch.float32 else ROUNDINGS)
        for p, q in zip(pair.ours.parameters(), pair.averages.module.parameters()):
            assert_close(pair.opt.ema(p), q, 1e-6 if dtype == torch.float32 else ROUNDINGS)
    versions = [pair.opt.ema(p)._version for p in pair.ours.parameters()]
    before = [pair.opt.ema(p).clone() for p in pair.ours.parameters()]
    step(0, found_inf=torch.ones(()), grad_scale=torch.ones(()))
    assert all_equal(before, [pair.opt.ema(p) for p in pair.ours.parameters()])
    step(0, found_inf=torch.zeros(()), grad_scale=torch.ones(()))
    for p, average, version in zip(pair.ours.parameters(), before, versions):
        assert not torch.equal(pair.opt.ema(p), average)
        assert pair.opt.ema(p)._version > version


def test_a_group_that_joins(case):
    joined, others = nn.Parameter(torch.ones(3, dtype=torch.float64)), list(net(torch.float64).parameters())
    opt = case.make(others, **{"lr": 0.1, **case.hyper}, **OPTIONS)
    for p in others:
        p.grad = torch.ones_like(p)
    for _ in range(STEADY):
        opt.step()
    opt.add_param_group({"params": [joined]})
    joined.grad = torch.full_like(joined, 2.0)
    for _ in range(STEADY):
        opt.step()
    elements = sum(p.numel() for p in others)
    assert float(opt.last_grad_norm) == pytest.approx((elements + 12) ** 0.5)
    assert set(opt.state[joined]) >= {"ema", *case.states}
    assert opt.state_dict()["param_groups"][1]["step_count"] == 2 * STEADY


def test_a_parameter_listed_twice_is_averaged_once_a_step(case):
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = case.make([weight, weight], **{"lr": 0.1, **case.hyper}, **OPTIONS)
    average = None
    for step in range(STEADY):
        weight.grad = torch.full_like(weight, 1.0 + step)
        opt.step()
        average = weight.detach().clone() if average is None else average + (weight.detach() - average) * (1 - DECAY)
        assert_close(opt.ema(weight), average)
        assert float(opt.last_grad_norm) == pytest.approx(2 * (1.0 + step))


def test_a_closure(case):
    pair = Tailed(case)

    def closure():
        pair.set_grads(4)
        return torch.tensor(2.5)

    for _ in range(STEADY):
        assert pair.opt.step(closure) == 2.5
        pair.set_grads(4)
        pair.oracle_step()
    pair.assert_equal()


def test_spatial_scaling_and_the_norm(case):
    """G is a factor of M, but under AdamW, where it scales the gradient that has been clipped."""
    pair = Tailed(case, multiplied=False)
    pair.set_scaling(0, torch.rand(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5)
    pair.train(STEADY).assert_equal()


def test_sparse_gradients(case):
    if case.not_with_sparse and not case.not_with_sparse[0][0]:
        pytest.skip("it takes none")
    dense, sparse = (nn.Parameter(torch.ones(6, 2)) for _ in range(2))
    opt = case.make([dense, sparse], lr=0.5, **OPTIONS)
    averages = None
    for _ in range(STEADY):
        dense.grad = torch.full_like(dense, 0.3)
        sparse.grad = torch.sparse_coo_tensor([[1, 4, 1]], torch.full((3, 2), 0.2), (6, 2), check_invariants=True)
        values = sparse.grad.to_dense()
        norm = (dense.grad.square().sum() + values.square().sum()).sqrt()
        expected = sparse.detach() - 0.5 * values * min(1.0, MAX_NORM / (float(norm) + 1e-6))
        opt.step()
        torch.testing.assert_close(opt.last_grad_norm, norm)
        torch.testing.assert_close(sparse.detach(), expected)
        assert torch.equal(sparse.grad.to_dense(), values)
        averages = expected if averages is None else averages + (expected - averages) * (1 - DECAY)
        torch.testing.assert_close(opt.ema(sparse), averages)


def test_a_sparse_parameter_listed_twice_is_averaged_once_a_step(case):
    if case.not_with_sparse and not case.not_with_sparse[0][0]:
        pytest.skip("it takes none")
    weight = nn.Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = case.make([weight, weight], lr=0.5, ema_decay=DECAY)
    average = None
    for _ in range(3):
        weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
        opt.step()
        own = weight.detach().clone()
        average = own if average is None else average + (own - average) * (1 - DECAY)
        assert torch.equal(opt.ema(weight), average)


# ---- the number of the step


def test_a_schedule_is_asked_once_a_step(case):
    asked = []

    def decay(step: int) -> float:
        asked.append(step)
        return min(DECAY, step / (10 + step))

    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    opt = case.make([weight], **{"lr": 0.1, **case.hyper}, ema_decay=decay)
    average = None
    for step in range(1, 9):
        weight.grad = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        opt.step()
        own = weight.detach().clone()
        average = own if average is None else average + (own - average) * (1 - step / (10 + step))
        assert_close(opt.ema(weight), average)
    assert asked == list(range(1, 9))


def test_a_schedule_is_asked_once_where_a_planned_step_cannot_be_taken(case):
    asked = []
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    opt = case.make(params, **{"lr": 0.1, **case.hyper}, ema_decay=lambda step: asked.append(step) or 0.5)
    for step in range(STEADY + 3):
        for p in params:
            p.grad = torch.ones_like(p)
        if step == STEADY:
            params[1].grad = None
        opt.step()
    assert asked == list(range(1, STEADY + 4))


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_step_that_is_skipped_counts(case, steps):
    """The host does not wait to hear that it was."""
    asked = []
    weight = nn.Parameter(torch.ones(5))
    opt = case.make([weight], **{"lr": 0.1, **case.hyper}, fused=True, ema_decay=lambda step: asked.append(step) or 0.5)
    for step in range(steps + 3):
        weight.grad = torch.ones(5)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(float(step == steps))
        opt.step()
    assert asked == list(range(1, steps + 4))


@pytest.mark.parametrize("steps", [0, STEADY])
def test_a_schedule_that_gives_no_decay_changes_nothing(case, steps):
    given = [0.5] * steps + [1.5, 0.5]
    pair = Tailed(case)
    pair.opt.ema_decay = lambda step: given[step - 1] if step <= len(given) else 0.5
    for step in range(steps):
        pair.set_grads(step)
        pair.opt.step()
    before = pair.weights(), pair.arrays()
    pair.set_grads(9)
    with pytest.raises(ValueError, match=rf"ema_decay\({steps + 1}\) must be a number in \[0, 1\], got 1.5"):
        pair.opt.step()
    assert all_equal(before[0], pair.weights())
    assert all_equal(before[1], pair.arrays())
    given[steps] = 0.5
    pair.opt.step()


def test_a_decay_in_a_tensor(case):
    decay = torch.tensor(0.5, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = case.make([weight], lr=0.1, **case.plain, ema_decay=decay)
    average = torch.zeros(3, dtype=torch.float64)
    for step in range(8):
        decay.fill_(0.9 if step > 5 else 0.5)
        weight.grad = torch.ones_like(weight)
        opt.step()
        own = weight.detach().clone()
        average = own if step == 0 else average + (own - average) * (1 - float(decay))
        assert_close(opt.ema(weight), average)
    decay.fill_(2.0)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="ema_decay must be a number in"):
        opt.step()


# ---- options


class Wrapper:
    """Looks like the optimizer that it holds, as Lightning's wrappers do: its class is a child of the other's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_options_are_set_through_a_wrapper(case):
    """Its methods write attributes of the wrapper, which the optimizer inside does not see."""
    pair = Tailed(case, max_norm=None, decay=None).train(STEADY)
    wrapper = Wrapper(pair.opt)
    wrapper.ema_decay, wrapper.max_grad_norm = 0.8, 0.2
    pair.max_norm, pair.averages = 0.2, AveragedModel(pair.twin, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    pair.train(STEADY, seed=60).assert_equal()
    with wrapper.swap_ema(), pytest.raises(RuntimeError, match="a step inside swap_ema"):
        pair.opt.step()
    pair.train(1, seed=70).assert_equal()


def test_options_change_in_mid_run(case):
    pair = Tailed(case, max_norm=None, decay=None).train(STEADY)
    pair.opt.max_grad_norm = pair.max_norm = 0.2
    pair.train(STEADY, seed=50).assert_equal()
    pair.opt.ema_decay = 0.8
    pair.averages = AveragedModel(pair.twin, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    pair.train(STEADY, seed=60).assert_equal()
    norm = pair.opt.last_grad_norm
    pair.opt.max_grad_norm = pair.max_norm = None
    pair.train(STEADY, seed=70).assert_equal()
    pair.opt.ema_decay = pair.averages = None
    pair.train(STEADY, seed=80).assert_equal()
    assert pair.opt.last_grad_norm is norm


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be above 0, got 0; None turns clipping off"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be above 0"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm must be above 0"),
        ({"max_grad_norm": "1,5"}, TypeError, "max_grad_norm must be a number, got str"),
        ({"ema_decay": 1.1}, ValueError, r"ema_decay must be a number in \[0, 1\], got 1.1"),
        ({"ema_decay": float("nan")}, ValueError, "ema_decay must be a number in"),
        ({"ema_decay": "0.9"}, TypeError, "ema_decay must be a number, got str"),
        ({"ema_decay": True}, TypeError, "ema_decay must be a number, got bool"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number, got str"),
        ({"ema_decay": torch.ones(2)}, ValueError, r"must be one floating-point number, got torch.float32 \[2\]"),
        ({"ema_decay": 0.9, "differentiable": True}, ValueError, "differentiable=True takes torch's functional step"),
    ],
)
def test_wrong_options(case, options, error, message):
    with pytest.raises(error, match=message):
        case.make([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    opt = case.make([nn.Parameter(torch.ones(2))], lr=0.1, differentiable="differentiable" in options)
    name, value = next(iter(options.items()))
    with pytest.raises(error, match=message):
        setattr(opt, name, value)
    assert getattr(opt, name) is None


@pytest.mark.parametrize("given", [None, "1", True])
def test_a_norm_that_is_no_number(case, given):
    pair = Tailed(case)
    pair.set_grads(0)
    before = [p.grad.clone() for p in pair.ours.parameters()]
    with pytest.raises(TypeError, match=f"max_norm must be a number, got {type(given).__name__}"):
        pair.opt.clip_grad_norm_(given)
    assert all_equal(before, [p.grad for p in pair.ours.parameters()])


@pytest.mark.parametrize("option", ["grad_mults", "max_grad_norm", "ema_decay", "momentum_dtype"])
def test_they_are_no_options_of_a_group(case, option):
    with pytest.raises(ValueError, match=f"{option} is not an option of a parameter group"):
        case.make([{"params": [nn.Parameter(torch.ones(2))], option: None}], lr=0.1)


def test_the_last_norm_is_zero_without_gradients(case):
    opt = case.make([nn.Parameter(torch.ones(2))], lr=0.1, **OPTIONS)
    opt.step()
    assert float(opt.last_grad_norm) == 0
