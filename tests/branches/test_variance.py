"""csla.identity_variance_ratio: by hand, over kinds of blocks, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from cases_csla import random_scales
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import csla, models


def variance(x):
    """Of each channel, summed: the definition, by numpy."""
    return float(x.detach().double().numpy().var(axis=(0, 2, 3)).sum())


def plain(channels=4):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def test_a_hand_counted_case():
    """k x k and 1 x 1 are 0: the output is id ⊙ x. Then a 1 x 1 that doubles x: id² / (id + 2)²."""
    model = csla.hyper_search_model(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)))
    block = model[0]
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv_1x1.weight)
    nn.init.constant_(block.scale_identity.weight, -3.0)
    x = torch.tensor([[[[1.0, 2.0], [5.0, 0.0]]]])
    assert csla.identity_variance_ratio(model, x) == {"0": pytest.approx(1.0)}
    nn.init.constant_(block.conv_1x1.weight, 2.0)
    nn.init.constant_(block.scale_1x1.weight, 1.0)
    assert csla.identity_variance_ratio(model, x) == {"0": pytest.approx(9.0)}


@pytest.mark.parametrize("mode", ["hs", "csla"])
def test_ratios_of_a_network_are_those_of_its_maps(mode):
    scales = random_scales(models.repopt_vgg_small(num_classes=4)) if mode == "csla" else None
    model = models.repopt_vgg_small(mode, 4, scales=scales).train()
    x = torch.randn(5, 3, 9, 7)
    ratios = csla.identity_variance_ratio(model, x)
    assert list(ratios) == ["stage1.1.conv", "stage2.1.conv", "stage2.2.conv"]
    y = model.stage1[0](copy.deepcopy(model.stage0)(x))
    block = model.stage1[1].conv
    expected = variance(block.scale_identity.weight.view(-1, 1, 1) * y) / variance(block(y))
    assert ratios["stage1.1.conv"] == pytest.approx(expected, rel=1e-6)


def test_constant_branches_count():
    model = csla.hyper_search_model(plain(), branches="qarepvgg")
    x = torch.randn(3, 4, 5, 6)
    assert model[0].scale_identity is None
    value = float(model[0].constants[0])
    expected = variance(value * x) / variance(model[0](x))
    assert csla.identity_variance_ratio(model, x) == {"0": pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("training", [False, True])
def test_blocks_with_norms(training):
    model = gr.models.repvgg_model(plain()).train(training)
    nn.init.uniform_(model[0].norm_identity.weight)
    x = torch.randn(3, 4, 5, 6)
    expected = variance(copy.deepcopy(model[0].norm_identity)(x)) / variance(copy.deepcopy(model[0])(x))
    assert csla.identity_variance_ratio(model, x) == {"0": pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("se", [False, True])
def test_residual_blocks(se):
    model = models.resnet18(4, se=se).eval()
    x = torch.randn(2, 3, 9, 8)
    ratios = csla.identity_variance_ratio(model, x)
    assert list(ratios) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    x = F.relu(model.bn1(model.conv1(x)))
    block = model.layer1[0]
    y = block.se(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert ratios["layer1.0"] == pytest.approx(variance(x) / variance(x + y), rel=1e-6)
    assert list(csla.identity_variance_ratio(models.resnet50(4).eval(), torch.randn(2, 3, 9, 8)))[:2] == [
        "layer1.1",
        "layer1.2",
    ]


def test_preactivated_blocks():
    model = models.preact_resnet18(4).eval()
    x = torch.randn(2, 3, 9, 8)
    ratios = csla.identity_variance_ratio(model, x)
    x = model.conv1(x)
    assert ratios["layer1.0"] == pytest.approx(variance(x) / variance(model.layer1[0](x)), rel=1e-6)


def test_depth_makes_the_identity_heavier():
    """Figure 4: √(2/l) makes later blocks of a stage weigh less, and the identity more. Scales of 1 do not."""
    x, by_init = torch.randn(8, 3, 16, 16), {}
    for init in ("depth", 1.0):
        torch.manual_seed(0)
        model = csla.hyper_search_model(models.repopt_vgg_deep(num_classes=4), init)
        ratios = csla.identity_variance_ratio(model, x)
        by_init[init] = [value for name, value in ratios.items() if name.startswith("stage1")]
    assert by_init["depth"][-1] > by_init["depth"][0] + 0.2
    assert max(by_init[1.0]) - min(by_init[1.0]) < 0.2


def test_nothing_of_the_model_moves():
    model = nn.Sequential(models.repopt_vgg_small("hs", 4), nn.Dropout(0.5)).train()
    model[0].stage2.eval()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    model[0].stage1[1].conv.register_forward_pre_hook(lambda *args: calls.append(2))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state, x = torch.get_rng_state(), torch.randn(2, 3, 8, 8)
    torch.set_rng_state(state)
    first = csla.identity_variance_ratio(model, (x,))
    with pytest.raises(RuntimeError):
        csla.identity_variance_ratio(model, torch.randn(2, 5, 8, 8))
    torch.set_rng_state(state)
    assert csla.identity_variance_ratio(torch.optim.swa_utils.AveragedModel(model), x) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert modes == [module.training for module in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_residual_blocks_of_other_code():
    """They say where their sum is. Their input is taken before they write over it."""

    class Block(nn.Module):
        residual = "branch"

        def __init__(self):
            super().__init__()
            self.branch = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            kept = x.clone()
            x.zero_()
            return self.branch(kept) + kept

    model = nn.Sequential(Block())
    x = torch.randn(3, 4, 5, 6)
    expected = variance(x) / variance(x + model[0].branch(x))
    assert csla.identity_variance_ratio(model, x.clone()) == {"0": pytest.approx(expected, rel=1e-6)}


def test_models_without_an_answer():
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="the model has no block with an identity path"):
        csla.identity_variance_ratio(plain(), x)
    with pytest.raises(ValueError, match="does not vary over the example, or is not finite: 0"):
        csla.identity_variance_ratio(csla.hyper_search_model(plain()), torch.zeros_like(x))

    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = csla.hyper_search_model(plain())

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"calls none of the blocks with an identity path: inside\.0"):
        csla.identity_variance_ratio(Elsewhere(), x)
