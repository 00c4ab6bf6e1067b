"""Optimizers with Grad Mult against their oracle on M ⊙ g; multipliers, clipping, checkpoints, wrong input."""

from __future__ import annotations

import copy
import pickle
import warnings

import cases
import pytest
import torch
from cases_optim import (
    CASES,
    SGD,
    Pair,
    assert_close,
    assert_left_alone,
    batch,
    csla_norm,
    dense,
    gradients_of,
    mults,
    named,
    net,
    set_grads,
)
from files import through_a_file
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import FusedRepSGD, GradMult

VARIANTS = [
    pytest.param(case, variant.options, id=f"{case.name}-{variant.name}") for case in CASES for variant in case.variants
]


@pytest.fixture(**named(CASES))
def case(request):
    return request.param


# ---- the step


@pytest.mark.parametrize(("case", "options"), VARIANTS)
@pytest.mark.parametrize("multiplied", [False, True])
def test_each_step_is_the_oracles_on_multiplied_gradients(case, options, multiplied):
    """Four steps (first, second, and the cached steady state), each from the oracle's state.

    They agree to 1e-15 of max(|W|, lr |d|), and of what d is a difference of.
    """
    pair = Pair(case, multiplied=multiplied, groups=2, hyper=options)
    for step in range(4):
        before = [q.detach().clone() for q in pair.twin.parameters()]
        pair.train(1, seed=step)
        for p, q, old in zip(pair.ours.parameters(), pair.twin.parameters(), before):
            largest = torch.stack([q.detach().abs(), old.abs(), (q.detach() - old).abs()]).amax(0)
            if case.counts:  # m, which may cancel, is divided by √v
                largest = torch.maximum(largest, options["lr"] * 2 * case.terms(pair.oracle.state[q], q.grad, options))
            assert bool(((p - q).abs() <= cases.FLOAT64_TOLERANCE * largest).all())
            with torch.no_grad():
                p.copy_(q)
                for key in pair.opt.state[p]:
                    pair.opt.state[p][key].copy_(pair.oracle.state[q][key])
    pair.assert_equal()


