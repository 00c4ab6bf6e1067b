"""FusedRepAdamW alone: torch.optim.AdamW without branches, branch scales, checkpoints and counts of steps."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from typing import Any

import cases
import pytest
import torch
from cases_branches import BLOCKS, searched
from cases_optim import ADAMW, STEADY, served, set_both_grads, set_grads
from files import through_a_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gradrep_kernels as gr
from gradrep_kernels import Branch, BranchScales, csla

AdamW = functools.partial(torch.optim.AdamW, foreach=False)


@pytest.fixture(autouse=True, **served([ADAMW]))
def _backend(request):
    with gr.use_backend(request.param[1]):
        yield


SHAPES = tuple(cases.SHAPES.values())


def parameters(seed: int = 0, shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(cases.tensor(shape, seed + n)) for n, shape in enumerate(shapes)]


def terms(state: dict[str, Any], grad: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """What the update is a quotient of: m may cancel."""
    beta1, beta2 = (float(beta) for beta in options.get("betas", (0.9, 0.999)))
    t = float(state["step"])
    v = state["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"] / (1 - beta2**t)
    return (2 * grad.abs() + state["exp_avg"].abs()) / (1 - beta1**t) / (v.sqrt() + options.get("eps", 1e-8))


# ---- without branches it is torch's


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


PLAIN = {
    "default": {},
    "lr_alone": {"lr": 0.1, "weight_decay": 0.0},
    "amsgrad": {"amsgrad": True, "lr": 0.02},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "without_epsilon": {"eps": 0.0},
    "large_epsilon": {"eps": 1.0, "lr": 1.0},
    "short_memory": {"betas": (0.2, 0.5)},
    "at_the_turn_of_lerp": {"betas": (0.5, 0.9)},
    "no_memory": {"betas": (0.0, 0.0), "eps": 1e-3},
    "tensor_lr": {"lr": double(0.05), "weight_decay": 0.0},
    "betas_in_tensors": {"betas": (double(0.8), double(0.95)), "lr": double(0.05), "weight_decay": 0.0},
    "all": {"lr": 0.02, "betas": (0.3, 0.7), "eps": 1e-2, "weight_decay": 0.2, "amsgrad": True, "maximize": True},
}


@pytest.mark.parametrize("options", PLAIN)
def test_each_step_is_torchs(options):
    """Each from torch's state, to 1e-15 of what it is a sum of. With ε = 0 no gradient is zero here."""
    options = PLAIN[options]
    ours, theirs = parameters(), parameters()
    opt, adamw = gr.FusedRepAdamW(ours, **options), AdamW(theirs, **options)
    lr = float(options.get("lr", 1e-3))
    for step in range(STEADY + 1):
        set_both_grads(ours, theirs, step)
        before = [q.detach().clone() for q in theirs]
        opt.step()
        adamw.step()
        for p, q, old in zip(ours, theirs, before):
            if not p.numel():
                continue
            assert p.grad is not None
            bound = torch.stack([old.abs(), q.abs(), 2 * lr * terms(adamw.state[q], p.grad, options)]).amax(0)
            assert bool(((p - q).abs() <= cases.FLOAT64_TOLERANCE * bound).all())
            for key, value in adamw.state[q].items():
                assert torch.allclose(opt.state[p][key], value, rtol=1e-14, atol=1e-15), key
                opt.state[p][key].copy_(value)
        with torch.no_grad():
            for p, q in zip(ours, theirs):
                p.copy_(q)


def test_signature_and_defaults_are_torchs():
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    own = inspect.signature(gr.FusedRepAdamW.__init__).parameters
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default, name
        assert own[name].kind == parameter.kind, name
    assert set(own) - set(theirs) == {"branch_scales", "max_grad_norm", "ema_decay"}
    opt = gr.FusedRepAdamW(parameters())
    assert isinstance(opt, torch.optim.AdamW)
    assert repr(opt).startswith("FusedRepAdamW (")
    assert opt.defaults.items() >= AdamW(parameters()).defaults.items() - {("foreach", False)}


