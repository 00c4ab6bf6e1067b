"""Baselines that re-parameterize the structure instead of the optimizer: a norm in every branch, merged after training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.algebra import (
    CentredConv2d,
    MultiBranch,
    add_centred,
    fold,
    has_shortcut,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.sites import conv_sites, first_few, replace, unwrap
from gradrep_kernels.ops.reference.multiply import diagonal_taps

__all__ = ["NormedBranches", "acb_model", "repvgg_model"]


class NormedBranches(MultiBranch):
    """norm(conv(x)) + Σ norm_b(conv_b(x)) [+ norm_identity(x)], each branch with a BatchNorm2d of its own, in the place of conv and norm.

    Args:
        conv, norm: the plain pair; conv's weight and bias, and the norm, become the first branch's.
        smaller:    kernel sizes of the other branches, centred on conv's; drawn as nn.Conv2d draws them.
        identity:   whether there is a branch of a BatchNorm2d alone.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, smaller: list[tuple[int, int]], identity: bool):
        super().__init__()
        self.convs = nn.ModuleList(
            [plain_conv(conv, conv.weight, conv.bias), *(CentredConv2d(conv, size) for size in smaller)]
        )
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in smaller)])
        self.norm_identity = copy.deepcopy(norm) if identity else None
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms))
        return y if self.norm_identity is None else y + self.norm_identity(x)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        first = self.convs[0]
        kernel, bias = fold(first.weight, first.bias, self.norms[0])
        for conv, norm in zip(self.convs[1:], self.norms[1:]):
            small, shift = fold(conv.weight, conv.bias, norm)
            add_centred(kernel, small)
            bias += shift
        if self.norm_identity is not None:
            # BN(x) is the 1x1 kernel diag(1) and then the norm.
            ones = torch.zeros_like(kernel)
            ones[diagonal_taps(kernel.shape, kernel.device)] = 1
            diagonal, shift = fold(ones, None, self.norm_identity)
            kernel += diagonal
            bias += shift
        weight = rounded(kernel, first.weight)
        return plain_conv(first, weight, nn.Parameter(bias.to(weight.dtype), weight.requires_grad))


def repvgg_model(model: nn.Module) -> nn.Module:
    """A new model in RepVGG's training form (Ding et al., 2021): k x k + BN, 1 x 1 + BN, and BN where the conv has a shortcut,
    in place of each conv that csla would replace and its BatchNorm2d. `csla.merge` gives the deployed form.

    Random numbers, names and what is replaced: as `csla.hyper_search_model`. `model` itself is not changed.
    Raises ValueError where such a conv is followed by another norm than a BatchNorm2d with running statistics.
    """
    return _with_branches(model, lambda kh, kw: [(1, 1)], identity=True)


def acb_model(model: nn.Module) -> nn.Module:
    """A new model in ACNet's training form (Ding et al., 2019): k x k + BN, 1 x k + BN and k x 1 + BN. Otherwise as `repvgg_model`."""
    return _with_branches(model, lambda kh, kw: [(1, kw), (kh, 1)], identity=False)


def _with_branches(model: nn.Module, smaller: Callable[[int, int], list[tuple[int, int]]], identity: bool) -> nn.Module:
    model = copy.deepcopy(unwrap(model))
    sites = conv_sites(model)
    problems = [
        f"{site.name}: {type(site.norm).__name__}"
        for site in sites
        if not isinstance(site.norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or site.norm.running_mean is None
    ]
    if problems:
        raise ValueError(
            f"the branches need a BatchNorm2d with running statistics after each conv, got {first_few(problems)}"
        )
    new: dict[nn.Module, nn.Module] = {}
    for site in sites:
        new[site.conv] = NormedBranches(
            site.conv, site.norm, smaller(*site.conv.kernel_size), identity and has_shortcut(site.conv)
        )
        new[site.norm] = nn.Identity().train(site.norm.training)
    replace(model, new)
    return model