@pytest.mark.parametrize(("case", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_twice_eager_torch(case, options, dtype):
    """Against float64, three steps on the same gradients; the multipliers keep float32."""
    low, exact = Pair(case, dtype, groups=2, hyper=options), Pair(case, groups=2, hyper=options)
    with torch.no_grad():
        for p, q in zip(exact.twin.parameters(), low.twin.parameters()):
            p.copy_(q)
    for step in range(3):
        low.set_grads(step)
        for p, q in zip(exact.twin.parameters(), low.twin.parameters()):
            p.grad = q.grad.double()
        low.opt.step()
        low.oracle_step()
        exact.oracle_step()
    rows = zip(low.ours.parameters(), low.twin.parameters(), exact.twin.parameters())
    ours, theirs = zip(
        *((float((p - e).detach().abs().max()), float((q - e).detach().abs().max())) for p, q, e in rows)
    )
    assert max(ours) <= 2 * max(theirs)


def test_a_closure_runs_with_gradients_and_its_loss_is_returned(case):
    pair = Pair(case)
    x = batch(torch.float64)

    def closure():
        pair.opt.zero_grad()
        loss = pair.ours(x).square().mean()
        loss.backward()
        return loss

    loss = pair.opt.step(closure)
    assert loss.requires_grad
    pair.twin(x).square().mean().backward()
    pair.oracle_step()
    pair.assert_equal()


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_are_left_alone(case, plain):
    pair = Pair(case, torch.float32, hyper=case.plain if plain else case.hyper)
    for step in range(4):
        pair.set_grads(step)
        before = gradients_of(pair.ours)
        pair.opt.step()
        assert_left_alone(pair.ours, before)


def test_multipliers_of_every_kind_of_argument(case):
    """A GradMult, a tensor of full size and one that broadcasts."""
    pair = Pair(case, multiplied=False)
    full = torch.rand(6, 3, 3, 3)
    given = dict(
        zip(
            pair.ours.parameters(),
            [full, torch.tensor([0.5, 1, 2, 1, 0.5, 0]), GradMult(torch.rand(3, 3), torch.ones(6))],
        )
    )
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        if p in given:
            pair.opt.set_grad_mult(p, given[p])
            pair.masks[q] = dense(pair.opt.grad_mult(p), p.shape)
    assert torch.equal(pair.masks[next(pair.twin.parameters())], full.double())
    pair.train().assert_equal()


def test_a_multiplier_is_a_copy():
    p = nn.Parameter(torch.ones(3))
    mask = torch.tensor([1.0, 2.0, 3.0])
    opt = FusedRepSGD([p], lr=1.0, grad_mults={p: mask})
    mask.zero_()
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [0.0, -1.0, -2.0]


def test_a_multiplier_can_be_changed_and_removed_between_steps(case):
    pair = Pair(case)
    pair.train(3)
    first, second, third = list(pair.ours.parameters())[:3]
    new = GradMult(torch.rand(1, 1, 3, 3) + 0.1)
    pair.opt.set_grad_mult(first, new)
    pair.opt.set_grad_mult(third, None)
    twins = list(pair.twin.parameters())
    pair.masks[twins[0]] = dense(new, first.shape)
    del pair.masks[twins[2]]
    pair.train(3, seed=20).assert_equal()
    assert pair.opt.grad_mult(third) is None
    assert pair.opt.grad_mult(second) is None


def test_spatial_scaling_is_a_second_factor(case):
    pair = Pair(case)
    pair.train(3)
    g = torch.rand(3, 3) + 0.5
    weight, twin = next(pair.ours.parameters()), next(pair.twin.parameters())
    pair.set_scaling(0, g)
    pair.train(3, seed=20).assert_equal(1e-6)  # the product is formed in float32, the dtype of its factors
    assert torch.equal(
        pair.opt.grad_mult(weight).dense(weight.shape).double(),
        dense(pair.mults[weight], weight.shape, torch.float32).double(),
    )
    assert_close(pair.opt.grad_mult(weight, total=True).dense(weight.shape).double(), pair.masks[twin], 1e-6)
    assert "spatial" not in str(pair.opt.state_dict())
    pair.opt.set_spatial_scaling(weight, None)
    assert pair.opt.grad_mult(weight, total=True) is pair.opt.grad_mult(weight)
    assert pair.opt.grad_mult(weight) is not None


def test_repr_and_defaults_are_those_of_sgd():
    p = [nn.Parameter(torch.ones(2))]
    ours, theirs = FusedRepSGD(p, 0.1, 0.9, 0.0, 1e-4, True), torch.optim.SGD(p, 0.1, 0.9, 0.0, 1e-4, True)
    assert isinstance(ours, torch.optim.SGD)
    assert ours.defaults == theirs.defaults
    assert {k: v for k, v in ours.param_groups[0].items() if k != "grad_mults_fingerprint"} == theirs.param_groups[0]


def test_param_groups_splits_by_what_decays():
    class Scaled(nn.Module):
        decayed_vectors = ("identity_scale",)

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.identity_scale, self.conv_scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    decays, does_not = gr.param_groups(nn.Sequential(Scaled(), nn.Linear(3, 2)), 1e-4)
    assert (decays["weight_decay"], does_not["weight_decay"]) == (1e-4, 0.0)
    assert decays["param_names"] == ["0.identity_scale", "0.conv.weight", "1.weight"]
    assert does_not["param_names"] == ["0.conv_scale", "0.conv.bias", "0.norm.weight", "0.norm.bias", "1.bias"]
    assert len(FusedRepSGD([decays, does_not], lr=0.1).param_groups) == 2
    with pytest.raises(ValueError, match=r"weight_decay must not be negative, got -1"):
        gr.param_groups(nn.Linear(2, 2), -1)


# ---- clipping


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clipping_by_the_norm_of_the_csla_model(case, max_norm):
    pair = Pair(case)
    pair.set_grads(0)
    before = [p.grad.clone() for p in pair.ours.parameters()]
    expected = csla_norm(pair.twin.parameters(), pair.masks)
    norm = pair.opt.clip_grad_norm_(max_norm)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(expected, rel=1e-14)
    factor = min(1.0, max_norm / (expected + 1e-6))
    for p, grad in zip(pair.ours.parameters(), before):
        assert_close(p.grad, grad * factor, 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_multipliers_clipping_is_torchs(case, dtype):
    pair = Pair(case, dtype, multiplied=False)
    pair.set_grads(0)
    ours = pair.opt.clip_grad_norm_(2.0)
    theirs = nn.utils.clip_grad_norm_(pair.twin.parameters(), 2.0)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[
        dtype
    ]  # torch sums bf16 norms in bf16
    assert float(ours) == pytest.approx(float(theirs), rel=tolerance)
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.grad, q.grad, tolerance)


def test_clipping_counts_the_spatial_factor_and_skips_what_has_no_gradient(case):
    pair = Pair(case)
    pair.set_grads(0)
    params, twins = list(pair.ours.parameters()), list(pair.twin.parameters())
    g = torch.rand(3, 3, dtype=torch.float64)
    pair.set_scaling(2, g)  # under AdamW it scales gradients, after they have been clipped
    params[4].grad = None
    assert float(pair.opt.clip_grad_norm_(1e9)) == pytest.approx(
        csla_norm(twins[:4] + twins[5:], pair.masks), rel=1e-14
    )


def test_clipping_without_any_gradient(case):
    assert float(Pair(case).opt.clip_grad_norm_(1.0)) == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clipping_a_norm_that_is_not_finite(case, bad):
    pair = Pair(case)
    pair.set_grads(0)
    weight = next(pair.ours.parameters())
    weight.grad.view(-1)[3] = bad
    before = [p.grad.clone() for p in pair.ours.parameters()]
    with pytest.raises(RuntimeError, match=rf"the gradient norm is {bad}, so it cannot be clipped"):
        pair.opt.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert all(torch.equal(p.grad.nan_to_num(), b.nan_to_num()) for p, b in zip(pair.ours.parameters(), before))
    assert not torch.isfinite(pair.opt.clip_grad_norm_(1.0))


# ---- checkpoints


@pytest.mark.parametrize("plain", [True, False])
def test_a_run_resumed_from_a_file_ends_with_the_same_bits(case, plain):
    options = case.plain if plain else case.hyper
    whole, first, second = (Pair(case, torch.float32, hyper=options) for _ in range(3))
    whole.train(6)
    first.train(3)
    weights, state = through_a_file(first.ours.state_dict()), through_a_file(first.opt.state_dict())
    assert state["grad_mults"].keys() == {0, 2, 3, 5, 7}
    second.ours.load_state_dict(weights)
    second.opt.load_state_dict(state)
    second.train(3, seed=13)
    for a, b in zip(whole.ours.parameters(), second.ours.parameters()):
        assert torch.equal(a, b)


def test_checkpoint_to_torchs_optimizer_and_back(case):
    pair = Pair(case, multiplied=False, groups=2, fused=True)
    pair.train(3)
    to_torch, to_ours = through_a_file(pair.opt.state_dict()), through_a_file(pair.oracle.state_dict())
    assert all(not group["fused"] for group in to_torch["param_groups"])
    pair.oracle.load_state_dict(to_torch)
    pair.opt.load_state_dict(to_ours)
    pair.train(3, seed=20).assert_equal()


def test_a_checkpoint_of_a_fused_sgd_does_not_make_ours_unscale():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    set_grads(model.parameters(), 0)
    sgd.step()
    opt = FusedRepSGD(net().parameters(), lr=0.1)
    opt.load_state_dict(sgd.state_dict())
    assert all(group["fused"] is None for group in opt.param_groups)
    assert not getattr(opt, "_step_supports_amp_scaling", False)


def test_grad_mults_are_restored_where_none_are_live(case):
    saved, fresh = Pair(case), Pair(case, multiplied=False)
    saved.train(2)
    fresh.opt.load_state_dict(through_a_file(saved.opt.state_dict()))
    for p, q in zip(saved.ours.parameters(), fresh.ours.parameters()):
        a, b = saved.opt.grad_mult(p), fresh.opt.grad_mult(q)
        assert (a is None) == (b is None)
        assert a is None or a.same(b, p.shape)
    assert (
        fresh.opt.param_groups[0]["grad_mults_fingerprint"] == saved.opt.param_groups[0]["grad_mults_fingerprint"] != 0
    )


def test_fp32_multipliers_survive_a_bf16_model(case):
    """Optimizer.load_state_dict casts state to the parameter's dtype.

    9e-12, the smallest real one, must not become 0 or 2e-4 off.
    """
    model = net(torch.float16)
    weight = next(model.parameters())
    mult = GradMult(torch.full((6, 1, 3, 3), 9.123456e-12))
    opt, fresh = (
        case.make(model.parameters(), grad_mults={weight: mult}),
        case.make(net(torch.float16).parameters()),
    )
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    restored = fresh.grad_mult(fresh.param_groups[0]["params"][0])
    assert restored.dtype == torch.float32
    assert torch.equal(restored.scale, mult.scale)


def test_equal_grad_mults_on_resume_are_no_matter(case):
    saved, live = Pair(case), Pair(case)
    saved.train(2)
    before = live.opt.grad_mult(next(live.ours.parameters()))
    live.opt.load_state_dict(through_a_file(saved.opt.state_dict()))
    assert live.opt.grad_mult(next(live.ours.parameters())) is before
    assert len(live.opt.state) == len(list(live.ours.parameters()))


def test_different_grad_mults_on_resume_are_refused_and_nothing_changed(case):
    saved, live = Pair(case), Pair(case)
    saved.train(2)
    weight = list(live.ours.parameters())[5]
    live.opt.set_grad_mult(weight, torch.rand(8, 1, 5, 5))
    live.opt.set_grad_mult(next(live.ours.parameters()), None)
    state = through_a_file(saved.opt.state_dict())
    message = r"are not the live ones: parameter 5 of shape \[8, 1, 5, 5\] has another one\. Set"
    with pytest.raises(ValueError, match=message):
        live.opt.load_state_dict(state)
    assert not live.opt.state
    first = next(live.ours.parameters())
    assert live.opt.grad_mult(first) is None
    with pytest.warns(UserWarning, match=r"not the live ones, which stay: parameter 5"):
        live.opt.load_state_dict(state, strict=False)
    assert live.opt.state
    # judged per parameter: the one that had none has the checkpoint's, the other its own
    assert live.opt.grad_mult(first).same(saved.mults[next(saved.ours.parameters())], first.shape)
    assert not live.opt.grad_mult(weight).same(saved.mults[list(saved.ours.parameters())[5]], weight.shape)


STAY = (
    r"the checkpoint has none of these live Grad Mults, which stay: "
    r"parameter 0 of shape \[6, 3, 3, 3\], .*, and 1 more$"
)


@pytest.mark.parametrize("torchs", [False, True], ids=["ours", "torchs"])
def test_a_checkpoint_without_multipliers_leaves_the_live_ones_and_names_them(case, torchs):
    pair, live = Pair(case, multiplied=False), Pair(case)
    pair.train(2)
    saved = pair.oracle if torchs else pair.opt
    with pytest.warns(UserWarning, match=STAY):
        live.opt.load_state_dict(through_a_file(saved.state_dict()))
    assert live.opt.grad_mult(next(live.ours.parameters())) is live.mults[next(live.ours.parameters())]
    assert live.opt.param_groups[0]["grad_mults_fingerprint"] != 0


def test_the_fingerprint_tells_of_multipliers_that_a_checkpoint_has_lost(case):
    saved, live = Pair(case), Pair(case, multiplied=False)
    state = saved.opt.state_dict()
    del state["grad_mults"]  # as distributed checkpoint does
    with pytest.raises(ValueError, match="group 0 had some, which the checkpoint has lost, and none are set"):
        live.opt.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.opt.load_state_dict(state)  # the same ones are live


def test_the_fingerprint_tells_that_a_checkpoint_never_had_multipliers(case):
    saved, live = Pair(case, multiplied=False), Pair(case)
    state = saved.opt.state_dict()
    del state["grad_mults"]
    with pytest.warns(UserWarning, match=STAY):
        live.opt.load_state_dict(state)
    assert all(live.opt.grad_mult(p) is mult for p, mult in live.mults.items())


def test_the_fingerprint_tells_other_multipliers_apart(case):
    saved, live = Pair(case), Pair(case)
    live.opt.set_grad_mult(next(live.ours.parameters()), GradMult(torch.ones(3, 3)))
    state = saved.opt.state_dict()
    del state["grad_mults"]
    with pytest.raises(ValueError, match=r"group 0 had some, which the checkpoint has lost, and others are set"):
        live.opt.load_state_dict(state)


def test_a_checkpoint_whose_grad_mults_are_no_grad_mults(case):
    opt = Pair(case, multiplied=False).opt
    for broken, message in (
        ([], "must be a dict, got list"),
        ({0: {"scale": torch.ones(1)}}, "must hold a 'scale' and an 'identity' per parameter: KeyError"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict({**opt.state_dict(), "grad_mults": broken})
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[6, 3, 3, 3\]: scale \[7\] does not broadcast"):
        opt.load_state_dict({**opt.state_dict(), "grad_mults": {0: case.packed(torch.ones(7))}})


@pytest.mark.parametrize("multiplied", [False, True], ids=["none live", "some live"])
def test_a_checkpoint_with_grad_mults_of_parameters_that_are_not_there(case, multiplied):
    opt = Pair(case, multiplied=multiplied).opt
    count = len(opt.param_groups[0]["params"])
    before = opt.state_dict()
    for position in (-1, count, count + 93):
        packed = {**before["grad_mults"], position: case.packed(torch.ones(1))}
        with pytest.raises(ValueError, match=rf"speaks of parameter {position}; this optimizer has {count}"):
            opt.load_state_dict({**before, "grad_mults": packed}, strict=False)
    assert opt.state_dict()["grad_mults"].keys() == before["grad_mults"].keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(case, copied):
    pair = Pair(case, fused=True)
    pair.train(4)  # in the steady state, whose cached plan must not be shared
    twin = copy.copy(pair)
    twin.ours, twin.opt = copied((pair.ours, pair.opt))
    assert twin.opt.param_groups[0]["params"][0] is next(twin.ours.parameters())
    assert twin.opt._step_supports_amp_scaling
    before = [p.detach().clone() for p in pair.ours.parameters()]
    twin.train(3, seed=20).assert_equal()
    assert all(torch.equal(p, b) for p, b in zip(pair.ours.parameters(), before))


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, {}) for case in CASES), (SGD, {"fused": True})],
    ids=[*(c.name for c in CASES), "fused_sgd"],
)
def test_a_pickled_state_of_torchs_optimizer_becomes_ours(case, options):
    torchs = case.oracle(net().parameters(), lr=0.1, **case.hyper, **options)
    opt = case.make.__new__(case.make)
    opt.__setstate__(torchs.__getstate__())
    set_grads(opt.param_groups[0]["params"], 0)
    opt.step()
    assert opt.param_groups[0]["fused"] is None
    assert opt.state_dict()["grad_mults"] == {}


