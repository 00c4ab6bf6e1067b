"""PyramidNet-110 (Han et al., 2017) for CIFAR: each of its 54 blocks is a little wider than the one before."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gradrep_kernels.models.stages import Stage, StagedNetwork

__all__ = ["PyramidNet", "pyramidnet_a48", "pyramidnet_a84", "pyramidnet_a270"]

_DEPTH, _STEM = 110, 16


class PyramidBlock(nn.Module):
    """bn(conv(relu(bn(conv(bn(x)))))) + x  # [N, I, H, W] -> [N, O, H / stride, W / stride]

    x is averaged where there is a stride, and gets channels of zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        # ceil_mode: the 3x3 rounds odd sides up.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.added = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.relu(self.bn2(self.conv1(self.bn1(x))))))
        return y + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.added))


class PyramidNet(StagedNetwork):
    """Three stages of basic blocks. Block n of N is round(16 + α n / N) channels wide.

    [N, in_channels, H, W] -> [N, num_classes]. Rounding is that of the published code. The paper rounds down.
    """

    head: ClassVar = ("norm", "relu", "gap", "linear")

    def __init__(self, alpha: int, num_classes: int, in_channels: int = 3, depth: int = _DEPTH):
        super().__init__()
        count = (depth - 2) // 6  # blocks of a stage
        self.conv1 = nn.Conv2d(in_channels, _STEM, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        widths = [round(_STEM + alpha * n / (3 * count)) for n in range(3 * count + 1)]
        self.widths = tuple(widths[::count])  # of the stem and of the last block of each stage
        for stage in range(3):
            blocks = nn.Sequential()
            for n in range(stage * count, (stage + 1) * count):
                blocks.append(PyramidBlock(widths[n], widths[n + 1], 2 if stage and n == stage * count else 1))
            self.add_module(f"layer{stage + 1}", blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.relu = nn.ReLU()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def stages(self) -> tuple[Stage, ...]:
        stem, *others = self.widths
        layers = (Stage((f"layer{n + 1}",), width, 2**n) for n, width in enumerate(others))
        return (Stage(("conv1", "bn1"), stem, 1), *layers)

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(self.relu(self.norm(x)))


def pyramidnet_a48(num_classes: int = 10, *, in_channels: int = 3) -> PyramidNet:
    """PyramidNet-110 of α = 48, 1.8 M parameters  # [N, in_channels, H, W] -> [N, num_classes]"""
    return PyramidNet(48, num_classes, in_channels)


def pyramidnet_a84(num_classes: int = 10, *, in_channels: int = 3) -> PyramidNet:
    """PyramidNet-110 of α = 84, 3.9 M parameters  # [N, in_channels, H, W] -> [N, num_classes]"""
    return PyramidNet(84, num_classes, in_channels)


def pyramidnet_a270(num_classes: int = 10, *, in_channels: int = 3) -> PyramidNet:
    """PyramidNet-110 of α = 270, 28.5 M parameters  # [N, in_channels, H, W] -> [N, num_classes]"""
    return PyramidNet(270, num_classes, in_channels)
