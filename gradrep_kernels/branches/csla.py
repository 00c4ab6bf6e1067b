"""The multi-branch blocks that stand in a convolution's place during training: real branches, each with its own forward.

Source: RepOptimizers (Ding et al., 2023), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import CentredConv2d, MultiBranch, add_centred, plain_conv, rounded
from gradrep_kernels.ops.reference.multiply import diagonal_taps

__all__ = ["CSLABlock", "ScaleLayer"]


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
