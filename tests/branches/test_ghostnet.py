"""RepOpt-GhostNet: layers and names as published, its forms, and CSLA = GR on the published scales."""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch
from cases_csla import EQUIVALENCE_TOLERANCE, FORWARD_TOLERANCE, official, randomise_norms
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import BranchScales, csla
from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.normed import NormedBranches
from gradrep_kernels.models.repopt_ghostnet import Bottleneck, GhostModule

pytestmark = pytest.mark.usefixtures("no_warnings")

# README of RepGhost: width: millions of parameters, and of multiplications for one image of 224 x 224.
PUBLISHED_SIZES = {
    0.5: (2.3, 43),
    0.58: (2.5, 60),
    0.8: (3.3, 96),
    1.0: (4.1, 142),
    1.11: (4.5, 170),
    1.3: (5.5, 231),
    1.5: (6.6, 301),
    2.0: (9.8, 516),
}
# sha256 of the lines 'name shape' of the state_dict of the published 0.5x target form, sorted.
PUBLISHED_STATE = "986d2022d39c6eb81be10c6c1f90fe222a048095d6329236dc0e390f13f52786"
SCALES_FILE = "RepOptGhostNet_0_5x_scales.pth"
FORMS = ("hs", "csla", "rep")
# Ghost modules of each of RepGhost's 9 stages of bottlenecks, two in each bottleneck.
GHOSTS = [
    f"blocks.{stage}.{n}.ghost{m}"
    for stage, count in enumerate([1, 1, 1, 1, 1, 1, 5, 1, 4])
    for n in range(count)
    for m in (1, 2)
]
CONVS = [f"{ghost}.cheap_operation.0" for ghost in GHOSTS]


def small(mode="target", num_classes=5, scales=None, **options):
    return gr.models.repopt_ghostnet_0_5x(mode, num_classes, scales, **options)


@functools.cache
def published_scales():
    """In float64, so that squares are not rounded to float32."""
    loaded = csla.load_scales(official(SCALES_FILE))
    return {name: BranchScales(v.kxk.double(), None, v.identity.double()) for name, v in loaded.items()}


def drawn_scales():
    def vector(channels):
        return torch.rand(channels, dtype=torch.float64) + 0.3

    widths = {name: small().get_submodule(name).out_channels for name in CONVS}
    return {name: BranchScales(vector(width), None, vector(width)) for name, width in widths.items()}


def form(mode, **options):
    return small(mode, scales=drawn_scales() if mode == "csla" else None, **options)


# ---- layers and names


@pytest.mark.parametrize("width", PUBLISHED_SIZES)
def test_sizes_are_the_published_ones(width):
    """They count all parameters, and the multiplications and biases of convolutions and linear layers."""
    with torch.device("meta"):
        model = gr.models.repopt_ghostnet(width=width).eval()
    operations = 0

    def count(module, inputs, output):
        nonlocal operations
        operations += output.numel() * (module.weight[0].numel() + (module.bias is not None))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    parameters = sum(p.numel() for p in model.parameters())
    assert (round(parameters / 1e6, 1), round(operations / 1e6)) == PUBLISHED_SIZES[width]
    if width == 0.5:
        assert (parameters, operations) == (2_309_008, 43_318_244)


