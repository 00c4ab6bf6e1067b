"""A detector in the structure of YOLOv6: searched blocks among plain ones, its scales, masks and optimizer by hand.

The search model has blocks of branches in the backbone and the neck. Downsampling, the top of the pyramid and the heads
are plain convolutions with norms, which have no scales.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from foreign_blocks import Foreign, Plain, Scale
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import csla


class ConvBN(nn.Module):
    def __init__(self, inputs, outputs, kernel=3, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class RepStage(nn.Module):
    def __init__(self, block, inputs, outputs, more):
        super().__init__()
        self.conv1 = block(inputs, outputs)
        self.block = nn.Sequential(*(block(outputs, outputs) for _ in range(more))) if more else None

    def forward(self, x):
        x = self.conv1(x)
        return x if self.block is None else self.block(x)


class Detector(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "stem": block(3, 6, 2),
                "stage2": nn.Sequential(block(6, 8, 2), RepStage(block, 8, 8, 1)),
                "stage3": nn.Sequential(block(8, 12, 2), RepStage(block, 12, 12, 2)),
            }
        )
        self.reduce, self.mix = ConvBN(12, 8, 1), RepStage(block, 16, 8, 1)
        self.down, self.bottom = ConvBN(8, 8, 3, 2), RepStage(block, 16, 12, 0)
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {"stem": ConvBN(c, c, 1), "cls": ConvBN(c, c), "reg": ConvBN(c, c), "pred": nn.Conv2d(c, 5, 1)}
            )
            for c in (8, 12)
        )

    def forward(self, x):
        fine = self.backbone["stage2"](self.backbone["stem"](x))
        coarse = self.reduce(self.backbone["stage3"](fine))
        mixed = self.mix(torch.cat((F.interpolate(coarse, scale_factor=2), fine), 1))
        levels = mixed, self.bottom(torch.cat((self.down(mixed), coarse), 1))
        outputs = []
        for level, head in zip(levels, self.heads):
            stem = head["stem"](level)
            outputs.append((head["pred"](head["cls"](stem)) + head["pred"](head["reg"](stem))).flatten(1))
        return torch.cat(outputs, 1)


BLOCKS, PLAIN_3X3 = 11, 5  # the latter: downsampling, and two of each head


def searched() -> Detector:
    """A search model after its training: scales of every sign."""
    torch.manual_seed(1)
    model = Detector(Foreign)
    for module in model.modules():
        if isinstance(module, Scale):
            nn.init.normal_(module.weight, 0.4, 0.7)
    return model


def target() -> Detector:
    torch.manual_seed(2)
    return Detector(Plain)


def pairs(search, plain):
    """(search block, its plain form) in module order, which is how the detector's own code pairs them."""
    own = [[m for m in model.modules() if isinstance(m, kind)] for model, kind in ((search, Foreign), (plain, Plain))]
    return list(zip(*own, strict=True))


def mask_by_hand(block, conv):
    mask = torch.ones_like(conv.weight) * (block.scale_conv.weight.detach() ** 2).view(-1, 1, 1, 1)
    mask[:, :, 1:2, 1:2] += (block.scale_1x1.weight.detach() ** 2).view(-1, 1, 1, 1)
    if hasattr(block, "scale_identity"):
        index = torch.arange(conv.in_channels)
        mask[index, index, 1, 1] += 1.0
    return mask


def kernel_by_hand(block, conv):
    """Draws the 1 x 1 kernel as the package does, in module order."""
    one = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False).weight.detach()
    kernel = conv.weight.detach().double() * block.scale_conv.weight.detach().double().view(-1, 1, 1, 1)
    kernel[:, :, 1:2, 1:2] += one.double() * block.scale_1x1.weight.detach().double().view(-1, 1, 1, 1)
    if hasattr(block, "scale_identity"):
        index = torch.arange(conv.in_channels)
        kernel[index, index, 1, 1] += block.scale_identity.weight.detach().double()
    return kernel


def images(step):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))


@pytest.fixture(params=["module", "state_dict", "average"])
def scales(request, tmp_path):
    if request.param == "module":
        return csla.extract_scales(searched())
    if request.param == "average":
        return csla.extract_scales(torch.optim.swa_utils.AveragedModel(searched()))
    torch.save({"epoch": 9, "model": searched().state_dict()}, tmp_path / "search.pt")
    return csla.load_scales(tmp_path / "search.pt")


def test_a_detector_trains_by_its_searched_scales(scales):
    assert len(scales) == BLOCKS
    search, model = searched(), target()
    with pytest.raises(
        ValueError, match=rf", {PLAIN_3X3} mismatches: down\.conv: missing; heads\.0\.cls\.conv: missing"
    ):
        csla.grad_mults(model, scales)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        csla.reinitialize(model, scales, partial=True)
        mults = csla.grad_mults(model, scales, partial=True)
    plain, by_hand = target(), {}
    torch.manual_seed(3)
    for block, twin in pairs(search, plain):
        twin.conv.weight.data.copy_(kernel_by_hand(block, twin.conv))
        by_hand[twin.conv.weight] = mask_by_hand(block, twin.conv)
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)  # what has no scales is as it was drawn
        assert (p in mults) == (q in by_hand)
        if p in mults:
            ulp = torch.finfo(torch.float32).eps * by_hand[q].abs()
            assert bool(((mults[p].dense(p.shape) - by_hand[q]).abs() <= ulp).all())
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": True}
    ours = gr.FusedRepSGD(gr.param_groups(model, 5e-4), **options, grad_mults=mults)
    sgd = torch.optim.SGD(gr.param_groups(plain, 5e-4), **options, foreach=False)
    for step in range(3):
        for m, opt in ((model, ours), (plain, sgd)):
            opt.zero_grad()
            m(images(step)).square().mean().backward()
        for p, mask in by_hand.items():
            p.grad.mul_(mask)
        ours.step()
        sgd.step()
        for p, q in zip(model.parameters(), plain.parameters()):
            assert float((p - q).detach().abs().max()) <= 4e-7 * max(1.0, float(q.detach().abs().max()))


def test_the_report_of_a_detector(scales):
    found = csla.coverage(target(), scales)
    assert found.counts == (BLOCKS, BLOCKS + PLAIN_3X3)
    assert found.left["heads.1.reg.conv"] == "no scales"
    assert csla.coverage(searched()).counts == (BLOCKS, BLOCKS + PLAIN_3X3)


def test_the_detectors_target_can_be_searched_by_the_package():
    """The same blocks by `where`, without code of the detector's."""
    model = target()
    chosen = ["backbone", "mix", "bottom"]
    search = csla.hyper_search_model(model, init=1.0, where=chosen)
    found = csla.extract_scales(search)
    assert list(found) == [f"{name}.conv" for name in csla.extract_scales(searched())]
    expected = copy.deepcopy(search).eval()
    merged = csla.merge(expected, example=images(0))
    assert len(csla.grad_mults(merged, found, partial=True)) == BLOCKS