# ---- wrong input


def with_names(model):
    return [{"params": list(model.named_parameters())}]


@pytest.mark.parametrize(
    ("mult", "error", "message"),
    [
        (torch.ones(5, 1, 3, 3), ValueError, r"scale \[5, 1, 3, 3\] does not broadcast to the weight \[6, 3, 3, 3\]"),
        (torch.full((6, 3, 3, 3), -1.0), ValueError, r"a Grad Mult must not be negative, M has -1"),
        (-torch.ones(3, 3), ValueError, r"a Grad Mult must not be negative, scale has -1"),
        (torch.tensor(float("nan")), ValueError, r"scale must be finite, got NaN or inf"),
        (torch.full((6, 3, 3, 3), float("inf")), ValueError, r"M must be finite, got NaN or inf"),
        (
            GradMult(torch.ones(1), torch.ones(5)),
            ValueError,
            r"identity has 5 elements, the weight has 6 output channels",
        ),
        (GradMult(torch.ones(1), torch.full((6,), -2.0)), ValueError, r"a Grad Mult must not be negative, got -1"),
        (2.0, TypeError, r"a Grad Mult must be a GradMult or a Tensor, got float"),
        (torch.ones(1, dtype=torch.complex64), TypeError, r"scale must be real, got torch.complex64"),
    ],
)
def test_a_wrong_multiplier_names_its_parameter(case, mult, error, message):
    model = net()
    weight = next(model.parameters())
    with pytest.raises(error, match=rf"^parameter 0 of shape \[6, 3, 3, 3\]: {message}"):
        case.make(model.parameters(), grad_mults={weight: mult})
    opt = case.make(with_names(model))
    with pytest.raises(error, match=rf"^parameter '0\.weight': {message}"):
        opt.set_grad_mult(weight, mult)
    assert opt.grad_mult(weight) is None