def test_published_weights_fit():
    state = gr.models.repopt_ghostnet_0_5x().state_dict()
    lines = sorted(f"{name} {list(value.shape)}" for name, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED_STATE


def test_a_bottleneck_by_hand():
    """Stage 4: stride 2, 5x5, squeeze-and-excitation, another width."""
    block = small().blocks[3][0].double()
    randomise_norms(block)
    block.eval()
    state = {name: value.detach() for name, value in block.state_dict().items()}

    def norm(y, name):
        weight, bias, mean, var = (
            state[f"{name}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    def ghost(y, name, act):
        y = act(norm(F.conv2d(y, state[f"{name}.primary_conv.0.weight"]), f"{name}.primary_conv.1"))
        depthwise = state[f"{name}.cheap_operation.0.weight"]
        return act(norm(F.conv2d(y, depthwise, padding=1, groups=len(depthwise)), f"{name}.final_bn"))

    x = torch.randn(2, 12, 16, 16, dtype=torch.float64)
    y = ghost(x, "ghost1", F.relu)
    y = norm(F.conv2d(y, state["conv_dw.weight"], stride=2, padding=2, groups=20), "bn_dw")
    mean = y.mean((2, 3), keepdim=True)
    gate = F.relu(F.conv2d(mean, state["se.conv_reduce.weight"], state["se.conv_reduce.bias"]))
    gate = F.conv2d(gate, state["se.conv_expand.weight"], state["se.conv_expand.bias"])
    y = ghost(y * ((gate + 3).clamp(0, 6) / 6), "ghost2", lambda v: v)
    around = norm(F.conv2d(x, state["shortcut.0.weight"], stride=2, padding=2, groups=12), "shortcut.1")
    expected = y + norm(F.conv2d(around, state["shortcut.2.weight"]), "shortcut.3")
    assert expected.shape == (2, 20, 8, 8)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=FORWARD_TOLERANCE)


def test_a_bottleneck_that_keeps_its_shape_adds_its_input():
    block = small().blocks[8][0].eval()
    assert isinstance(block, Bottleneck)
    x = torch.randn(2, 80, 4, 4)
    torch.testing.assert_close(block(x), block.ghost2(block.ghost1(x)) + x)


def test_the_network_by_hand():
    """In eval mode, and in train mode, where dropout draws."""
    model = small(in_channels=1).double()
    x = torch.randn(3, 1, 40, 72, dtype=torch.float64)

    def features():
        y = model.blocks(F.relu(model.bn1(F.conv2d(x, model.conv_stem.weight, stride=2, padding=1))))
        return F.relu(F.linear(y.mean((2, 3)), model.conv_head.weight[..., 0, 0], model.conv_head.bias))

    for training in (False, True):
        model.train(training)
        torch.manual_seed(4)
        expected = model.classifier(F.dropout(features()[..., None, None], 0.2, training).flatten(1))
        torch.manual_seed(4)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=FORWARD_TOLERANCE)
    assert not torch.equal(model(x), model(x))
    model = small(dropout=0.0)
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(model(x), model(x))


# ---- forms


@pytest.mark.parametrize("mode", FORMS)
def test_forms_have_branches_in_the_ghost_modules_alone(mode):
    torch.manual_seed(3)
    plain = small()
    scales = drawn_scales()
    torch.manual_seed(3)
    model = small(mode, scales=scales if mode == "csla" else None)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, (CSLABlock, NormedBranches))}
    assert list(blocks) == CONVS
    for name, block in blocks.items():
        norm = model.get_submodule(name.replace("cheap_operation.0", "final_bn"))
        assert sum(isinstance(m, nn.Conv2d) for m in block.modules()) == 1
        if mode == "rep":
            assert isinstance(block.norm_identity, nn.BatchNorm2d)
            assert isinstance(norm, nn.Identity)
        else:
            assert block.scale_identity.weight.requires_grad
            assert isinstance(block.scale_conv.weight, nn.Parameter) == (mode == "hs")
            assert isinstance(norm, nn.BatchNorm2d)
    # The plain network is drawn the same in every mode.
    again = csla.merge(model).state_dict()
    for name in ("conv_stem.weight", "blocks.6.1.ghost2.primary_conv.0.weight", "classifier.weight"):
        assert torch.equal(plain.state_dict()[name], again[name])


def test_search_starts_as_published():
    """√(2 / (i + 1)), i from 1 in each run of bottlenecks of one shape; identity scales start at 1."""
    scales = csla.extract_scales(small("hs"))
    assert list(scales) == CONVS
    # 0.0 | 1.0, 2.0 | 3.0, 4.0 | 5.0 to 6.2, whose first changes the shape | 6.3, 6.4 | 7.0 to 8.3
    expected = [1, 2, *range(1, 5), *range(1, 5), *range(1, 9), *range(1, 5), *range(1, 11)]
    assert len(expected) == len(CONVS)
    for value, i in zip(scales.values(), expected):
        assert torch.equal(value.kxk, torch.full_like(value.kxk, math.sqrt(2 / (i + 1))))
        assert torch.equal(value.identity, torch.ones_like(value.identity))
        assert value.one_by_one is None


