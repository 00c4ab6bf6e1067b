"""Linear branches and the convolution that they add up to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["CentredConv2d", "MultiBranch", "add_centred", "fold", "has_shortcut", "plain_conv", "rounded"]


class MultiBranch(nn.Module, ABC):
    """A block of linear branches that is one convolution; `csla.merge` puts `merged()` in its place."""

    @abstractmethod
    def merged(self) -> nn.Conv2d:
        """The plain convolution that computes what the block does in eval mode; a new module, nothing shared."""


def plain_conv(like: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Conv2d:
    """An nn.Conv2d with the geometry and mode of `like` that holds these parameters. Draws no random numbers."""
    conv = nn.Conv2d(
        like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, like.dilation, like.groups,
        bias=False, padding_mode=like.padding_mode, device="meta",
    )  # fmt: skip
    conv.weight, conv.bias = weight, bias
    return conv.train(like.training)


def _excess(conv: nn.Conv2d, kernel_size: tuple[int, int]) -> list[int]:
    """Padding (rows, columns) that keeps the centre tap of a kernel of `kernel_size` on that of `conv`; below 0: crop."""
    if conv.padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size)]
    elif conv.padding == "valid":
        padding = [0, 0]
    else:
        padding = conv.padding
    return [p - d * (k - small) // 2 for p, d, k, small in zip(padding, conv.dilation, conv.kernel_size, kernel_size)]


def has_shortcut(conv: nn.Conv2d) -> bool:
    """Whether the block of `conv` has the identity branch: as many outputs as inputs, stride 1, 'same' padding."""
    return conv.in_channels == conv.out_channels and conv.stride == (1, 1) and _excess(conv, (1, 1)) == [0, 0]


class CentredConv2d(nn.Conv2d):
    """A smaller odd kernel beside `like`, whose centre taps meet; drawn as nn.Conv2d draws it, without bias.

    Where `like` pads less than 'same' the input is cropped by the difference, else padded in like's padding mode; the
    outputs have the size of like's at every stride and dilation.
    """

    def __init__(self, like: nn.Conv2d, kernel_size: tuple[int, int]):
        excess = _excess(like, kernel_size)
        super().__init__(
            like.in_channels, like.out_channels, kernel_size, like.stride, tuple(max(e, 0) for e in excess), like.dilation, like.groups,
            bias=False, padding_mode=like.padding_mode, device=like.weight.device, dtype=like.weight.dtype,
        )  # fmt: skip
        self.crop = tuple(max(-e, 0) for e in excess)
        self.weight.requires_grad_(like.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, O, H', W']
        rows, columns = self.crop
        if rows or columns:
            x = x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]
        return super().forward(x)


def rounded(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter with value's numbers and like's dtype, memory format and requires_grad."""
    return nn.Parameter(torch.empty_like(like, requires_grad=False).copy_(value), like.requires_grad)


def add_centred(kernel: Tensor, small: Tensor) -> None:
    """kernel += small, zero-padded to kernel's size  # [O, I, kh, kw], both odd"""
    row, column = ((big - n) // 2 for big, n in zip(kernel.shape[2:], small.shape[2:]))
    kernel[:, :, row : row + small.shape[2], column : column + small.shape[3]] += small


@torch.no_grad()
def fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel [O, I, kh, kw] and bias [O], float64, of the convolution that equals conv and then `norm` in eval mode."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return weight.double() * factor.view(-1, 1, 1, 1), shift