def test_an_identity_on_an_even_kernel(case):
    p = nn.Parameter(torch.ones(2, 2, 4, 3))
    with pytest.raises(
        ValueError, match=r"parameter 0 of shape \[2, 2, 4, 3\]: identity needs an odd kernel, got 4 x 3"
    ):
        case.make([p], grad_mults={p: GradMult(torch.ones(1), torch.ones(2))})


def test_an_unknown_parameter(case):
    model, other = net(), net()
    weight = next(other.parameters())
    message = r"unknown parameter \(shape \[6, 3, 3, 3\]\): it is not in this optimizer's param_groups"
    with pytest.raises(ValueError, match=message):
        case.make(model.parameters(), grad_mults={weight: torch.ones(1)})
    opt = case.make(model.parameters())
    for call in (
        lambda: opt.set_grad_mult(weight, None),
        lambda: opt.grad_mult(weight),
        lambda: opt.set_spatial_scaling(weight, torch.ones(3, 3)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"unknown parameter \(str\)"):
        opt.set_grad_mult("0.weight", torch.ones(1))


def test_one_wrong_multiplier_among_right_ones_changes_nothing(case):
    model = net()
    opt = case.make(model.parameters(), grad_mults=mults(model))
    before = opt.state_dict()["grad_mults"]
    with pytest.raises(ValueError, match="does not broadcast"):
        opt.set_spatial_scaling(next(model.parameters()), torch.ones(5, 5))
    with pytest.raises(ValueError, match=r"a spatial scaling must have shape \[kh, kw\], got \[1, 1, 3, 3\]"):
        opt.set_spatial_scaling(next(model.parameters()), torch.ones(1, 1, 3, 3))
    after = opt.state_dict()["grad_mults"]
    assert before.keys() == after.keys()
    assert all(before[n]["scale"] is after[n]["scale"] for n in before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1"),
        ({"momentum": -0.1}, ValueError, "Invalid momentum value: -0.1"),
        ({"weight_decay": -1e-4}, ValueError, "Invalid weight_decay value: -0.0001"),
        ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ({"grad_mults": [torch.ones(1)]}, TypeError, "grad_mults must map parameters to GradMult or Tensor, got list"),
    ],
)
def test_wrong_hyper_parameters(options, error, message):
    with pytest.raises(error, match=message):
        FusedRepSGD(net().parameters(), **options)


def test_grad_mults_are_no_option_of_a_group(case):
    with pytest.raises(ValueError, match=r"grad_mults is not an option of a parameter group: call set_grad_mult"):
        case.make([{"params": list(net().parameters()), "grad_mults": {}}])
