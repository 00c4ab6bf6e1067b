"""The block of DyRep: a convolution that has grown branches, and what it may grow.

Source: DyRep (Huang et al., 2022), and its published code (hunto/image_classification_sota) for what the paper leaves
open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.algebra import CentredAverage, CentredConv2d, plain_conv
from gradrep_kernels.branches.diverse import (
    AverageBranch,
    Branch,
    DiverseBranches,
    IdentityBranch,
    KernelBranch,
    SequenceBranch,
    fresh_norm,
    pointwise,
)

__all__ = ["ORDER", "OWN", "DynamicBranches", "kinds_for"]

OWN = "kxk"
"""The branch of the convolution itself."""
_ALWAYS, _OF_SAME_SIZE = ("1x1_kxk", "1x1_average"), ("1x1", "1xk", "kx1")
ORDER = (OWN, "1x1", *_ALWAYS, "1xk", "kx1", "identity")
"""Of branches in a block, and so of parameters. It is fixed, so that a resumed network is the same network."""


class DynamicBranches(DiverseBranches):
    """A convolution that has grown branches. The norm that follows it stays where it is."""

    def __init__(self, conv: nn.Conv2d, kinds: Iterable[str]):
        branches = {kind: _branch(kind, conv) for kind in sorted(kinds, key=ORDER.index)}
        super().__init__(branches, conv.training)

    def loudness(self) -> dict[str, float]:
        """The mean size of the scales at the end of each further branch, over that of the k x k branch."""
        scales = {kind: branch.norm.weight.detach().double() for kind, branch in self.branches.items()}
        sizes = {kind: float(scale.abs().mean()) for kind, scale in scales.items()}
        own = sizes.pop(OWN)
        return {kind: size / own if own else math.inf for kind, size in sizes.items()}

    @torch.no_grad()
    def represent(self, kernel: Tensor, bias: Tensor, x: Tensor) -> None:
        """Make the block equal to this convolution in eval mode, by its k x k branch alone.

        The norm of that branch starts with the statistics on x, and with the scale and bias that undo them. So in train
        mode it starts there too.
        """
        of_others, shift = self.sums(leave_out=(OWN,))
        branch = self.branches[OWN]
        if isinstance(branch.conv, DynamicBranches):
            branch.conv.represent(kernel - of_others, torch.zeros_like(bias), x)
        else:
            branch.conv.weight.copy_(kernel - of_others)
            if branch.conv.bias is not None:
                branch.conv.bias.zero_()
        norm = branch.norm
        _calibrate(branch, [norm], x)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean.double() + (bias - shift))

    @torch.no_grad()
    def start(self, generator: torch.Generator, size: float, x: Tensor) -> None:
        """Draw the further branches, `size` times as large as the output of the convolution, which stays what it is."""
        conv = self.plain
        kernel = conv.weight.double().clone()
        bias = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.double().clone()
        spread = conv(x).double().std((0, 2, 3), correction=0)
        for kind, branch in self.branches.items():
            if kind == OWN:
                continue
            for layer in branch.modules():
                if isinstance(layer, nn.Conv2d):
                    std = math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))
                    layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, std, generator=generator))
            norms = [layer for layer in branch.modules() if isinstance(layer, nn.BatchNorm2d)]
            _calibrate(branch, norms, x)
            branch.norm.weight.copy_(size * spread)
        self.represent(kernel, bias, x)

    def as_plain(self) -> nn.Conv2d:
        """Return a convolution of the same outputs in eval mode, with the block's own weight as its parameter."""
        merged, own = self.merged(), self.plain
        with torch.no_grad():
            own.weight.copy_(merged.weight)
        conv = plain_conv(own, own.weight, merged.bias)
        return conv.train(self.training)


def kinds_for(conv: nn.Conv2d) -> tuple[str, ...]:
    """The branches that grow at a convolution: those of the published code."""
    kinds = [OWN, *_ALWAYS]
    rows, columns = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    if CentredAverage(conv).padding == (columns, columns, rows, rows):
        kinds += _OF_SAME_SIZE
        if conv.in_channels == conv.out_channels and conv.stride == (1, 1):
            kinds.append("identity")
    return tuple(sorted(kinds, key=ORDER.index))


def _branch(kind: str, conv: nn.Conv2d) -> Branch:
    inputs, outputs, (kh, kw) = conv.in_channels, conv.out_channels, conv.kernel_size

    def norm(features: int = outputs) -> nn.BatchNorm2d:
        return fresh_norm(features, None, conv.weight).requires_grad_(conv.weight.requires_grad)

    if kind == OWN:
        return KernelBranch(plain_conv(conv, conv.weight, conv.bias), norm(), conv)
    if kind == "1x1_kxk":
        return SequenceBranch(pointwise(conv, inputs), norm(inputs), norm(), conv)
    if kind == "1x1_average":
        if inputs == outputs == conv.groups:
            return AverageBranch(None, None, norm(), conv)
        return AverageBranch(pointwise(conv, outputs), norm(), norm(), conv)
    if kind == "identity":
        return IdentityBranch(norm(), conv)
    sizes = {"1x1": (1, 1), "1xk": (1, kw), "kx1": (kh, 1)}
    return KernelBranch(CentredConv2d(conv, sizes[kind]), norm(), conv)


def _calibrate(branch: nn.Module, norms: Sequence[nn.BatchNorm2d], x: Tensor) -> None:
    """Give norms of `branch` the statistics of what they get in its forward on x, one after the other.

    The variance is that of the batch, without Bessel's correction, so that train mode computes the same.
    """

    def take(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        y = args[0].double()
        norm.running_mean.copy_(y.mean((0, 2, 3)))
        norm.running_var.copy_(y.var((0, 2, 3), correction=0))

    modes = [(module, module.training) for module in branch.modules()]
    handles = [norm.register_forward_pre_hook(take) for norm in norms]
    try:
        branch.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
