"""VGG-11, 13, 16 and 19 for CIFAR, and VGG-16 for ImageNet: 3x3 convolutions with norms, and linear layers.

The SGS paper (Detkov et al., 2023) trains the first four: section 4.1 and Table 4. RepOptimizers (Ding et al., 2023),
Table 3, compares with the last.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        head_width: features of hidden linear layers, each with ReLU and dropout, before the last one. A number for one
                    of them, several for as many, None or () for none.
        width:      channels of the convolutions, over those of VGG.
        dropout:    share of the features of each hidden layer that is set to 0 in training.
        pooled:     side of the maps that the head takes.
    """

    head: ClassVar = ("gap", "hidden", "linear")

    def __init__(
        self,
        counts: tuple[int, ...],
        num_classes: int,
        in_channels: int,
        head_width: int | Sequence[int] | None = None,
        width: float = 1.0,
        dropout: float = 0.0,
        pooled: int = 1,
    ):
        widths = (head_width,) if isinstance(head_width, int) else tuple(head_width or ())
        if any(features < 1 for features in widths):
            raise ValueError(f"head_width must be at least 1, or None, got {head_width}")
        if not 0 < width < float("inf"):
            raise ValueError(f"width must be a number above 0, got {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if dropout and not widths:
            raise ValueError(f"dropout must be 0 without head_width, got {dropout}")
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for count, of_group in zip(counts, _WIDTHS):
            of_group = max(1, round(width * of_group))
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, of_group, 3, padding=1, bias=False),
                    nn.BatchNorm2d(of_group),
                    nn.ReLU(inplace=True),
                ]
                channels = of_group
            # ceil_mode changes nothing for 32 x 32, and lets smaller images end at 1 x 1 instead of 0 x 0.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.gap = nn.AdaptiveAvgPool2d(pooled)
        hidden: list[nn.Module] = []
        inputs = channels * pooled**2
        for features in widths:
            hidden += [nn.Linear(inputs, features), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            inputs = features
        self.hidden: nn.Module = nn.Sequential(*hidden) if hidden else nn.Identity()
        self.linear = nn.Linear(inputs, num_classes)

    def stages(self) -> tuple[Stage, ...]:
        groups: list[list[str]] = [[]]
        widths = [0]
        for name, layer in self.features.named_children():
            if isinstance(layer, nn.MaxPool2d):
                groups.append([])
                widths.append(widths[-1])
            elif isinstance(layer, nn.BatchNorm2d):
                widths[-1] = layer.num_features
            groups[-1].append(f"features.{name}")
        return tuple(Stage(tuple(steps), width, 2**n) for n, (steps, width) in enumerate(zip(groups, widths)))

    def classify(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(self.gap(x).flatten(1)))

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there was a hidden layer."""
        super().__setstate__(state)
        if "hidden" not in self._modules and "linear" in self._modules:
            self.hidden = nn.Identity()


def vgg11(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    head_width: int | Sequence[int] | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> VGG:
    """VGG-11, 9.2 M parameters, 8 convolutions. Arguments as `vgg16`."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels, head_width, width, dropout)


def vgg13(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    head_width: int | Sequence[int] | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> VGG:
    """VGG-13, 9.4 M parameters, 10 convolutions. Arguments as `vgg16`."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels, head_width, width, dropout)


def vgg16(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    head_width: int | Sequence[int] | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> VGG:
    """VGG-16, 14.7 M parameters, 13 convolutions  # [N, in_channels, H, W] -> [N, num_classes]

    Args:
        head_width: features of hidden linear layers with ReLU before the last one: a number, or several. 512 is the
                    head of the VGG-16 that SGS, DyRep and DBB train on CIFAR in 600 epochs: 15.0 M parameters and 313 M
                    multiply-adds at 32 x 32 (SGS, Table 1). (4096, 4096) with dropout=0.5 is the head of the VGGs that
                    the code of SGS takes for 200 epochs (Table 4). None for one linear layer.
        width:      channels of the convolutions, over those of VGG: 0.25 is a network of a sixteenth of the cost.
        dropout:    share of the features of each hidden layer that is set to 0 in training.

    Raises ValueError for a `head_width` below 1, a `width` that is not above 0, and a `dropout` outside of [0, 1) or
    without hidden layers.
    """
    return VGG(_VGG16, num_classes, in_channels, head_width, width, dropout)


def vgg19(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    head_width: int | Sequence[int] | None = None,
    width: float = 1.0,
    dropout: float = 0.0,
) -> VGG:
    """VGG-19, 20.0 M parameters, 16 convolutions. Arguments as `vgg16`."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels, head_width, width, dropout)


def vgg16_imagenet(
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    head_width: int | Sequence[int] | None = (4096, 4096),
    width: float = 1.0,
    dropout: float = 0.5,
) -> VGG:
    """VGG-16 for ImageNet, 138.4 M parameters, 15.5 G multiply-adds  # [N, in_channels, H, W] -> [N, num_classes]

    The 13 convolutions, pools to 7 x 7, and three linear layers, as Simonyan and Zisserman (2015) have them. It departs
    from them in this: each convolution has a batch norm, and no bias, as RepOpt-VGG has it. RepOptimizers, Table 3,
    says "the original VGGNet-16" trained with the settings of RepOpt-VGG, and not whether it had norms. Images of other
    sizes than 224 x 224 are pooled to 7 x 7 too. Arguments as `vgg16`.
    """
    return VGG(_VGG16, num_classes, in_channels, head_width, width, dropout, pooled=7)