def test_published_search_hardly_moved_the_last_scales():
    """Which shows where they started: those of the last stage are within 0.5 % of it on average."""
    found = published_scales()
    start = csla.extract_scales(small("hs"))
    for ghost, conv in zip(GHOSTS[23:], CONVS[23:]):
        torch.testing.assert_close(found[ghost].kxk.mean(), start[conv].kxk.double().mean(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("mode", FORMS)
def test_forms_train_and_merge(mode):
    model = form(mode, dropout=0.0).double()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    opt = torch.optim.SGD(gr.param_groups(model, 1e-5), lr=0.05)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        opt.step()
    assert float(losses[-1].detach()) < float(losses[0].detach())
    randomise_norms(model)
    model.eval()
    expected = model(x).detach()
    assert float(expected.std()) > 0.01
    merged = csla.merge(model)
    plain = small()
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in plain.named_modules()]
    torch.testing.assert_close(merged(x), expected, rtol=FORWARD_TOLERANCE, atol=FORWARD_TOLERANCE)
    deployed = csla.merge(model, fold_norm=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), expected, rtol=FORWARD_TOLERANCE, atol=FORWARD_TOLERANCE)


def test_rep_by_hand():
    """RepGhost, Figure 2: act(BN(depthwise(x)) + BN(x)), in train mode too."""
    ghost = small("rep").blocks[1][0].ghost1
    assert isinstance(ghost, GhostModule)
    x = torch.randn(3, 8, 6, 6)
    inner = F.relu(ghost.primary_conv(x))

    def normalised(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    depthwise = ghost.cheap_operation[0].convs[0].weight
    expected = F.relu(normalised(F.conv2d(inner, depthwise, padding=1, groups=12)) + normalised(inner))
    torch.testing.assert_close(ghost(x), expected, rtol=1e-5, atol=1e-5)


# ---- scales


def test_published_scales_fit():
    model, scales = small(num_classes=1000), published_scales()
    assert list(scales) == GHOSTS
    mults = csla.grad_mults(model, scales, partial=True)
    assert list(mults) == [model.get_submodule(conv).weight for conv in CONVS]
    explicit = small("csla", scales=official(SCALES_FILE))
    for ghost, conv in zip(GHOSTS, CONVS):
        block = explicit.get_submodule(conv)
        assert torch.equal(block.scale_conv.weight.double(), scales[ghost].kxk)
        assert torch.equal(block.scale_identity.weight.double(), scales[ghost].identity)


def test_a_search_gives_the_scales_of_a_training(tmp_path):
    csla.save_scales(csla.extract_scales(small("hs")), tmp_path / "scales.pth")
    explicit = small("csla", scales=tmp_path / "scales.pth")
    plain = small()
    csla.reinitialize(plain, csla.load_scales(tmp_path / "scales.pth"), partial=True)
    assert list(csla.extract_scales(explicit)) == CONVS
    with pytest.raises(ValueError, match="was re-initialised before"):
        csla.reinitialize(plain, csla.extract_scales(explicit), partial=True)


def test_a_trained_network_is_not_reinitialized():
    plain = small()
    plain(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"the norm after blocks.0.0.ghost1.cheap_operation.0 has seen 1 batches"):
        csla.reinitialize(plain, drawn_scales(), partial=True)


def test_scales_of_every_ghost_module_are_needed():
    scales = drawn_scales()
    lacking = {name: value for name, value in scales.items() if name != CONVS[7]}
    with pytest.raises(ValueError, match=f"identity scale, missing for {CONVS[7]}$"):
        small("csla", scales=lacking)
    fusionless = {**scales, CONVS[3]: BranchScales(scales[CONVS[3]].kxk)}
    with pytest.raises(ValueError, match=f"identity scale, missing for {CONVS[3]}$"):
        small("csla", scales=fusionless)
    with pytest.raises(ValueError, match="the scales do not fit the model"):
        gr.models.repopt_ghostnet("csla", scales=scales)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "repvgg"}, "mode must be 'target', 'hs', 'csla' or 'rep', got 'repvgg'"),
        ({"mode": "csla"}, "mode='csla' needs scales"),
        ({"mode": "hs", "scales": {}}, "scales are for mode='csla', got mode='hs'"),
    ],
)
def test_wrong_modes(arguments, message):
    with pytest.raises(ValueError, match=message):
        gr.models.repopt_ghostnet_0_5x(**arguments)


