"""VGG-11, 13, 16 and 19 for CIFAR, and VGG-16 for ImageNet: 3x3 convolutions with norms, and linear layers.

The SGS paper (Detkov et al., 2023) trains the first four: section 4.1 and Table 4. RepOptimizers (Ding et al., 2023),
Table 3, compares with the last.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gradrep_kernels.models.stages import Stage, StagedNetwork

__all__ = ["VGG", "vgg11", "vgg13", "vgg16", "vgg16_imagenet", "vgg19"]

_WIDTHS = (64, 128, 256, 512, 512)
_VGG16 = (2, 2, 3, 3, 3)


class VGG(StagedNetwork):
    """Five groups of convolutions, and a head.

    [N, in_channels, H, W] -> [N, num_classes]. Group n is counts[n] times [conv, BN, ReLU], and a 2x2 max pool.

    Args:
        head_width: features of a linear layer with ReLU before the last, None for no such layer.
    """

    head: ClassVar = ("gap", "hidden", "linear")

    def __init__(self, counts: tuple[int, ...], num_classes: int, in_channels: int, head_width: int | None = None):
        if head_width is not None and head_width < 1:
            raise ValueError(f"head_width must be at least 1, or None, got {head_width}")
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for count, width in zip(counts, _WIDTHS):
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
        self.hidden: nn.Module = nn.Identity()
        if head_width is not None:
            self.hidden = nn.Sequential(nn.Linear(channels, head_width), nn.ReLU(inplace=True))
            channels = head_width
        self.linear = nn.Linear(channels, num_classes)

    def stages(self) -> tuple[Stage, ...]:
        groups: list[list[str]] = [[]]
        for name, layer in self.features.named_children():
            if isinstance(layer, nn.MaxPool2d):
                groups.append([])
            groups[-1].append(f"features.{name}")
        widths = (*_WIDTHS, _WIDTHS[-1])
        return tuple(Stage(tuple(steps), width, 2**n) for n, (steps, width) in enumerate(zip(groups, widths)))

    def classify(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(self.gap(x).flatten(1)))

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there was a hidden layer."""
        super().__setstate__(state)
        if "hidden" not in self._modules and "linear" in self._modules:
            self.hidden = nn.Identity()


class ImageNetVGG(VGG):
    """VGG with the head of Simonyan and Zisserman (2015): 7 x 7 features and three linear layers with dropout.

    [N, in_channels, H, W] -> [N, num_classes]
    """

    def __init__(self, counts: tuple[int, ...], num_classes: int, in_channels: int, head_width: int, dropout: float):
        super().__init__(counts, num_classes, in_channels)
        self.gap = nn.AdaptiveAvgPool2d(7)
        self.hidden = nn.Sequential(
            nn.Linear(7 * 7 * _WIDTHS[-1], head_width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(head_width, head_width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )
        self.linear = nn.Linear(head_width, num_classes)


def vgg11(num_classes: int = 10, *, in_channels: int = 3, head_width: int | None = None) -> VGG:
    """VGG-11, 9.2 M parameters, 8 convolutions. Arguments as `vgg16`."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels, head_width)


def vgg13(num_classes: int = 10, *, in_channels: int = 3, head_width: int | None = None) -> VGG:
    """VGG-13, 9.4 M parameters, 10 convolutions. Arguments as `vgg16`."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels, head_width)


def vgg16(num_classes: int = 10, *, in_channels: int = 3, head_width: int | None = None) -> VGG:
    """VGG-16, 14.7 M parameters, 13 convolutions  # [N, in_channels, H, W] -> [N, num_classes]

    Args:
        head_width: features of a linear layer with ReLU before the last. 512 is the head of the VGG-16 that SGS, DyRep
                    and DBB train on CIFAR: 15.0 M parameters and 313 M multiply-adds at 32 x 32 (SGS, Table 1). None
                    for one linear layer.

    Raises ValueError for a `head_width` below 1.
    """
    return VGG(_VGG16, num_classes, in_channels, head_width)


def vgg19(num_classes: int = 10, *, in_channels: int = 3, head_width: int | None = None) -> VGG:
    """VGG-19, 20.0 M parameters, 16 convolutions. Arguments as `vgg16`."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels, head_width)


def vgg16_imagenet(
    num_classes: int = 1000, *, in_channels: int = 3, head_width: int = 4096, dropout: float = 0.5
) -> VGG:
    """VGG-16 for ImageNet, 138.4 M parameters, 15.5 G multiply-adds  # [N, in_channels, H, W] -> [N, num_classes]

    The 13 convolutions, pools to 7 x 7, and three linear layers, as Simonyan and Zisserman (2015) have them. It departs
    from them in this: each convolution has a batch norm, and no bias, as RepOpt-VGG has it. RepOptimizers, Table 3,
    says "the original VGGNet-16" trained with the settings of RepOpt-VGG, and not whether it had norms. Images of other
    sizes than 224 x 224 are pooled to 7 x 7 too.

    Args:
        head_width: features of the two hidden linear layers.
        dropout:    share of their features that is set to 0 in training.
    """
    return ImageNetVGG(_VGG16, num_classes, in_channels, head_width, dropout)
