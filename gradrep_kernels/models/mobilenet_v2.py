"""MobileNetV2 (Sandler et al., 2018) for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MobileNetV2", "mobilenet_v2"]

# Of the paper's Table 2: expansion, channels, blocks. Strides are those of the form for 32 x 32, which keeps the size
# in the stem and in the first two rows.
_ROWS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _LAST = 32, 1280


def _conv(into: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(into, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """1x1(depthwise 3x3(1x1(x))), + x where the shape stays  # [N, I, H, W] -> [N, O, H / stride, W / stride]"""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * in_channels
        expand = _conv(in_channels, hidden, 1) if expansion > 1 else []
        linear = _conv(hidden, channels, 1)[:-1]  # no ReLU follows
        self.layers = nn.Sequential(*expand, *_conv(hidden, hidden, 3, stride, hidden), *linear)
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV2(nn.Module):
    """A stem, 17 inverted residuals, a 1x1, global average pooling, a linear layer.

    [N, in_channels, H, W] -> [N, num_classes]. H and W are halved three times, by the paper's form for 224 x 224 five
    times. Dropout of 0.2 before the linear layer is left out.
    """

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        layers, channels = _conv(in_channels, _STEM, 3), _STEM
        for expansion, width, count, stride in _ROWS:
            for n in range(count):
                layers.append(InvertedResidual(channels, width, 1 if n else stride, expansion))
                channels = width
        self.features = nn.Sequential(*layers, *_conv(channels, _LAST, 1))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(_LAST, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gap(self.features(x)).flatten(1))


def mobilenet_v2(num_classes: int = 10, *, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2, 2.2 M parameters, for images of 32 x 32  # [N, in_channels, H, W] -> [N, num_classes]"""
    return MobileNetV2(num_classes, in_channels)