# ---- CSLA = GR


def train(model, opt, steps):
    """Train with dropout, on images that are the same at each call."""
    data = torch.Generator().manual_seed(11)
    for step in range(steps):
        x = torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=data)
        y = torch.randint(0, 5, (8,), generator=data)
        torch.manual_seed(step)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def sgd(explicit, plain, mults):
    options = {"lr": 0.003, "momentum": 0.9, "nesterov": True}
    theirs = torch.optim.SGD(gr.param_groups(explicit, 0.01), foreach=False, **options)
    return theirs, gr.FusedRepSGD(gr.param_groups(plain, 0.01), grad_mults=mults, **options)


def adamw(explicit, plain, scales):
    """With ε = 1e-8 rounding leaves 4e-11: norms before other norms have gradients of 1e-17 to 1e-8, exact to 1e-16."""
    options = {"lr": 3e-4, "eps": 1e-3}
    theirs = torch.optim.AdamW(gr.param_groups(explicit, 0.01), foreach=False, **options)
    return theirs, gr.FusedRepAdamW(gr.param_groups(plain, 0.01), branch_scales=scales, **options)


def largest_difference(scales, factors_of, steps, optimizers=sgd):
    """Train the explicit network by torch's optimizer and the plain one by ours, and compare the merged states.

    Small batches and large steps magnify rounding: 4 images and lr 0.01 leave 1e-9, 8 images and 0.003 leave 1e-13.
    """
    plain = small().double()
    explicit = csla.csla_model(plain, scales, partial=True)
    csla.reinitialize(plain, scales, partial=True)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    theirs, rep = optimizers(explicit, plain, factors_of(plain))
    train(explicit, theirs, steps)
    train(plain, rep, steps)
    for conv in CONVS:
        name = f"{conv}.weight"
        assert float((plain.get_parameter(name).detach() - start[name]).abs().max()) > 1e-5 * steps  # it has trained
    expected, found = csla.merge(explicit).state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def test_published_scales_train_end_to_end():
    """RepOptimizers, Appendix D: the plain network and the Grad Mults instead of branches."""
    scales = published_scales()
    difference = largest_difference(scales, lambda plain: csla.grad_mults(plain, scales, partial=True), steps=20)
    assert difference <= EQUIVALENCE_TOLERANCE


def test_published_scales_train_by_adamw():
    scales = published_scales()
    assert min(float(value.kxk.min()) for value in scales.values()) < 0

    def scales_of(plain):
        return csla.branch_scales(plain, scales, partial=True)

    def without_identity(plain):
        return {p: BranchScales(value.kxk) for p, value in scales_of(plain).items()}

    assert largest_difference(scales, scales_of, 15, adamw) <= EQUIVALENCE_TOLERANCE
    assert largest_difference(scales, without_identity, 3, adamw) > 1e6 * EQUIVALENCE_TOLERANCE


@pytest.mark.parametrize("wrong", ["nothing", "all_without", "one_module_without", "no_fusion"])
def test_wrong_multipliers_are_far_outside(wrong):
    scales = drawn_scales()

    def mults_of(plain):
        mults = csla.grad_mults(plain, scales, partial=True)
        if wrong == "all_without":
            return {}
        if wrong == "one_module_without":
            del mults[plain.get_submodule(CONVS[20]).weight]
        if wrong == "no_fusion":
            return {p: gr.GradMult(mult.scale) for p, mult in mults.items()}
        return mults

    difference = largest_difference(scales, mults_of, steps=5)
    if wrong == "nothing":
        assert difference <= EQUIVALENCE_TOLERANCE
    else:
        assert difference > 1e6 * EQUIVALENCE_TOLERANCE
