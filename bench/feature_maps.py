"""Feature maps to count: kinds of data, and the inputs of the convolutions of real networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def half_displacements(kernel: int) -> list[tuple[int, int]]:
    """One of each pair ±d of a square kernel's taps: 4 for 3 x 3, 24 for 7 x 7."""
    taps = [(i, j) for i in range(-(kernel // 2), kernel // 2 + 1) for j in range(-(kernel // 2), kernel // 2 + 1)]
    return taps[len(taps) // 2 + 1 :]


def pairs(shape: tuple[int, ...], kernel: int, padding: int) -> int:
    """How many pairs are counted in a map [N, C, H, W]: those inside the padded map, for half of the displacements."""
    n, c, h, w = shape
    h, w = h + 2 * padding, w + 2 * padding
    return n * c * sum(max(0, h - abs(di)) * max(0, w - abs(dj)) for di, dj in half_displacements(kernel))


def _uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, device=device)


def _smooth(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Means over 5 x 5 of white noise: neighbours share most of their value, as in natural images."""
    n, c, h, w = shape
    return F.avg_pool2d(torch.randn(n, c, h + 4, w + 4, device=device), 5, 1)


def _relu(threshold: float) -> Callable[[tuple[int, ...], torch.device], Tensor]:
    return lambda shape, device: torch.randn(shape, device=device).sub_(threshold).relu_()


KINDS: dict[str, Callable[[tuple[int, ...], torch.device], Tensor]] = {
    "uniform": _uniform,
    "smooth": _smooth,
    "ReLU, 60 % zeros": _relu(0.2533),  # quantiles of the normal distribution
    "ReLU, 90 % zeros": _relu(1.2816),
    "constant": lambda shape, device: torch.full(shape, 0.5, device=device),
}


@dataclass(frozen=True)
class Layer:
    """The input of a convolution: [N, channels, size, size]."""

    channels: int
    size: int
    kernel: int = 3
    padding: int = 1
    count: int = 1  # convolutions of this kind in the network

    def shape(self, images: int) -> tuple[int, int, int, int]:
        return images, self.channels, self.size, self.size

    def __str__(self) -> str:
        return f"{self.channels} x {self.size} x {self.size}, {self.kernel} x {self.kernel}"


VGG16_CIFAR = (  # 2.43 G pairs in 20 x 128 images
    Layer(3, 32), Layer(64, 32), Layer(64, 16), Layer(128, 16), Layer(128, 8), Layer(256, 8, count=2),
    Layer(256, 4), Layer(512, 4, count=2), Layer(512, 2, count=3),
)  # fmt: skip
RESNET18_IMAGENET = (  # 5.67 G pairs in 2 x 256 images
    Layer(3, 224, 7, 3), Layer(64, 56, count=5), Layer(128, 28, count=4), Layer(256, 14, count=4),
    Layer(512, 7, count=3),
)  # fmt: skip


@torch.no_grad()
def conv_inputs(model: nn.Module, batch: Tensor) -> list[tuple[nn.Conv2d, Tensor]]:
    """Each convolution of `model` with its input, in the order of the calls."""
    found: list[tuple[nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda conv, args: found.append((conv, args[0].clone())))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        model.eval()(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
