"""QARepVGG's block, whose merged kernel keeps a range that survives 8 bits.

Source: Make RepVGG Greater Again: A Quantization-Aware Approach (Chu et al., 2022), section 4, its final form S4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.algebra import (
    CentredConv2d,
    MultiBranch,
    add_centred,
    add_diagonal,
    fold,
    has_shortcut,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.diverse import fresh_norm
from gradrep_kernels.branches.sites import Site, Where, conv_sites

__all__ = ["QuantizableBranches", "qarepvgg_model"]


class QuantizableBranches(MultiBranch):
    """norm(conv(x)) + conv_1x1(x) [+ x], which stands for conv. The norm that follows conv stays, and norms the sum.

    Args:
        conv, norm: the plain pair. The block takes over the weight and bias of conv, and has a norm of its own with the
            settings of `norm`.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None):
        super().__init__()
        self.conv = plain_conv(conv, conv.weight, conv.bias)
        self.norm = fresh_norm(conv.out_channels, norm, conv.weight)
        self.conv_1x1 = CentredConv2d(conv, (1, 1))
        self.has_identity = has_shortcut(conv)
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = self.norm(self.conv(x)) + self.conv_1x1(x)
        return y + x if self.has_identity else y

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        kernel, bias = fold(self.conv.weight, self.conv.bias, self.norm)
        add_centred(kernel, self.conv_1x1.weight.double())
        if self.has_identity:
            add_diagonal(kernel, 1.0)
        weight = rounded(kernel, self.conv.weight)
        return plain_conv(self.conv, weight, nn.Parameter(bias.to(weight.dtype), weight.requires_grad))

    def extra_repr(self) -> str:
        return f"identity={self.has_identity}"


def qarepvgg_model(model: nn.Module, *, where: Where | None = None) -> nn.Module:
    """Return a new model in QARepVGG's training form (Chu et al., 2022, S4).

    A block is k x k + BN, 1 x 1 without a norm, and the identity without a norm where the conv has a shortcut. It
    stands in place of each conv that `csla.hyper_search_model` would replace. The norm of the model that follows is the
    paper's norm after the sum. `where` chooses convolutions as there. `csla.merge` gives the deployed form. Its weight
    decay is the usual one: RepVGG's custom L2 is not used, as in the paper. Random numbers and names are as in
    `csla.hyper_search_model`. `model` itself is not changed.

    `csla.hyper_search_model(model, branches="qarepvgg")` is another thing: branches of fixed values without norms
    inside, which a Grad Mult can stand for.

    Raises ValueError if there is no such convolution, or if the model holds multi-branch blocks already.
    """

    def blocks(model: nn.Module) -> Iterator[tuple[Site, QuantizableBranches]]:
        for site in conv_sites(model, where):
            yield site, QuantizableBranches(site.conv, site.norm)

    return with_blocks(model, blocks)
