"""PreAct-ResNet-18 and 34 (He et al., 2016, Identity Mappings in Deep Residual Networks) for CIFAR."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gradrep_kernels.models.resnet import STAGE_WIDTHS, block_stage
from gradrep_kernels.models.stages import Stage, StagedNetwork

__all__ = ["PreActResNet", "preact_resnet18", "preact_resnet34"]


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(a)))) + x, where a = relu(bn(x))

    [N, I, H, W] -> [N, width, H / stride, W / stride]. A 1x1 of a stands for x where the shape changes. No norm follows
    the second convolution at once, so that it has no branches unless `where` names it.
    """

    expansion: ClassVar = 1
    residual: ClassVar = "conv2"  # what is added to the shortcut; csla.identity_variance_ratio reads it

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        y = self.conv2(self.relu(self.bn2(self.conv1(a))))
        return y + (x if self.shortcut is None else self.shortcut(a))


class PreActResNet(StagedNetwork):
    """A 3x3 without stride, four stages of blocks, and the norm and ReLU of the last sum before the head.

    [N, in_channels, H, W] -> [N, num_classes]. A stage's output is the sum, without norm and ReLU.
    """

    head: ClassVar = ("norm", "relu", "gap", "linear")

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        channels, stages = 64, []
        for count, width, stride in zip(blocks, STAGE_WIDTHS, (1, 2, 2, 2)):
            stages.append(block_stage(PreActBlock, channels, width, count, stride))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def stages(self) -> tuple[Stage, ...]:
        layers = (Stage((f"layer{n + 1}",), width, 2**n) for n, width in enumerate(STAGE_WIDTHS))
        return (Stage(("conv1",), 64, 1), *layers)

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(self.relu(self.norm(x)))


def preact_resnet18(num_classes: int = 10, *, in_channels: int = 3) -> PreActResNet:
    """PreAct-ResNet-18, 11.2 M parameters, for images of 32 x 32  # [N, in_channels, H, W] -> [N, num_classes]"""
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels)


def preact_resnet34(num_classes: int = 10, *, in_channels: int = 3) -> PreActResNet:
    """PreAct-ResNet-34, 21.3 M parameters, for images of 32 x 32  # [N, in_channels, H, W] -> [N, num_classes]"""
    return PreActResNet((3, 4, 6, 3), num_classes, in_channels)
