"""Cases of general branches: blocks that are trained as explicit branches and as one convolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import BranchScales, csla


@dataclass(frozen=True)
class Block:
    """A block in the place of one convolution, and one training of it."""

    name: str
    branches: Any  # as csla.hyper_search_model takes them
    why: str
    kernel: int | tuple[int, int] = 3
    channels: tuple[int, int] = (8, 8)
    conv: dict[str, Any] = field(default_factory=lambda: {"padding": 1})
    sgd: dict[str, Any] = field(default_factory=lambda: {"momentum": 0.9, "weight_decay": 0.02})
    max_norm: float | None = None
    draw: str = "conv2d"
    identity: str = "searched"

    def plain(self) -> nn.Sequential:
        """A network whose convolution "3" is the case's, behind a 1 x 1 that stays plain."""
        into, out = self.channels
        return nn.Sequential(
            nn.Conv2d(3, into, 1, bias=False),
            nn.BatchNorm2d(into),
            nn.ReLU(),
            nn.Conv2d(into, out, self.kernel, **{"padding": "same", **self.conv}),
            nn.GroupNorm(2, out),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * out, 5),
        ).double()


def dw(padding=1, **options):
    return {"padding": padding, "groups": 8, **options}


# The merged kernel decays as a whole, and with it constant branches, which as branches do not: see
# test_constant_branches_decay_with_the_kernel.
CONSTANTS = {"momentum": 0.9, "nesterov": True}
NESTEROV = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
BLOCKS = [
    Block("repvgg", "repvgg", "the default of before"),
    Block("acb", "acb", "rows and columns"),
    Block("acb_3x5_stride2", "acb", "unlike sides, stride", (3, 5), conv={"padding": (1, 2), "stride": 2}),
    Block("repghost", "repghost", "depthwise, identity without 1 x 1", conv=dw()),
    Block("mobileone", "mobileone:3", "several k x k"),
    Block("mobileone_stride2", "mobileone:2", "no identity", conv=dw(stride=2), sgd=NESTEROV),
    Block("mobileone_1", "mobileone:1", "no further branch"),
    Block("replk", "replk:3", "a small kernel", 7, conv=dw(3)),
    Block("replk_valid", "replk:5", "the small kernel crops its input", 7, conv=dw(0)),
    Block("unireplk_7", "unireplk", "dilated kernels", 7, conv=dw(3)),
    Block("unireplk_13", "unireplk", "a larger row of the table", 13, conv=dw(6), sgd=NESTEROV),
    Block("unireplk_5_dilation2", "unireplk", "dilation times dilation", 5, conv=dw(4, dilation=2)),
    Block("unireplk_9_stride2", "unireplk", "alignment at a stride", 9, conv=dw(4, stride=2, bias=False)),
    Block("qarepvgg", "qarepvgg", "constant branches", sgd=CONSTANTS),
    Block("qarepvgg_groups", "qarepvgg", "constants at (o, o mod I)", conv={"padding": 1, "groups": 2}, sgd=CONSTANTS),
    Block(
        "qarepvgg_reflect",
        "qarepvgg",
        "an average of padded values",
        conv={"padding": 1, "padding_mode": "reflect"},
        sgd=CONSTANTS,
    ),
    Block(
        "qarepvgg_dilation2",
        "qarepvgg",
        "an average over dilated taps",
        conv={"padding": 2, "dilation": 2},
        sgd=CONSTANTS,
    ),
    Block("qarepvgg_stride2", "qarepvgg", "no shortcut, so no constants", conv={"padding": 1, "stride": 2}),
    Block("repvit", ["kxk", "1x1=1", "identity=1"], "RepViT's depthwise block", conv=dw(), sgd=CONSTANTS),
    Block(
        "average_stride2",
        ["kxk", "average=0.3"],
        "the average at a stride",
        conv={"padding": 1, "stride": 2},
        sgd=CONSTANTS,
    ),
    Block(
        "list",
        ["kxk", "1x1", "identity", (5, 5), ((3, 3), 2), ((3, 3), 2)],
        "repeats and all forms",
        7,
        conv={"padding": 3},
    ),
    Block(
        "words",
        ["kxk", "3xk", "5x5_d1", "3x3_d2", "identity=-0.5", "kxk=0.7"],
        "words, fixed scales",
        5,
        conv={"padding": 2},
        sgd=CONSTANTS,
    ),
    Block("two_1x1", ["kxk", "1x1", "1x1", 1], "repeats of 1 x 1"),
    Block("function", lambda name, conv: ["kxk", (1, 3)] if conv.groups == 8 else None, "a function", conv=dw()),
    Block("function_of_presets", lambda name, conv: {"3": "acb"}[name], "a function that names a preset"),
    Block("circular", "unireplk", "padding mode", 5, conv=dw(2, padding_mode="circular")),
    Block("replicate", ["kxk", "3x3_d2", "3x3"], "padding mode", 5, conv=dw(2, padding_mode="replicate")),
    Block("reflect_wide", "mobileone:2", "padded by more than 'same'", conv={"padding": 2, "padding_mode": "reflect"}),
    Block("same", "unireplk", "'same' with dilation", 5, conv={"padding": "same", "dilation": (1, 2)}),
    Block("rows_crop", ["kxk", "3x3", "1x5"], "padded rows, cropped columns", 5, conv={"padding": (3, 0)}),
    Block("wider", "mobileone:2", "more outputs than inputs", channels=(4, 8), conv={"padding": 1, "groups": 4}),
    Block("clipped", ["kxk", "1x1", "identity", "1xk", "kx1"], "clipping by the CSLA norm", max_norm=0.3),
    Block("clipped_dilated", "unireplk", "clipping, dilated", 7, conv=dw(3), sgd=NESTEROV, max_norm=0.3),
    Block("msra", "mobileone:2", "kernels drawn as the paper says", draw="msra"),
    Block("identity_one", "mobileone:2", "the paper's start of the identity", identity="one"),
]


