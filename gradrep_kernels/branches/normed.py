"""Blocks with a norm in every branch (RepVGG, ACB, RepGhost, MobileOne, ...), the baselines of the papers.

They re-parameterize the structure instead of the optimizer, and are merged after training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.algebra import (
    CentredConv2d,
    MultiBranch,
    add_centred,
    add_diagonal,
    fold,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.pairs import check_pairs
from gradrep_kernels.branches.presets import Branches, Kernel, laid_out_sites
from gradrep_kernels.branches.sites import Site, Where
from gradrep_kernels.messages import first_few

__all__ = ["NormedBranches", "acb_model", "check_norms", "normed_model", "repghost_model", "repvgg_model"]


class NormedBranches(MultiBranch):
    """A block of branches with a BatchNorm2d each, which stands for conv and norm.

    norm(conv(x)) + Σ norm_b(conv_b(x)) [+ norm_identity(x)]

    Args:
        conv, norm: the plain pair. The first branch takes over the weight and bias of conv, and the norm.
        others:     kernels of the other branches, centred on conv's and drawn as nn.Conv2d draws them.
        identity:   whether there is a branch of a BatchNorm2d alone.
    """

    holds_norm = True

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, others: Sequence[Kernel], identity: bool):
        super().__init__()
        first = plain_conv(conv, conv.weight, conv.bias)
        self.convs = nn.ModuleList([first, *(CentredConv2d(conv, other.size, other.dilation) for other in others)])
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in others)])
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
            add_centred(kernel, small, conv.dilation[0] // first.dilation[0])
            bias += shift
        if self.norm_identity is not None:
            # The identity is the kernel diag(1), into which its norm is folded.
            identity = torch.zeros_like(kernel)
            add_diagonal(identity, 1.0)
            diagonal, shift = fold(identity, None, self.norm_identity)
            kernel += diagonal
            bias += shift
        weight = rounded(kernel, first.weight)
        return plain_conv(first, weight, nn.Parameter(bias.to(weight.dtype), weight.requires_grad))


def check_norms(sites: Iterable[Site]) -> None:
    """Raise ValueError where a convolution is followed by another norm than a BatchNorm2d with running statistics."""
    problems = [
        f"{site.name}: {type(site.norm).__name__}"
        for site in sites
        if type(site.norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or site.norm.running_mean is None
    ]
    if problems:
        raise ValueError(
            f"the branches need a BatchNorm2d with running statistics after each conv, got {first_few(problems)}"
        )


def normed_model(model: nn.Module, *, branches: Branches = "repvgg", where: Where | None = None) -> nn.Module:
    """Return a new model of blocks with a BatchNorm2d in every branch.

    `branches` and `where` say which, as in `csla.hyper_search_model`. A block stands in place of a conv and of its
    BatchNorm2d. An identity is a BN alone. `csla.merge` gives the deployed form. Random numbers and names are as in
    `csla.hyper_search_model`. `model` itself is not changed.

    Raises ValueError if such a conv is followed by another norm than a BatchNorm2d with running statistics, if that
    norm is not the only consumer of its output, or for branches of a fixed value, which have no norm.
    """

    def blocks(model: nn.Module) -> Iterator[tuple[Site, NormedBranches]]:
        laid_out = laid_out_sites(model, branches, where)
        check_norms([site for site, _ in laid_out])
        for site, layout in laid_out:
            if layout.has_fixed:
                raise ValueError(f"branches of {site.name}: those of a fixed value have no form with a norm in each")
        check_pairs(model, [site for site, _ in laid_out], None, "a block that takes its norm along")
        for site, layout in laid_out:
            others = [*([] if layout.one_by_one is None else [layout.one_by_one]), *layout.others]
            yield site, NormedBranches(site.conv, site.norm, others, layout.identity)

    return with_blocks(model, blocks)


def repvgg_model(model: nn.Module) -> nn.Module:
    """Return a new model in RepVGG's training form (Ding et al., 2021).

    A block is k x k + BN, 1 x 1 + BN, and a BN alone. It stands in place of each conv that `csla.hyper_search_model`
    would replace, and of its BatchNorm2d. The BN alone is there where the conv has a shortcut. `csla.merge` gives the
    deployed form. Random numbers and names are as in `csla.hyper_search_model`. `model` itself is not changed.

    Raises ValueError if such a conv is followed by another norm than a BatchNorm2d with running statistics, or if that
    norm is not the only consumer of its output.
    """
    return normed_model(model, branches="repvgg")


def acb_model(model: nn.Module) -> nn.Module:
    """Return a new model in ACNet's training form (Ding et al., 2019).

    A block is k x k + BN, 1 x k + BN and k x 1 + BN. Otherwise as `repvgg_model`.
    """
    return normed_model(model, branches="acb")


def repghost_model(model: nn.Module, *, where: Where | None = None) -> nn.Module:
    """Return a new model in RepGhost's training form (Chen et al., 2022).

    A block is k x k + BN and a BN alone, the fusion layer. `where` chooses convolutions as in
    `csla.hyper_search_model`. Otherwise as `repvgg_model`. Draws no random numbers.
    """
    return normed_model(model, branches="repghost", where=where)
