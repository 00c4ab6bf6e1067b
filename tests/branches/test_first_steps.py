"""What a newcomer meets: `repr` of scales and multipliers, common mistakes, and a forgotten half of the method."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import csla

# ---- repr


def test_repr_of_branch_scales():
    scales = gr.BranchScales(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-0.5, -0.5, -0.5]), True)
    assert repr(scales) == "BranchScales([3]: kxk 3 (1 to 6), one_by_one -0.5 (-0.5), identity not searched)"
    searched = gr.BranchScales(torch.ones(2), None, torch.tensor([0.25, 0.75]))
    assert repr(searched) == "BranchScales([2]: kxk 1 (1), identity 0.5 (0.25 to 0.75))"
    assert repr(gr.BranchScales(torch.ones(2))) == "BranchScales([2]: kxk 1 (1))"


def test_repr_of_a_grad_mult():
    mult = gr.GradMult(torch.linspace(0, 4, 18).view(2, 1, 3, 3), torch.tensor([1.0, 2.0]))
    assert repr(mult) == "GradMult(scale[2, 1, 3, 3] 0 to 4, identity[2] 1 to 2, float32, 80 bytes)"
    big = gr.GradMult(torch.ones(64, 1, 5, 5, dtype=torch.float64))
    assert repr(big) == "GradMult(scale[64, 1, 5, 5] 1, float64, 12,800 bytes)"


def unfinished(kind):
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: unfinished(gr.GradMult), "GradMult(not whole)"),
        (lambda: unfinished(gr.BranchScales), "BranchScales(not whole)"),
        (lambda: gr.GradMult(torch.ones(0, 1, 3, 3)), "GradMult(scale[0, 1, 3, 3] no values, float32, 0 bytes)"),
        (lambda: gr.BranchScales(torch.ones(0)), "BranchScales([0]: kxk nan (no values))"),
        (
            lambda: gr.GradMult.of_parts(torch.ones(2, 1, 1, 1, device="meta"), None),
            "GradMult(scale[2, 1, 1, 1] no val",
        ),
    ],
)
def test_repr_never_raises(make, text):
    assert repr(make()).startswith(text)


def test_repr_of_meta_scales():
    scales = gr.BranchScales(torch.ones(4))
    scales.kxk = torch.ones(4, device="meta")
    assert repr(scales) == "BranchScales([4]: kxk ? (no values))"


# ---- mistakes


def net():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)),
    )


def scaled_net():
    torch.manual_seed(0)
    model = net()
    model(torch.zeros(1, 3, 4, 4))  # lazy
    for norm in (model[1], model[4]):
        norm.reset_running_stats()
    return model, csla.extract_scales(csla.hyper_search_model(model, init=1.5))


@pytest.mark.parametrize(
    ("make", "kind"), [(lambda m: m.parameters(), "generator"), (lambda m: m.state_dict(), "OrderedDict")]
)
def test_param_groups_takes_the_model(make, kind):
    with pytest.raises(TypeError, match=rf"model must be an nn\.Module, got {kind}: param_groups\(model, 4e-5\) takes"):
        gr.param_groups(make(scaled_net()[0]), 1e-4)


def test_an_optimizer_does_not_take_the_model():
    with pytest.raises(TypeError, match=r"got a Sequential: pass param_groups\(model, weight_decay\), or model\.para"):
        gr.FusedRepSGD(net(), lr=0.1)


# ---- one half of the method


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()


def test_forgotten_multipliers_are_told_once():
    model, scales = scaled_net()
    csla.reinitialize(model, scales)
    optimizer = gr.FusedRepSGD(gr.param_groups(model, 1e-4), lr=0.1)
    message = r"none for them: parameter '0\.weight', parameter '3\.weight'\. It wants grad_mults=gr\.csla\.grad_mults"
    with pytest.warns(UserWarning, match=message) as heard:
        step(model, optimizer)
    assert heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def multiplied(model, scales):
    return gr.FusedRepSGD(model.parameters(), lr=0.1, grad_mults=csla.grad_mults(model, scales))


def multiplied_later(model, scales):
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    for weight, mult in csla.grad_mults(model, scales).items():
        optimizer.set_grad_mult(weight, mult)
    return optimizer


def restored(model, scales):
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    optimizer.load_state_dict(multiplied(model, scales).state_dict())
    return optimizer


def meant(model, scales):
    return gr.FusedRepSGD(model.parameters(), lr=0.1, grad_mults={})


def copied(model, scales):
    return pickle.loads(pickle.dumps(multiplied(model, scales)))


@pytest.mark.parametrize("make", [multiplied, multiplied_later, restored, meant, copied])
def test_there_is_no_false_alarm(make, no_warnings):
    model, scales = scaled_net()
    csla.reinitialize(model, scales)
    step(model, make(model, scales))


def test_copies_and_loaded_weights_have_no_mark(no_warnings):
    model, scales = scaled_net()
    csla.reinitialize(model, scales)
    resumed = scaled_net()[0]
    resumed.load_state_dict(model.state_dict())
    explicit = csla.csla_model(scaled_net()[0], scales)
    for other in (copy.deepcopy(model), resumed, explicit):
        step(other, gr.FusedRepSGD(other.parameters(), lr=0.1))


def test_partial_multipliers_are_enough():
    model, scales = scaled_net()
    csla.reinitialize(model, scales)
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    optimizer.set_grad_mult(model[0].weight, csla.grad_mults(model, scales)[model[0].weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
