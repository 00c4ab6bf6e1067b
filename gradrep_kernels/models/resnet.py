"""ResNet-18 for CIFAR (He et al., 2016): the first convolution is 3x3, without stride.

There is no max pool.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ResNet", "resnet18"]


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))

    [N, I, H, W] -> [N, O, H / stride, W / stride]
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of basic blocks, of 64, 128, 256 and 512 channels.

    [N, in_channels, H, W] -> [N, num_classes]
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        channels, stages = 64, []
        for count, width, stride in zip(blocks, (64, 128, 256, 512), (1, 2, 2, 2)):
            stages.append(
                nn.Sequential(
                    *(BasicBlock(channels if n == 0 else width, width, stride if n == 0 else 1) for n in range(count))
                )
            )
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.gap(x).flatten(1))


def resnet18(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-18, 11.2 M parameters, 17 convolutions of 3x3."""
    return ResNet((2, 2, 2, 2), num_classes, in_channels)
