"""RepOpt-GhostNet: plain depthwise networks, and their Hyper-Search, CSLA and RepGhostNet forms.

Sources: RepOptimizers (Ding et al., 2023), Appendix D and Table 12; RepGhost (Chen et al., 2022) for the layers. Module
names are those of the code that the authors of RepOptimizers published, so that its weights load into the target form:
`conv_stem`, `bn1`, `blocks.a.b.ghost1`, `conv_head`, `classifier`, and in a ghost module `primary_conv`,
`cheap_operation`, `final_bn`.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gradrep_kernels import csla
from gradrep_kernels.messages import first_few
from gradrep_kernels.models.modes import BranchForm, ScalesOrPath, scales_of_mode

__all__ = ["GhostModule", "RepOptGhostNet", "repopt_ghostnet", "repopt_ghostnet_0_5x"]

# RepGhost's table at width 1, stage by stage. A bottleneck: side of the strided kernels, hidden channels, channels,
# whether it has squeeze-and-excitation, stride.
_STAGES = (
    ((3, 8, 16, False, 1),),
    ((3, 24, 24, False, 2),),
    ((3, 36, 24, False, 1),),
    ((5, 36, 40, True, 2),),
    ((5, 60, 40, True, 1),),
    ((3, 120, 80, False, 2),),
    (
        (3, 100, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 240, 112, True, 1),
        (3, 336, 112, True, 1),
    ),
    ((5, 336, 160, True, 2),),
    (
        (5, 480, 160, False, 1),
        (5, 480, 160, True, 1),
        (5, 480, 160, False, 1),
        (5, 480, 160, True, 1),
    ),
)
_STEM, _LAST, _HEAD = 16, 960, 1280  # channels; those of the head do not follow the width


def _channels(wanted: float) -> int:
    """Round to a multiple of 4 that is at least 4, and no less than 90 % of what is wanted."""
    rounded = max(4, int(wanted + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * wanted else rounded + 4


def _conv(into: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x ⊙ hardsigmoid(expand(relu(reduce(mean of x))))  # [N, C, H, W]

    Both are 1x1 convolutions with bias, with about C / 4 channels in between.
    """

    def __init__(self, channels: int):
        super().__init__()
        between = _channels(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, between, 1)
        self.conv_expand = nn.Conv2d(between, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.conv_expand(F.relu(self.conv_reduce(F.adaptive_avg_pool2d(x, 1)))))


class ConvNormAct(nn.Module):
    """ReLU(BN(conv_1x1(x)))  # [N, I, H, W] -> [N, O, H, W]"""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = _conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)))


class GhostModule(nn.Module):
    """The target form of a ghost module: act(BN(depthwise_3x3(act(BN(conv_1x1(x))))))  # [N, I, H, W] -> [N, O, H, W]

    The depthwise convolution is the one that has branches in the other forms: itself and the identity. act is a ReLU if
    `relu`, else nothing.
    """

    # The published names put the convolution and its norm into different parents.
    norms_after: ClassVar = {"cheap_operation.0": "final_bn"}

    def __init__(self, in_channels: int, channels: int, relu: bool):
        super().__init__()
        self.primary_conv = nn.Sequential(_conv(in_channels, channels, 1), nn.BatchNorm2d(channels))
        self.cheap_operation = nn.Sequential(_conv(channels, channels, 3, groups=channels))
        self.final_bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.final_bn(self.cheap_operation(self.relu(self.primary_conv(x)))))