WRONG = {
    "lr": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1"),
    "beta": ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    "eps": ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
    "decay": ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
    "grad_mults": ({"grad_mults": {}}, TypeError, "unexpected keyword argument 'grad_mults'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options(wrong):
    options, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        gr.FusedRepAdamW(parameters(), **options)


# ---- branch scales


def scaled(seed: int = 0, live: bool = True):
    """Two weights with branches of every kind and a bias, under an optimizer."""
    params = parameters(seed, ((8, 8, 5, 5), (6, 4), (8,)))
    generator = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randn(8, generator=generator) for _ in range(4))
    conv = BranchScales(a, b, c, others=[Branch(d, 3, 2), Branch(b, (1, 5))], constant_average=0.5)
    scales = {params[0]: conv, params[1]: BranchScales(a[:6].double(), one_by_one=b[:6])}
    opt = gr.FusedRepAdamW(params, lr=0.01, eps=1e-3, amsgrad=True, branch_scales=scales if live else None)
    return params, opt, scales


def train(params, *optimizers, steps: int = STEADY, seed: int = 0) -> None:
    for step in range(steps):
        for opt in optimizers:
            set_grads(params if len(optimizers) == 1 else opt.param_groups[0]["params"], seed + step)
            opt.step()


def test_branch_scales_are_given_back_set_and_removed():
    params, opt, scales = scaled()
    assert opt.branch_scales(params[0]) is scales[params[0]]
    assert opt.branch_scales(params[2]) is None
    m = opt.grad_mult(params[0])
    expected = scales[params[0]].grad_mult(5)
    torch.testing.assert_close(m.scale.float(), expected.scale, rtol=1e-7, atol=0)
    assert torch.equal(m.identity, torch.ones(8, dtype=m.identity.dtype))
    twins, plain = parameters(0, ((8, 8, 5, 5), (6, 4), (8,))), {"lr": 0.01, "eps": 1e-3, "amsgrad": True}
    for p in params:
        opt.set_branch_scales(p, None)
    adamw = AdamW(twins, **plain)
    train(params, opt)
    train(twins, adamw)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    opt.set_branch_scales(params[0], scales[params[0]])
    train(params, opt)
    train(twins, adamw)
    assert float((params[0] - twins[0]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(3, 3), (5, 3)])
def test_spatial_scaling_without_branches_scales_the_gradient(shape):
    (p,), (q,) = (parameters(0, ((8, 4, *shape),)) for _ in range(2))
    g = cases.tensor(shape, 3).abs().float()
    opt, adamw = (make([w], lr=0.01, eps=1e-3) for make, w in ((gr.FusedRepAdamW, p), (AdamW, q)))
    opt.set_spatial_scaling(p, g)
    for step in range(2 * STEADY):
        set_both_grads([p], [q], step)
        assert q.grad is not None
        q.grad *= g.double()
        opt.step()
        adamw.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)
    assert opt.grad_mult(p) is None
    assert opt.branch_scales(p) is None