# ---- blocks that this package did not write


class Stranger(nn.Module):
    """A block as its own paper draws it, written with F.conv2d: kernels, constant scales and a rule for the sum."""

    def __init__(self, kernels, scales, forward, identity=None):
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(k.detach().clone()) for k in kernels])
        self.scales = [s.view(-1, 1, 1) for s in scales]
        self.identity = None if identity is None else nn.Parameter(identity.clone())
        self.rule = forward

    def forward(self, x):
        return self.rule(x, [lambda y, s=s: s * y for s in self.scales], self.kernels, self.identity)


def unireplk_7(x, scale, w, _):
    y = scale[0](F.conv2d(x, w[0], padding=3, groups=8)) + scale[1](F.conv2d(x, w[1], padding=2, groups=8))
    y = y + scale[2](F.conv2d(x, w[2], padding=2, dilation=2, groups=8))
    return y + scale[3](F.conv2d(x, w[3], padding=3, dilation=3, groups=8))


def mobileone_2(x, scale, w, identity):
    y = scale[0](F.conv2d(x, w[0], padding=1)) + scale[1](F.conv2d(x, w[1])) + scale[2](F.conv2d(x, w[2], padding=1))
    return y + identity.view(-1, 1, 1) * x


def acb(x, scale, w, _):
    rows, columns = F.conv2d(x, w[1], padding=(0, 1)), F.conv2d(x, w[2], padding=(1, 0))
    return scale[0](F.conv2d(x, w[0], padding=1)) + scale[1](rows) + scale[2](columns)


def qarepvgg(x, scale, w, _):
    return scale[0](F.conv2d(x, w[0], padding=1)) + F.conv2d(x, w[1]) + x + F.avg_pool2d(x, 3, 1, 1)


STRANGERS = {  # block: (preset, k, groups, kernels of the branches in the order they are drawn, its sum)
    "unireplk": ("unireplk", 7, 8, [5, 3, 3], unireplk_7),
    "mobileone": ("mobileone:2", 3, 1, [1, 3], mobileone_2),
    "acb": ("acb", 3, 1, [(1, 3), (3, 1)], acb),
    "qarepvgg": ("qarepvgg", 3, 1, [1], qarepvgg),
}


# ---- trainings


def searched(model: nn.Module, branches: Any, *, negative: float = 0.4) -> dict[str, BranchScales]:
    """Draw scales for each block of `branches`, 0.3 to 1.3 in size, of which a share is below 0."""

    def drawn(t: torch.Tensor) -> torch.Tensor:
        size = 0.3 + torch.rand(t.shape, dtype=torch.float64)
        size[torch.randperm(t.numel())[: -int(-negative * t.numel() // 1)]] *= -1
        return size

    scales = csla.extract_scales(csla.hyper_search_model(model, branches=branches))
    return {name: value.mapped(drawn) for name, value in scales.items()}


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip, steps: int = 60, images: tuple[int, ...] = (4, 3, 14, 15)
) -> list[float]:
    """Train on random images. Returns the norms of the gradients before clipping."""
    data = torch.Generator().manual_seed(11)
    x = torch.randn(steps, *images, dtype=torch.float64, generator=data)
    y = torch.randint(0, 5, (steps, images[0]), generator=data)
    norms = []
    for batch, labels in zip(x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        norms.append(float(clip(optimizer)))
        optimizer.step()
    return norms


def rep_sgd(model: nn.Module, scales: dict[str, BranchScales], decay: float, **options: Any) -> gr.FusedRepSGD:
    return gr.FusedRepSGD(gr.param_groups(model, decay), grad_mults=csla.grad_mults(model, scales), **options)
