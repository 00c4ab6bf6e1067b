"""ShuffleNet (Zhang et al., 2018), 1x with 3 groups, for CIFAR."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ShuffleNet", "shufflenet"]

_GROUPS = 3
_STEM, _STAGES = 24, ((240, 4), (480, 8), (960, 4))  # channels and units of a stage: Table 1 of the paper


def _conv(into: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(into, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class ShuffleUnit(nn.Module):
    """relu(x + y), or for stride 2 relu([average of x, y]), y = 1x1(depthwise 3x3(shuffled 1x1(x)))

    [N, I, H, W] -> [N, O, H / stride, W / stride]. The 1x1s have groups, between which channels are shuffled, and a
    quarter of the channels in between. The first has one group where `dense`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dense: bool = False):
        super().__init__()
        between = channels // 4
        self.reduce = nn.Sequential(*_conv(in_channels, between, 1, groups=1 if dense else _GROUPS), nn.ReLU())
        self.shuffle = nn.ChannelShuffle(_GROUPS)
        self.depthwise = nn.Sequential(*_conv(between, between, 3, stride, between))
        joined = channels if stride == 1 else channels - in_channels  # the average brings the others
        self.expand = nn.Sequential(*_conv(between, joined, 1, groups=_GROUPS))
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(self.shuffle(self.reduce(x))))
        return F.relu(x + y if self.pool is None else torch.cat((self.pool(x), y), 1))


class ShuffleNet(nn.Module):
    """A 3x3 without stride, three stages that halve the size, global average pooling, a linear layer.

    [N, in_channels, H, W] -> [N, num_classes]. The paper's stem, for images of 224 x 224, has stride 2 and a pool.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = nn.Sequential(*_conv(in_channels, _STEM, 3), nn.ReLU())
        self.stages, channels = nn.Sequential(), _STEM
        for width, count in _STAGES:
            first = ShuffleUnit(channels, width, 2, dense=channels == _STEM)
            self.stages.append(nn.Sequential(first, *(ShuffleUnit(width, width, 1) for _ in range(count - 1))))
            channels = width
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.stages(self.stem(x))).flatten(1))


def shufflenet(num_classes: int = 10, *, in_channels: int = 3) -> ShuffleNet:
    """ShuffleNet 1x of 3 groups, 0.9 M parameters, for 32 x 32  # [N, in_channels, H, W] -> [N, num_classes]"""
    return ShuffleNet(num_classes, in_channels)