REFUSED = {
    "grad_mult": (lambda: gr.GradMult(torch.ones(8, 1, 1, 1)), TypeError, "AdamW needs the BranchScales of a weight"),
    "tensor": (lambda: torch.ones(8, 1, 1, 1), TypeError, "AdamW needs the BranchScales of a weight.*got Tensor"),
    "channels": (
        lambda: BranchScales(torch.ones(7)),
        ValueError,
        "the scales have 7 channels, the weight has 8 output channels",
    ),
    "outside": (
        lambda: BranchScales(torch.ones(8), others=[Branch(torch.ones(8), 5, 2)]),
        ValueError,
        "reaches 9 x 9 taps, more than the 5 x 5 kernel has",
    ),
    "overflow": (lambda: BranchScales(torch.full((8,), 1e30)), ValueError, "the squares of the scales overflow"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_branch_scales_that_do_not_fit_change_nothing(what):
    make, error, message = REFUSED[what]
    params, opt, scales = scaled()
    with pytest.raises(error, match=f"parameter 0 of shape .*{message}"):
        opt.set_branch_scales(params[0], make())
    assert opt.branch_scales(params[0]) is scales[params[0]]
    with pytest.raises(error, match=message):
        gr.FusedRepAdamW(params, branch_scales={params[0]: make()})
    with pytest.raises(ValueError, match=r"branch scales need a weight \[O, I, kh, kw\] or \[O, I\], got \[8\]"):
        opt.set_branch_scales(params[2], BranchScales(torch.ones(8)))


def test_scales_for_sgd_are_refused_by_it_with_what_to_give():
    params, _, scales = scaled()
    with pytest.raises(TypeError, match=r"got BranchScales: gr\.csla\.grad_mults\(model, scales\)"):
        gr.FusedRepSGD(params, grad_mults=scales)


# ---- checkpoints


def same_scales(a: BranchScales, b: BranchScales) -> bool:
    mine, others = a.tensors(), b.tensors()
    return (
        mine.keys() == others.keys()
        and all(torch.equal(t, others[name]) and t.dtype == others[name].dtype for name, t in mine.items())
        and [(x.kernel_size, x.dilation) for x in a.others] == [(x.kernel_size, x.dilation) for x in b.others]
        and (a.identity is True) == (b.identity is True)
        and (a.constant_identity, a.constant_average) == (b.constant_identity, b.constant_average)
    )


@pytest.mark.parametrize("ends", ["with_live_ones", "without"])
def test_a_run_resumed_from_a_file_ends_with_the_same_bits(ends):
    params, opt, scales = scaled()
    train(params, opt)
    saved = through_a_file({"model": [p.detach() for p in params], "optimizer": opt.state_dict()})
    resumed, fresh, _ = scaled(seed=50, live=ends == "with_live_ones")
    with torch.no_grad():
        for p, value in zip(resumed, saved["model"]):
            p.copy_(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(saved["optimizer"])
    for p, q in zip(params, resumed):
        restored = fresh.branch_scales(q)
        assert (p in scales) == (restored is not None)
        assert restored is None or same_scales(restored, scales[p])
    train(params, opt, seed=20)
    train(resumed, fresh, seed=20)
    for p, q in zip(params, resumed):
        assert torch.equal(p, q)


CONSTANT = [case for case in BLOCKS if case.name in ("qarepvgg", "repvit", "average_stride2", "list", "unireplk_7")]


@pytest.mark.parametrize("case", CONSTANT, ids=lambda case: case.name)
def test_a_checkpoint_has_every_branch(case):
    plain = case.plain()
    scales = csla.branch_scales(plain, searched(plain, case.branches))
    opt, fresh = gr.FusedRepAdamW(plain.parameters(), branch_scales=scales), gr.FusedRepAdamW(plain.parameters())
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert same_scales(fresh.branch_scales(plain[3].weight), scales[plain[3].weight])


def test_other_branch_scales_in_a_checkpoint_are_refused():
    params, opt, _ = scaled()
    train(params, opt)
    saved = through_a_file(opt.state_dict())
    others, live, scales = scaled(seed=50)
    value = scales[others[0]]
    # Σ α² and the taps are the same. As one branch of 5 x 5 they give another step of AdamW.
    squares = value.grad_mult(5).scale[:, 0]
    assert not live.state
    merged = BranchScales(squares[:, 0, 1].sqrt(), identity=True)
    live.set_branch_scales(others[0], merged)
    before = [p.detach().clone() for p in others]
    with pytest.raises(ValueError, match=r"not the live ones: parameter 0 of shape .* has another one"):
        live.load_state_dict(saved)
    assert not live.state
    assert live.branch_scales(others[0]) is merged
    with pytest.warns(UserWarning, match="not the live ones, which stay: parameter 0"):
        live.load_state_dict(saved, strict=False)
    assert live.branch_scales(others[0]) is merged
    assert all(torch.equal(p, b) for p, b in zip(others, before))
    negated = value.mapped(torch.neg)  # of another sign: |α| decides
    live.set_branch_scales(others[0], negated)
    live.load_state_dict(saved)
    assert live.branch_scales(others[0]) is negated


def test_two_ways_to_the_same_sum_of_squares_are_told_apart():
    a = torch.full((4,), 0.6)
    one, two = BranchScales(torch.ones(4)), BranchScales(a, others=[Branch(torch.full((4,), 0.8), 3)])
    params = parameters(0, ((4, 2, 3, 3),))
    opt, other = (gr.FusedRepAdamW(params, branch_scales={params[0]: value}) for value in (one, two))
    assert torch.allclose(opt.grad_mult(params[0]).scale, other.grad_mult(params[0]).scale)
    with pytest.raises(ValueError, match="has another one"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("way", ["sgd_to_adamw", "adamw_to_sgd", "plain_sgd_to_adamw", "plain_adamw_to_sgd"])
def test_a_checkpoint_of_the_other_optimizer(way):
    params, opt, scales = scaled(live=way != "plain_adamw_to_sgd")
    mults = {} if way.startswith("plain") else {p: scales[p].grad_mult(5) for p in params[:1]}
    sgd = gr.FusedRepSGD(params, lr=0.1, momentum=0.9, grad_mults=mults)
    train(params, opt)
    train(params, sgd)
    source, target = (opt, sgd) if way.endswith("to_sgd") else (sgd, opt)
    before = copy.deepcopy(target.state_dict())
    messages = {
        "sgd_to_adamw": "the checkpoint is of FusedRepSGD: its Grad Mults do not determine a step of AdamW",
        "adamw_to_sgd": "the checkpoint is of FusedRepAdamW: its branch scales are no Grad Mults of this optimizer",
        "plain_sgd_to_adamw": "is of another optimizer than FusedRepAdamW: its groups have no betas and no eps",
        "plain_adamw_to_sgd": "is of another optimizer than FusedRepSGD: its groups have no momentum",
    }
    with pytest.raises(ValueError, match=messages[way]):
        target.load_state_dict(through_a_file(source.state_dict()))
    after = target.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for n, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][n][key]) for key, value in entry.items())


TORCHS = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "amsgrad": {"amsgrad": True},
}


