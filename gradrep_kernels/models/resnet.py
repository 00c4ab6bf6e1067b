"""ResNet-18, 34 and 50 (He et al., 2016), with or without squeeze-and-excitation (Hu et al., 2018).

Their ImageNet form has as many parameters and multiplications as Table 2 of the SGS paper (Detkov et al., 2023) says.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gradrep_kernels.models.repopt_vgg import SqueezeExcite
from gradrep_kernels.models.stages import Stage, StagedNetwork

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "block_stage", "resnet18", "resnet34", "resnet50"]

STAGE_WIDTHS = (64, 128, 256, 512)
_REDUCTION = 16  # of squeeze-and-excitation


def _shortcut(into: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and into == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(into, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _squeeze_excite(channels: int, se: bool) -> nn.Module:
    return SqueezeExcite(channels, channels // _REDUCTION) if se else nn.Identity()


class BasicBlock(nn.Module):
    """relu(SE(bn(conv(relu(bn(conv(x)))))) + shortcut(x))

    [N, I, H, W] -> [N, width, H / stride, W / stride]. SE is there if `se`.
    """

    expansion: ClassVar = 1
    residual: ClassVar = "se"  # what is added to the shortcut; csla.identity_variance_ratio reads it

    def __init__(self, in_channels: int, width: int, stride: int, se: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.se = _squeeze_excite(width, se)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.se(self.bn2(self.conv2(y))) + self.shortcut(x))

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there was squeeze-and-excitation."""
        super().__setstate__(state)
        if "se" not in self._modules:
            self.se = nn.Identity()


class Bottleneck(nn.Module):
    """relu(SE(1x1(3x3(1x1(x)))) + shortcut(x)), each convolution with a norm, ReLUs between them

    [N, I, H, W] -> [N, 4 width, H / stride, W / stride]. The stride is that of the 3x3, as in torchvision: with it in
    the first 1x1, as He et al. have it, ResNet-50 would take 3.86 instead of 4.09 GFLOPs.
    """

    expansion: ClassVar = 4
    residual: ClassVar = "se"

    def __init__(self, in_channels: int, width: int, stride: int, se: bool = False):
        super().__init__()
        channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.se = _squeeze_excite(channels, se)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.se(self.bn3(self.conv3(y))) + self.shortcut(x))


def block_stage(block: type, into: int, width: int, count: int, stride: int, **settings: bool) -> nn.Sequential:
    """Return `count` blocks of one width, the first of them with the stride."""
    channels = block.expansion * width
    first = block(into, width, stride, **settings)
    return nn.Sequential(first, *(block(channels, width, 1, **settings) for _ in range(count - 1)))


def check_stem(stem: str) -> None:
    """Raise ValueError unless `stem` is one of the two."""
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")


class ResNet(StagedNetwork):
    """A stem and four stages of residual blocks.

    [N, in_channels, H, W] -> [N, num_classes]

    Args:
        stem: 'cifar': a 3x3 without stride. 'imagenet': a 7x7 of stride 2, and a 3x3 max pool of stride 2.
        se:   squeeze-and-excitation in each block before the addition, with a 16th of the channels in between.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        stem: str = "cifar",
        se: bool = False,
    ):
        check_stem(stem)
        super().__init__()
        small = stem == "cifar"
        self.conv1 = nn.Conv2d(in_channels, 64, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.reductions = (1, 1) if small else (2, 4)  # of the stem's output and of the first stage's
        self.expansion = block.expansion
        channels, stages = 64, []
        for count, width, stride in zip(blocks, STAGE_WIDTHS, (1, 2, 2, 2)):
            stages.append(block_stage(block, channels, width, count, stride, se=se))
            channels = block.expansion * width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def stages(self) -> tuple[Stage, ...]:
        stem, first = self.reductions
        layers = [("pool", "layer1"), ("layer2",), ("layer3",), ("layer4",)]
        return (
            Stage(("conv1", "bn1", "relu"), 64, stem),
            *(
                Stage(names, self.expansion * width, first * 2**n)
                for n, (names, width) in enumerate(zip(layers, STAGE_WIDTHS))
            ),
        )

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there were an ImageNet form and bottlenecks."""
        super().__setstate__(state)
        if "expansion" not in self.__dict__:
            self.pool, self.reductions, self.expansion = nn.Identity(), (1, 1), BasicBlock.expansion


def resnet18(num_classes: int = 10, *, in_channels: int = 3, stem: str = "cifar", se: bool = False) -> ResNet:
    """ResNet-18, 11.2 M parameters, 17 convolutions of 3x3  # [N, in_channels, H, W] -> [N, num_classes]

    Args:
        stem: 'cifar', for images of 32 x 32: a 3x3 convolution without stride, no pool. 'imagenet': a 7x7 of stride 2
              and a max pool. With 1000 classes that takes 11.7 M parameters and 1.81 G multiply-adds at 224 x 224.
        se:   squeeze-and-excitation in each block, before the addition.

    Raises ValueError for another stem.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, stem, se)


def resnet34(num_classes: int = 10, *, in_channels: int = 3, stem: str = "cifar", se: bool = False) -> ResNet:
    """ResNet-34: 21.8 M parameters and 3.66 G multiply-adds in ImageNet form. Arguments as `resnet18`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, stem, se)


def resnet50(num_classes: int = 10, *, in_channels: int = 3, stem: str = "cifar", se: bool = False) -> ResNet:
    """ResNet-50: 25.6 M parameters and 4.09 G multiply-adds in ImageNet form. Arguments as `resnet18`.

    The stride of a bottleneck is in its 3x3.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, stem, se)
