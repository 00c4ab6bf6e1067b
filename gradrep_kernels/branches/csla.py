"""The multi-branch blocks that stand in a convolution's place during training: real branches, each with its own forward.

Source: RepOptimizers (Ding et al., 2023), section 3.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.ops.reference.multiply import diagonal_taps

__all__ = [
    "CSLABlock",
    "CentredConv2d",
    "MultiBranch",
    "ScaleLayer",
    "add_centred",
    "fold",
    "has_shortcut",
    "plain_conv",
    "rounded",
]


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


class ScaleLayer(nn.Module):
    """y = α ⊙ x, α one number per channel: a parameter if `trainable`, else a buffer, so that no optimizer moves it."""

    def __init__(self, scale: Tensor, *, trainable: bool, decays: bool = False):
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(scale)
        else:
            self.register_buffer("weight", scale)
        self.decayed_vectors = ("weight",) if decays else ()  # read by gr.param_groups

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x * self.weight.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, trainable={isinstance(self.weight, nn.Parameter)}"


class CSLABlock(MultiBranch):
    """s ⊙ conv(x) + t ⊙ conv_1x1(x) + id ⊙ x + bias: the linear part of a CSLA block (section 3.2, Figure 2); the norm follows it.

    Args:
        conv:      the convolution it replaces. Its weight and bias parameters become the block's, the bias outside of s.
        scales:    s, t and id, cast to the weight's dtype. The block has the branches that `scales` has.
        trainable: whether s and t are parameters (Hyper-Search) or buffers (CSLA). id always is a parameter.

    The 1x1 kernel is drawn as nn.Conv2d draws it, from the default generator of the weight's device.
    """

    def __init__(self, conv: nn.Conv2d, scales: BranchScales, *, trainable: bool = False):
        super().__init__()
        weight = conv.weight

        def layer(scale: Tensor, **kind: bool) -> ScaleLayer:
            return ScaleLayer(scale.to(device=weight.device, dtype=weight.dtype, copy=True), **kind).requires_grad_(
                weight.requires_grad
            )

        self.conv = plain_conv(conv, weight)
        self.scale_conv = layer(scales.kxk, trainable=trainable)
        self.conv_1x1 = self.scale_1x1 = self.scale_identity = None
        if scales.one_by_one is not None:
            self.conv_1x1 = CentredConv2d(conv, (1, 1))
            self.scale_1x1 = layer(scales.one_by_one, trainable=trainable)
        if scales.has_identity:
            searched = torch.ones_like(scales.kxk) if scales.identity is True else scales.identity
            self.scale_identity = layer(searched, trainable=True, decays=True)
        self.register_parameter("bias", conv.bias)
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = self.scale_conv(self.conv(x))
        if self.conv_1x1 is not None:
            y = y + self.scale_1x1(self.conv_1x1(x))
        if self.scale_identity is not None:
            y = y + self.scale_identity(x)
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        return y

    def scales(self) -> BranchScales:
        """The scales as they are now; an identity scale has trained on in a CSLA model too."""
        return BranchScales(
            self.scale_conv.weight,
            None if self.scale_1x1 is None else self.scale_1x1.weight,
            False if self.scale_identity is None else self.scale_identity.weight,
        )

    @torch.no_grad()
    def merged_kernel(self) -> Tensor:
        """Eq. 4, W = s ⊙ W_kxk + t ⊙ W_1x1 (zero-padded) + diag(id)  # [O, I, kh, kw] float64"""
        kernel = _per_output(self.scale_conv.weight) * self.conv.weight.double()
        if self.conv_1x1 is not None:
            add_centred(kernel, _per_output(self.scale_1x1.weight) * self.conv_1x1.weight.double())
        if self.scale_identity is not None:
            kernel[diagonal_taps(kernel.shape, kernel.device)] += self.scale_identity.weight.double()
        return kernel

    def merged(self) -> nn.Conv2d:
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain_conv(self.conv, rounded(self.merged_kernel(), self.conv.weight), bias)


def _per_output(scale: Tensor) -> Tensor:
    return scale.double().view(-1, 1, 1, 1)


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