@pytest.mark.parametrize("helper", ["file", "distributed"])
@pytest.mark.parametrize("kind", TORCHS)
def test_checkpoints_of_torchs_and_back_in_mid_run(kind, helper):
    """They go on alike, whatever torch's was made for."""
    torch.manual_seed(0)
    options = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "amsgrad": kind == "amsgrad"}
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2)).double()]
    models += [copy.deepcopy(models[0]) for _ in range(3)]
    theirs, ours, back, onward = models
    # torch's capturable step runs on a GPU alone, so here it is a mark in the groups.
    made = {**options, **({} if kind == "capturable" else TORCHS[kind])}
    adamw = torch.optim.AdamW(theirs.parameters(), **{"foreach": False, **made})
    opt = gr.FusedRepAdamW(ours.parameters(), lr=0.5)

    def carry(source, optimizer, target, other):
        target.load_state_dict(source.state_dict())
        if helper == "file":
            other.load_state_dict(through_a_file(optimizer.state_dict()))
        else:
            set_optimizer_state_dict(target, other, through_a_file(get_optimizer_state_dict(source, optimizer)))

    train(list(theirs.parameters()), adamw)
    if kind == "capturable":
        adamw.param_groups[0]["capturable"] = True
    carry(theirs, adamw, ours, opt)
    opt.param_groups[0]["capturable"] = adamw.param_groups[0]["capturable"] = False
    assert not opt.param_groups[0]["fused"]
    assert not getattr(opt, "_step_supports_amp_scaling", False)
    train(list(theirs.parameters()), adamw, seed=10)
    train(list(ours.parameters()), opt, seed=10)
    second = AdamW(back.parameters())
    carry(ours, opt, back, second)
    assert second.param_groups[0]["lr"] == 0.01
    third = gr.FusedRepAdamW(onward.parameters())
    carry(ours, opt, onward, third)
    finished = ((theirs, adamw), (ours, opt), (back, second), (onward, third))
    for model, optimizer in finished:
        train(list(model.parameters()), optimizer, seed=20)
    for model, optimizer in finished:
        for p, q in zip(theirs.parameters(), model.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
            assert float(optimizer.state[q]["step"]) == 3 * STEADY


# ---- counts of steps


@pytest.mark.parametrize("to", ["file", "copy"])
def test_each_parameter_has_its_own_count_in_a_checkpoint(to):
    """Here they are elements of one array, which goes on counting."""
    params, opt, _ = scaled()
    train(params, opt)
    assert len({opt.state[p]["step"].untyped_storage().data_ptr() for p in params}) == 1
    assert len({opt.state[p]["step"].data_ptr() for p in params}) == len(params)
    saved = opt.state_dict() if to == "copy" else through_a_file(opt.state_dict())
    counts = [saved["state"][n]["step"] for n in range(len(params))]
    assert len({count.data_ptr() for count in counts}) == len(params)
    assert all(count.dtype == torch.float32 and count.shape == () and float(count) == STEADY for count in counts)
    counts[0].add_(1)
    assert float(opt.state[params[0]]["step"]) == STEADY
    fresh = gr.FusedRepAdamW(params)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    train(params, fresh)
    assert len({fresh.state[p]["step"].untyped_storage().data_ptr() for p in params}) == 1
    assert {float(fresh.state[p]["step"]) for p in params} == {2 * STEADY}


def reset_the_first(params, opt):
    state = opt.state[params[0]]
    for key in ("step", "exp_avg", "exp_avg_sq"):
        state[key].zero_()


def ten_more(params, opt):
    for p in params:
        opt.state[p]["step"] += 10


def replace_one(params, opt):
    opt.state[params[1]]["step"] = torch.tensor(100.0)


@pytest.mark.parametrize("edit", [reset_the_first, ten_more, replace_one])
@pytest.mark.parametrize("before", [1, STEADY])
def test_counts_that_a_user_writes_to(edit, before):
    """Each is its parameter's own, whether or not the steps are planned."""
    ours, theirs = (parameters(0, ((4, 3, 3, 3), (5, 4), (6,))) for _ in range(2))
    opt, adamw = (make(params, lr=0.05) for make, params in ((gr.FusedRepAdamW, ours), (AdamW, theirs)))
    for step in range(before + STEADY):
        if step == before:
            edit(ours, opt)
            edit(theirs, adamw)
        set_both_grads(ours, theirs, step)
        opt.step()
        adamw.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
        assert float(opt.state[p]["step"]) == float(adamw.state[q]["step"])


def test_counts_that_part_after_the_step_was_compiled():
    ours, theirs = ([nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)] for _ in range(2))
    opt, adamw = gr.FusedRepAdamW(ours, lr=torch.tensor(0.1)), AdamW(theirs, lr=torch.tensor(0.1))
    step = opt.step
    for number in range(5):
        if number == 1:
            step = torch.compile(opt.step, backend="eager")
        set_both_grads(ours, theirs, number)
        if number == 2:
            ours[1].grad = theirs[1].grad = None
        step()
        adamw.step()
    assert [float(opt.state[p]["step"]) for p in ours] == [5, 4]
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_of_which_a_part_is_missing_is_refused(key):
    params, opt, _ = scaled()
    train(params, opt)
    saved = opt.state_dict()
    del saved["state"][1][key]
    fresh = gr.FusedRepAdamW(params)
    with pytest.raises(ValueError, match=rf"the checkpoint has states that cannot go on: parameter 1 .* has no {key}"):
        fresh.load_state_dict(saved)
    assert not fresh.state
    del opt.state[params[1]][key]
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=f"has a state without {key}, so that its update cannot go on"):
        opt.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before))


