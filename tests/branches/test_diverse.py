"""DBB's and QARepVGG's blocks: trained, they are one convolution; their parts and their costs are the papers'."""

from __future__ import annotations

import copy

import pytest
import torch
from cases_csla import randomise_norms
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.branches.diverse import DiverseBranchBlock
from gradrep_kernels.branches.quantizable import QuantizableBranches

RIVALS = {"dbb": gr.models.dbb_model, "qarepvgg": gr.models.qarepvgg_model}
# One forward in float64 after a few steps. A tap or a border that is merged wrongly leaves 1e-3 and more.
TOLERANCE = 1e-10

GEOMETRIES = {
    "3x3": ((6, 6, 3), {"padding": 1}),
    "more outputs": ((3, 7, 3), {"padding": 1}),
    "stride": ((6, 6, 3), {"padding": 1, "stride": 2}),
    "strides": ((5, 5, 3), {"padding": 1, "stride": (3, 2), "bias": True}),
    "groups": ((6, 6, 3), {"padding": 1, "groups": 3}),
    "groups of other sizes": ((4, 6, 3), {"padding": 1, "groups": 2}),
    "depthwise": ((6, 6, 3), {"padding": 1, "groups": 6}),
    "multiplied depthwise": ((3, 6, 3), {"padding": 1, "groups": 3}),
    "fewer outputs than inputs, a group each": ((6, 3, 3), {"padding": 1, "groups": 3}),
    "dilation": ((5, 5, 3), {"padding": 2, "dilation": 2}),
    "dilated and padded less": ((5, 5, 3), {"padding": 1, "dilation": (2, 1)}),
    "5x5": ((4, 4, 5), {"padding": 2}),
    "3x5": ((4, 3, (3, 5)), {"padding": (1, 2)}),
    "1x3": ((4, 4, (1, 3)), {"padding": (0, 1)}),
    "no padding": ((4, 4, 5), {}),
    "more padding": ((4, 4, 3), {"padding": 2}),
    "same": ((4, 4, (3, 5)), {"padding": "same", "dilation": (2, 1)}),
    "reflect": ((4, 4, 3), {"padding": 1, "padding_mode": "reflect"}),
    "replicate": ((4, 4, 5), {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    "circular": ((4, 5, 3), {"padding": (1, 2), "padding_mode": "circular"}),
}


def conv_and_norm(geometry, **norm):
    shape, options = GEOMETRIES[geometry]
    model = nn.Sequential(nn.Conv2d(*shape, **{"bias": False, **options}), nn.BatchNorm2d(shape[1], **norm)).double()
    randomise_norms(model)
    return model


def converted(rival, plain):
    return RIVALS[rival](plain, where="0")  # By name, for 1 x 3 is converted where it is named.


def trained(model, channels, steps=3):
    """Move weights, norms and statistics away from their start."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, channels, 9, 8, dtype=torch.float64) + 0.5).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_trained_block_is_one_convolution(rival, geometry):
    plain = conv_and_norm(geometry)
    inputs = plain[0].in_channels
    model = trained(converted(rival, plain), inputs)
    assert isinstance(model[0], DiverseBranchBlock if rival == "dbb" else QuantizableBranches)
    merged = csla.merge(model, fold_norm=True)
    assert type(merged[0]) is nn.Conv2d
    geometry = [getattr(conv, name) for conv in (merged[0], plain[0]) for name in ("stride", "padding", "dilation")]
    assert geometry[:3] == geometry[3:]
    x = torch.randn(3, inputs, 9, 8, dtype=torch.float64) + 0.5
    expected = model(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(csla.merge(model)(x), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("norm", [{"affine": False}, {"momentum": None, "eps": 0.1}])
def test_norms_of_other_settings(rival, norm):
    plain = conv_and_norm("3x3") if norm.get("affine", True) else None
    if plain is None:
        plain = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)).double()
    else:
        plain[1].momentum, plain[1].eps = norm["momentum"], norm["eps"]
    model = trained(converted(rival, plain), 6)
    settings = {(m.affine, m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert settings == {(plain[1].affine, plain[1].momentum, plain[1].eps)}
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(csla.merge(model, fold_norm=True)(x), model(x), rtol=0, atol=TOLERANCE)


def normed(x, norm):
    """A norm in train mode, of the batch alone."""
    scaled = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight.view(-1, 1, 1, 1).transpose(0, 1) + norm.bias.view(1, -1, 1, 1)


def test_the_forward_of_dbb_in_train_mode_is_that_of_the_papers_figure():
    """Without padding, where no inner norm has a border: k x k, 1 x 1, 1 x 1 - k x k, 1 x 1 - average."""
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)).double()
    randomise_norms(plain)
    model = gr.models.dbb_model(plain)
    kxk, small, sequence, average = model[0].branches.values()
    with torch.no_grad():
        sequence.first.weight.normal_(0, 0.3)
    x = torch.randn(5, 4, 9, 7, dtype=torch.float64)
    square = sequence.first.weight + torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1)
    inner = normed(F.conv2d(x, square), sequence.first_norm.norm)
    pooled = F.avg_pool2d(normed(F.conv2d(x, average.first.weight), average.first_norm.norm), 3, 2)
    expected = (
        normed(F.conv2d(x, plain[0].weight, stride=2), kxk.norm)
        + normed(F.conv2d(x[..., 1:-1, 1:-1], small.conv.weight, stride=2), small.norm)
        + normed(F.conv2d(inner, sequence.conv.weight, stride=2), sequence.norm)
        + normed(pooled, average.norm)
    )
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_the_forward_of_qarepvgg_is_that_of_s4():
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    randomise_norms(plain)
    model = gr.models.qarepvgg_model(plain)
    randomise_norms(model)
    block, x = model[0], torch.randn(5, 4, 9, 7, dtype=torch.float64)
    inner = normed(F.conv2d(x, plain[0].weight, padding=1), block.norm)
    expected = normed(inner + F.conv2d(x, block.conv_1x1.weight) + x, model[1])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.conv.weight", "0.norm.weight", "0.norm.bias", "0.conv_1x1.weight", "1.weight", "1.bias"]


def test_dbb_starts_its_sequence_at_the_identity_and_a_depthwise_one_has_no_1x1_before_its_average():
    block = gr.models.dbb_model(conv_and_norm("groups"))[0]
    assert not bool(block.branches["1x1_kxk"].first.weight.any())
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    assert torch.equal(block.branches["1x1_kxk"].first(x), x)
    assert block.branches["1x1_average"].first.weight.shape == (6, 2, 1, 1)
    assert gr.models.dbb_model(conv_and_norm("depthwise"))[0].branches["1x1_average"].first is None
    assert gr.models.dbb_model(conv_and_norm("multiplied depthwise"))[0].branches["1x1_average"].first is not None


@pytest.mark.parametrize("rival", RIVALS)
def test_the_model_is_not_changed_and_its_first_branch_takes_it_over(rival):
    plain = conv_and_norm("3x3").eval()
    before = copy.deepcopy(plain.state_dict())
    model = converted(rival, plain)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not any(module.training for module in model.modules())
    first = model[0].branches["kxk"].conv if rival == "dbb" else model[0].conv
    assert torch.equal(first.weight, plain[0].weight)
    assert isinstance(model[1], nn.Identity if rival == "dbb" else nn.BatchNorm2d)
    with pytest.raises(ValueError, match=r"multi-branch blocks already \(0\)"):
        converted(rival, model)
    copied = copy.deepcopy(model)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(copied(x), model(x))


def test_frozen_weights_stay_frozen():
    plain = conv_and_norm("3x3").requires_grad_(False)
    for rival in RIVALS:
        assert not any(p.requires_grad for p in converted(rival, plain).parameters())


def test_dbb_needs_a_batch_norm_that_nothing_else_takes():
    with pytest.raises(
        ValueError, match="need a BatchNorm2d with running statistics after each conv, got 0: GroupNorm"
    ):
        gr.models.dbb_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)))
    with pytest.raises(ValueError, match="got 0: NoneType"):
        gr.models.dbb_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), where="0")
    # The block of QARepVGG leaves the norm where it is.
    assert isinstance(gr.models.qarepvgg_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)))[1], nn.GroupNorm)


def cost(model, side=32):
    """Parameters, and multiply-adds of one image, in millions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e6


def test_the_costs_of_vgg16_are_those_of_the_sgs_papers_table_1():
    """Its VGG-16 has a layer of 512 more before the classes: 15.0 M parameters, 313 M multiply-adds.

    DBB: 728 M. The paper says 34.7 M parameters, the paper's block counts 34.6.
    """
    plain = gr.models.vgg16(10)
    plain.linear = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    assert cost(plain) == pytest.approx((14.99, 313.5), abs=0.05)
    dbb = gr.models.dbb_model(plain)
    assert cost(dbb) == pytest.approx((34.556, 727.7), abs=0.05)
    # By hand: 3x3, 1x1, 1x1 and 3x3, 1x1. Norms: five of the outputs and one of the inputs. The last layers.
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    expected = sum(
        o * i * (9 + 1 + 9 + 1) + i * i + 2 * (5 * o + i) for i, o in ((c.in_channels, c.out_channels) for c in convs)
    )
    assert sum(p.numel() for p in dbb.parameters()) == expected + 512 * 513 + 10 * 513
    deployed = csla.merge(dbb, fold_norm=True)
    assert cost(deployed) == pytest.approx((14.982, 313.5), abs=0.05)
