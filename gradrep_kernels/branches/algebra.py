"""The interface of a block, and the sums that turn its branches into one convolution.

This module knows no kind of block. Kernels are summed in float64 and rounded once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradrep_kernels.ops.reference.multiply import diagonal_taps

__all__ = [
    "CentredAverage",
    "CentredConv2d",
    "MultiBranch",
    "add_average",
    "add_centred",
    "add_diagonal",
    "can_average",
    "fold",
    "has_shortcut",
    "plain_conv",
    "rounded",
]


class MultiBranch(nn.Module, ABC):
    """A block of linear branches that is one convolution.

    A subclass stands in the place of a convolution during training. `csla.merge` puts `merged()` in its place.
    """

    holds_norm = False  # whether the block also takes the place of the norm that follows the convolution

    @abstractmethod
    def merged(self) -> nn.Conv2d:
        """Return the plain convolution that equals the block in eval mode. It shares no tensor."""


def plain_conv(like: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Conv2d:
    """Return an nn.Conv2d of the geometry and mode of `like` that holds these parameters.

    Draws no random numbers.
    """
    conv = nn.Conv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        like.groups,
        bias=False,
        padding_mode=like.padding_mode,
        device="meta",
    )
    conv.weight, conv.bias = weight, bias
    return conv.train(like.training)


def _own_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Return what `conv` pads on each side, as numbers (rows, columns)."""
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return (0, 0) if conv.padding == "valid" else conv.padding


def _centred_padding(conv: nn.Conv2d, kernel_size: tuple[int, int], dilation: int = 1) -> list[int]:
    """Return the padding (rows, columns) that puts a smaller kernel on the centre of `conv`.

    Below 0 the input is cropped. `dilation` counts taps of `conv`.
    """
    sizes = zip(_own_padding(conv), conv.dilation, conv.kernel_size, kernel_size)
    return [p - d * ((k - 1) - dilation * (small - 1)) // 2 for p, d, k, small in sizes]


def can_average(conv: nn.Conv2d) -> bool:
    """Whether an average pool fits beside `conv`: as many outputs as inputs and 'same' padding."""
    return conv.in_channels == conv.out_channels and _centred_padding(conv, (1, 1)) == [0, 0]


def has_shortcut(conv: nn.Conv2d) -> bool:
    """Whether the block of `conv` has the identity branch.

    It has one for as many outputs as inputs, stride 1 and 'same' padding.
    """
    return can_average(conv) and conv.stride == (1, 1)


class CentredConv2d(nn.Conv2d):
    """A smaller odd kernel beside `like`, with the centre taps on the same pixel.

    It has no bias, and its weight is drawn as nn.Conv2d draws it. Where `like` pads less than 'same', the input is
    cropped by the difference. Elsewhere it is padded in the padding mode of `like`. The outputs have the size of like's
    at every stride and dilation. `dilation` is the distance of the taps, in taps of `like`.
    """

    def __init__(self, like: nn.Conv2d, kernel_size: tuple[int, int], dilation: int = 1):
        padding = _centred_padding(like, kernel_size, dilation)
        super().__init__(
            like.in_channels,
            like.out_channels,
            kernel_size,
            like.stride,
            tuple(max(p, 0) for p in padding),
            tuple(dilation * d for d in like.dilation),
            like.groups,
            bias=False,
            padding_mode=like.padding_mode,
            device=like.weight.device,
            dtype=like.weight.dtype,
        )
        self.crop = tuple(max(-p, 0) for p in padding)
        self.weight.requires_grad_(like.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, O, H', W']
        rows, columns = self.crop
        if rows or columns:
            x = x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]
        return super().forward(x)


class CentredAverage(nn.Module):
    """The average pool beside `like`, of each channel, whose window is the kernel of `like` and counts its padding."""

    def __init__(self, like: nn.Conv2d):
        super().__init__()
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        rows, columns = _own_padding(like)
        self.padding = (columns, columns, rows, rows)
        self.padding_mode = "constant" if like.padding_mode == "zeros" else like.padding_mode

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H', W']
        x = F.pad(x, self.padding, self.padding_mode)
        if self.dilation == (1, 1):
            return F.avg_pool2d(x, self.kernel_size, self.stride)
        channels, (kh, kw) = x.shape[-3], self.kernel_size
        window = x.new_full((channels, 1, kh, kw), 1 / (kh * kw))
        return F.conv2d(x, window, None, self.stride, 0, self.dilation, channels)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def add_centred(kernel: Tensor, small: Tensor, dilation: int = 1) -> None:
    """Add `small`, padded with zeros, to the centre of `kernel`  # [O, I, kh, kw], both odd

    `dilation` is the distance of its taps in `kernel`.
    """
    rows, columns = ((n - 1) * dilation + 1 for n in small.shape[2:])
    top, left = (kernel.shape[2] - rows) // 2, (kernel.shape[3] - columns) // 2
    kernel[:, :, top : top + rows : dilation, left : left + columns : dilation] += small


def add_diagonal(kernel: Tensor, values: Tensor | float) -> None:
    """Add the identity branch times `values` to `kernel`  # [O] or a number, [O, I, kh, kw]"""
    kernel[diagonal_taps(kernel.shape, kernel.device)] += values


def add_average(kernel: Tensor, value: Tensor | float) -> None:
    """Add the average pool of each channel times `value` to `kernel`  # a number, [O, I, kh, kw]"""
    output, its_input, _, _ = diagonal_taps(kernel.shape, kernel.device)
    kernel[output, its_input] += value / (kernel.shape[2] * kernel.shape[3])


def rounded(value: Tensor, like: Tensor) -> nn.Parameter:
    """Round `value` to a parameter with the dtype, memory format and requires_grad of `like`."""
    return nn.Parameter(torch.empty_like(like, requires_grad=False).copy_(value), like.requires_grad)


@torch.no_grad()
def fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold `norm`, in eval mode, into the convolution before it.

    Returns kernel [O, I, kh, kw] and bias [O], float64.
    """
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return weight.double() * factor.view(-1, 1, 1, 1), shift