def test_a_complex_weight_with_an_identity():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.complex128, generator=generator))
    real, imaginary = (nn.Parameter(part.detach().clone()) for part in (p.real, p.imag))
    scales = gr.BranchScales(torch.full((4,), 0.7).double(), identity=True)
    ours = gr.FusedRepAdamW([p], branch_scales={p: scales})
    parts = gr.FusedRepAdamW([real, imaginary], branch_scales={real: scales, imaginary: scales})
    for _ in range(3):
        p.grad = torch.randn(p.shape, dtype=torch.complex128, generator=generator)
        real.grad, imaginary.grad = p.grad.real.clone(), p.grad.imag.clone()
        ours.step()
        parts.step()
    torch.testing.assert_close(p, torch.complex(real, imaginary), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("how", ["late", "frozen", "dealt", "moved"])
def test_a_parameter_counts_its_own_steps(how):
    ours, theirs = (parameters(0, ((4, 3, 3, 3), (5, 4), (6,))) for _ in range(2))
    opt, adamw = (make(params, lr=0.05) for make, params in ((gr.FusedRepAdamW, ours), (AdamW, theirs)))
    without = {
        "late": [{1}, {1}, {1}, set(), set(), set()],
        "frozen": [set(), set(), {0}, {0}, {0, 1}, set(), set()],
        "dealt": [{0}, {1}, {2}, {0, 1}, set(), {2}],
        "moved": [set(), set(), set(), {2}],
    }[how]
    for step, absent in enumerate([*without, *[set()] * STEADY]):
        set_both_grads(ours, theirs, step)
        for n in absent:
            ours[n].grad = theirs[n].grad = None
        opt.step()
        adamw.step()
        if how == "moved" and step == 1:  # to a group of its own
            for optimizer in (opt, adamw):
                group = optimizer.param_groups[0]
                optimizer.param_groups.append({**group, "params": [group["params"].pop(0)], "lr": 0.1})
        for p, q in zip(ours, theirs):
            assert (p in opt.state) == (q in adamw.state)
            if p in opt.state:
                assert float(opt.state[p]["step"]) == float(adamw.state[q]["step"])
            torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    saved, fresh = through_a_file(opt.state_dict()), gr.FusedRepAdamW(ours)
    if how != "moved":
        fresh.load_state_dict(saved)
        assert [float(fresh.state[p]["step"]) for p in ours] == [float(adamw.state[q]["step"]) for q in theirs]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_branches_and_counts_of_its_own(copied):
    params, opt, scales = scaled()
    train(params, opt, steps=2)
    params[1].grad = None
    opt.step()
    twins, twin = copied((params, opt))
    for p, q in zip(params, twins):
        assert twin.state[q]["step"] is not opt.state[p]["step"]
        assert p not in scales or same_scales(twin.branch_scales(q), scales[p])
    train(params, opt, seed=30)
    assert [float(twin.state[q]["step"]) for q in twins] == [3, 2, 3]
    train(twins, twin, seed=30)
    for p, q in zip(params, twins):
        assert torch.equal(p, q)
    assert [float(opt.state[p]["step"]) for p in params] == [3 + STEADY, 2 + STEADY, 3 + STEADY]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(1)], "branch_scales must map parameters to BranchScales, got list"),
        (
            {"0": gr.BranchScales(torch.ones(2))},
            r"these go by name: branch_scales=gr\.csla\.branch_scales\(model, scales\)",
        ),
    ],
)
def test_branch_scales_that_are_no_mapping_of_parameters(given, message):
    with pytest.raises(TypeError, match=message):
        gr.FusedRepAdamW([nn.Parameter(torch.ones(2, 3))], branch_scales=given)


def test_what_is_said_where_scales_are_forgotten():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
    scales = {"0": gr.BranchScales(torch.ones(2), torch.ones(2), True)}
    gr.csla.reinitialize(model, scales)
    optimizer = gr.FusedRepAdamW(gr.param_groups(model, 0.0))
    model(torch.randn(2, 2, 4, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"It wants branch_scales=gr\.csla\.branch_scales\(model, scales\)"):
        optimizer.step()
