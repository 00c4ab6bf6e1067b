"""RepOpt-VGG: plain 3x3 networks, and their Hyper-Search, CSLA and RepVGG forms.

Source: RepOptimizers (Ding et al., 2023), section 4.1 and Table 1. Module names are the published code's, so that its
weights load into the target form: `stage0`, `stageN.i`, below them `conv`, `bn`, `post_se`; `linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradrep_kernels import csla
from gradrep_kernels.branches.normed import repvgg_model
from gradrep_kernels.models.modes import ScalesOrPath, scales_of_mode
from gradrep_kernels.models.stages import Stage, StagedNetwork

__all__ = [
    "RepOptVGG",
    "repopt_vgg_b1",
    "repopt_vgg_b2",
    "repopt_vgg_deep",
    "repopt_vgg_l1",
    "repopt_vgg_l2",
    "repopt_vgg_small",
]

_HALVED = (2, 2, 2, 2, 2)  # strides of stage0 and of the first block of each stage


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x ⊙ sigmoid(up(relu(down(mean of x))))  # [N, C, H, W]

    Both are 1x1 convolutions with bias, with `between` channels in between, C // 4 where it is None.
    """

    def __init__(self, channels: int, between: int | None = None):
        super().__init__()
        between = channels // 4 if between is None else between
        self.down = nn.Conv2d(channels, between, 1)
        self.up = nn.Conv2d(between, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Block(nn.Module):
    """SE(ReLU(BN(conv(x)))), 3x3  # [N, I, H, W] -> [N, O, H / stride, W / stride]

    SE is there if `se`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, se: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.post_se = SqueezeExcite(channels) if se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.post_se(self.relu(self.bn(self.conv(x))))


class RepOptVGG(StagedNetwork):
    """The target form: a block, stages of blocks, global average pooling, a linear layer.

    Args:
        blocks:  blocks of stage1, stage2, ...
        widths:  their channels. stage0 has min(64, widths[0]).
        strides: of stage0 and of the first block of each stage.

    Raises ValueError for strides of another number or below 1.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        se: bool = False,
    ):
        _check_strides(strides, len(blocks) + 1)
        super().__init__()
        channels = min(64, widths[0])
        self.stage0 = Block(in_channels, channels, strides[0], se)
        self.shapes = [(channels, strides[0])]  # of each stage: channels, stride
        for number, (count, width, stride) in enumerate(zip(blocks, widths, strides[1:]), 1):
            self.add_module(
                f"stage{number}",
                nn.Sequential(
                    *(Block(channels if n == 0 else width, width, stride if n == 0 else 1, se) for n in range(count))
                ),
            )
            channels = width
            self.shapes.append((width, stride))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def stages(self) -> tuple[Stage, ...]:
        strides = [stride for _, stride in self.shapes]
        return tuple(
            Stage((f"stage{n}",), channels, math.prod(strides[: n + 1])) for n, (channels, _) in enumerate(self.shapes)
        )

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there were backbones."""
        super().__setstate__(state)
        names = self.__dict__.pop("stages", None)
        if names is not None:
            first = [
                next(m for m in getattr(self, n).modules() if isinstance(m, nn.Conv2d)) for n in ("stage0", *names)
            ]
            self.shapes = [(conv.out_channels, conv.stride[0]) for conv in first]


def _check_strides(strides: Sequence[int], count: int) -> None:
    if len(strides) != count or any(type(stride) is not int or stride < 1 for stride in strides):
        raise ValueError(
            f"strides must be {count} whole numbers of at least 1, of stage0 and of the first block of each stage, got "
            f"{tuple(strides)}"
        )


def _build(
    blocks: Sequence[int],
    widths: Sequence[int],
    usual: Sequence[int],
    strides: Sequence[int] | None,
    mode: str,
    num_classes: int,
    se: bool,
    scales: ScalesOrPath,
    in_channels: int,
) -> nn.Module:
    scales = scales_of_mode(mode, scales, "repvgg")
    target = RepOptVGG(blocks, widths, usual if strides is None else strides, num_classes, in_channels, se)
    if mode == "hs":
        return csla.hyper_search_model(target)
    if mode == "csla":
        return csla.csla_model(target, scales)
    return repvgg_model(target) if mode == "repvgg" else target


def repopt_vgg_b1(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """RepOpt-VGG-B1, 51.84 M parameters as target  # [N, in_channels, H, W] -> [N, num_classes]

    Every stage halves H and W, unless `strides` says otherwise.

    Args:
        mode:    'target' (plain), 'hs' (Hyper-Search), 'csla' (explicit CSLA, needs `scales`) or 'repvgg' (a norm in
                 each branch).
        se:      squeeze-and-excitation after every ReLU.
        scales:  branch scales for mode 'csla': Scales, or the path of a scales file.
        strides: five numbers, of stage0 and of the first block of each stage. None: 2, 2, 2, 2, 2. RepOptimizers,
                 Table 6, has 2, 2, 1, 2, 1 and 2, 1, 2, 1, 1 too.

    Raises ValueError for another mode, for scales that are missing, superfluous, or do not fit, and for strides of
    another number or below 1.
    """
    return _build((4, 6, 16, 1), (128, 256, 512, 2048), _HALVED, strides, mode, num_classes, se, scales, in_channels)


def repopt_vgg_b2(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """RepOpt-VGG-B2, 80.33 M parameters as target. Arguments as `repopt_vgg_b1`."""
    return _build((4, 6, 16, 1), (160, 320, 640, 2560), _HALVED, strides, mode, num_classes, se, scales, in_channels)


def repopt_vgg_l1(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """RepOpt-VGG-L1, 76.04 M parameters as target. Arguments as `repopt_vgg_b1`."""
    return _build((8, 14, 24, 1), (128, 256, 512, 2048), _HALVED, strides, mode, num_classes, se, scales, in_channels)


def repopt_vgg_l2(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """RepOpt-VGG-L2, 118.13 M parameters as target. Arguments as `repopt_vgg_b1`."""
    return _build((8, 14, 24, 1), (160, 320, 640, 2560), _HALVED, strides, mode, num_classes, se, scales, in_channels)


def repopt_vgg_small(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """A RepOpt-VGG for images of 32 x 32 and less. Arguments as `repopt_vgg_b1`.

    stage0 keeps the size, stage1 and stage2 halve it: `strides` are three numbers, 1, 2, 2 where None. Three of its six
    blocks have a shortcut. The blocks have 0.1 M parameters.
    """
    return _build((2, 3), (32, 64), (1, 2, 2), strides, mode, num_classes, se, scales, in_channels)


def repopt_vgg_deep(
    mode: str = "target",
    num_classes: int = 1000,
    se: bool = False,
    scales: ScalesOrPath = None,
    *,
    in_channels: int = 3,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """A narrow RepOpt-VGG of 17 convolutions for small images. Arguments as `repopt_vgg_b1`.

    Plain networks of this depth are hard to train, so that a second of training shows what branches and Grad Mults are
    for. stage0 keeps the size, stage1 and stage2 halve it: `strides` are three numbers, 1, 2, 2 where None. 14 of its
    17 blocks have a shortcut. The blocks have 0.1 M parameters.
    """
    return _build((8, 8), (16, 32), (1, 2, 2), strides, mode, num_classes, se, scales, in_channels)
