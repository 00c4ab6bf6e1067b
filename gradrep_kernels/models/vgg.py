"""VGG-11, 13, 16 and 19 for CIFAR: 3x3 convolutions with norms, and one linear layer.

VGG-16 is that of the SGS paper (Detkov et al., 2023), section 4.1: 15 M parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG", "vgg11", "vgg13", "vgg16", "vgg19"]


class VGG(nn.Module):
    """Five groups of convolutions, and a linear layer.

    [N, in_channels, H, W] -> [N, num_classes]. Group n is counts[n] times [conv, BN, ReLU], and a 2x2 max pool.
    """

    def __init__(self, counts: tuple[int, ...], num_classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for count, width in zip(counts, (64, 128, 256, 512, 512)):
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            # ceil_mode changes nothing for 32 x 32, and lets smaller images end at 1 x 1 instead of 0 x 0.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.features(x)).flatten(1))


def vgg11(num_classes: int = 10, *, in_channels: int = 3) -> VGG:
    """VGG-11, 9.2 M parameters, 8 convolutions."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels)


def vgg13(num_classes: int = 10, *, in_channels: int = 3) -> VGG:
    """VGG-13, 9.4 M parameters, 10 convolutions."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels)


def vgg16(num_classes: int = 10, *, in_channels: int = 3) -> VGG:
    """VGG-16, 14.7 M parameters, 13 convolutions."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)


def vgg19(num_classes: int = 10, *, in_channels: int = 3) -> VGG:
    """VGG-19, 20.0 M parameters, 16 convolutions."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels)