class Bottleneck(nn.Module):
    """ghost2(SE(BN(depthwise(ghost1(x))))) + shortcut(x)  # [N, I, H, W] -> [N, O, H / stride, W / stride]

    The depthwise convolution and its BN are there if the stride is above 1, SE if `se`. The shortcut is x itself where
    the shape stays, else depthwise + BN + 1x1 + BN. `kernel` is the side of these depthwise kernels. Those of the ghost
    modules are 3x3.
    """

    def __init__(self, in_channels: int, hidden: int, channels: int, kernel: int, stride: int, se: bool):
        super().__init__()
        self.ghost1 = GhostModule(in_channels, hidden, relu=True)
        self.conv_dw = self.bn_dw = self.se = None
        if stride > 1:
            self.conv_dw = _conv(hidden, hidden, kernel, stride, groups=hidden)
            self.bn_dw = nn.BatchNorm2d(hidden)
        if se:
            self.se = SqueezeExcite(hidden)
        self.ghost2 = GhostModule(hidden, channels, relu=False)
        self.keeps_shape = stride == 1 and in_channels == channels
        self.shortcut = nn.Sequential()
        if not self.keeps_shape:
            self.shortcut = nn.Sequential(
                _conv(in_channels, in_channels, kernel, stride, groups=in_channels),
                nn.BatchNorm2d(in_channels),
                _conv(in_channels, channels, 1),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.conv_dw is not None:
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + self.shortcut(x)


class RepOptGhostNet(nn.Module):
    """The target form: a stem, bottlenecks, a 1x1 convolution, pooling, another 1x1, a linear layer.

    Args:
        width:   factor of all channels but those of the head. They are multiples of 4.
        dropout: share of the features that is set to 0 before the linear layer, in training.
    """

    def __init__(self, width: float, num_classes: int, in_channels: int = 3, dropout: float = 0.2):
        super().__init__()
        channels = _channels(_STEM * width)
        self.conv_stem = _conv(in_channels, channels, 3, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for stage in _STAGES:
            bottlenecks = nn.Sequential()
            for kernel, hidden, wide, se, stride in stage:
                out = _channels(wide * width)
                bottlenecks.append(Bottleneck(channels, _channels(hidden * width), out, kernel, stride, se))
                channels = out
            self.blocks.append(bottlenecks)
        last = _channels(_LAST * width)
        self.blocks.append(nn.Sequential(ConvNormAct(channels, last)))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(last, _HEAD, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_HEAD, num_classes)
        starts = _first_scales(self)
        self.branch_form = BranchForm("repghost", tuple(starts), starts)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.blocks(F.relu(self.bn1(self.conv_stem(x))))
        x = F.relu(self.conv_head(self.global_pool(x))).flatten(1)
        return self.classifier(self.dropout(x))


def _first_scales(target: RepOptGhostNet) -> dict[str, float]:
    """Where the scales behind the depthwise convolutions start in a Hyper-Search, by name, in module order.

    They start at √(2 / (i + 1)). i numbers the ghost modules from 1 on, and starts anew at each bottleneck that changes
    the shape. This is the published code's rule, for which the paper has no formula.
    """
    starts: dict[str, float] = {}
    i = 0
    for name, module in target.named_modules():
        if isinstance(module, Bottleneck):
            i = i if module.keeps_shape else 0
            for ghost in ("ghost1", "ghost2"):
                i += 1
                starts[f"{name}.{ghost}.cheap_operation.0"] = math.sqrt(2 / (i + 1))
    return starts


def _csla(target: RepOptGhostNet, scales: csla.Scales) -> nn.Module:
    """Convert a network by scales that leave out the convolutions outside of ghost modules, but no ghost module."""
    model = target.branch_form.explicit(target, scales)
    missing = [
        name
        for name in target.branch_form.where
        if getattr(model.get_submodule(name), "scale_identity", None) is None  # a plain convolution has none either
    ]
    if missing:
        raise ValueError(f"ghost modules need a k x k and an identity scale, missing for {first_few(missing)}")
    return model


def repopt_ghostnet(
    mode: str = "target",
    num_classes: int = 1000,
    scales: ScalesOrPath = None,
    *,
    width: float = 1.0,
    in_channels: int = 3,
    dropout: float = 0.2,
) -> nn.Module:
    """RepOpt-GhostNet of any width  # [N, in_channels, H, W] -> [N, num_classes]

    H and W are halved five times. RepGhost has the widths 0.5, 0.58, 0.8, 1, 1.11, 1.3, 1.5 and 2. The target form has
    as many parameters and multiplications as RepGhost's README says of each.

    Args:
        mode:    'target' (plain), 'hs' (Hyper-Search), 'csla' (explicit CSLA, needs `scales`) or 'rep' (RepGhostNet, a
                 norm in each branch).
        scales:  branch scales for mode 'csla': Scales, or the path of a scales file.
        width:   factor of the channels, which are rounded to multiples of 4.
        dropout: share of the features that is set to 0 before the linear layer, in training.

    In the last three forms the depthwise 3x3 of every ghost module has an identity beside it, and no other convolution
    has branches: s ⊙ conv(x) + id ⊙ x before the norm in 'hs' and 'csla', BN(conv(x)) + BN(x) in 'rep'. `csla.merge`
    gives the plain network. Scales leave out the other convolutions, so `csla.reinitialize` and `csla.grad_mults` take
    them with `partial=True`.

    Where paper and published code differ this follows the code: Appendix D speaks of 1x1 target operators, but the
    published scales stand beside depthwise 3x3 kernels. A search starts s at √(2 / (i + 1)) in the i-th ghost module of
    a run of bottlenecks of one shape, and id at 1. It departs from the code in this: the identity scale decays
    (`gr.param_groups`), without which CSLA would not equal the target form. Blocks of branches have this package's
    names, so that the published weights load into 'target' alone.

    Raises ValueError for another mode, and for scales that are missing, superfluous, or do not fit.
    """
    scales = scales_of_mode(mode, scales, "rep")
    target = RepOptGhostNet(width, num_classes, in_channels, dropout)
    if mode == "hs":
        return target.branch_form.hyper_search(target)
    if mode == "csla":
        return _csla(target, scales)
    return target.branch_form.normed(target) if mode == "rep" else target


def repopt_ghostnet_0_5x(
    mode: str = "target",
    num_classes: int = 1000,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    dropout: float = 0.2,
) -> nn.Module:
    """RepOpt-GhostNet 0.5x, 2.31 M parameters as target. Arguments as `repopt_ghostnet`.

    It is the one with published scales (RepOptimizers, Table 12: 66.51 % on ImageNet, RepGhostNet 66.49 %). An image of
    224 x 224 takes 43.3 M multiplications. RepGhost's README says 2.3 M and 43 M.
    """
    return repopt_ghostnet(mode, num_classes, scales, width=0.5, in_channels=in_channels, dropout=dropout)
