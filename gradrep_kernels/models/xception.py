"""Xception (Chollet, 2017) for CIFAR."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

__all__ = ["Xception", "xception"]

_ENTRY = (64, 128, 256, 728)
_MIDDLE = 8  # blocks


def _separable(into: int, channels: int) -> list[nn.Module]:
    """A depthwise 3x3, a 1x1, a norm. No norm stands between the two convolutions."""
    depthwise = nn.Conv2d(into, into, 3, padding=1, groups=into, bias=False)
    return [depthwise, nn.Conv2d(into, channels, 1, bias=False), nn.BatchNorm2d(channels)]


class XceptionBlock(nn.Module):
    """Separable convolutions with a ReLU before each, and a pool where `halves`, + shortcut(x)

    [N, I, H, W] -> [N, O, H', W']. The first has no ReLU where `relu_first` is False.
    """

    def __init__(self, widths: tuple[int, ...], *, halves: bool, relu_first: bool = True):
        super().__init__()
        layers: list[nn.Module] = []
        for into, channels in pairwise(widths):
            layers += [nn.ReLU(), *_separable(into, channels)]
        layers += [nn.MaxPool2d(3, 2, padding=1)] * halves
        self.layers = nn.Sequential(*layers[0 if relu_first else 1 :])
        self.shortcut: nn.Module = nn.Identity()
        if halves:
            conv = nn.Conv2d(widths[0], widths[-1], 1, 2, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


class Xception(nn.Module):
    """Entry, middle and exit flow, global average pooling, a linear layer.

    [N, in_channels, H, W] -> [N, num_classes]. H and W are halved four times. The paper's stem, for images of
    299 x 299, has stride 2 and no padding; here it keeps the size.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        stem: list[nn.Module] = []
        for into, channels in ((in_channels, 32), (32, 64)):
            stem += [nn.Conv2d(into, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        entry = [
            XceptionBlock((into, width, width), halves=True, relu_first=into != _ENTRY[0])
            for into, width in pairwise(_ENTRY)
        ]
        middle = [XceptionBlock((728,) * 4, halves=False) for _ in range(_MIDDLE)]
        leaving = XceptionBlock((728, 728, 1024), halves=True)
        last = [*_separable(1024, 1536), nn.ReLU(), *_separable(1536, 2048), nn.ReLU()]
        self.features = nn.Sequential(*stem, *entry, *middle, leaving, *last)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.features(x)).flatten(1))


def xception(num_classes: int = 10, *, in_channels: int = 3) -> Xception:
    """Xception, 20.8 M parameters, for images of 32 x 32  # [N, in_channels, H, W] -> [N, num_classes]"""
    return Xception(num_classes, in_channels)
